"""Connections between containers of this host and of other hosts.

This module passes what sessions, links, the relay and this host's registry report to these parts:

    remote_hosts.py        the other hosts, and which of them owns an address
    remote_requests.py     requests that wait for an end on another host, and their matches
    remote_events.py       phases, events and actions of a connection
    remote_end.py          what an event means in a phase
    remote_connections.py  the connections: executes the actions
    verbs_interhost.py     connections of rdma_cm, and datagrams
    links.py               the links between the relays, and their transports

A peer's router can affect only connections with its own host. Each router checks its own end with
its own kernel, when the end sends its request and before it is granted. There is no I/O except
through the interfaces that the constructor takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Set
from functools import partial
from typing import Any, Final, Generic, TypeVar

from dataplane.router import peer_wire, relay_wire
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.lent_arenas import LentArenas
from dataplane.router.library_wire import IPAddress
from dataplane.router.link_table import LinkSockets
from dataplane.router.links import KINDS, Links
from dataplane.router.loop import Loop
from dataplane.router.pair_requests import PairRequest
from dataplane.router.pairing import Pairing
from dataplane.router.queue_pairs import FarDatagrams, QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import RelayKind
from dataplane.router.remote_connections import (
    RemoteConnections,
    Trace,
    log_invalid,
    note_left,
    transport_of,
    why_stalled,
)
from dataplane.router.remote_events import Event, On, Transport
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.remote_matches import Match, RemoteUsers
from dataplane.router.remote_requests import EntryRule, RemoteRequest, RemoteRequests, waits
from dataplane.router.seams import ArenaMemory, SocketTable
from dataplane.router.sessions import SessionUser
from dataplane.router.verbs_interhost import VerbsInterHost
from dataplane.router.verbs_remote import RemoteQueuePairs

OPENING: Final = "it is being opened"
"""Why a transport can't be used yet."""
SESSION_PATIENCE: Final = 30.0
"""Seconds for which requests wait for a session that was lost."""

SessionsT = TypeVar("SessionsT", bound=PeerSessions)


