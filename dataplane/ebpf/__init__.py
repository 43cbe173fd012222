"""The fast path of the overlay's packets through the kernel: programs, maps, and what the running kernel takes of it.

`overlay.bpf.c` is what runs per packet, `overlay.h` and `layout.py` what it shares with us. `probe.py` finds out what the
kernel can do. What attaches the programs to devices is the driver's: `driver/kernel/fastpath/`.
"""

from dataplane.ebpf.layout import NOWHERE, Count, Place, Port, Settings, Way
from dataplane.ebpf.libbpf import detach_link, link_device, pin, pinned, update_link
from dataplane.ebpf.maps import Maps, Programs
from dataplane.ebpf.probe import STAGES, Found, find_out

__all__ = [
    "NOWHERE",
    "STAGES",
    "Count",
    "Found",
    "Maps",
    "Place",
    "Port",
    "Programs",
    "Settings",
    "Way",
    "detach_link",
    "find_out",
    "link_device",
    "pin",
    "pinned",
    "update_link",
]
