"""Queue pairs that wait for one on another host, and their matches.

Each process tells its own router which queue pair is to be connected with which of another GID. The
follower offers those of its processes to the leader, which matches them with its own: two belong
together if they name each other. A match becomes a connection between the relays
(`remote_connections.py`).

A queue pair has nothing to fall back to. So it waits as long as it likes, whatever is missing: the
peer, its host, a session or a link. Its library decides how long that is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from dataplane.errors import WrongMessage
from dataplane.router import peer_wire
from dataplane.router.arenas import Arena, SlotEnd
from dataplane.router.library_wire import IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Loop, Timer
from dataplane.router.queue_pairs import FarDatagrams, QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import QUEUE_PAIR
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.remote_matches import OFFERS, Match
from dataplane.router.verbs_pairing import VerbsPairing

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
class RemoteQueuePair:
    """A queue pair of this host that waits for one of another."""

    local: PairedRecord
    host: RemoteHost | None = None
    """Has the peer. None: no host claims its GID."""
    offer: int = 0
    """Follower: the number under which the leader knows it."""
    connection: int = 0
    """That was begun for it; 0: none."""
    timer: Timer | None = None
    """Runs while it rests after a connection that came to nothing."""

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
    def peer_process(self) -> int:
        """Unknown: queue pairs don't enter by the processes that have them."""
        return 0


@dataclass(slots=True, eq=False)
class _HostQueuePairs:
    """The queue pairs of this host and of one other, for connections between the two."""

    requests: dict[QueuePairKey, RemoteQueuePair] = field(default_factory=dict)
    """This host's."""
    offered: dict[int, RemoteQueuePair] = field(default_factory=dict)
    """Follower: this host's, by offer."""
    offers: dict[QueuePairKey, int] = field(default_factory=dict)
    keys: dict[int, QueuePairKey] = field(default_factory=dict)
    """Leader: the other host's, both ways. Keys have this host's GID first."""

    def take(self, offer: int) -> None:
        """An offer isn't open any more."""
        key = self.keys.pop(offer, None)
        if key is not None and self.offers.get(key) == offer:
            del self.offers[key]


