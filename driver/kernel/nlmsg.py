"""Netlink messages and attributes, packed and parsed by hand: linux/netlink.h.

Some are exchanged once per peer or address, and pyroute2 takes a fifth of a millisecond and more to
encode or decode a message. Others are read in namespaces in which a container may have written
anything, so nothing here trusts what it parses.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final

REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
CREATE, EXCLUSIVE, REPLACE, APPEND = 0x400, 0x200, 0x100, 0x800
INTERRUPTED: Final = 0x10
"""NLM_F_DUMP_INTR: what is listed has changed meanwhile."""
ERROR, DONE = 2, 3
NESTED: Final = 1 << 15
HEADER: Final = struct.Struct("=IHHII")
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
