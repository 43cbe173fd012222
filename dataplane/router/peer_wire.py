"""What routers of two hosts say to each other: a length of four bytes, then one message in MessagePack.

A peer is a host of our own Swarm and may be hostile all the same: each field has a limit here, and a frame that is no message
ends the session. What fields mean is checked where they are used. Unknown fields are skipped, so that a later version can
add some; unknown messages aren't.
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
MAX_BLOB: Final = 128
"""Bytes of a relay's place or address."""

_LENGTH: Final = struct.Struct(">I")

U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
NodeId = Annotated[str, Meta(pattern=r"^[0-9a-z]{1,64}\Z")]
NetworkId = Annotated[str, Meta(pattern=r"^[0-9a-z]{1,64}\Z")]
AddressText = Annotated[str, Meta(max_length=45)]
EndText = Annotated[str, Meta(max_length=53)]
Blob = Annotated[bytes, Meta(max_length=MAX_BLOB)]
Text = Annotated[str, Meta(pattern=r"^[ -~]{0,200}\Z")]
"""Goes into logs and tables."""


class PeerHello(msgspec.Struct, frozen=True, tag="Hello", kw_only=True):
    """The first message of each side, and again when something in it has changed."""

    version: U32 = PEER_VERSION
    instance: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    """Random, anew at each start of a router: another one means that the peer knows nothing of what was before."""
    node: NodeId
    data_path: AddressText
    """The address at which its RDMA device is reached; "" if it has none to tell."""
    rdma: bool
    ring: U32 = 0
    """Bytes of a ring for connections between hosts; the two use the smaller of theirs."""
    build: Annotated[str, Meta(pattern=r"^[0-9A-Za-z.+_-]{0,64}\Z")] = ""


class Owns(msgspec.Struct, frozen=True, tag=True):
    """The addresses of the speaker's endpoints by network, of the networks that both share. Whole each time."""

    networks: Annotated[
        dict[NetworkId, Annotated[tuple[AddressText, ...], Meta(max_length=8192)]],
        Meta(max_length=1024),
    ]


class Offer(msgspec.Struct, frozen=True, tag=True):
    """A process of the speaker's has asked for a connection; `local` and `remote` as that process sees them."""

    offer: U63
    network: NetworkId
    local: EndText
    remote: EndText


class Withdraw(msgspec.Struct, frozen=True, tag=True):
    """The speaker's offer doesn't stand any more."""

    offer: U63


class Decline(msgspec.Struct, frozen=True, tag=True):
    """The hearer's offer can't be had; `reason` is a `Reason`."""

    offer: U63
    reason: U32


class Placement(msgspec.Struct, frozen=True, tag="Place"):
    """Leader to follower: an offer is taken; `connection` and `place` are the leader's."""

    offer: U63
    connection: U32
    place: Blob


class PeerAccept(msgspec.Struct, frozen=True, tag="Accept"):
    """Follower to leader: the answer to Placement; `connection` and `place` are the follower's."""

    offer: U63
    connection: U32
    place: Blob


class Paired(msgspec.Struct, frozen=True, tag=True):
    """Leader to follower: the answer to PeerAccept; both ends have a path now. `connection` is the hearer's."""

    connection: U32


class LinkOffer(msgspec.Struct, frozen=True, tag=True):
    """The speaker's relay has made its end of a link. `again`: in place of one that broke."""

    link: U32
    address: Blob
    again: bool = False


class LinkAnswer(msgspec.Struct, frozen=True, tag=True):
    """The hearer's link has another end now."""

    link: U32
    address: Blob


class LinkRefused(msgspec.Struct, frozen=True, tag=True):
    """There is no other end for the hearer's link."""

    link: U32
    text: Text


class Drop(msgspec.Struct, frozen=True, tag=True):
    """A connection, by the hearer's number, is given up."""

    connection: U32
    reason: U32


class PeerFrame(msgspec.Struct, frozen=True, tag="Frame"):
    """Bytes from one relay to the other."""

    link: U32
    data: Annotated[bytes, Meta(max_length=MAX_DATA)]


class PeerPing(msgspec.Struct, frozen=True, tag="Ping"):
    """The speaker lives."""


class PeerPong(msgspec.Struct, frozen=True, tag="Pong"):
    """The answer to PeerPing."""


Message = (
    PeerHello
    | Owns
    | Offer
    | Withdraw
    | Decline
    | Placement
    | PeerAccept
    | Paired
    | LinkOffer
    | LinkAnswer
    | LinkRefused
    | Drop
    | PeerFrame
    | PeerPing
    | PeerPong
)

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """A message as a frame.

    Raises:
        WrongMessage: it is longer than a frame may be.
    """
    data = _encoder.encode(message)
    if len(data) > MAX_FRAME:
        raise WrongMessage(
            f"{type(message).__name__} of {len(data)} bytes; a peer takes {MAX_FRAME}"
        )
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Puts messages together from pieces of a stream; holds no more than one frame and one piece."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole with this piece. To be taken to the end before the next piece.

        Raises:
            WrongMessage: what came is no message.
        """
        held = self._held
        held += data
        at = 0
        try:
            while len(held) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(held, at)
                if not 0 < length <= MAX_FRAME:
                    raise WrongMessage(f"a frame of {length} bytes; 1 to {MAX_FRAME} are allowed")
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
        raise WrongMessage(f"a frame that is no message: {str(error)[:200]!r}") from error
    return message


def ip_of(text: str) -> IPAddress:
    """An address in a message. IPv4 in IPv6's clothes is IPv4.

    Raises:
        WrongMessage: it is none.
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
    """One end of a connection in a message, as `str(Address)` writes it: 10.0.1.2:80 or [fd00::2]:80.

    Raises:
        WrongMessage: it is none.
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
