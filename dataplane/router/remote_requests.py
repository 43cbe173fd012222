"""Requests that wait for an end on another host, and their match with the requests of that host.

Each end sends a request to its own router. The follower offers its requests to the leader, which
matches them with its own: they belong together if their addresses are each other's. A match is
returned to the caller, which begins a connection (`remote_connections.py`).

A request waits for `OWNER_PATIENCE` until a host claims its peer's address, and for the peer's
request as long as the session lasts. Where the link is TCP between the relays, it also waits until
the leader's `EntryRule` admits it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from dataplane.errors import WrongMessage
from dataplane.router import peer_wire
from dataplane.router.arenas import Arena, ConnectionEnd
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import Address, IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Loop, Timer
from dataplane.router.pair_requests import Key, PairRequest
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import CONNECTION
from dataplane.router.remote_events import Transport
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.remote_matches import OFFERS, Match
from dataplane.router.seams import SocketTable

OWNER_PATIENCE: Final = 2.0
"""Seconds for which a request waits until a host claims its peer's address: the peer's container
may have just started."""
_U32: Final = (1 << 32) - 1
_WAITING: Final = (Reason.FEW, Reason.SLOW, Reason.BULK, Reason.LIMIT)


@dataclass(slots=True, eq=False)
class RemoteRequest:
    """A request of this host for a connection to another host."""

    local: PairRequest
    network: str
    server: Address
    """The address of the peer: where a connection to a VIP leads."""
    host: RemoteHost | None = None
    """Has the peer. None: no host claims its address."""
    offer: int = 0
    """Follower: the number under which the leader knows it."""
    connection: int = 0
    """The connection that was begun for it; 0: none."""
    timer: Timer | None = None
    held: Reason | None = None
    """Follower: why the leader was told not to take the offer yet."""
    match: PeerOffer | None = None
    """Leader: the follower's request for the same connection, as it was last considered."""
    waits: Reason | None = None
    """Why it waits, though both ends have sent requests, if that is known."""
    told: Reason | None = None
    """Leader: what the follower was told about that."""

    @property
    def peer_process(self) -> int:
        """Leader: the follower's number of the process at the other end; 0: unknown."""
        return 0 if self.match is None else self.match.process

    @property
    def key(self) -> Key:
        """Network and addresses, this host's first."""
        return self.network, self.local.message.local, self.server


def waits(number: int) -> Reason | None:
    """A peer's reason why a request waits; None: it doesn't. A later version may have more."""
    if not number:
        return None
    return next((reason for reason in _WAITING if reason == number), Reason.FEW)


class EntryRule(Protocol):
    """Which connections may enter the relays' TCP connections. The leader's decides."""

    def may_enter(self, request: RemoteRequest) -> bool:
        """Whether a connection may enter now. If not, its request waits: see
        `Remotes.reconsider`.
        """

    def why_waiting(self, request: RemoteRequest) -> Reason:
        """Why it may not."""

    def held(self, request: RemoteRequest) -> Reason | None:
        """Why this host holds a request back for a while, leading or not; None: it doesn't."""

    def forget(self, request: RemoteRequest) -> None:
        """A request waits no more, or that of the other end doesn't."""


class Closed:
    """No connection enters: an `EntryRule`."""

    def may_enter(self, request: RemoteRequest) -> bool:
        return False

    def why_waiting(self, request: RemoteRequest) -> Reason:
        return Reason.FEW

    def held(self, request: RemoteRequest) -> Reason | None:
        return None

    def forget(self, request: RemoteRequest) -> None:
        pass


class Open(Closed):
    """Each connection enters: an `EntryRule` for tests."""

    def may_enter(self, request: RemoteRequest) -> bool:
        return True


class PeerOffer(NamedTuple):
    """An offer of the other host."""

    number: int
    process: int
    held: Reason | None
    """Why it is not to be taken yet."""


@dataclass(slots=True, eq=False)
class _HostRequests:
    """The requests of this host and of one other, for connections between the two."""

    requests: dict[Key, RemoteRequest] = field(default_factory=dict)
    """This host's."""
    offered: dict[int, RemoteRequest] = field(default_factory=dict)
    """Follower: this host's, by offer."""
    offers: dict[Key, PeerOffer] = field(default_factory=dict)
    keys: dict[int, Key] = field(default_factory=dict)
    """Leader: the other host's, both ways. Keys have this host's address first."""

    def take(self, offer: int) -> None:
        """An offer isn't open any more."""
        key = self.keys.pop(offer, None)
        if key is not None and (known := self.offers.get(key)) and known.number == offer:
            del self.offers[key]

    def request_for(self, offer: int) -> RemoteRequest | None:
        """This host's request that an offer of the other host fits."""
        key = self.keys.get(offer)
        return None if key is None else self.requests.get(key)


