"""The messages of `dataplane/library/verbs_protocol.h`: verbs, between a library and the router.

The bytes are those of the header; a test compares both. The size and kind of what arrives are
checked here; what the fields mean is checked where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from ipaddress import IPv6Address
from typing import Annotated, Final

import msgspec

from dataplane.errors import WrongMessage
from dataplane.router.codec import U32, U64, WireField
from dataplane.router.library_wire import IPAddress, codec

VERBS_VERSION: Final = 1
PRIVATE: Final = 256
"""Bytes of private data of a connection, at most."""
MAX_MESSAGE: Final = 332
"""Bytes of the longest message, of those of `library_wire.py` too."""


class VerbsKind(IntEnum):
    """What a message is."""

    OPEN = 32
    DEVICE = 33
    QUEUE_PAIR = 34
    GRANT = 35
    REFUSE = 36
    QUEUE_PAIR_END = 37
    DATAGRAMS = 38
    DATAGRAM_PEER = 39
    GROUP = 40
    LISTEN = 41
    LISTENING = 42
    LISTEN_END = 43
    CONNECTION = 44
    STATUS = 45
    MEMORY = 46
    MEMORY_MADE = 47
    MEMORY_MAPPED = 48
    MEMORY_END = 49
    REACH = 50
    REACHED = 51


class SlotKind(IntEnum):
    """What a slot carries."""

    CONNECTED = 1
    DATAGRAMS = 2


class Step(IntEnum):
    """A step of a connection's life."""

    REQUEST = 1
    REPLY = 2
    READY = 3
    REJECT = 4
    DISCONNECT = 5
    DISCONNECTED = 6
    RESOLVE = 7
    RESOLVED = 8
    RESUME = 9


def _pack_gid(gid: IPAddress | None) -> bytes:
    if gid is None:
        return bytes(16)
    return gid.packed if gid.version == 6 else b"\0" * 10 + b"\xff\xff" + gid.packed


def _unpack_gid(raw: bytes) -> IPAddress | None:
    gid = IPv6Address(raw)
    return (gid.ipv4_mapped or gid) if int(gid) else None


def _one_of(kinds: type[IntEnum]) -> Callable[[int], IntEnum]:
    """Decodes a number that has to be one of an enumeration's."""
    known = {kind.value: kind for kind in kinds}

    def decode(number: int) -> IntEnum:
        if number not in known:
            raise WrongMessage(f"{kinds.__name__.lower()} {number}")
        return known[number]

    return decode


def _private_size(number: int) -> int:
    if number > PRIVATE:
        raise WrongMessage(f"{number} bytes of private data", cause=f"{PRIVATE} are the most")
    return number


Gid = Annotated[IPAddress | None, WireField("16s", _pack_gid, _unpack_gid)]
"""An address; None: 0. An IPv4-mapped GID is an IPv4 address here."""
_Bool = Annotated[bool, WireField("I", int, bool)]
_Step = Annotated[Step, WireField("I", int, _one_of(Step))]
_SlotKind = Annotated[SlotKind, WireField("I", int, _one_of(SlotKind))]
_U8 = Annotated[int, WireField("B")]
_PrivateSize = Annotated[int, WireField("H", int, _private_size)]
_Private = Annotated[bytes, WireField(f"{PRIVATE}s", bytes, bytes)]


@codec.message(VerbsKind.OPEN)
class VerbsOpen(msgspec.Struct, frozen=True, gc=False):
    """A process wants to know its device. `qpn_first`: an earlier router gave it these numbers."""

    version: U32
    qpn_first: U32 = 0


@codec.message(VerbsKind.DEVICE)
class VerbsDevice(msgspec.Struct, frozen=True, gc=False):
    """A GID of the device of a process, and what is the same for all; `count` 0: no device."""

    index: U32
    count: U32
    qpn_first: U32
    qpn_count: U32
    queue_pairs: U32
    regions: U32
    direct: _Bool
    guid: U64
    direct_bytes: U64
    gid: Gid


@codec.message(VerbsKind.QUEUE_PAIR)
class VerbsQueuePair(msgspec.Struct, frozen=True, gc=False):
    """A queue pair wants to be paired, or was paired by an earlier router.

    `request` is the process's own number of this message, which the answers repeat.
    """

    request: U32
    qpn: U32
    peer_qpn: U32
    gid_index: U32
    type: U32
    paired: _Bool
    peer_gid: Gid


