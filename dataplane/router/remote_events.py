"""The vocabulary of `remote_end.py`: phases, events and actions of an end of a connection to
another host.

Values only. Reasons of events and actions are `Reason`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from dataplane.router.reasons import Reason


class Transport(Enum):
    """What carries the bytes between the two relays."""

    RDMA = "rdma"
    RELAY = "relay"
    """TCP connections between the relays."""


class Phase(Enum):
    """How far an end is. It never returns to an earlier phase."""

    NEW = "new"
    LEADER_PLACING = "leader placing"
    """Our relay prepares its slot."""
    OFFERED = "offered"
    """Leader: the follower was told where our slot is."""
    LEADER_PAIRING = "leader pairing"
    """Our relay is told where the follower's slot is. The follower's end is granted."""
    ABANDONED = "abandoned"
    """Leader: our end will not be granted, and the follower's is. The follower's router is told to
    take its end back, and so are the relays once they are paired: neither end has bytes in a ring.
    Our slot is dropped when the relay reports that the follower's end is done with the path."""
    FOLLOWER_PLACING = "follower placing"
    """Our relay prepares its slot."""
    FOLLOWER_PAIRING = "follower pairing"
    """Our relay is told where the leader's slot is."""
    UNCONFIRMED = "unconfirmed"
    """Follower: our end is granted. We don't know yet whether the leader's end is."""
    GRANTED = "granted"
    """Both ends are granted."""
    DROPPING = "dropping"
    """Our relay stops using the slot."""
    OVER = "over"
    """Nothing is left of it."""


LEADER: Final = (Phase.LEADER_PLACING, Phase.OFFERED, Phase.LEADER_PAIRING)
FOLLOWER: Final = (Phase.FOLLOWER_PLACING, Phase.FOLLOWER_PAIRING)
"""Our process waits for an answer to its request."""
LIVE: Final = (Phase.UNCONFIRMED, Phase.GRANTED)
"""Our process has the ring."""
TIMED: Final = frozenset({*LEADER, *FOLLOWER, Phase.UNCONFIRMED})
"""A timer runs from the start of the phase: see `On.STEP_TIMEOUT`."""


@dataclass(frozen=True, slots=True)
class EndState:
    """All that changes in the life of an end."""

    phase: Phase = Phase.NEW
    transport: Transport = Transport.RDMA
    peer_number: int = 0
    """The connection's number at the peer's relay; 0 until it is known."""
    place: bytes = b""
    """Where the peer's relay finds our slot; opaque to routers."""
    peer_place: bytes = b""
    closed: bool = False
    """No process of this host has the end any more."""
    received: bool = False
    """The relay has all that the peer sent, or the path is broken."""
    sent: bool = False
    """The peer has all that our process sent, or the path is broken."""
    leaving: bool = False
    """The relay was asked to bring both ends back to TCP."""


class On(Enum):
    """What can happen to a connection."""

    # The start.
    LEAD = "leader: a request of this host matches an offer of the follower"
    FOLLOW = "follower: the leader has taken our offer, and told us its place"
    # Our relay.
    PLACED = "the slot is prepared"
    PLACE_FAILED = "the slot can't be prepared"
    PAIRED = "the relay knows the peer's place"
    PAIR_FAILED = "the relay can't use the peer's place"
    ALL_RECEIVED = "the peer's end is closed, and all that it sent is in our ring"
    ALL_SENT = "our end is closed, and the peer has all that it sent"
    PATH_BROKEN = "bytes may be lost; the relay has reset the connection"
    PATH_LEFT = "both directions are on TCP again, without the relay"
    DROPPED = "the relay doesn't use the slot any more, and the peer can't write there"
    RELAY_DIED = "the relay's process has ended; what it had not delivered is lost"
    # The peer's router.
    ACCEPTED = "the follower is about to grant its end, and has told us its place"
    CONFIRMED = "the leader has granted its end"
    DECLINED = "the leader doesn't take our offer"
    WITHDRAWN = "the follower takes its offer back"
    PEER_DROPPED = "the peer has given the connection up"
    # Sessions and links.
    SESSION_UP = "there is a session; the last messages of the one before may be lost"
    SESSION_DOWN = "there is no session"
    SESSION_EXPIRED = "there has been no session for a long time"
    LINK_LOST = "the two relays can't reach each other, and won't"
    # This host.
    SOCKET_OPEN = "answer to CHECK_SOCKET: our process still has the connected socket"
    SOCKET_GONE = "answer to CHECK_SOCKET: it hasn't"
    ACCEPT_SENT = "answer to SEND_ACCEPT: the message is on its way"
    ACCEPT_UNSENT = "answer to SEND_ACCEPT: there is no session"
    REQUEST_GONE = "our process has taken its request back, or has ended"
    RELEASED = "no process of this host has the end any more"
    LEAVE_PATH = "the connection is to go back to TCP"
    STEP_TIMEOUT = "the end has been in its phase for too long"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a connection."""

    on: On
    transport: Transport = Transport.RDMA
    """LEAD, FOLLOW."""
    peer_number: int = 0
    """FOLLOW, ACCEPTED."""
    place: bytes = b""
    """PLACED: ours. FOLLOW, ACCEPTED: the peer's."""
    reason: Reason = Reason.NONE
    """PEER_DROPPED: the peer's. LEAVE_PATH: the answer to a request that still waits."""


class Do(Enum):
    """Actions without parameters."""

    MAKE_PLACE = "tell the relay to prepare its slot"
    SEND_PLACE = "tell the follower our place"
    CHECK_SOCKET = "ask the kernel whether our process still has the socket"
    PAIR = "tell the relay the peer's place"
    SEND_ACCEPT = "tell the leader that our end is granted, and our place"
    SEND_PAIRED = "tell the follower that our end is granted"
    GRANT = "give our process the ring"
    RESTART_TIMER = "begin the time of the phase again"
    KEEP_REQUEST = "let the request of our process wait for another match"
    FREE_SIDE = "free our process's side of the slot"
    CLOSE = "tell the relay that our end is closed"
    LEAVE = "tell the relay to bring both ends back to TCP"
    COUNT_BROKEN = "note that the connection is reset"
    COUNT_LEFT = "count a connection that went back to TCP"
    UNDO_GRANT = "send our end back to TCP: nothing is in its rings"
    SEVER = "mark our end's rings as broken, in place of the relay"
    FORGET = "delete the connection"


@dataclass(frozen=True, slots=True)
class RefuseRequest:
    """Answer the request of our process, if it still waits: the connection stays on TCP."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the peer's router that we give the connection up, if there is a session.

    `dropped` is sent if we know the connection's number at the peer, else `declined`, if given.
    """

    dropped: Reason
    declined: Reason | None = None


@dataclass(frozen=True, slots=True)
class Drop:
    """Tell the relay to stop using the slot. `broken`: both ends are reset."""

    broken: bool = False


Action = Do | RefuseRequest | Tell | Drop
