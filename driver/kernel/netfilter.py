"""Netlink with the kernel's netfilter (nfnetlink), in namespaces that a container may control.

What is read isn't trusted, and its amount is limited. All functions work in the calling thread's
network namespace. Constants: linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from dataplane.nlmsg import DONE, DUMP, ERROR, INTERRUPTED, Netlink, check, messages

IPV4: Final = 2
FAMILY: Final = struct.Struct("!BBH")

_NETLINK_NETFILTER: Final = 12
_SO_SNDBUFFORCE: Final = 32
_LARGEST: Final = 1 << 17


class InterruptedDumpError(Exception):
    """The listed objects changed meanwhile; the listing may be incomplete."""


def open_socket(room: int = 0) -> socket.socket:
    """A non-blocking socket: the kernel answers during the send. `room`: bytes to be sent at
    once."""
    channel = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    )
    channel.setblocking(False)
    if room:
        channel.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * room + 65536)
    return channel


def answers(channel: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """All received messages: type, sequence number and body."""
    while True:
        try:
            data = channel.recv(_LARGEST)
        except BlockingIOError:
            return
        for kind, sequence, _, body in messages(data):
            yield kind, sequence, body


def dump(kind: int, family: int, most: int, *parts: bytes) -> Iterator[tuple[int, bytes]]:
    """Family and attributes of each object that the kernel lists, up to `most` of them.

    Raises:
        InterruptedDumpError: the objects changed meanwhile.
        OSError: the kernel refused.
        OverflowError: there are more objects.
    """
    with contextlib.closing(Netlink(open_socket())) as netlink:
        netlink.send(kind, DUMP, FAMILY.pack(family, 0, 0) + b"".join(parts))
        count = 0
        while True:
            # The first part has arrived when the send returns, each other when its predecessor is
            # read.
            for got, flags, body in netlink.receive():
                if flags & INTERRUPTED:
                    raise InterruptedDumpError
                if got == DONE:
                    return
                if got == ERROR:
                    check(body)
                count += 1
                if count > most:
                    raise OverflowError
                yield body[0], body[FAMILY.size :]


def send_each(kind: int, family: int, requests: Iterable[bytes]) -> int:
    """Send requests of one kind, given by their attributes; returns how many were carried out.

    The objects of the others don't exist.

    Raises:
        OSError: the kernel refused for another reason.
    """
    done = 0
    with contextlib.closing(Netlink(open_socket())) as netlink:
        for parts in requests:
            with contextlib.suppress(FileNotFoundError):
                netlink.change(kind, 0, FAMILY.pack(family, 0, 0) + parts)
                done += 1
    return done


def one(kind: int, family: int, *parts: bytes) -> bytes:
    """The attributes of one object.

    Raises:
        OSError: it doesn't exist, or the kernel refused for another reason.
    """
    with contextlib.closing(Netlink(open_socket())) as netlink:
        return netlink.get(kind, FAMILY.pack(family, 0, 0) + b"".join(parts))[FAMILY.size :]


def exists(kind: int, family: int, *parts: bytes) -> bool:
    """Whether an object exists.

    Raises:
        OSError: the kernel refused for another reason.
    """
    return send_each(kind, family, [b"".join(parts)]) == 1