@codec.message(VerbsKind.GRANT)
class VerbsGrant(msgspec.Struct, frozen=True, gc=False):
    """A slot of an arena for a queue pair, or for the datagrams of two processes; see `Grant`.

    `number`: the router's of a slot for datagrams; for a queue pair, whether memory may be direct.
    """

    request: U32
    qpn: U32
    peer_qpn: U32
    slot_kind: _SlotKind
    side: U32
    slot: U32
    gid_index: U32
    arena: U64
    incarnation: U64
    token: U64
    peer_gid: Gid
    peer_count: U32 = 0
    number: U32 = 0


@codec.message(VerbsKind.REFUSE)
class VerbsRefuse(msgspec.Struct, frozen=True, gc=False):
    """A message of kind `refused` is refused, or what it has led to has ended."""

    refused: U32
    request: U32
    number: U32
    reason: U32


@codec.message(VerbsKind.QUEUE_PAIR_END, VerbsKind.LISTEN_END)
class VerbsEnd(msgspec.Struct, frozen=True, gc=False):
    """A queue pair, or a listener, has ended."""

    kind: VerbsKind
    number: U32


@codec.message(VerbsKind.DATAGRAMS, VerbsKind.DATAGRAM_PEER, VerbsKind.GROUP)
class VerbsDatagrams(msgspec.Struct, frozen=True, gc=False):
    """A queue pair takes datagrams, sends some to a peer or a group, or joins a group; from the
    router: where members of a group are, by the number of a slot.
    """

    kind: VerbsKind
    request: U32
    qpn: U32
    gid_index: U32
    peer_qpn: U32
    on: _Bool
    number: U32
    gid: Gid


@codec.message(VerbsKind.LISTEN, VerbsKind.LISTENING)
class VerbsListen(msgspec.Struct, frozen=True, gc=False):
    """A process has a port, or wants one; `gid` None: on all addresses. See the header."""

    kind: VerbsKind
    id: U32
    space: U32
    port: U32
    backlog: U32
    reuse: _Bool
    gid: Gid


@codec.message(VerbsKind.CONNECTION)
class VerbsConnection(msgspec.Struct, frozen=True, gc=False):
    """A step of a connection, between the processes at its ends."""

    step: _Step
    id: U32
    connection: U32
    gid_index: U32
    space: U32
    port: U32
    from_port: U32
    qpn: U32
    type: U32
    psn: U32
    qkey: U32
    reject: U32
    responder_resources: _U8
    initiator_depth: _U8
    flow_control: _U8
    retry: _U8
    rnr_retry: _U8
    srq: _U8
    private_size: _PrivateSize
    peer_gid: Gid
    private: _Private


@codec.message(VerbsKind.STATUS, order=("qpn", "state", "moved", "operations", "bytes"))
class VerbsStatus(msgspec.Struct, frozen=True, gc=False):
    """What a queue pair has done, for lists."""

    qpn: U32
    state: U32
    operations: U64
    bytes: U64
    moved: _Bool = False
    """The relays' device has executed some for it."""


@codec.message(
    VerbsKind.MEMORY,
    VerbsKind.MEMORY_MADE,
    VerbsKind.MEMORY_MAPPED,
    VerbsKind.MEMORY_END,
    VerbsKind.REACH,
    VerbsKind.REACHED,
)
class VerbsMemory(msgspec.Struct, frozen=True, gc=False):
    """A file for registered memory: a process wants one, has mapped it or has no use for it, or
    wants its peer's.
    """

    kind: VerbsKind
    request: U32 = 0
    qpn: U32 = 0
    writable: _Bool = False
    bytes: U64 = 0
    memory: U64 = 0
    token: U64 = 0


FromVerbs = (
    VerbsOpen
    | VerbsQueuePair
    | VerbsEnd
    | VerbsDatagrams
    | VerbsListen
    | VerbsConnection
    | VerbsMemory
    | VerbsStatus
)
VerbsAnswer = (
    VerbsDevice
    | VerbsGrant
    | VerbsRefuse
    | VerbsDatagrams
    | VerbsListen
    | VerbsConnection
    | VerbsMemory
)
VerbsMessage = FromVerbs | VerbsAnswer

pack: Final[Callable[[VerbsMessage], bytes]] = codec.pack
"""A message as bytes."""

unpack: Final[Callable[[bytes], VerbsMessage]] = codec.unpack
"""The message in a packet.

Raises:
    WrongMessage: the packet isn't exactly one known message.
"""
