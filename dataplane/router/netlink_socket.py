"""A netlink socket of a container's namespace: it belongs to where it was made, whoever uses it then."""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Final

from dataplane.errors import KernelRefused
from dataplane.threads import in_thread

_CLONE_NEWNET: Final = 0x40000000
_TIMEOUT: Final = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


def netlink_in(namespace: int, protocol: int, what: str) -> socket.socket:
    """A netlink socket of the namespace behind a descriptor, which stays the caller's. `what` it is for is said in errors.

    Raises:
        KernelRefused: the namespace can't be entered, or has no such socket.
    """

    def inside() -> socket.socket:
        if _libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise KernelRefused(
                f"entering a container's network namespace: {os.strerror(ctypes.get_errno())}"
            )
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)

    try:
        made = in_thread(inside)
    except OSError as error:
        raise KernelRefused(f"opening a {what} socket: {error.strerror}") from error
    made.settimeout(_TIMEOUT)
    return made
