"""Netlink sockets in containers' namespaces. A socket belongs to the namespace it was made in."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
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
    (made,) = netlink_in_each((namespace,), protocol, what)
    if isinstance(made, KernelRefused):
        raise made
    return made


def netlink_in_each(
    namespaces: Sequence[int], protocol: int, what: str
) -> list[socket.socket | KernelRefused]:
    """The same in several namespaces: for each a socket, or why there is none.

    One thread makes all of them. On a busy host each thread waits for a processor.
    """
    return in_thread(lambda: [_enter(namespace, protocol, what) for namespace in namespaces])


def _enter(namespace: int, protocol: int, what: str) -> socket.socket | KernelRefused:
    """Enter a namespace, and make a socket in it. The thread stays there."""
    if _libc.setns(namespace, _CLONE_NEWNET) != 0:
        return KernelRefused(
            "cannot enter a container's network namespace",
            cause=os.strerror(ctypes.get_errno()),
        )
    try:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    except OSError as error:
        return KernelRefused(f"cannot open a {what} socket", cause=error.strerror or str(error))
    made.settimeout(_TIMEOUT)
    return made
