"""The eBPF fast path of the overlay: programs, maps, and a probe of the running kernel.

`overlay.bpf.c` has the programs, `overlay.h` and `map_layout.py` the maps' keys and values,
`probe.py` the probe. The driver attaches the programs to devices: `driver/kernel/fastpath/`.
"""

from dataplane.ebpf.libbpf import detach_link, link_device, pin, pinned, update_link
from dataplane.ebpf.map_layout import NOWHERE, Count, FastPathSettings, FdbEntry, PeerRoute, Port
from dataplane.ebpf.maps import Maps, Programs
from dataplane.ebpf.probe import STAGES, KernelSupport, probe_kernel

__all__ = [
    "NOWHERE",
    "STAGES",
    "Count",
    "FastPathSettings",
    "FdbEntry",
    "KernelSupport",
    "Maps",
    "PeerRoute",
    "Port",
    "Programs",
    "detach_link",
    "link_device",
    "pin",
    "pinned",
    "probe_kernel",
    "update_link",
]