class RemoteRequests:
    """See the module. `RemoteUsers` of connections."""

    kind = CONNECTION

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sessions: PeerSessions,
        hosts: RemoteHosts,
        links: Links,
        sockets: SocketTable,
        rule: EntryRule,
        numbers: Iterator[int],
    ) -> None:
        """`numbers`: of offers."""
        self._pairing = pairing
        self._loop = loop
        self._sessions = sessions
        self._hosts = hosts
        self._links = links
        self._sockets = sockets
        self._rule = rule
        self.refused: Counter[int] = Counter()
        """Requests that were refused since the start, by reason."""
        self._requests: dict[PairRequest, RemoteRequest] = {}
        self._unowned: dict[PairRequest, RemoteRequest] = {}
        """Those whose peer's address no host claims."""
        self._of: defaultdict[IPAddress, _HostRequests] = defaultdict(_HostRequests)
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._requests)

    # --- requests of this host

    def add(self, local: PairRequest, network: KnownNetwork) -> Match | None:
        """Let a request wait, match it at once, or refuse it."""
        if not self._is_unique(local, network):
            local.ambiguous = True
            self._pairing.refuse(local, Reason.AMBIGUOUS)
            return None
        request = RemoteRequest(local, network.id, local.peer)
        self._requests[local] = request
        if not self._assign(request):
            self._wait_for_owner(request)
        return self.match_of(request)

    def _is_unique(self, local: PairRequest, network: KnownNetwork) -> bool:
        """Whether no other connection of the container leads from the same port to the same
        server.
        """
        server = local.peer
        leading = [
            server,
            *(Address(vip, server.port) for vip in network.leading.get(server.ip, ())),
        ]
        return not any(
            remote != local.message.remote
            and self._sockets.exists(local.namespace, local.message.local, remote)
            for remote in leading
        )

    def _assign(self, request: RemoteRequest) -> bool:
        """Assign a request to the host that owns its peer's address; false if none does."""
        host = self._hosts.owner(request.network, request.server.ip)
        if host is None:
            return False
        assert host.hello is not None
        self._unowned.pop(request.local, None)
        self._stop_timer(request)
        transport = self._links.transport(host.address)
        if transport is None:
            self.refuse(request, Reason.PEER_NO_RDMA)
        elif not self._hosts.may_use(request.network, transport):
            self.refuse(request, Reason.REMOTE_OFF)
        elif self._links.has_failed(host.address):
            self.refuse(request, Reason.NO_LINK)
        else:
            request.host = host
            self._of[host.address].requests[request.key] = request
            if not self._hosts.leads(host):
                self._offer(host, request)
        return True

    def _wait_for_owner(self, request: RemoteRequest) -> None:
        self._unowned[request.local] = request
        request.timer = self._loop.after(OWNER_PATIENCE, lambda: self._refuse_unowned(request))

    def _refuse_unowned(self, request: RemoteRequest) -> None:
        known = self._pairing.knowledge.networks.get(request.network)
        is_foreign = known is not None and known.foreign
        self.refuse(request, Reason.NO_ENDPOINT if is_foreign else Reason.REMOTE)

    def refuse(self, request: RemoteRequest, reason: Reason) -> None:
        """Answer a request: its connection stays on TCP."""
        self.refused[reason] += 1
        self._pairing.refuse(request.local, reason)

    def cancel(self, local: PairRequest) -> int:
        """A request doesn't wait any more. The connection that was begun for it, or 0."""
        request = self._requests.pop(local, None)
        if request is None:
            return 0
        connection = request.connection
        self._detach(request)
        return connection

    def refuse_all(self, condition: Callable[[RemoteRequest], bool], reason: Reason) -> None:
        """Refuse requests for which no connection was begun."""
        for request in list(self._requests.values()):
            if not request.connection and condition(request):
                self.refuse(request, reason)

    # --- requests with a connection

    def fail(self, local: PairRequest, reason: Reason) -> None:
        """A connection comes to nothing. Its request may be gone."""
        request = self._requests.pop(local, None)
        if request is not None:
            self._detach(request)
            self.refuse(request, reason)

    def retry(self, local: PairRequest) -> None:
        """A connection comes to nothing, and its request goes on waiting."""
        request = self._requests.get(local)
        if request is not None:
            request.connection = request.offer = 0

    def why_not(self, local: PairRequest) -> Reason | None:
        """Why a request's connection gets no path; None: it may.

        A process must still have the connected socket.
        """
        asked = local.message
        if not self._sockets.is_open(local.namespace, asked.local, asked.remote, asked.cookie):
            return Reason.NOT_FOUND
        return self._pairing.why_apart(local)

    def is_held(self, end: ConnectionEnd) -> bool:
        """Whether any process has the socket of an end."""
        return self._sockets.is_held(end.namespace, end.local, end.remote, end.cookie)

    def reserve(self, local: PairRequest, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot. Raises KernelRefused: there is no memory for it."""
        return self._pairing.reserve(local, ring, connection)

    def grant(self, local: PairRequest, arena: Arena, slot: int) -> None:
        """A connection is granted: its request has its answer."""
        request = self._requests.pop(local)
        if request.host is not None:
            # It was accepted, not withdrawn.
            self._of[request.host.address].offered.pop(request.offer, None)
        self._detach(request)
        self._pairing.grant(local, arena, slot)

    def _detach(self, request: RemoteRequest) -> None:
        """Take a request from the host to which it was assigned."""
        self._stop_timer(request)
        self._unowned.pop(request.local, None)
        request.connection = 0
        self._rule.forget(request)
        host, request.host = request.host, None
        if host is not None:
            of_host = self._of[host.address]
            if of_host.requests.get(request.key) is request:
                del of_host.requests[request.key]
            offered = of_host.offered.pop(request.offer, None) is not None
            if offered and host.hello is not None:
                self._sessions.send(host.address, peer_wire.Withdraw(request.offer))
            request.offer = 0

    def _stop_timer(self, request: RemoteRequest) -> None:
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None

    # --- offers

    def _offer(self, host: RemoteHost, request: RemoteRequest) -> None:
        """Offer it to the leader, or later if much waits to be sent: whoever asks again and again
        fills no session, which all containers use.
        """
        if self._sessions.congested(host.address):
            return
        request.offer = next(self._numbers)
        self._of[host.address].offered[request.offer] = request
        self._send_offer(host, request)

    def _send_offer(self, host: RemoteHost, request: RemoteRequest) -> None:
        held = request.held = request.waits = self._held(host, request)
        knows = host.hello is not None and host.hello.relay
        message = peer_wire.Offer(
            request.offer,
            request.network,
            str(request.local.message.local),
            str(request.server),
            request.local.process & _U32 if knows else 0,
            held or Reason.NONE,
        )
        self._sessions.send(host.address, message)

    def _held(self, host: RemoteHost, request: RemoteRequest) -> Reason | None:
        """Follower: why this host holds a request back."""
        is_relay = self._links.transport(host.address) is Transport.RELAY
        return self._rule.held(request) if is_relay else None

    def offer_again(self) -> None:
        """Follower: tell leaders which offers they may take by now, and which they may not."""
        for of_host in self._of.values():
            for request in list(of_host.offered.values()):
                host = request.host
                if request.connection or host is None or host.hello is None:
                    continue
                if self._held(host, request) is not request.held:
                    self._send_offer(host, request)

    def told_to_wait(self, host: RemoteHost, message: peer_wire.Waits) -> None:
        """Follower: the leader says why offers wait."""
        for offer in message.offers:
            request = self.offered(host, offer)
            if request is not None and request.held is None:
                request.waits = waits(message.reason)

    def offered(self, host: RemoteHost, offer: int) -> RemoteRequest | None:
        """Follower: the request that was offered under a number."""
        return self._of[host.address].offered.get(offer)

    def take_offer(
        self, host: RemoteHost, message: peer_wire.Offer, reason: Reason | None
    ) -> Match | None:
        """Leader: keep an offer, and match it if possible. `reason`: decline it.

        Raises:
            WrongMessage: the host is not the follower, or an address is invalid.
        """
        if not self._hosts.leads(host):
            raise WrongMessage("the leader sends no offers")
        of_host = self._of[host.address]
        key = (
            message.network,
            peer_wire.end_of(message.remote),
            peer_wire.end_of(message.local),
        )
        if of_host.keys.get(message.offer, key) != key:
            self.withdrawn(host, message.offer)
        is_known = message.offer in of_host.keys
        if reason is None and self._links.has_failed(host.address):
            reason = Reason.NO_LINK
        elif reason is None and len(of_host.keys) >= OFFERS and not is_known:
            reason = Reason.LIMIT
        if reason is not None:
            self._sessions.send(host.address, peer_wire.Decline(message.offer, reason))
            return None
        old = of_host.offers.get(key)
        if old is not None:
            of_host.keys.pop(old.number, None)
        of_host.offers[key] = PeerOffer(message.offer, message.process, waits(message.waits))
        of_host.keys[message.offer] = key
        return self._match(host, key)

    def withdrawn(self, host: RemoteHost, offer: int) -> None:
        """Leader: an offer isn't open any more."""
        of_host = self._of[host.address]
        request = of_host.request_for(offer)
        of_host.take(offer)
        if request is not None:
            self._rule.forget(request)

    def decline_all(self, host: RemoteHost, reason: Reason) -> None:
        """Leader: no offer of a host can be had."""
        for offer in list(self._of[host.address].keys):
            self.withdrawn(host, offer)
            self._sessions.send(host.address, peer_wire.Decline(offer, reason))

    # --- matches (leader)

    def match_of(self, request: RemoteRequest) -> Match | None:
        """The match of a request, if there is one by now."""
        return None if request.host is None else self._match(request.host, request.key)

    def _match(self, host: RemoteHost, key: Key) -> Match | None:
        """The requests of both hosts for one connection, if there are both."""
        of_host = self._of[host.address]
        request, offer = of_host.requests.get(key), of_host.offers.get(key)
        if request is None or offer is None or request.connection:
            return None
        network, _, server = key
        if not self._hosts.owns(host, network, server.ip):
            return None
        if not self._links.is_up(host.address):
            return None
        transport = self._links.link(host.address).transport
        if not self._hosts.may_use(network, transport):
            return None
        request.match = offer
        if transport is Transport.RELAY and not self._rule.may_enter(request):
            return None
        of_host.take(offer.number)
        return Match(self, host, request, offer.number)

    def why_waiting(self, local: PairRequest) -> Reason:
        """Why a request waits."""
        request = self._requests.get(local)
        if request is None or request.host is None or request.connection:
            return Reason.PEER_SHORT
        address = request.host.address
        leads = self._hosts.leads(request.host)
        if self._links.transport(address) is not Transport.RELAY or (
            leads and request.key not in self._of[address].offers
        ):
            return Reason.PEER_SHORT
        return self._rule.why_waiting(request)

    def matches(self, host: RemoteHost) -> Iterator[Match]:
        """What can be matched by now: a link is up, or the host has claimed addresses."""
        for key in list(self._of[host.address].requests):
            match = self._match(host, key)
            if match is not None:
                yield match

    def reassign(self, host: RemoteHost) -> Iterator[Match]:
        """A host claims other addresses than before. Matches that are possible now."""
        for request in list(self._of[host.address].requests.values()):
            claimed = host.owned.get(request.network, ())
            if not request.connection and request.server.ip not in claimed:
                self._detach(request)
                self._wait_for_owner(request)
        for request in list(self._unowned.values()):
            self._assign(request)
            match = self.match_of(request)
            if match is not None:
                yield match
        yield from self.matches(host)

    # --- sessions

    def session_up(self, host: RemoteHost) -> None:
        """The leader of a new session knows no offers."""
        if not self._hosts.leads(host):
            for request in list(self._of[host.address].requests.values()):
                self._offer(host, request)

    def eased(self, host: RemoteHost) -> None:
        """Follower: the session has room again for offers that were held back."""
        if not self._hosts.leads(host):
            for request in list(self._of[host.address].requests.values()):
                if not request.offer and not request.connection:
                    self._offer(host, request)

    def session_down(self, host: RemoteHost) -> None:
        """Offers end with the session; requests wait for the next."""
        of_host = self._of[host.address]
        for request in of_host.requests.values():
            self._rule.forget(request)
        of_host.offers.clear()
        of_host.keys.clear()
        of_host.offered.clear()

    def forget(self, host: RemoteHost) -> None:
        """No network is shared with the host any more."""
        self._of.pop(host.address, None)
