"""Requests that wait for an end on another host, and their match with the requests of that host.

Each end sends a request to its own router. The follower offers its requests to the leader, which
matches them with its own: they belong together if their addresses are each other's. A match is
returned to the caller, which begins a connection (`remote_connections.py`).

A request waits for `OWNER_PATIENCE` until a host claims its peer's address, and for the peer's
request as long as the session lasts. Where the link is TCP between the relays, it also waits until
the leader's `EntryRule` admits it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from dataplane.router import peer_wire
from dataplane.router.arenas import Arena, ConnectionEnd
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import Address, IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Loop
from dataplane.router.pair_requests import Key, PairRequest
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import CONNECTION
from dataplane.router.remote_events import Transport
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.remote_matches import Match, PeerOffer, RemoteUser, RemoteUsers
from dataplane.router.seams import SocketTable

OWNER_PATIENCE: Final = 2.0
"""Seconds for which a request waits until a host claims its peer's address: the peer's container
may have just started."""
_U32: Final = (1 << 32) - 1
_WAITING: Final = (Reason.FEW, Reason.SLOW, Reason.BULK, Reason.LIMIT)


@dataclass(slots=True, eq=False)
class RemoteRequest(RemoteUser):
    """A request of this host for a connection to another host."""

    local: PairRequest
    network: str
    server: Address
    """The address of the peer: where a connection to a VIP leads."""
    held: Reason | None = None
    """Follower: why the leader was told not to take the offer yet."""
    waits: Reason | None = None
    """Why it waits, though both ends have sent requests, if that is known."""
    told: Reason | None = None
    """Leader: what the follower was told about that."""

    @property
    def key(self) -> Key:
        return self.network, self.local.message.local, self.server

    @property
    def peer(self) -> tuple[str, IPAddress]:
        return self.network, self.server.ip


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


class RemoteRequests(RemoteUsers[RemoteRequest]):
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
        super().__init__(sessions, hosts, links, numbers)
        self._pairing = pairing
        self._loop = loop
        self._sockets = sockets
        self._rule = rule
        self.refused: Counter[int] = Counter()
        """Requests that were refused since the start, by reason."""
        self._unowned: dict[PairRequest, RemoteRequest] = {}
        """Those whose peer's address no host claims."""

    # --- requests of this host

    def add(self, local: PairRequest, network: KnownNetwork) -> Match | None:
        """Let a request wait, match it at once, or refuse it."""
        if not self._is_unique(local, network):
            local.ambiguous = True
            self._pairing.refuse(local, Reason.AMBIGUOUS)
            return None
        request = RemoteRequest(local, network.id, local.peer)
        self._waiting[local] = request
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
            self._attach(request, host)
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

    def refuse_all(self, condition: Callable[[RemoteRequest], bool], reason: Reason) -> None:
        """Refuse requests for which no connection was begun."""
        for request in list(self._waiting.values()):
            if not request.connection and condition(request):
                self.refuse(request, reason)

    # --- requests with a connection

    def fail(self, local: PairRequest, reason: Reason) -> None:
        """A connection comes to nothing. Its request may be gone."""
        request = self._waiting.pop(local, None)
        if request is not None:
            self._detach(request)
            self.refuse(request, reason)

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

    def _tell(self, local: PairRequest, arena: Arena, slot: int) -> None:
        """Its request has its answer."""
        self._pairing.grant(local, arena, slot)

    def _detach(self, request: RemoteRequest) -> None:
        self._unowned.pop(request.local, None)
        self._rule.forget(request)
        super()._detach(request)

    # --- offers

    def _offer_of(self, request: RemoteRequest) -> peer_wire.Offer:
        host = request.host
        assert host is not None
        held = request.held = request.waits = self._held(host, request)
        knows = host.hello is not None and host.hello.relay
        return peer_wire.Offer(
            request.offer,
            request.network,
            str(request.local.message.local),
            str(request.server),
            request.local.process & _U32 if knows else 0,
            held or Reason.NONE,
        )

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
                    self._sessions.send(host.address, self._offer_of(request))

    def told_to_wait(self, host: RemoteHost, message: peer_wire.Waits) -> None:
        """Follower: the leader says why offers wait."""
        for offer in message.offers:
            request = self.offered(host, offer)
            if request is not None and request.held is None:
                request.waits = waits(message.reason)

    def take_offer(
        self, host: RemoteHost, message: peer_wire.Offer, reason: Reason | None
    ) -> Match | None:
        """Leader: keep an offer, and match it if possible. `reason`: decline it.

        Raises:
            WrongMessage: the host is not the follower, or an address is invalid.
        """
        key = (
            message.network,
            peer_wire.end_of(message.remote),
            peer_wire.end_of(message.local),
        )
        if reason is None and self._links.has_failed(host.address):
            reason = Reason.NO_LINK
        offer = PeerOffer(message.offer, message.process, waits(message.waits))
        return self._take_offer(host, key, offer, reason)

    def withdrawn(self, host: RemoteHost, offer: int) -> None:
        """Leader: an offer isn't open any more."""
        of_host = self._of[host.address]
        key = of_host.keys.get(offer)
        request = None if key is None else of_host.requests.get(key)
        super().withdrawn(host, offer)
        if request is not None:
            self._rule.forget(request)

    def decline_all(self, host: RemoteHost, reason: Reason) -> None:
        """Leader: no offer of a host can be had."""
        for offer in list(self._of[host.address].keys):
            self.withdrawn(host, offer)
            self._sessions.send(host.address, peer_wire.Decline(offer, reason))

    # --- matches (leader)

    def _may_match(self, request: RemoteRequest, transport: Transport) -> bool:
        return transport is not Transport.RELAY or self._rule.may_enter(request)

    def why_waiting(self, local: PairRequest) -> Reason:
        """Why a request waits."""
        request = self._waiting.get(local)
        if request is None or request.host is None or request.connection:
            return Reason.PEER_SHORT
        address = request.host.address
        leads = self._hosts.leads(request.host)
        if self._links.transport(address) is not Transport.RELAY or (
            leads and request.key not in self._of[address].offers
        ):
            return Reason.PEER_SHORT
        return self._rule.why_waiting(request)

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

    def session_down(self, host: RemoteHost) -> None:
        """Offers end with the session; requests wait for the next."""
        for request in self._of[host.address].requests.values():
            self._rule.forget(request)
        super().session_down(host)
