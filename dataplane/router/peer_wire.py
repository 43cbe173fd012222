"""The messages between routers of two hosts: a length of four bytes, then a message in MessagePack.

A peer is a host of our own Swarm, but it may be hostile. So each field has a limit here, and an
invalid frame ends the session. What fields mean is checked where they are used. Unknown fields are
ignored, so that a later version can add some; unknown messages are invalid.

A message's tag and its fields' names are on the wire: they don't follow the names of classes.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from dataplane.errors import WrongMessage
from dataplane.router.library_wire import Address, IPAddress

PEER_VERSION: Final = 1
MAX_FRAME: Final = 128 << 10
"""Bytes of the longest message, without its length."""
MAX_DATA: Final = 60_000
"""Bytes that one `PeerFrame` carries."""
MAX_WAITS: Final = 4096
"""Offers in one `Waits`, connections in one `Leaves`."""
MAX_PRIVATE: Final = 256
"""Bytes of private data in one `VerbsStep`."""
MAX_ALIVE: Final = 8192
"""Numbers of either kind in one `VerbsAlive`."""
MAX_MEMBERS: Final = 1024
"""Members of either kind in one `VerbsGroupMembers`."""
MAX_BLOB: Final = 128
"""Bytes of a relay's memory location or link address."""

_LENGTH: Final = struct.Struct(">I")

U8 = Annotated[int, Meta(ge=0, lt=1 << 8)]
U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
TICKET: Final = 32
"""Bytes that a data socket shows."""
NodeId = Annotated[str, Meta(pattern=r"^[0-9a-z]{1,64}\Z")]
NetworkId = Annotated[str, Meta(pattern=r"^[0-9a-z]{1,64}\Z")]
AddressText = Annotated[str, Meta(max_length=45)]
EndText = Annotated[str, Meta(max_length=53)]
Blob = Annotated[bytes, Meta(max_length=MAX_BLOB)]
Word = Annotated[str, Meta(pattern=r"^[a-z]{0,16}\Z")]
PublicKey = Annotated[str, Meta(pattern=r"^[0-9A-Za-z+/]{42}[AEIMQUYcgkosw048]=\Z")]
"""A key of WireGuard: 32 bytes in base64."""
KeyProof = Annotated[str, Meta(pattern=r"^[0-9A-Za-z+/]{128}\Z")]
"""A key of Ed25519 and a signature, 96 bytes in base64."""
Text = Annotated[str, Meta(pattern=r"^[ -~]{0,200}\Z")]
"""Text that goes into logs and tables."""


class PeerHello(msgspec.Struct, frozen=True, tag="Hello", kw_only=True):
    """The first message of each side; sent again when a field has changed."""

    version: U32 = PEER_VERSION
    instance: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    """A random number of the router's start. A new one means that the peer's router has been
    restarted and has no state of before."""
    node: NodeId
    data_path: AddressText
    """The address of its RDMA device; "" if there is none."""
    rdma: bool
    ring: U32 = 0
    """Bytes of a ring for connections between hosts. Both hosts use the smaller of their sizes."""
    build: Annotated[str, Meta(pattern=r"^[0-9A-Za-z.+_-]{0,64}\Z")] = ""
    relay: bool = False
    """Whether it can carry connections over TCP between the relays."""
    relay_ring: U32 = 0
    """As `ring`, for connections over TCP between the relays."""
    relay_encryption: Word = ""
    """What its relay encrypts: a value of `RELAY_ENCRYPTION`."""
    tunnel_offload: bool = True
    """Whether its underlay's device segments UDP tunnels."""
    verbs: bool = False
    """Whether it pairs queue pairs of verbs with those of other hosts."""
    verbs_cm: bool = False
    """Whether it also connects processes by rdma_cm, and gives them slots for datagrams."""
    verbs_groups: bool = False
    """Whether it also tells of the members of multicast groups."""
    wireguard: Annotated[tuple[PublicKey, ...], Meta(max_length=2)] = ()
    """The public keys of its two WireGuard devices; none, if it has no encrypted network."""
    wireguard_proofs: Annotated[tuple[KeyProof, ...], Meta(max_length=2)] = ()
    """That the keys belong to the node: `driver/key_proof.py` makes and checks them."""
    wireguard_slot: Annotated[int, Meta(ge=0, le=1)] = 0
    """The device by which it sends."""
    wireguard_port: Annotated[int, Meta(ge=0, lt=(1 << 16) - 1)] = 0
    """UDP port of the first device; that of the second is the next one."""


class Owns(msgspec.Struct, frozen=True, tag=True):
    """The addresses of the sender's endpoints, by networks that both hosts share; all of them."""

    networks: Annotated[
        dict[NetworkId, Annotated[tuple[AddressText, ...], Meta(max_length=8192)]],
        Meta(max_length=1024),
    ]


