"""Netlink sockets and messages, packed and parsed by hand: linux/netlink.h.

Some messages are exchanged once per connection, peer or address, and pyroute2 takes a fifth of a
millisecond and more to encode or decode one. Others are read in namespaces in which a container may
have written anything, so nothing here trusts what it parses.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
CREATE, EXCLUSIVE, REPLACE, APPEND = 0x400, 0x200, 0x100, 0x800
INTERRUPTED: Final = 0x10
"""NLM_F_DUMP_INTR: what is listed has changed meanwhile."""
ERROR, DONE = 2, 3
NESTED: Final = 1 << 15
HEADER: Final = struct.Struct("=IHHII")
_LARGEST: Final = 1 << 17
"""Bytes of a datagram from the kernel, at most."""
_DUMP_TRIES: Final = 20
_NUMBERS: Final = (1 << 32) - 1
"""Mask of a sequence number."""
_TYPE_MASK: Final = 0x3FFF
_ATTRIBUTE: Final = struct.Struct("=HH")


def attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)


def nest(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | NESTED, b"".join(attributes))


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes of a message, or of a nest, from an offset on.

    Raises:
        ValueError: an attribute runs past the end.
    """
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


def error_number(body: bytes) -> int:
    """The errno in the body of an error message; 0: it is an acknowledgement."""
    return -int(struct.unpack_from("=i", body)[0])


def check(body: bytes) -> None:
    """Raise the OSError that an error message reports, unless it is an acknowledgement."""
    number = error_number(body)
    if number:
        raise OSError(number, os.strerror(number))


class Netlink:
    """A netlink socket, for one thread at a time. A request that the kernel refuses raises OSError.

    The socket becomes this object's. Its timeout bounds each wait. It is connected to the kernel,
    so nobody else can send to it: a container with CAP_NET_ADMIN could, in its own namespace.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._socket = channel
        channel.connect((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def send(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request."""
        self._socket.send(self._message(kind, flags, body))

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence = (self._sequence + 1) & _NUMBERS
        return message(kind, flags, self._sequence, body)

    def receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and body of the next messages that answer the last request."""
        for kind, number, flags, body in messages(self._socket.recv(_LARGEST)):
            if number == self._sequence:
                yield kind, flags, body

    def _replies(self) -> Iterator[tuple[int, int, bytes]]:
        """All messages of an answer; without end."""
        while True:
            yield from self.receive()

    def change(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request that is answered by an acknowledgement only."""
        self.send(kind, flags | ACK, body)
        for found, _, answer in self._replies():
            if found == ERROR:
                check(answer)
                return

    def get(self, kind: int, body: bytes) -> bytes:
        """The one message that answers a request."""
        self.send(kind, 0, body)
        for found, _, answer in self._replies():
            if found != ERROR:
                return answer
            check(answer)
        raise AssertionError("unreachable: the messages have no end")

    def get_each(self, kind: int, requests: Sequence[bytes]) -> list[bytes | None]:
        """The one message that answers each request; None: the kernel refused it.

        All requests are sent at once, so the answers have to fit into the socket's buffer.
        """
        before = self._sequence
        self._socket.send(b"".join(self._message(kind, 0, body) for body in requests))
        found: list[bytes | None] = [None] * len(requests)
        missing = len(requests)
        while missing:
            for got, number, _, body in messages(self._socket.recv(_LARGEST)):
                at = (number - before - 1) & _NUMBERS
                if at < len(requests):
                    missing -= 1
                    found[at] = None if got == ERROR else body
        return found

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All messages of a consistent listing."""
        for _ in range(_DUMP_TRIES):
            self.send(kind, DUMP, body)
            listed: list[bytes] = []
            whole = True
            for found, flags, answer in self._replies():
                whole &= not flags & INTERRUPTED
                if found == DONE:
                    break
                if found == ERROR:
                    check(answer)
                    break
                listed.append(answer)
            if whole:
                return listed
        raise OSError(errno.EAGAIN, "the list changes faster than it can be read")
