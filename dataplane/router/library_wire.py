"""The messages of `dataplane/library/protocol.h`, byte for byte; a test compares both.

Whatever arrives is checked here for size and kind; what the fields mean is checked where they are used.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

import msgspec

from dataplane.errors import WrongMessage

PROTOCOL_VERSION: Final = 2
MAX_MESSAGE: Final = 64
"""Bytes of the longest message."""

IPAddress = IPv4Address | IPv6Address

KEPT: Final = 1 << 14
"""So many addresses are made once."""
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
    """Compared and hashed by the thousand per second: the standard one makes a text of itself each time."""

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
    """One end of a connection. IPv4 in IPv6's clothes (::ffff:0:0/96) is IPv4 here."""

    ip: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if self.ip.version == 6 else f"{self.ip}:{self.port}"


_HEAD: Final = struct.Struct("=HH")
_HELLO: Final = struct.Struct("=HHIII32s")
_WELCOME: Final = struct.Struct("=HHIIIIIIIIII")
_ADDRESS: Final = struct.Struct("=16sHHI")
_REQUEST: Final = struct.Struct("=HHIQ24s24s")
_GRANT: Final = struct.Struct("=HHIQQQQII")
_REFUSE: Final = struct.Struct("=HHIQII")
_BELL: Final = struct.Struct("=HHIQQII")
_RELEASE: Final = struct.Struct("=HHIQQQ")
_NOTE: Final = struct.Struct("=HHIQ")

SIZES: Final = {
    MessageKind.HELLO: _HELLO.size,
    MessageKind.WELCOME: _WELCOME.size,
    MessageKind.REQUEST: _REQUEST.size,
    MessageKind.GRANT: _GRANT.size,
    MessageKind.REFUSE: _REFUSE.size,
    MessageKind.BELL: _BELL.size,
    MessageKind.FETCH: _BELL.size,
    MessageKind.RING: _BELL.size,
    MessageKind.RELEASE: _RELEASE.size,
    MessageKind.NOTE: _NOTE.size,
    MessageKind.HEAR: _BELL.size,
}


class Hello(msgspec.Struct, frozen=True, gc=False):
    """The first message of a process. `build` names its library, for `freeflow doctor`."""

    version: int
    layout_version: int
    build: str = ""


class Welcome(msgspec.Struct, frozen=True, gc=False):
    """The router's answer: whether to ask at all, and when. Sent again when it changes."""

    version: int
    layout_version: int
    enabled: bool
    operations: int
    age: int
    bytes: int
    bulk: int
    spin: int
    ring_limit: int


class Request(msgspec.Struct, frozen=True, gc=False):
    """A process wants shared memory for a connection. `connection` is its own number, which the answer repeats."""

    connection: int
    cookie: int
    local: Address
    remote: Address


class Grant(msgspec.Struct, frozen=True, gc=False):
    """A slot of an arena. The arena's memfd comes with it; with the first to a process also the end that hears bell 0."""

    connection: int
    cookie: int
    arena: int
    incarnation: int
    token: int
    side: int
    slot: int


class Refuse(msgspec.Struct, frozen=True, gc=False):
    """The connection stays on TCP."""

    connection: int
    cookie: int
    reason: int


class Bell(msgspec.Struct, frozen=True, gc=False):
    """The speaker wants a bell of its own side."""

    index: int
    arena: int
    token: int
    side: int


class Fetch(msgspec.Struct, frozen=True, gc=False):
    """The speaker has to ring a bell of the other side, and hasn't got it: the router is to ring it."""

    index: int
    arena: int
    token: int
    side: int


class Hear(msgspec.Struct, frozen=True, gc=False):
    """The answer to Bell, with the bell's hearing end, or without if there is none to be had."""

    index: int
    arena: int
    side: int


class Ring(msgspec.Struct, frozen=True, gc=False):
    """The answer to Fetch, with the bell's ringing end, or without if it isn't known. For bell 0 it comes unasked."""

    index: int
    arena: int
    side: int


class Release(msgspec.Struct, frozen=True, gc=False):
    """The speaker's side is done with a slot."""

    slot: int
    arena: int
    incarnation: int
    token: int


class Note(msgspec.Struct, frozen=True, gc=False):
    """Why a connection stays on TCP."""

    reason: int
    cookie: int


FromProcess = Hello | Request | Bell | Fetch | Release | Note
Answer = Welcome | Grant | Refuse | Hear | Ring
Message = FromProcess | Answer


def _pack_address(address: Address) -> bytes:
    family = _AF_INET if address.ip.version == 4 else _AF_INET6
    return _ADDRESS.pack(address.ip.packed, family, address.port, 0)


