"""The first bytes of a TCP connection that a link between two relays will use.

The dialling router sends a preamble and waits for one byte (`ACCEPTED`). Then the connection is the
relays'. No TLS record begins with the preamble's first byte (RFC 8446, 5.1), so the session port
can serve both. The ticket came to the dialling router in its session; it is worth nothing after its
use. Whoever reads it on the way can end the attempt at a link, and no more: the relays authenticate
each record with keys of their own.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from dataplane.errors import WrongMessage
from dataplane.router.peer_wire import TICKET

SOCKETS: Final = 4
"""TCP connections of a link."""
ACCEPTED: Final = b"\x06"
_MAGIC: Final = b"\xffFFRELAY"
_VERSION: Final = 1
_PREAMBLE: Final = struct.Struct(f"=8sBB{TICKET}s")
SIZE: Final = _PREAMBLE.size


class Preamble(NamedTuple):
    """Which connection of which link it is."""

    socket: int
    ticket: bytes


def pack(preamble: Preamble) -> bytes:
    """The bytes of a preamble."""
    return _PREAMBLE.pack(_MAGIC, _VERSION, *preamble)


def begins(data: bytes | bytearray) -> bool:
    """Whether a connection that begins with these bytes is no TLS connection."""
    return data[:1] == _MAGIC[:1]


def parse(data: bytes | bytearray) -> Preamble | None:
    """The preamble, if it is complete.

    Raises:
        WrongMessage: it is none, or more bytes follow: the dialling router has to wait.
    """
    if not _MAGIC.startswith(bytes(data[: len(_MAGIC)])):
        raise WrongMessage("it begins neither with a ClientHello of TLS nor for a link")
    if len(data) > SIZE:
        raise WrongMessage("it sends more than the preamble of a link before the answer")
    if len(data) < SIZE:
        return None
    _, version, index, ticket = _PREAMBLE.unpack(data)
    if version != _VERSION:
        raise WrongMessage(f"the preamble of a link has version {version}, not {_VERSION}")
    if index >= SOCKETS:
        raise WrongMessage(f"connection {index} of a link", cause=f"a link has {SOCKETS}")
    return Preamble(index, ticket)
