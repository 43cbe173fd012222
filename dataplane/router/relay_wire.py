"""The messages of `dataplane/relay/relay_protocol.h`, between the router and its relay.

The bytes are those of the header; a test compares both. Several kinds share a struct, here as
there. The relay is the router's child: a wrong message from it is a bug, and the router ends it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Annotated, Final

import msgspec

from dataplane.errors import WrongMessage
from dataplane.router.codec import I32, U32, U64, Codec, WireField

RELAY_VERSION: Final = 7
RELAY_SOCKET: Final = 3
"""The relay's descriptor."""
MAX_TEXT: Final = 96
MAX_WORDS: Final = 128
"""Bytes of a memory location or a link address."""
MAX_FRAME: Final = 60_000
LINK_CONNECTIONS: Final = 16384
"""Of one link."""
VERBS: Final = 1
LOOPBACK: Final = 2
TCP: Final = 3
"""Transports."""
ENCRYPT_NOTHING: Final = 0
ENCRYPT_MESSAGES: Final = 1
ENCRYPT_ALL: Final = 2
"""What is encrypted over TCP."""
CONNECTION: Final = 0
QUEUE_PAIR: Final = 1
MOVING_QUEUE_PAIR: Final = 2
"""Who uses a slot. A queue pair of verbs has no TCP to fall back to. The relays may move bytes
between the registered memory of the processes of one that is moving."""
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
    "moves",
    "bytes_moved",
    "moves_refused",
    "moves_lost",
)
"""enum relay_counter, in its order."""

USES: Final = (
    "bytes_out",
    "bytes_in",
    "blocks_out",
    "blocks_in",
    "messages_out",
    "messages_in",
    "bells_in",
    "slots_in",
    "bells_out",
    "slots_out",
    "cpu",
)
"""enum relay_usage_value, in its order."""


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
    SOCKET = 27
    USAGE = 28
    EXPIRE = 29
    SHARE = 30
    FILE = 31
    FILE_END = 32
    FILE_ENDED = 33


codec: Final = Codec()

_WORDS: Final = struct.Struct(f"=H2x{MAX_WORDS}s")
_COUNTS: Final = struct.Struct(f"={len(COUNTERS)}Q")
_USES: Final = struct.Struct(f"={len(USES)}Q")
_HEAD_SIZE: Final = 8
"""Bytes of a frame before its data."""
MAX_MESSAGE: Final = _HEAD_SIZE + MAX_FRAME


def _pack_words(words: bytes) -> bytes:
    return _WORDS.pack(len(words), words)


def _unpack_words(raw: bytes) -> bytes:
    length, words = _WORDS.unpack(raw)
    if length > MAX_WORDS:
        raise WrongMessage(f"{length} words", cause=f"{MAX_WORDS} are the most")
    return bytes(words[:length])


