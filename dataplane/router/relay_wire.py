"""The messages of `dataplane/relay/protocol.h`, byte for byte; a test compares both.

Several kinds share a shape, here as there. The relay is our own child: what it sends wrong is a bug of ours, and it is ended.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import msgspec

from dataplane.errors import WrongMessage

RELAY_VERSION: Final = 1
RELAY_SOCKET: Final = 3
"""The relay's descriptor."""
MAX_TEXT: Final = 96
MAX_WORDS: Final = 128
"""Bytes of a place or an address."""
MAX_FRAME: Final = 60_000
VERBS: Final = 1
MEMORY: Final = 2
"""Transports."""
WHOLE: Final = 0
BROKEN: Final = 1
"""How a connection ended."""

COUNTERS: Final = (
    "connections",
    "bytes_out",
    "bytes_in",
    "messages_out",
    "messages_in",
    "blocks_out",
    "blocks_in",
    "writes",
    "posts",
    "polls",
    "completions",
    "calls",
    "sleeps",
    "bells",
    "spins",
    "copied",
    "frames_out",
    "frames_in",
    "downs",
    "resumed",
    "broken",
    "corrupt",
    "registered",
    "turns",
)
"""enum relay_counter, in its order."""


class RelayKind(IntEnum):
    """What a message is."""

    OPEN = 1
    OPENED = 2
    LINK = 3
    LINKED = 4
    CONNECT = 5
    CONNECTED = 6
    UNLINK = 7
    ARENA = 8
    BELL = 9
    DISCARD = 10
    SLOT = 11
    PLACED = 12
    PAIR = 13
    PAIRED = 14
    CLOSE = 15
    FINISHED = 16
    LEAVE = 17
    LEFT = 18
    DROP = 19
    DROPPED = 20
    FRAME = 21
    STREAM = 22
    COUNT = 23
    COUNTS = 24
    DOWN = 25
    ENDED = 26


_HEAD: Final = struct.Struct("=HH")
_OPEN: Final = struct.Struct("=HH64sBBHII")
_OPENED: Final = struct.Struct(f"=HHi{MAX_TEXT}sI")
_NUMBER: Final = struct.Struct("=HHII")
_OUTCOME: Final = struct.Struct(f"=HHIi{MAX_TEXT}s")
_OFFER: Final = struct.Struct(f"=HHIi{MAX_TEXT}sHH{MAX_WORDS}s")
_ACCEPT: Final = struct.Struct(f"=HHIIHH{MAX_WORDS}s")
_ARENA: Final = struct.Struct("=HHIQ")
_SLOT: Final = struct.Struct("=HHIIIQQ")
_FRAME: Final = struct.Struct("=HHI")
_COUNTS: Final = struct.Struct(f"=HHI{len(COUNTERS)}Q")

MAX_MESSAGE: Final = _FRAME.size + MAX_FRAME

_NUMBERS: Final = frozenset(
    {
        RelayKind.LINK,
        RelayKind.UNLINK,
        RelayKind.STREAM,
        RelayKind.CLOSE,
        RelayKind.FINISHED,
        RelayKind.LEAVE,
        RelayKind.LEFT,
        RelayKind.DROP,
        RelayKind.DROPPED,
        RelayKind.COUNT,
        RelayKind.ENDED,
    }
)
_OUTCOMES: Final = frozenset({RelayKind.CONNECTED, RelayKind.DOWN, RelayKind.PAIRED})
_OFFERS: Final = frozenset({RelayKind.LINKED, RelayKind.PLACED})
_ACCEPTS: Final = frozenset({RelayKind.CONNECT, RelayKind.PAIR})
_ARENAS: Final = frozenset({RelayKind.ARENA, RelayKind.BELL, RelayKind.DISCARD})


class Open(msgspec.Struct, frozen=True):
    """Which device. `spin` in microseconds."""

    device: str
    port: int
    gid_index: int
    transport: int
    spin: int
    version: int = RELAY_VERSION


class Opened(msgspec.Struct, frozen=True):
    """`error` is an errno, 0: it is open."""

    error: int
    text: str
    mtu: int


class Number(msgspec.Struct, frozen=True):
    """A link or a connection, by its kind."""

    kind: int
    number: int = 0
    state: int = WHOLE


class RelayOutcome(msgspec.Struct, frozen=True):
    """What became of a link or a connection."""

    kind: int
    number: int
    error: int
    text: str


class Offered(msgspec.Struct, frozen=True):
    """A link's address or a connection's place."""

    kind: int
    number: int
    error: int
    text: str
    words: bytes


class RelayAccept(msgspec.Struct, frozen=True):
    """The peer's address or place."""

    kind: int
    number: int
    peer: int
    words: bytes


class RelayArena(msgspec.Struct, frozen=True):
    """An arena: its ring's size, the index of a bell, or 0."""

    kind: int
    arena: int
    value: int = 0


