"""Small virtual machines on one wire: real kernels of several ages, real RDMA verbs (rdma_rxe), nothing of it on this machine.

    with guests(2) as (a, b):
        a.rxe_up(), b.rxe_up()
        server = a.start(["rping", "-s", "-a", str(a.address), "-C", "5"])
        b.run(["rping", "-c", "-a", str(a.address), "-C", "5"])
        server.wait()

A guest sees only the others: its network is a pair of sockets of this process, `wire.py`. Commands go through a serial port to
`agent.py`, its process 1. The checkout is /src in each, read-only; what is built after the boot is better pushed. Where the
processor can't virtualise, QEMU emulates it: everything is ten to thirty times slower, so no test asserts on a rate.

`python -m testbed.vm shell|run` does it from a shell. Start with `guest.py`; `images.py` makes what is booted.
"""

from testbed.vm.channel import GuestGoneError, Process
from testbed.vm.guest import Guest, guests
from testbed.vm.images import DEFAULT_KERNEL, KERNELS, KernelAbsentError, missing_tools

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