class Offer(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A process of the sender has requested a path. `local` and `remote` are as it sees them."""

    offer: U63
    network: NetworkId
    local: EndText
    remote: EndText
    process: U32 = 0
    """The sender's number of the process, for connections over the relays' TCP."""
    waits: U32 = 0
    """Why the sender holds it back for now, a `Reason`; 0: it doesn't. It is offered again, under
    the same number, when that changes."""


class VerbsOffer(msgspec.Struct, frozen=True, tag=True):
    """As `Offer`, for a queue pair of verbs. Only for peers whose Hello has `verbs`.

    `gid` and `qpn` are the sender's, `peer_gid` and `peer_qpn` the receiver's. `service` is one of
    enum ibv_qp_type (infiniband/verbs.h).
    """

    offer: U63
    network: NetworkId
    gid: AddressText
    qpn: U32
    peer_gid: AddressText
    peer_qpn: U32
    service: U32


class VerbsStep(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """A step of a connection of rdma_cm: what one end says to the other.

    `number` is that of the host that asked, with `asks` the sender. `gid` is the sender's. `step`
    is one of enum verbs_step, and the other fields are those of struct v_connection
    (dataplane/library/verbs_protocol.h). Only for peers whose Hello has `verbs`.
    """

    number: U32
    asks: bool
    step: Annotated[int, Meta(ge=1, le=8)]
    network: NetworkId
    gid: AddressText
    peer_gid: AddressText
    space: U32 = 0
    port: U32 = 0
    from_port: U32 = 0
    qpn: U32 = 0
    service: U32 = 0
    """`type` there."""
    psn: U32 = 0
    qkey: U32 = 0
    reject: U32 = 0
    responder_resources: U8 = 0
    initiator_depth: U8 = 0
    flow_control: U8 = 0
    retry: U8 = 0
    rnr_retry: U8 = 0
    srq: U8 = 0
    private: Annotated[bytes, Meta(max_length=MAX_PRIVATE)] = b""


class VerbsAlive(msgspec.Struct, frozen=True, tag=True):
    """The numbers of the connections of rdma_cm that the sender has with the receiver, first of all
    in a session. `asking`: it has asked for them. `last`: all are said.
    """

    asking: Annotated[tuple[U32, ...], Meta(max_length=MAX_ALIVE)]
    asked: Annotated[tuple[U32, ...], Meta(max_length=MAX_ALIVE)]
    last: bool


class VerbsDatagramAsk(msgspec.Struct, frozen=True, tag=True):
    """A process of the sender sends datagrams to a queue pair of the receiver.

    `qpn` is the first number of the sender's process. A `VerbsOffer` for both processes' first
    numbers follows from the follower. Only for peers whose Hello has `verbs`.
    """

    network: NetworkId
    gid: AddressText
    qpn: U32
    peer_gid: AddressText
    peer_qpn: U32


class VerbsDatagramNone(msgspec.Struct, frozen=True, tag=True):
    """The sender refuses what the receiver asked by VerbsDatagramAsk, whose fields it repeats;
    `reason` is a `Reason`.
    """

    network: NetworkId
    gid: AddressText
    qpn: U32
    peer_gid: AddressText
    peer_qpn: U32
    reason: U32


class VerbsGroupAsk(msgspec.Struct, frozen=True, tag=True):
    """Processes of the sender send to a multicast group, or no more: the receiver tells it of the
    group's members, now and as they change. Only for peers whose Hello has `verbs_groups`.
    """

    network: NetworkId
    group: AddressText
    on: bool


GroupMemberText = tuple[AddressText, U32]
"""The GID of a process, and the number of a queue pair of it that takes datagrams."""


class VerbsGroupMembers(msgspec.Struct, frozen=True, tag=True):
    """Members of a group that the receiver has asked for: new ones, and those that are gone.
    `all`: these are all of the sender's.
    """

    network: NetworkId
    group: AddressText
    here: Annotated[tuple[GroupMemberText, ...], Meta(max_length=MAX_MEMBERS)]
    gone: Annotated[tuple[GroupMemberText, ...], Meta(max_length=MAX_MEMBERS)]
    all: bool


class Waits(msgspec.Struct, frozen=True, tag=True):
    """Leader to follower: why offers wait, though the leader has a request for them.

    `reason` is a `Reason`. Only for peers whose Hello has `relay`.
    """

    reason: U32
    offers: Annotated[tuple[U63, ...], Meta(max_length=MAX_WAITS)]


class Leaves(msgspec.Struct, frozen=True, tag=True):
    """The sender brings connections back to TCP; `connections` are the receiver's numbers.

    `reason` is a `Reason`, for lists. Only for peers whose Hello has `relay`.
    """

    reason: U32
    connections: Annotated[tuple[U32, ...], Meta(max_length=MAX_WAITS)]


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """The sender withdraws its offer."""

    offer: U63


class Decline(msgspec.Struct, frozen=True, tag=True):
    """The sender declines the receiver's offer; `reason` is a `Reason`."""

    offer: U63
    reason: U32


class Placement(msgspec.Struct, frozen=True, tag="Place"):
    """Leader to follower: an offer is taken.

    `connection` is the leader's number of the connection, `place` its relay's memory location.
    """

    offer: U63
    connection: U32
    place: Blob


class PeerAccept(msgspec.Struct, frozen=True, tag="Accept"):
    """Follower to leader: the answer to Placement, with the follower's `connection` and `place`."""

    offer: U63
    connection: U32
    place: Blob


class Paired(msgspec.Struct, frozen=True, tag=True):
    """Leader to follower: the answer to PeerAccept. Both ends have a path now.

    `connection` is the receiver's number.
    """

    connection: U32


class LinkOffer(msgspec.Struct, frozen=True, tag=True):
    """The sender's relay has made its end of a link. `again`: in place of one that was lost.

    `transport` is "" for RDMA, or "relay". Only peers whose Hello has `relay` are offered the
    latter. `attempt` comes back in all that is said about this offer; peers of earlier versions
    say 0.
    """

    link: U32
    address: Blob
    again: bool = False
    transport: Word = ""
    attempt: U32 = 0


class LinkAnswer(msgspec.Struct, frozen=True, tag=True):
    """The receiver's link has its other end now.

    `ticket`: what the TCP connections of the link have to show; empty for RDMA.
    """

    link: U32
    address: Blob
    ticket: Annotated[bytes, Meta(max_length=TICKET)] = b""
    attempt: U32 = 0


class LinkRefused(msgspec.Struct, frozen=True, tag=True):
    """There will be no other end for the receiver's link. `worked`: bytes got through on it, over
    TCP, before it was lost.
    """

    link: U32
    text: Text
    worked: bool = False
    attempt: U32 = 0


class PeerDrop(msgspec.Struct, frozen=True, tag="Drop"):
    """The sender drops a connection, which has the receiver's number here."""

    connection: U32
    reason: U32


class PeerFrame(msgspec.Struct, frozen=True, tag="Frame"):
    """Bytes of a relay for the other relay."""

    link: U32
    data: Annotated[bytes, Meta(max_length=MAX_DATA)]


class PeerPing(msgspec.Struct, frozen=True, tag="Ping"):
    """The sender is alive."""


class PeerPong(msgspec.Struct, frozen=True, tag="Pong"):
    """The answer to PeerPing."""


VerbsPeerMessage = (
    VerbsStep
    | VerbsAlive
    | VerbsDatagramAsk
    | VerbsDatagramNone
    | VerbsGroupAsk
    | VerbsGroupMembers
)
"""Of verbs, besides `VerbsOffer`."""
Message = (
    PeerHello
    | Owns
    | Offer
    | VerbsOffer
    | VerbsPeerMessage
    | Waits
    | Leaves
    | Withdraw
    | Decline
    | Placement
    | PeerAccept
    | Paired
    | LinkOffer
    | LinkAnswer
    | LinkRefused
    | PeerDrop
    | PeerFrame
    | PeerPing
    | PeerPong
)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """A message as a frame.

    Raises:
        WrongMessage: the message is longer than a frame may be.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_FRAME:
        raise WrongMessage(
            f"{type(message).__name__} of {len(data)} bytes", cause=f"a peer takes {MAX_FRAME}"
        )
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Splits a stream into messages. It holds one frame and one piece of the stream at most."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete with this piece. To be exhausted before the next piece.

        Raises:
            WrongMessage: a frame is invalid.
        """
        held = self._held
        held += data
        at = 0
        try:
            while len(held) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(held, at)
                if not 0 < length <= MAX_FRAME:
                    raise WrongMessage(
                        f"a frame of {length} bytes", cause=f"1 to {MAX_FRAME} are allowed"
                    )
                start = at + _LENGTH.size
                if len(held) - start < length:
                    return
                at = start + length
                yield _message(bytes(held[start:at]))
        finally:
            del held[:at]


def _message(data: bytes) -> Message:
    try:
        message: Message = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WrongMessage(f"an invalid frame: {str(error)[:200]!r}") from error
    return message


def ip_of(text: str) -> IPAddress:
    """An address in a message. IPv4-mapped IPv6 addresses are IPv4.

    Raises:
        WrongMessage: the text is no address.
    """
    try:
        ip = ipaddress.ip_address(text)
    except ValueError as error:
        raise WrongMessage(f"{text[:45]!r} is no address") from error
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            raise WrongMessage(f"{text[:45]!r} is an address of one link")
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
    return ip


def end_of(text: str) -> Address:
    """An address and port in a message, as in `str(Address)`: 10.0.1.2:80 or [fd00::2]:80.

    Raises:
        WrongMessage: the text is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or len(port) > 5:
        raise WrongMessage(f"{text[:53]!r} is no address and port")
    bracketed = host.startswith("[") and host.endswith("]")
    ip = ip_of(host[1:-1] if bracketed else host)
    number = int(port)
    if bracketed != (":" in host) or not 0 < number < 1 << 16:
        raise WrongMessage(f"{text[:53]!r} is no address and port")
    return Address(ip, number)
