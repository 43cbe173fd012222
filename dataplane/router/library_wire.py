"""The messages of `dataplane/library/protocol.h`, between a process's library and the router.

The bytes are those of the header; a test compares both. The size and kind of what arrives are
checked here; what the fields mean is checked where they are used.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Final, NamedTuple

import msgspec

from dataplane.errors import WrongMessage
from dataplane.router.codec import U32, U64, Codec, WireField

PROTOCOL_VERSION: Final = 2

IPAddress = IPv4Address | IPv6Address

KEPT: Final = 1 << 14
"""Addresses that are cached."""
# Plain numbers: comparing with the socket module's is slow.
_AF_INET: Final = int(socket.AF_INET)
_AF_INET6: Final = int(socket.AF_INET6)


class MessageKind(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    REQUEST = 3
    GRANT = 4
    REFUSE = 5
    BELL = 6
    FETCH = 7
    RING = 8
    RELEASE = 9
    NOTE = 10
    HEAR = 11


class _IPv4(IPv4Address):
    """An address with a cached hash: the router hashes thousands per second, and the standard class
    makes a text of itself each time."""

    __slots__ = ("_hash",)

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class _IPv6(IPv6Address):
    """As `_IPv4`."""

    __slots__ = ("_hash",)

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class Address(NamedTuple):
    """An IP address and a TCP port. An IPv4-mapped IPv6 address (::ffff:0:0/96) is IPv4 here."""

    ip: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"


_ADDRESS: Final = struct.Struct("=16sHH4x")

codec: Final = Codec()


@lru_cache(KEPT)
def ip_of(family: int, raw: bytes) -> IPAddress:
    """The address in the sixteen bytes in which the kernel and messages have it.

    It is the same object for the same bytes, as long as it is cached.

    Raises:
        WrongMessage: an unknown family.
    """
    if family == _AF_INET:
        return _IPv4(raw[:4])
    if family != _AF_INET6:
        raise WrongMessage(f"address family {family}", cause="AF_INET and AF_INET6 are known")
    ip = _IPv6(raw)
    mapped = ip.ipv4_mapped
    return ip if mapped is None else _IPv4(mapped.packed)


def _pack_address(address: Address) -> bytes:
    family = _AF_INET if address.ip.version == 4 else _AF_INET6
    return _ADDRESS.pack(address.ip.packed, family, address.port)


def _unpack_address(data: bytes) -> Address:
    raw, family, port = _ADDRESS.unpack(data)
    return Address(ip_of(family, raw), port)


def _build_id(raw: bytes) -> str:
    """A build ID. It goes into answers and logs, so it has nothing but hexadecimal digits."""
    text = raw.rstrip(b"\0")
    if not all(character in b"0123456789abcdef" for character in text):
        raise WrongMessage("HELLO with a build id that isn't hexadecimal")
    return text.decode("ascii")


_Address = Annotated[Address, WireField(f"{_ADDRESS.size}s", _pack_address, _unpack_address)]
_Build = Annotated[str, WireField("4x32s", str.encode, _build_id)]
_Bool = Annotated[bool, WireField("I", int, bool)]
_Last = Annotated[int, WireField("I4x")]
"""The last number, before the padding of the C struct."""
_AfterToken = Annotated[int, WireField("8xI4x")]
"""The last number of a `struct bell` without a token."""


@codec.message(MessageKind.HELLO)
class Hello(msgspec.Struct, frozen=True, gc=False):
    """The first message of a process. `build` is its library's build ID, for `freeflow doctor`."""

    version: U32
    layout_version: U32
    build: _Build = ""


@codec.message(MessageKind.WELCOME)
class Welcome(msgspec.Struct, frozen=True, gc=False):
    """The router's answer: whether and when to send requests. Sent again when that changes."""

    version: U32
    layout_version: U32
    enabled: _Bool
    operations: U32
    age: U32
    bytes: U32
    bulk: U32
    spin: U32
    ring_limit: U32
    verbs: U32 = 0
    """Version of the messages of verbs."""


@codec.message(MessageKind.REQUEST)
class Request(msgspec.Struct, frozen=True, gc=False):
    """A process requests shared memory for a connection.

    `connection` is the process's own number of it, which the answer repeats.
    """

    connection: U32
    cookie: U64
    local: _Address
    remote: _Address


@codec.message(MessageKind.GRANT)
class Grant(msgspec.Struct, frozen=True, gc=False):
    """A slot of an arena.

    The arena's memfd comes with it; with the first grant of an arena to a process also the hearing
    end of bell 0.
    """

    connection: U32
    cookie: U64
    arena: U64
    incarnation: U64
    token: U64
    side: U32
    slot: U32


@codec.message(MessageKind.REFUSE)
class Refuse(msgspec.Struct, frozen=True, gc=False):
    """The connection stays on TCP. `passes`: the reason may be gone later."""

    connection: U32
    cookie: U64
    reason: U32
    passes: _Bool = False


@codec.message(MessageKind.BELL)
class Bell(msgspec.Struct, frozen=True, gc=False):
    """The process wants a bell of its own side."""

    index: U32
    arena: U64
    token: U64
    side: _Last


@codec.message(MessageKind.FETCH)
class Fetch(msgspec.Struct, frozen=True, gc=False):
    """The process has to ring a bell that it does not have: the router rings it."""

    index: U32
    arena: U64
    token: U64
    side: _Last


@codec.message(MessageKind.HEAR)
class Hear(msgspec.Struct, frozen=True, gc=False):
    """The answer to Bell, with the bell's hearing end, or without if none can be had."""

    index: U32
    arena: U64
    side: _AfterToken


@codec.message(MessageKind.RING)
class Ring(msgspec.Struct, frozen=True, gc=False):
    """The answer to Fetch, with the bell's ringing end, or without if the bell is unknown.

    For bell 0 the router sends it unasked.
    """

    index: U32
    arena: U64
    side: _AfterToken


@codec.message(MessageKind.RELEASE)
class Release(msgspec.Struct, frozen=True, gc=False):
    """The process's side is done with a slot."""

    slot: U32
    arena: U64
    incarnation: U64
    token: U64


@codec.message(MessageKind.NOTE)
class Note(msgspec.Struct, frozen=True, gc=False):
    """Why a connection stays on TCP."""

    reason: U32
    cookie: U64


FromProcess = Hello | Request | Bell | Fetch | Release | Note
Answer = Welcome | Grant | Refuse | Hear | Ring
Message = FromProcess | Answer

pack: Final[Callable[[Message], bytes]] = codec.pack
"""A message as bytes."""

unpack: Final[Callable[[bytes], Message]] = codec.unpack
"""The message in a packet.

Raises:
    WrongMessage: the packet isn't exactly one known message.
"""