class Remotes(LentArenas, Generic[SessionsT]):
    """A `RemotePairing`, `SessionUser` and `LinkOwner`."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sessions: Callable[[SessionUser], SessionsT],
        tell_relay: Callable[..., None],
        sockets: SocketTable,
        memory: ArenaMemory,
        hello_changed: Callable[[], None],
        link_sockets: Callable[[SessionsT, Links], LinkSockets],
        rule: EntryRule,
        kinds: Mapping[Transport, int] = KINDS,
        trace: Trace = log_invalid,
    ) -> None:
        """`sessions` and `link_sockets` make these for their user. `tell_relay` is
        `RelayProcess.send`. `kinds`: the relay's numbers of transports.
        """
        LentArenas.__init__(self, pairing, tell_relay, memory)
        self._loop = loop
        self._hello_changed = hello_changed
        self.sessions = sessions(self)
        self.hosts = RemoteHosts(self.sessions, lambda: pairing.knowledge)
        self.links = Links(
            loop, tell_relay, self.sessions, self, partial(link_sockets, self.sessions), kinds
        )
        offers = itertools.count(1)
        self.requests = RemoteRequests(
            pairing, loop, self.sessions, self.hosts, self.links, sockets, rule, offers
        )
        self.queue_pairs = RemoteQueuePairs(
            pairing, loop, self.sessions, self.hosts, self.links, offers, self._begin
        )
        self._users: tuple[RemoteUsers[Any], ...] = self.requests, self.queue_pairs
        self.connections = RemoteConnections(
            pairing, loop, self.sessions, tell_relay, self._users, self.links, memory, trace
        )
        self.verbs = VerbsInterHost(pairing, loop, self.sessions, self.hosts, self.why_not)
        self.queue_pairs.datagrams = self.verbs.datagrams
        self.why = dict.fromkeys(Transport, "the router has just started")
        """Why the relay can't use a transport; "" if it can."""

    # --- networks, hosts and the device

    def ready(self, transport: Transport) -> bool:
        """Whether this host's relay can use a transport."""
        return not self.why[transport]

    def wanted(self) -> frozenset[IPAddress]:
        """The hosts with which sessions are needed."""
        connected = {host.address for host in self.hosts if self.connections.of(host)}
        encrypted = self._pairing.knowledge.encrypted_peers
        return self.hosts.sharing(*Transport) | encrypted | connected

    def hellos(self) -> list[peer_wire.PeerHello]:
        """The Hello messages of the hosts with a session."""
        return [host.hello for host in self.hosts if host.hello is not None]

    def learned(self) -> None:
        """The driver has sent a snapshot, or some time has passed."""
        wanted = self.wanted()
        for host in self.hosts:
            if host.address not in wanted:
                self._forget_host(host)
        networks = self._pairing.knowledge.networks
        allowed = {
            network.id for network in networks.values() if any(map(network.may_use, Transport))
        }
        self.requests.refuse_all(lambda request: request.network not in allowed, Reason.REMOTE_OFF)
        for host in self.hosts:
            self.hosts.tell_owned(host)
        self.links.tick()

    def use(self, transport: Transport, why: str) -> None:
        """The relay can use a transport (""), or why it can't."""
        before, self.why[transport] = self.ready(transport), why
        if self.ready(transport) and not before:
            for host in self.hosts:
                if transport is Transport.RDMA:
                    self.links.device_changed(host.address)
                self.links.wake(host.address)
        elif before and not self.ready(transport):
            self.requests.refuse_all(self._is_hopeless, Reason.NO_RDMA)

    def _is_hopeless(self, request: RemoteRequest) -> bool:
        """Whether there is no transport for a request."""
        host = request.host
        return not (self.transports(host.address) if host else any(map(self.ready, Transport)))

    def enter(self, requests: Iterable[RemoteRequest]) -> None:
        """The `EntryRule` admits these requests."""
        for request in requests:
            self._begin(self.requests.match_of(request))

    def reconsider(self, host: RemoteHost) -> None:
        """Something has changed for the requests that wait for the `EntryRule`."""
        for users in self._users:
            for match in users.matches(host):
                self._begin(match)

    def _forget_host(self, host: RemoteHost) -> None:
        """No network is shared with it any more."""
        self._refuse_all(host, Reason.REMOTE)
        self.links.forget(host.address)
        for users in self._users:
            users.forget(host)
        self.verbs.end_all(host)
        self.connections.forget(host)
        self.hosts.remove(host)

    def _refuse_all(self, host: RemoteHost, reason: Reason) -> None:
        self.requests.refuse_all(lambda request: request.host is host, reason)

    # --- requests and ends of this host (`RemotePairing`)

    def why_not(self, network: KnownNetwork) -> Reason | None:
        """Why no connection of a network can get a path to another host; None: some may."""
        allowed = set(filter(network.may_use, Transport))
        if network.foreign and not (allowed and network.peers):
            return Reason.NO_ENDPOINT
        if not allowed:
            return Reason.REMOTE_OFF
        if not network.peers:
            return Reason.REMOTE
        usable = set(filter(self.ready, allowed))
        if not usable:
            return Reason.NO_RDMA
        hosts = [host for host in map(self.hosts.get, network.peers) if host and host.hello]
        if not hosts:
            return Reason.NO_SESSION
        shared = any(usable & host.transports for host in hosts)
        return None if shared else Reason.PEER_NO_RDMA

    def why_waiting(self, request: PairRequest) -> Reason:
        """Why a request waits."""
        return self.requests.why_waiting(request)

    def transport(self, connection: int) -> Transport:
        """The transport of a connection."""
        return transport_of(self.connections.get(connection))

    def why_stalled(self, connection: int) -> Reason | None:
        """Why a connection carries nothing, for now or for good; None: it does."""
        return why_stalled(self.connections.get(connection), self.links)

    def pair(self, request: PairRequest, network: KnownNetwork) -> None:
        """Take a request whose other end is on another host."""
        self._begin(self.requests.add(request, network))

    def _begin(self, match: Match | None) -> None:
        """Leader: begin a connection."""
        if match is None:
            return
        transport = self.links.link(match.host.address).transport
        reason = self.connections.begin(match, Event(On.LEAD, transport))
        if reason is not None:
            self.sessions.send(match.host.address, peer_wire.Decline(match.offer, reason))
            match.users.refuse(match.request, reason)

    def cancel(self, request: PairRequest) -> None:
        """A request doesn't wait any more."""
        self.connections.step_number(self.requests.cancel(request), Event(On.REQUEST_GONE))

    def connect(self, queue_pair: QueuePairRecord | FarDatagrams) -> None:
        """Take a queue pair whose peer is on another host."""
        self._begin(self.queue_pairs.add(queue_pair))

    def withdraw(self, queue_pair: QueuePairRecord | FarDatagrams) -> None:
        """A queue pair doesn't wait any more."""
        self.connections.step_number(self.queue_pairs.cancel(queue_pair), Event(On.REQUEST_GONE))

    def released(self, connection: int) -> None:
        """No process of this host has the end any more."""
        self.connections.step_number(connection, Event(On.RELEASED))

    def orphaned(self, connection: int) -> None:
        """The end's process has hung up; others may have its socket."""
        self.connections.orphaned(connection)

    def leave(self, connection: int) -> None:
        """Bring a connection back to TCP."""
        self.connections.step_number(connection, Event(On.LEAVE_PATH, reason=Reason.REMOTE_OFF))

    # --- the relay

    def relay_message(self, message: relay_wire.Message) -> None:
        """The relay reports something about a link or a connection."""
        match message:
            case relay_wire.Offered(kind=RelayKind.LINKED):
                self.links.linked(message)
            case relay_wire.RelayOutcome(kind=RelayKind.DOWN):
                self.links.down(message)
            case relay_wire.RelayOutcome(kind=RelayKind.CONNECTED):
                self.links.connected(message)
            case relay_wire.RelayFile():
                self._pairing.direct_memory.returned(message.file)
            case relay_wire.RelayFrame():
                self.links.frame(message)
            case relay_wire.Number() | relay_wire.Offered() | relay_wire.RelayOutcome():
                self.connections.relay_reported(message)

    def relay_died(self) -> None:
        """What the relay had not delivered is lost."""
        for transport in Transport:
            self.use(transport, "the relay ended; it is started again")
        self._lent.clear()
        self.connections.relay_died()
        self.relay_lost()
        self.links.relay_died()
        self.connections.all_dropped()
        self._pairing.retire_remote()
        for host in self.hosts:
            self.links.wake(host.address)

    # --- links (`LinkOwner`)

    def has_session(self, peer: IPAddress) -> bool:
        """Whether there is a session between the two routers."""
        host = self.hosts.get(peer)
        return host is not None and host.hello is not None

    def transports(self, peer: IPAddress) -> Set[Transport]:
        """The transports that both hosts have; none without a session."""
        host = self.hosts.get(peer)
        has = frozenset() if host is None else self.hosts.transports(host)
        return frozenset(filter(self.ready, has))

    def opens_rdma(self, peer: IPAddress) -> bool:
        """Whether this host's device is being opened, and the peer has one."""
        host = self.hosts.get(peer)
        opening = self.why[Transport.RDMA] == OPENING
        return opening and host is not None and Transport.RDMA in self.hosts.transports(host)

    def leads(self, peer: IPAddress) -> bool:
        """Whether this host makes the link."""
        host = self.hosts.get(peer)
        return host is not None and self.hosts.leads(host)

    def has_connections(self, peer: IPAddress) -> bool:
        """Whether there are connections on the link."""
        host = self.hosts.get(peer)
        return host is not None and self.connections.are_on_link(host)

    def is_empty(self, peer: IPAddress) -> bool:
        """Whether nothing is left of any connection on the link."""
        host = self.hosts.get(peer)
        return host is None or not self.connections.of(host)

    def link_up(self, peer: IPAddress) -> None:
        """Connections can be paired, if their network may use the link's transport."""
        host = self.hosts.get(peer)
        if host is None:
            return
        transport = self.links.link(peer).transport
        self.requests.refuse_all(
            lambda request: (
                request.host is host and not self.hosts.may_use(request.network, transport)
            ),
            Reason.REMOTE_OFF,
        )
        self.reconsider(host)

    def link_failed(self, peer: IPAddress) -> None:
        """Connections can't be paired for now."""
        host = self.hosts.get(peer)
        if host is not None:
            self._refuse_all(host, Reason.NO_LINK)
            self.requests.decline_all(host, Reason.NO_LINK)

    def link_lost(self, peer: IPAddress) -> None:
        """Drop all connections before this returns."""
        self.connections.step_all(self.hosts.get(peer), Event(On.LINK_LOST))

    def link_leaves(self, peer: IPAddress) -> None:
        """Bring all connections back to TCP."""
        self.connections.step_all(
            self.hosts.get(peer), Event(On.LEAVE_PATH, reason=Reason.REMOTE_OFF)
        )

    # --- sessions (`SessionUser`)

    def up(self, peer: IPAddress, hello: peer_wire.PeerHello) -> None:
        """There is a session."""
        host = self.hosts.add(peer)
        host.stop_timer()
        if host.instance and (host.instance, host.node) != (hello.instance, hello.node):
            # Another router: the relay ended with the one before, so its connections are lost.
            self.links.forget(peer)
            self.connections.forget_broken(host)
        host.hello, host.instance, host.node = hello, hello.instance, hello.node
        self.hosts.tell_owned(host)
        self.verbs.session_up(host)
        self.connections.step_all(host, Event(On.SESSION_UP))
        for users in self._users:
            users.session_up(host)
        self.links.wake(peer)
        self._hello_changed()

    def down(self, peer: IPAddress, reason: str) -> None:
        """The session is lost."""
        host = self.hosts.get(peer)
        if host is None or host.hello is None:
            return
        host.hello = None
        host.told = None
        self.verbs.session_down(host)
        for users in self._users:
            users.session_down(host)
        self.connections.step_all(host, Event(On.SESSION_DOWN))
        self.links.session_down(peer)
        host.timer = self._loop.after(SESSION_PATIENCE, lambda: self._session_expired(host))

    def _session_expired(self, host: RemoteHost) -> None:
        host.timer = None
        self._refuse_all(host, Reason.NO_SESSION)
        self.verbs.end_all(host)
        self.connections.step_all(host, Event(On.SESSION_EXPIRED))

    def message(self, peer: IPAddress, message: peer_wire.Message) -> None:
        """The peer's router reports something."""
        host = self.hosts.get(peer)
        if host is None or host.hello is None:
            return
        match message:
            case peer_wire.Offer():
                reason = None if self.transports(peer) else Reason.PEER_NO_RDMA
                # One that is taken may be offered again, if both messages have crossed.
                if not self.connections.has_taken(host, message.offer):
                    self._begin(self.requests.take_offer(host, message, reason))
            case peer_wire.VerbsOffer():
                if not self.connections.has_taken(host, message.offer):
                    self._begin(self.queue_pairs.take_offer(host, message))
            case peer_wire.Waits():
                self.requests.told_to_wait(host, message)
            case peer_wire.Leaves():
                note_left(self.connections.among(host, message.connections), waits(message.reason))
            case peer_wire.Withdraw():
                for users in self._users:
                    users.withdrawn(host, message.offer)
                self.connections.withdrawn(host, message.offer)
            case peer_wire.Decline():
                self.connections.declined(host, message)
            case peer_wire.Placement():
                self.connections.placed(host, message)
            case peer_wire.PeerAccept():
                self.connections.accepted(host, message)
            case peer_wire.Paired():
                self.connections.step_number(message.connection, Event(On.CONFIRMED), host)
            case peer_wire.PeerDrop():
                self.connections.dropped(host, message)
            case peer_wire.Owns():
                if self.hosts.claim(host, message):
                    self.reassign(host)
            case peer_wire.PeerHello():
                self._greeted(host, message)
            case peer_wire.LinkOffer():
                self.links.offered(peer, message)
            case peer_wire.LinkAnswer():
                self.links.answered(peer, message)
            case peer_wire.LinkRefused():
                self.links.refused(peer, message)
            case peer_wire.PeerFrame():
                self.links.framed(peer, message)
            case _ if isinstance(message, peer_wire.VerbsPeerMessage):
                self.verbs.message(host, message)

    def eased(self, peer: IPAddress) -> None:
        """The session has room again."""
        self.links.eased(peer)
        host = self.hosts.get(peer)
        if host is not None and host.hello is not None:
            self.verbs.eased(host)
            for users in self._users:
                users.eased(host)

    def reassign(self, host: RemoteHost) -> None:
        """A host claims other addresses than before."""
        self.verbs.reassign(host)
        for users in self._users:
            for match in users.reassign(host):
                self._begin(match)

    def _greeted(self, host: RemoteHost, hello: peer_wire.PeerHello) -> None:
        """Something about the peer has changed."""
        if host.hello is None or (hello.rdma, hello.data_path) != (
            host.hello.rdma,
            host.hello.data_path,
        ):
            self.links.device_changed(host.address)
        host.hello = hello
        if not self.transports(host.address):
            self._refuse_all(host, Reason.PEER_NO_RDMA)
        self.verbs.greeted(host)
        for match in self.queue_pairs.reassign(host):
            self._begin(match)
        self.links.wake(host.address)
        self._hello_changed()