class RelaySlot(msgspec.Struct, frozen=True):
    """A connection's place in memory."""

    connection: int
    link: int
    slot: int
    arena: int
    incarnation: int


class RelayFrame(msgspec.Struct, frozen=True):
    """Bytes of a link that has no RDMA."""

    link: int
    data: bytes


class RelayCounters(msgspec.Struct, frozen=True):
    """By the names of `COUNTERS`."""

    counters: dict[str, int]


Message = (
    Open
    | Opened
    | Number
    | RelayOutcome
    | Offered
    | RelayAccept
    | RelayArena
    | RelaySlot
    | RelayFrame
    | RelayCounters
)


def pack(message: Message) -> bytes:
    """A message as bytes."""
    match message:
        case Number():
            return _NUMBER.pack(message.kind, _NUMBER.size, message.number, message.state)
        case RelayAccept():
            words = message.words
            return _ACCEPT.pack(
                message.kind, _ACCEPT.size, message.number, message.peer, len(words), 0, words
            )
        case RelayArena():
            return _ARENA.pack(message.kind, _ARENA.size, message.value, message.arena)
        case RelaySlot():
            return _SLOT.pack(
                RelayKind.SLOT,
                _SLOT.size,
                message.connection,
                message.link,
                message.slot,
                message.arena,
                message.incarnation,
            )
        case RelayFrame():
            size = _FRAME.size + len(message.data)
            return _FRAME.pack(RelayKind.FRAME, size, message.link) + message.data
        case Open():
            return _OPEN.pack(
                RelayKind.OPEN,
                _OPEN.size,
                message.device.encode(),
                message.port,
                message.version,
                message.gid_index,
                message.transport,
                message.spin,
            )
        case Opened():
            return _OPENED.pack(
                RelayKind.OPENED, _OPENED.size, message.error, message.text.encode(), message.mtu
            )
        case RelayOutcome():
            return _OUTCOME.pack(
                message.kind, _OUTCOME.size, message.number, message.error, message.text.encode()
            )
        case Offered():
            return _OFFER.pack(
                message.kind,
                _OFFER.size,
                message.number,
                message.error,
                message.text.encode(),
                len(message.words),
                0,
                message.words,
            )
        case RelayCounters():
            values = (message.counters.get(name, 0) for name in COUNTERS)
            return _COUNTS.pack(RelayKind.COUNTS, _COUNTS.size, 0, *values)


def unpack(data: bytes) -> Message:
    """The message in a packet.

    Raises:
        WrongMessage: the packet isn't exactly one known message.
    """
    if len(data) < _HEAD.size:
        raise WrongMessage(f"packet of {len(data)} bytes; a message has at least {_HEAD.size}")
    kind, size = _HEAD.unpack_from(data)
    if size != len(data):
        raise WrongMessage(f"packet of {len(data)} bytes that says {size}")
    try:
        return _unpack(kind, data)
    except struct.error as error:
        raise WrongMessage(f"message of kind {kind} with {size} bytes: {error}") from error


def _unpack(kind: int, data: bytes) -> Message:
    if kind in _NUMBERS:
        return Number(kind, *_NUMBER.unpack(data)[2:])
    if kind in _OUTCOMES:
        _, _, number, error, text = _OUTCOME.unpack(data)
        return RelayOutcome(kind, number, error, _text(text))
    if kind in _OFFERS:
        _, _, number, error, text, length, _, words = _OFFER.unpack(data)
        return Offered(kind, number, error, _text(text), _words(length, words))
    if kind == RelayKind.FRAME and _FRAME.size <= len(data) <= MAX_MESSAGE:
        return RelayFrame(_FRAME.unpack_from(data)[2], data[_FRAME.size :])
    if kind == RelayKind.OPENED:
        _, _, error, text, mtu = _OPENED.unpack(data)
        return Opened(error, _text(text), mtu)
    if kind == RelayKind.COUNTS:
        return RelayCounters(dict(zip(COUNTERS, _COUNTS.unpack(data)[3:], strict=True)))
    if kind in _ACCEPTS:
        _, _, number, peer, length, _, words = _ACCEPT.unpack(data)
        return RelayAccept(kind, number, peer, _words(length, words))
    if kind in _ARENAS:
        _, _, value, arena = _ARENA.unpack(data)
        return RelayArena(kind, arena, value)
    if kind == RelayKind.SLOT:
        return RelaySlot(*_SLOT.unpack(data)[2:5], *_SLOT.unpack(data)[5:])
    if kind == RelayKind.OPEN:
        _, _, device, port, version, gid_index, transport, spin = _OPEN.unpack(data)
        return Open(_text(device), port, gid_index, transport, spin, version)
    raise WrongMessage(f"message of kind {kind} with {len(data)} bytes")


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")


def _words(length: int, words: bytes) -> bytes:
    if length > MAX_WORDS:
        raise WrongMessage(f"{length} words; {MAX_WORDS} are the most")
    return words[:length]
