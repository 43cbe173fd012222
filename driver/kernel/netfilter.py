"""Netlink with the kernel's netfilter (nfnetlink), encoded and read here: for namespaces in which a container may have anything.

Nothing that is read is trusted to be well-formed, and no more is read than is asked for. All functions work in the calling
thread's network namespace. Constants: linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from driver.kernel.nlmsg import (
    ACK,
    DONE,
    DUMP,
    ERROR,
    INTERRUPTED,
    check,
    error_number,
    message,
    messages,
)

IPV4: Final = 2
FAMILY: Final = struct.Struct("!BBH")

_NETLINK_NETFILTER: Final = 12
_SO_SNDBUFFORCE: Final = 32
_LARGEST: Final = 1 << 17


class InterruptedDumpError(Exception):
    """What was listed has changed meanwhile; the listing may lack something."""


def open_socket(room: int = 0) -> socket.socket:
    """A socket that never waits: the kernel answers in the course of sending and reading. `room`: bytes to be sent at once."""
    channel = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    )
    channel.setblocking(False)
    if room:
        channel.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * room + 65536)
    return channel


def answers(channel: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """All messages that are there: type, sequence number and body."""
    while True:
        try:
            data = channel.recv(_LARGEST)
        except BlockingIOError:
            return
        for kind, sequence, _, body in messages(data):
            yield kind, sequence, body


def dump(kind: int, family: int, most: int, *parts: bytes) -> Iterator[tuple[int, bytes]]:
    """Family and attributes of each object that the kernel lists, of `most` at most; then OverflowError.

    Raises:
        InterruptedDumpError
        OSError: the kernel can't be asked.
        OverflowError: there are more.
    """
    with open_socket() as channel:
        request = FAMILY.pack(family, 0, 0) + b"".join(parts)
        channel.send(message(kind, DUMP, 1, request))
        count = 0
        while True:
            # The first part is there when the request has been sent, each other when the one before was read.
            for got, _, flags, body in messages(channel.recv(_LARGEST)):
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
    """Send requests of one kind, each its attributes; how many were done. Of the others there is no such thing.

    Raises:
        OSError: the kernel can't be asked, or has another reason to refuse.
    """
    done = 0
    with open_socket() as channel:
        for number, parts in enumerate(requests):
            channel.send(message(kind, ACK, number & 0xFFFF, FAMILY.pack(family, 0, 0) + parts))
            for got, _, body in answers(channel):
                if got != ERROR:
                    continue
                refused = error_number(body)
                if refused != errno.ENOENT:
                    check(body)
                done += not refused
    return done


def exists(kind: int, family: int, *parts: bytes) -> bool:
    """Whether the kernel has the one object that is asked for.

    Raises:
        OSError: the kernel can't be asked, or has another reason to refuse than that there is no such thing.
    """
    return send_each(kind, family, [b"".join(parts)]) == 1