class RemoteQueuePairs:
    """See the module. `RemoteUsers` of queue pairs."""

    kind = QUEUE_PAIR

    def __init__(
        self,
        verbs: VerbsPairing,
        loop: Loop,
        sessions: PeerSessions,
        hosts: RemoteHosts,
        links: Links,
        numbers: Iterator[int],
        begin: Callable[[Match], None],
    ) -> None:
        """`numbers`: of offers. `begin` begins the connection of a match that a timer has found."""
        self._verbs = verbs
        self.datagrams: QueuePairOwner | None = None
        """Has the slots for datagrams."""
        self._loop = loop
        self._sessions = sessions
        self._hosts = hosts
        self._links = links
        self._numbers = numbers
        self._begin = begin
        self._waiting: dict[PairedRecord, RemoteQueuePair] = {}
        self._of: defaultdict[IPAddress, _HostQueuePairs] = defaultdict(_HostQueuePairs)

    def __len__(self) -> int:
        return len(self._waiting)

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
        return self._match_of(request)

    def _assign(self, request: RemoteQueuePair) -> None:
        """Assign a queue pair to the host that owns its peer's GID, if that knows verbs."""
        record = request.local
        host = self._hosts.owner(record.network, record.peer_gid)
        if host is None or host.hello is None or not _knows(host.hello, record):
            return
        request.host = host
        self._of[host.address].requests[request.key] = request
        if not self._hosts.leads(host):
            self._offer(host, request)

    def _offer(self, host: RemoteHost, request: RemoteQueuePair) -> None:
        """Offer it to the leader, or later if much waits to be sent: whoever asks again and again
        fills no session, which all containers use.
        """
        if self._sessions.congested(host.address):
            return
        request.offer = next(self._numbers)
        self._of[host.address].offered[request.offer] = request
        key = request.key
        message = peer_wire.VerbsOffer(
            request.offer,
            key.network,
            str(key.gid),
            key.qpn,
            str(key.peer_gid),
            key.peer_qpn,
            key.type,
        )
        self._sessions.send(host.address, message)

    def cancel(self, record: PairedRecord) -> int:
        """A queue pair doesn't wait any more. The connection that was begun for it, or 0."""
        request = self._waiting.pop(record, None)
        if request is None:
            return 0
        connection = request.connection
        self._detach(request)
        return connection

    def _detach(self, request: RemoteQueuePair) -> None:
        """Take a queue pair from the host to which it was assigned."""
        self._stop_timer(request)
        request.connection = 0
        host, request.host = request.host, None
        if host is not None:
            of_host = self._of[host.address]
            if of_host.requests.get(request.key) is request:
                del of_host.requests[request.key]
            self._withdraw(host, request)

    def _withdraw(self, host: RemoteHost, request: RemoteQueuePair) -> None:
        """Follower: take an open offer back."""
        offered = self._of[host.address].offered.pop(request.offer, None) is not None
        if offered and host.hello is not None:
            self._sessions.send(host.address, peer_wire.Withdraw(request.offer))
        request.offer = 0

    def _stop_timer(self, request: RemoteQueuePair) -> None:
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None

    # --- queue pairs with a connection (`RemoteUsers`)

    def offered(self, host: RemoteHost, offer: int) -> RemoteQueuePair | None:
        """Follower: the queue pair that was offered under a number."""
        return self._of[host.address].offered.get(offer)

    def refuse(self, request: RemoteQueuePair, reason: Reason) -> None:
        """Its peer can't be had: for ever, or for now."""
        self.fail(request.local, reason)

    def why_not(self, record: PairedRecord) -> Reason | None:
        """Its process may have ended it."""
        return None if self._owner(record).has(record) else Reason.NOT_FOUND

    def is_held(self, end: SlotEnd) -> bool:
        """Nobody has the queue pairs of a process that has hung up."""
        return False

    def reserve(self, record: PairedRecord, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot. Raises KernelRefused: there is no memory for it."""
        return self._owner(record).reserve(record, ring, connection)

    def grant(self, record: PairedRecord, arena: Arena, slot: int) -> None:
        """It has a slot."""
        request = self._waiting.pop(record)
        if request.host is not None:
            # It was accepted, not withdrawn.
            self._of[request.host.address].offered.pop(request.offer, None)
        self._detach(request)
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
        match = self._match_of(request)
        if match is not None:
            self._begin(match)

    def retry(self, record: PairedRecord) -> None:
        """A connection comes to nothing, and the queue pair goes on waiting."""
        request = self._waiting.get(record)
        if request is not None:
            request.connection = request.offer = 0

    # --- offers and matches (leader)

    def take_offer(self, host: RemoteHost, message: peer_wire.VerbsOffer) -> Match | None:
        """Keep an offer, and match it if possible.

        Raises:
            WrongMessage: the host is not the follower, or a GID is invalid.
        """
        if not self._hosts.leads(host):
            raise WrongMessage("the leader sends no offers")
        of_host = self._of[host.address]
        key = QueuePairKey(
            message.network,
            peer_wire.ip_of(message.peer_gid),
            message.peer_qpn,
            peer_wire.ip_of(message.gid),
            message.qpn,
            message.service,
        )
        of_host.take(message.offer)
        if len(of_host.keys) >= OFFERS:
            self._sessions.send(host.address, peer_wire.Decline(message.offer, Reason.LIMIT))
            return None
        old = of_host.offers.get(key)
        if old is not None:
            of_host.take(old)
        of_host.offers[key] = message.offer
        of_host.keys[message.offer] = key
        return self._match(host, key)

    def withdrawn(self, host: RemoteHost, offer: int) -> None:
        """An offer isn't open any more."""
        self._of[host.address].take(offer)

    def _match_of(self, request: RemoteQueuePair) -> Match | None:
        return None if request.host is None else self._match(request.host, request.key)

    def _match(self, host: RemoteHost, key: QueuePairKey) -> Match | None:
        """The queue pairs of both hosts that belong together, if there are both."""
        of_host = self._of[host.address]
        request, offer = of_host.requests.get(key), of_host.offers.get(key)
        if request is None or offer is None or request.connection:
            return None
        if not self._hosts.owns(host, key.network, key.peer_gid):
            return None
        if not self._links.is_up(host.address):
            return None
        if not self._hosts.may_use(key.network, self._links.link(host.address).transport):
            return None
        of_host.take(offer)
        return Match(self, host, request, offer)

    def matches(self, host: RemoteHost) -> Iterator[Match]:
        """What can be matched by now: a link is up."""
        for key in list(self._of[host.address].requests):
            match = self._match(host, key)
            if match is not None:
                yield match

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
        """The leader of a new session knows no offers. Others may have waited for the host."""
        if not self._hosts.leads(host):
            for request in list(self._of[host.address].requests.values()):
                self._offer(host, request)
        self._assign_all()

    def eased(self, host: RemoteHost) -> None:
        """Follower: the session has room again for offers that were held back."""
        if not self._hosts.leads(host):
            for request in list(self._of[host.address].requests.values()):
                if not request.offer and not request.connection:
                    self._offer(host, request)

    def _assign_all(self) -> None:
        for request in list(self._waiting.values()):
            if request.host is None and request.timer is None:
                self._assign(request)

    def session_down(self, host: RemoteHost) -> None:
        """Offers end with the session; queue pairs wait for the next."""
        of_host = self._of[host.address]
        of_host.offers.clear()
        of_host.keys.clear()
        of_host.offered.clear()

    def forget(self, host: RemoteHost) -> None:
        """No network is shared with the host any more."""
        for request in list(self._of[host.address].requests.values()):
            self._detach(request)
        self._of.pop(host.address, None)
