"""Netlink with the kernel's netfilter (nfnetlink), encoded and read here: for namespaces in which a container may have anything.

Nothing that is read is trusted to be well-formed, and no more is read than is asked for. All functions work in the calling
thread's network namespace. Constants: linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

IPV4: Final = 2
REQUEST, ACK, DUMP, INTERRUPTED = 1, 4, 0x300, 0x10
ERROR, DONE = 2, 3
NESTED: Final = 1 << 15
HEADER: Final = struct.Struct("=IHHII")
FAMILY: Final = struct.Struct("!BBH")

_NETLINK_NETFILTER: Final = 12
_SO_SNDBUFFORCE: Final = 32
_TYPE_MASK: Final = 0x3FFF
_LARGEST: Final = 1 << 17
_ATTRIBUTE: Final = struct.Struct("=HH")


class InterruptedDumpError(Exception):
    """What was listed has changed meanwhile; the listing may lack something."""


def attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message or of a nest.

    Raises:
        ValueError: they don't fit where they stand.
    """
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            raise ValueError("an attribute runs past the end of its message")
        yield kind & _TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags | REQUEST, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, sequence number, flags and body of each message of a datagram."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size:
            return
        yield kind, sequence, flags, data[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


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


def number_of(body: bytes) -> int:
    """The error's number in an error message; 0 if it says that all went well."""
    return -int(struct.unpack_from("=i", body)[0])


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
                    raise OSError(number_of(body), os.strerror(number_of(body)))
                count += 1
                if count > most:
                    raise OverflowError
                yield body[0], body[FAMILY.size :]


def tell(kind: int, family: int, requests: Iterable[bytes]) -> int:
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
                refused = number_of(body)
                if refused not in (0, errno.ENOENT):
                    raise OSError(refused, os.strerror(refused))
                done += not refused
    return done


def ask(kind: int, family: int, *parts: bytes) -> bool:
    """Whether the kernel has the one object that is asked for.

    Raises:
        OSError: the kernel can't be asked, or has another reason to refuse than that there is no such thing.
    """
    return tell(kind, family, [b"".join(parts)]) == 1
