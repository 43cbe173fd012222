"""Netlink sockets in containers' namespaces. A socket belongs to the namespace it was made in."""

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
    """A netlink socket in the namespace of a descriptor, which stays the caller's.

    Args:
        namespace: descriptor of the namespace.
        protocol: NETLINK_… of linux/netlink.h.
        what: the socket's purpose, for errors.

    Raises:
        KernelRefused: the namespace can't be entered, or has no such socket.
    """

    def inside() -> socket.socket:
        if _libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise KernelRefused(
                "cannot enter a container's network namespace",
                cause=os.strerror(ctypes.get_errno()),
            )
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)

    try:
        made = in_thread(inside)
    except OSError as error:
        raise KernelRefused(
            f"cannot open a {what} socket", cause=error.strerror or str(error)
        ) from error
    made.settimeout(_TIMEOUT)
    return made
