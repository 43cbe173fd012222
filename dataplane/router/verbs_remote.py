"""Queue pairs that wait for one on another host, and their matches.

Each process tells its own router which queue pair is to be connected with which of another GID. The
follower offers those of its processes to the leader, which matches them with its own: two belong
together if they name each other. A match becomes a connection between the relays
(`remote_connections.py`).

A queue pair has nothing to fall back to. So it waits as long as it likes, whatever is missing: the
peer, its host, a session or a link. Its library decides how long that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from dataplane.router import peer_wire
from dataplane.router.arenas import Arena, SlotEnd
from dataplane.router.library_wire import IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.queue_pairs import FarDatagrams, QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import MOVING_QUEUE_PAIR, QUEUE_PAIR
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.remote_matches import Match, PeerOffer, RemoteUser, RemoteUsers

AGAIN: Final = 1.0
"""Seconds after which a queue pair whose connection came to nothing waits for a match again."""
_FINAL: Final = frozenset({Reason.LIMIT, Reason.MEMORY, Reason.REMOTE_OFF})
"""Reasons that a program is told. Whatever else is missing may come."""


PairedRecord = QueuePairRecord | FarDatagrams


def _knows(peer: peer_wire.PeerHello, record: PairedRecord) -> bool:
    """Whether a peer's router knows what is to be paired; one of an earlier version may not."""
    return peer.verbs_cm if isinstance(record, FarDatagrams) else peer.verbs


class QueuePairOwner(Protocol):
    """Who has queue pairs, or what is paired like them."""

    def has(self, record: Any) -> bool:
        """Whether its process still has it."""

    def reserve(self, record: Any, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot. Raises KernelRefused: there is no memory for it."""

    def grant_remote(self, record: Any, arena: Arena, slot: int) -> None:
        """It has a slot."""

    def forbid(self, record: Any, reason: Reason) -> None:
        """It gets no slot."""


class QueuePairKey(NamedTuple):
    """What two queue pairs say of each other. The own one comes first."""

    network: str
    gid: IPAddress
    qpn: int
    peer_gid: IPAddress
    peer_qpn: int
    type: int


@dataclass(slots=True, eq=False)
class RemoteQueuePair(RemoteUser):
    """A queue pair of this host that waits for one of another. Its timer runs while it rests after
    a connection that came to nothing.
    """

    local: PairedRecord

    @property
    def key(self) -> QueuePairKey:
        record = self.local
        message = record.message
        return QueuePairKey(
            record.network,
            record.gid,
            message.qpn,
            record.peer_gid,
            message.peer_qpn,
            message.type,
        )

    @property
    def peer(self) -> tuple[str, IPAddress]:
        return self.local.network, self.local.peer_gid


class RemoteQueuePairs(RemoteUsers[RemoteQueuePair]):
    """See the module. `RemoteUsers` of queue pairs."""

    kind = QUEUE_PAIR

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sessions: PeerSessions,
        hosts: RemoteHosts,
        links: Links,
        numbers: Iterator[int],
        begin: Callable[[Match], None],
    ) -> None:
        """`numbers`: of offers. `begin` begins the connection of a match that a timer has found."""
        super().__init__(sessions, hosts, links, numbers)
        self._verbs = pairing.verbs
        self._files = pairing.direct_memory
        self.datagrams: QueuePairOwner | None = None
        """Has the slots for datagrams."""
        self._loop = loop
        self._begin = begin

    def _owner(self, record: PairedRecord) -> QueuePairOwner:
        if isinstance(record, FarDatagrams):
            assert self.datagrams is not None
            return self.datagrams
        return self._verbs

    # --- queue pairs of this host

    def add(self, record: PairedRecord) -> Match | None:
        """Let a queue pair wait, or match it at once."""
        request = self._waiting[record] = RemoteQueuePair(record)
        self._assign(request)
        return self.match_of(request)

    def _assign(self, request: RemoteQueuePair) -> None:
        """Assign a queue pair to the host that owns its peer's GID, if that knows verbs."""
        record = request.local
        host = self._hosts.owner(record.network, record.peer_gid)
        if host is not None and host.hello is not None and _knows(host.hello, record):
            self._attach(request, host)

    def _offer_of(self, request: RemoteQueuePair) -> peer_wire.VerbsOffer:
        key = request.key
        return peer_wire.VerbsOffer(
            request.offer,
            key.network,
            str(key.gid),
            key.qpn,
            str(key.peer_gid),
            key.peer_qpn,
            key.type,
        )

    # --- queue pairs with a connection (`RemoteUsers`)

    def refuse(self, request: RemoteQueuePair, reason: Reason) -> None:
        """Its peer can't be had: for ever, or for now."""
        self.fail(request.local, reason)

    def why_not(self, record: PairedRecord) -> Reason | None:
        """Its process may have ended it."""
        return None if self._owner(record).has(record) else Reason.NOT_FOUND

    def enter_relay(self, user: PairedRecord) -> int:
        """The relay gets the registered memory of its process, if it may move bytes."""
        if not isinstance(user, QueuePairRecord) or not user.moving:
            return QUEUE_PAIR
        self._files.lend(user.process)
        return MOVING_QUEUE_PAIR

    def is_held(self, end: SlotEnd) -> bool:
        """Nobody has the queue pairs of a process that has hung up."""
        return False

    def reserve(self, record: PairedRecord, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot. Raises KernelRefused: there is no memory for it."""
        return self._owner(record).reserve(record, ring, connection)

    def _tell(self, record: PairedRecord, arena: Arena, slot: int) -> None:
        self._owner(record).grant_remote(record, arena, slot)

    def fail(self, record: PairedRecord, reason: Reason) -> None:
        """A connection comes to nothing. The queue pair may be gone."""
        request = self._waiting.get(record)
        if request is None:
            return
        if reason in _FINAL:
            self._owner(record).forbid(record, reason)
            return
        self._detach(request)
        request.timer = self._loop.after(AGAIN, lambda: self._assign_again(request))

    def _assign_again(self, request: RemoteQueuePair) -> None:
        request.timer = None
        self._assign(request)
        match = self.match_of(request)
        if match is not None:
            self._begin(match)

    # --- offers and matches (leader)

    def take_offer(self, host: RemoteHost, message: peer_wire.VerbsOffer) -> Match | None:
        """Keep an offer, and match it if possible.

        Raises:
            WrongMessage: the host is not the follower, or a GID is invalid.
        """
        key = QueuePairKey(
            message.network,
            peer_wire.ip_of(message.peer_gid),
            message.peer_qpn,
            peer_wire.ip_of(message.gid),
            message.qpn,
            message.service,
        )
        return self._take_offer(host, key, PeerOffer(message.offer))

    def reassign(self, host: RemoteHost) -> Iterator[Match]:
        """A host claims other addresses than before, or has said that it knows verbs."""
        for request in list(self._of[host.address].requests.values()):
            record = request.local
            if not request.connection and not self._hosts.owns(
                host, record.network, record.peer_gid
            ):
                self._detach(request)
        self._assign_all()
        yield from self.matches(host)

    # --- sessions

    def session_up(self, host: RemoteHost) -> None:
        super().session_up(host)
        # Others may have waited for the host.
        self._assign_all()

    def _assign_all(self) -> None:
        for request in list(self._waiting.values()):
            if request.host is None and request.timer is None:
                self._assign(request)
