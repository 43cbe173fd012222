"""Small virtual machines on one wire: kernels of several ages, and RDMA verbs (rdma_rxe).

Nothing of them touches this machine's own kernel or network.

    with guests(2) as (a, b):
        a.rxe_up(), b.rxe_up()
        server = a.start(["rping", "-s", "-a", str(a.address), "-C", "5"])
        b.run(["rping", "-c", "-a", str(a.address), "-C", "5"])
        server.wait()

A guest sees only other guests: its network is a pair of sockets of this process (`switch.py`).
Commands go through a serial port to `agent.py`, its process 1. Each guest has the checkout as /src,
read-only. Push files that are built after the boot. Where the processor cannot virtualise, QEMU
emulates it. Everything is then ten to thirty times slower, so no test asserts a rate.

`python -m testbed.vm shell` and `run` do it from a shell. Read `guest.py` first; `guest_images.py`
makes what guests boot.
"""

from testbed.vm.channel import GuestGoneError, Process
from testbed.vm.guest import Guest, guests
from testbed.vm.guest_images import DEFAULT_KERNEL, KERNELS, KernelAbsentError, missing_tools

__all__ = [
    "DEFAULT_KERNEL",
    "KERNELS",
    "Guest",
    "GuestGoneError",
    "KernelAbsentError",
    "Process",
    "guests",
    "missing_tools",
]