@lru_cache(KEPT)
def ip_of(family: int, raw: bytes) -> IPAddress:
    """The address in the sixteen bytes in which the kernel and messages have it; the same object for the same bytes.

    Raises:
        WrongMessage: an unknown family.
    """
    if family == _AF_INET:
        return _IPv4(raw[:4])
    if family != _AF_INET6:
        raise WrongMessage(f"address family {family}; AF_INET and AF_INET6 are known")
    ip = _IPv6(raw)
    mapped = ip.ipv4_mapped
    return ip if mapped is None else _IPv4(mapped.packed)


def _address(data: bytes) -> Address:
    raw, family, port, _ = _ADDRESS.unpack(data)
    return Address(ip_of(family, raw), port)


def pack(message: Message) -> bytes:
    """A message as bytes."""
    match message:
        case Hello():
            build = message.build.encode("ascii")
            return _HELLO.pack(
                MessageKind.HELLO, _HELLO.size, message.version, message.layout_version, 0, build
            )
        case Welcome():
            return _WELCOME.pack(
                MessageKind.WELCOME,
                _WELCOME.size,
                message.version,
                message.layout_version,
                message.enabled,
                message.operations,
                message.age,
                message.bytes,
                message.bulk,
                message.spin,
                message.ring_limit,
                0,
            )
        case Request():
            return _REQUEST.pack(
                MessageKind.REQUEST,
                _REQUEST.size,
                message.connection,
                message.cookie,
                _pack_address(message.local),
                _pack_address(message.remote),
            )
        case Grant():
            return _GRANT.pack(
                MessageKind.GRANT,
                _GRANT.size,
                message.connection,
                message.cookie,
                message.arena,
                message.incarnation,
                message.token,
                message.side,
                message.slot,
            )
        case Refuse():
            return _REFUSE.pack(
                MessageKind.REFUSE,
                _REFUSE.size,
                message.connection,
                message.cookie,
                message.reason,
                0,
            )
        case Bell() | Fetch():
            kind = MessageKind.BELL if isinstance(message, Bell) else MessageKind.FETCH
            return _BELL.pack(
                kind, _BELL.size, message.index, message.arena, message.token, message.side, 0
            )
        case Hear() | Ring():
            kind = MessageKind.HEAR if isinstance(message, Hear) else MessageKind.RING
            return _BELL.pack(kind, _BELL.size, message.index, message.arena, 0, message.side, 0)
        case Release():
            return _RELEASE.pack(
                MessageKind.RELEASE,
                _RELEASE.size,
                message.slot,
                message.arena,
                message.incarnation,
                message.token,
            )
        case Note():
            return _NOTE.pack(MessageKind.NOTE, _NOTE.size, message.reason, message.cookie)


def unpack(data: bytes) -> Message:
    """The message in a packet.

    Raises:
        WrongMessage: the packet isn't exactly one known message.
    """
    if len(data) < _HEAD.size:
        raise WrongMessage(f"packet of {len(data)} bytes; a message has at least {_HEAD.size}")
    kind, size = _HEAD.unpack_from(data)
    expected = SIZES.get(kind)
    if expected is None:
        raise WrongMessage(f"message of unknown kind {kind}")
    if size != len(data) or size != expected:
        raise WrongMessage(
            f"{MessageKind(kind).name} of {len(data)} bytes that says {size}; it has {expected}"
        )
    return _unpack(kind, data)


def _unpack(kind: int, data: bytes) -> Message:
    match kind:
        case MessageKind.REQUEST:
            _, _, connection, cookie, local, remote = _REQUEST.unpack(data)
            return Request(connection, cookie, _address(local), _address(remote))
        case MessageKind.RELEASE:
            return Release(*_RELEASE.unpack(data)[2:])
        case MessageKind.NOTE:
            return Note(*_NOTE.unpack(data)[2:])
        case MessageKind.BELL:
            return Bell(*_BELL.unpack(data)[2:6])
        case MessageKind.FETCH:
            return Fetch(*_BELL.unpack(data)[2:6])
        case MessageKind.HELLO:
            _, _, version, layout, _, build = _HELLO.unpack(data)
            return Hello(version, layout, _build(build))
        case MessageKind.WELCOME:
            _, _, version, layout, enabled, *rule, _ = _WELCOME.unpack(data)
            return Welcome(version, layout, bool(enabled), *rule)
        case MessageKind.GRANT:
            return Grant(*_GRANT.unpack(data)[2:])
        case MessageKind.REFUSE:
            return Refuse(*_REFUSE.unpack(data)[2:5])
        case _:
            _, _, index, arena, _, side, _ = _BELL.unpack(data)
            return (
                Hear(index, arena, side) if kind == MessageKind.HEAR else Ring(index, arena, side)
            )


def _build(raw: bytes) -> str:
    """A build id goes into answers and logs: nothing but hexadecimal digits."""
    text = raw.rstrip(b"\0")
    if not all(character in b"0123456789abcdef" for character in text):
        raise WrongMessage("HELLO with a build id that isn't hexadecimal")
    return text.decode("ascii")