def _text(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")


def _counters(names: tuple[str, ...], packed: struct.Struct, pad: str = "") -> WireField:
    """A field of named 64-bit numbers."""

    def encode(values: dict[str, int]) -> bytes:
        return packed.pack(*(values.get(name, 0) for name in names))

    def decode(raw: bytes) -> dict[str, int]:
        return dict(zip(names, packed.unpack(raw), strict=True))

    return WireField(f"{pad}{packed.size}s", encode, decode)


_U8 = Annotated[int, WireField("B")]
_U16 = Annotated[int, WireField("H")]
_Name = Annotated[str, WireField("64s", str.encode, _text)]
_Text = Annotated[str, WireField(f"{MAX_TEXT}s", str.encode, _text)]
_Words = Annotated[bytes, WireField(f"{_WORDS.size}s", _pack_words, _unpack_words)]
_Counters = Annotated[dict[str, int], _counters(COUNTERS, _COUNTS, "4x")]
_Uses = Annotated[dict[str, int], _counters(USES, _USES)]


@codec.message(
    RelayKind.OPEN,
    order=("device", "port", "version", "gid_index", "transport", "spin", "encryption"),
)
class RelayOpen(msgspec.Struct, frozen=True):
    """The transport to open, and its device. `spin` is in microseconds. `encryption` is for TCP."""

    device: _Name
    port: _U8
    gid_index: _U16
    transport: U32
    spin: U32
    encryption: U32 = ENCRYPT_NOTHING
    version: _U8 = RELAY_VERSION


@codec.message(RelayKind.OPENED)
class RelayOpened(msgspec.Struct, frozen=True):
    """The answer to RelayOpen. `error` is an errno; 0: the device is open."""

    error: I32
    text: _Text
    mtu: U32


@codec.message(
    RelayKind.LINK,
    RelayKind.SOCKET,
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
)
class Number(msgspec.Struct, frozen=True):
    """A link or a connection, depending on the kind. `state` is a link's transport, the index of
    its socket, or how a connection ended.
    """

    kind: int
    number: U32 = 0
    state: U32 = WHOLE


@codec.message(RelayKind.CONNECTED, RelayKind.DOWN, RelayKind.PAIRED)
class RelayOutcome(msgspec.Struct, frozen=True):
    """What became of a link or a connection. `received`, of a link that is down: how many messages
    of the peer's relay have arrived since it came up.
    """

    kind: int
    number: U32
    error: I32
    text: _Text
    received: U32 = 0


@codec.message(RelayKind.LINKED, RelayKind.PLACED)
class Offered(msgspec.Struct, frozen=True):
    """The address of a link, or the memory location of a connection."""

    kind: int
    number: U32
    error: I32
    text: _Text
    words: _Words


@codec.message(RelayKind.CONNECT, RelayKind.PAIR)
class RelayAccept(msgspec.Struct, frozen=True):
    """The peer's link address, or memory location."""

    kind: int
    number: U32
    peer: U32
    words: _Words


@codec.message(
    RelayKind.ARENA,
    RelayKind.BELL,
    RelayKind.SHARE,
    RelayKind.DISCARD,
    order=("value", "arena", "owner"),
)
class RelayArena(msgspec.Struct, frozen=True):
    """An arena. `value` is the size of its rings, the index of a bell, the thousandths of the time
    in which the relay works for it (0: all of it), or 0, by the kind. `owner` is the process, if
    the arena is new.
    """

    kind: int
    arena: U64
    value: U32 = 0
    owner: U64 = 0


@codec.message(RelayKind.SLOT, order=("connection", "link", "slot", "user", "arena", "incarnation"))
class RelaySlot(msgspec.Struct, frozen=True):
    """The slot of a connection, and who uses it."""

    connection: U32
    link: U32
    slot: _U16
    arena: U64
    incarnation: U64
    user: _U16 = CONNECTION


@codec.message(
    RelayKind.FILE,
    RelayKind.FILE_END,
    RelayKind.FILE_ENDED,
    order=("writable", "file", "token", "owner"),
)
class RelayFile(msgspec.Struct, frozen=True):
    """A file for registered memory of a process (`owner`), by its number; the rest if it is new."""

    kind: int
    file: U64
    token: U64 = 0
    owner: U64 = 0
    writable: U32 = 0


@codec.message(RelayKind.EXPIRE)
class RelayExpire(msgspec.Struct, frozen=True):
    """Users of a link that is down are reset if they have waited at each of the last `count`."""

    link: U32
    count: _U16
    user: _U16 = CONNECTION


@codec.message(RelayKind.FRAME, tail=MAX_FRAME)
class RelayFrame(msgspec.Struct, frozen=True):
    """Bytes of a link that is carried over the session instead of RDMA."""

    link: U32
    data: bytes


@codec.message(RelayKind.COUNTS)
class RelayCounters(msgspec.Struct, frozen=True):
    """The relay's counters, by the names of `COUNTERS`."""

    counters: _Counters


@codec.message(RelayKind.USAGE)
class RelayUsage(msgspec.Struct, frozen=True):
    """What an arena (`link` is 0) or a link (`arena` is 0) has used of the relay since it began, by
    the names of `USES`. `cpu` is in nanoseconds.
    """

    link: U32
    arena: U64
    values: _Uses


Message = (
    RelayOpen
    | RelayOpened
    | Number
    | RelayOutcome
    | Offered
    | RelayAccept
    | RelayArena
    | RelaySlot
    | RelayFile
    | RelayExpire
    | RelayFrame
    | RelayCounters
    | RelayUsage
)

pack: Final[Callable[[Message], bytes]] = codec.pack
"""A message as bytes."""

unpack: Final[Callable[[bytes], Message]] = codec.unpack
"""The message in a packet.

Raises:
    WrongMessage: the packet isn't exactly one known message.
"""
