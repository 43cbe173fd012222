"""Hosts with real registries, and with fake sessions, relays, sockets, kernels and time."""

from __future__ import annotations

import errno
import heapq
import itertools
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, ip_address
from typing import Any, Final

from dataplane.control import EndpointFact, Limits, NetworkFact, RouterSettings, RouterSnapshot
from dataplane.router import layout, peer_wire, relay_wire
from dataplane.router import library_wire as wire
from dataplane.router.arenas import EndKey
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import Address, IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Timer
from dataplane.router.pairing import Pairing
from dataplane.router.relay_ruling import RelayRuling
from dataplane.router.relay_wire import RelayKind
from dataplane.router.remote import Remotes
from dataplane.router.remote_connections import RemoteConnection
from dataplane.router.remote_end import Invalid, rule_for
from dataplane.router.remote_events import LIVE, Action, Do, EndState, Event, Transport
from dataplane.router.remote_requests import EntryRule, Open
from tests.unit.router_world import FakeKernel, FakeMemory, FakePost, at

NET: Final = "n1"
CONTAINERS: Final = (1, 2)
VIP: Final = "10.0.4.200"
RING: Final = 64 << 10
RELAY_RING: Final = 128 << 10
SOCKETS: Final = 4


class VirtualLoop:
    """A `Loop` in virtual time."""

    def __init__(self) -> None:
        self.time = 100.0
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        raise AssertionError("no descriptors here")

    def modify(self, descriptor: int, events: int) -> None:
        raise AssertionError("no descriptors here")

    def forget(self, descriptor: int) -> None:
        raise AssertionError("no descriptors here")

    def now(self) -> float:
        return self.time

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self.time + seconds, callback)
        heapq.heappush(self._due, (timer.due, next(self._numbers), timer))
        return timer

    def run(self, seconds: float) -> None:
        """Let time pass."""
        until = self.time + seconds
        while self._due and self._due[0][0] <= until:
            due, _, timer = heapq.heappop(self._due)
            self.time = max(self.time, due)
            timer.fire()
        self.time = until


@dataclass
class Lent:
    """A slot that a relay has."""

    number: int
    link: int
    arena: int
    slot: int
    queue_pair: bool = False
    moving: bool = False
    peer: int = 0
    paired: bool = False
    closed: bool = False
    leaves: bool = False
    left: bool = False
    broken: bool = False
    ended: bool = False
    finished: bool = False
    dropping: bool = False
    gone: bool = False
    """The peer's relay has dropped it."""
    expired: int = 0
    """How often in a row it was not idle when the router asked."""
    told: set[RelayKind] = field(default_factory=set)
    """Reports that were sent. Each is sent once."""


@dataclass
class Wire:
    """A relay's end of a link."""

    generation: int = 0
    other: tuple[int, int, int] | None = None
    """Host, link and generation."""
    kind: int = relay_wire.VERBS
    sockets: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By index: the number of the connection, and which end it is."""
    stream: bool = False
    dead: bool = False


class FakeRelay:
    """A relay without bytes: its answers, what it tells the peer's relay, and when it drops
    slots.
    """

    def __init__(self, world: World, host: Host) -> None:
        self.world = world
        self.host = host
        self.lent: dict[int, Lent] = {}
        self.files: dict[int, relay_wire.RelayFile] = {}
        self.links: dict[int, Wire] = {}
        self.arenas: set[int] = set()
        self.stuck: set[int] = set()
        """Slots with bytes on the way."""
        self.checks = 0
        """Of links, that the router has asked for."""
        self.farewells: list[Lent] = []
        """Slots that were dropped while the link did not work: the peer's relay hears of it
        later."""
        self.alive = True
        self.generations = itertools.count(1)

    def say(self, message: relay_wire.Message, descriptors: tuple[Any, ...] = ()) -> None:
        def hear() -> None:
            if self.alive:
                self.hear(message, descriptors)

        self.world.in_order((id(self), 0), hear)

    def answer(self, message: relay_wire.Message) -> None:
        def tell() -> None:
            if self.alive and self.host.relay is self:
                self.host.remotes.relay_message(message)

        self.world.in_order((id(self), 1), tell)

    def hear(self, message: relay_wire.Message, descriptors: tuple[Any, ...]) -> None:
        match message:
            case relay_wire.Number(kind=RelayKind.SOCKET):
                mine = self.links.get(message.number)
                if mine is not None:
                    assert mine.kind == relay_wire.TCP
                    assert message.state not in mine.sockets
                    (mine.sockets[message.state],) = descriptors
            case relay_wire.RelayArena(kind=RelayKind.ARENA):
                self.arenas.add(message.arena)
            case relay_wire.RelayArena(kind=RelayKind.DISCARD):
                assert all(lent.arena != message.arena for lent in self.lent.values())
                self.arenas.remove(message.arena)
            case relay_wire.RelayArena():
                assert message.arena in self.arenas
            case relay_wire.RelaySlot():
                self.slot(message)
            case relay_wire.RelayAccept(kind=RelayKind.CONNECT):
                self.connect(message)
            case relay_wire.RelayAccept():
                lent = self.lent[message.number]
                assert not lent.paired
                lent.paired, lent.peer = True, message.peer
                self.answer(relay_wire.RelayOutcome(RelayKind.PAIRED, message.number, 0, ""))
                self.world.exchange()
            case relay_wire.Number():
                self.number(message)
            case relay_wire.RelayFile(kind=RelayKind.FILE):
                assert message.file not in self.files
                self.files[message.file] = message
            case relay_wire.RelayFile():
                del self.files[message.file]
                self.answer(relay_wire.RelayFile(RelayKind.FILE_ENDED, message.file))
            case relay_wire.RelayExpire():
                self.expire(message)
            case relay_wire.RelayFrame():
                assert self.links[message.link].stream

    def slot(self, message: relay_wire.RelaySlot) -> None:
        assert message.arena in self.arenas
        used = {(lent.arena, lent.slot) for lent in self.lent.values()}
        assert (message.arena, message.slot) not in used, "memory that a relay still has"
        self.lent[message.connection] = Lent(
            message.connection,
            message.link,
            message.arena,
            message.slot,
            message.user != relay_wire.CONNECTION,
            message.user == relay_wire.MOVING_QUEUE_PAIR,
        )
        self.answer(relay_wire.Offered(RelayKind.PLACED, message.connection, 0, "", b"place"))

    def expire(self, message: relay_wire.RelayExpire) -> None:
        self.checks += 1
        wire = self.links[message.link]
        if not wire.dead and not wire.stream:
            if wire.other is not None and not self.world.hosts[wire.other[0]].alive:
                self.world.down_of(self.host, wire.other[0])
            return
        for lent in list(self.lent.values()):
            is_meant = lent.queue_pair == (message.user == relay_wire.QUEUE_PAIR)
            if lent.link == message.link and lent.paired and is_meant:
                waits = lent.number in self.stuck or lent.leaves or lent.closed
                lent.expired = lent.expired + 1 if waits else 0
                if lent.expired >= message.count and not lent.broken:
                    self.break_it(lent)

    def connect(self, message: relay_wire.RelayAccept) -> None:
        host, link, generation = map(int, message.words.split(b","))
        mine = self.links.get(message.number)
        if mine is None:
            return
        mine.other = (host, link, generation)
        if mine.kind == relay_wire.TCP:
            assert sorted(mine.sockets) == list(range(SOCKETS)), "a socket is missing"
            error = 5 if self.world.cut_tcp else 0
        else:
            error = 5 if self.world.cut_rdma else 0
        self.answer(
            relay_wire.RelayOutcome(
                RelayKind.CONNECTED, message.number, error, "cut" if error else ""
            )
        )
        self.world.exchange()

    def number(self, message: relay_wire.Number) -> None:
        number = message.number
        match message.kind:
            case RelayKind.LINK:
                generation = next(self.generations)
                # The frames of a link that is made again find the same peer.
                before = self.links.get(number, Wire())
                self.links[number] = Wire(generation, before.other, kind=message.state)
                words = f"{self.host.number},{number},{generation}".encode()
                self.answer(relay_wire.Offered(RelayKind.LINKED, number, 0, "", words))
            case RelayKind.UNLINK:
                self.links.pop(number, None)
                self.farewells = [lent for lent in self.farewells if lent.link != number]
                for lent in [lent for lent in self.lent.values() if lent.link == number]:
                    assert lent.dropping, "a link goes with connections on it"
                    self.dropped(lent)
            case RelayKind.STREAM:
                self.links[number].stream = True
                self.answer(relay_wire.RelayFrame(number, b"hello"))
            case RelayKind.CLOSE:
                lent = self.lent[number]
                lent.closed = True
                if not lent.paired or lent.gone or lent.broken:
                    self.report_finished(lent)
            case RelayKind.LEAVE:
                lent = self.lent[number]
                lent.leaves = not lent.queue_pair
                if lent.queue_pair and not lent.broken:
                    self.break_it(lent)
            case RelayKind.DROP if number not in self.lent:
                self.answer(relay_wire.Number(RelayKind.DROPPED, number))
            case RelayKind.DROP:
                lent = self.lent[number]
                assert not lent.dropping, "dropped twice"
                lent.dropping = True
                lent.broken = lent.broken or message.state == relay_wire.BROKEN
                if lent.broken:
                    self.host.severed.add((lent.arena, lent.slot))
        self.world.exchange()

    def dropped(self, lent: Lent) -> None:
        del self.lent[lent.number]
        self.answer(relay_wire.Number(RelayKind.DROPPED, lent.number))

    def reaches(self, lent: Lent) -> FakeRelay | None:
        """The peer's relay, if the link works."""
        mine = self.links.get(lent.link)
        if mine is None or mine.other is None or (mine.dead and not mine.stream):
            return None
        host, link, generation = mine.other
        other = self.world.hosts[host].relay
        theirs = other.links.get(link)
        if not other.alive or theirs is None:
            return None
        if mine.stream and theirs.stream:
            return other
        back = (self.host.number, lent.link, mine.generation)
        if theirs.generation == generation and theirs.other == back:
            assert theirs.kind == mine.kind
            assert all(
                mine.sockets[index][0] == theirs.sockets[index][0]
                and mine.sockets[index][1] != theirs.sockets[index][1]
                for index in mine.sockets
            ), "crossed sockets"
        return other if theirs.generation == generation and theirs.other == back else None

    def turn(self) -> bool:
        """Pass on the state of one connection to the peer's relay; whether there was a change."""
        for lent in self.farewells:
            other = self.reaches(lent)
            if other is not None:
                self.farewells.remove(lent)
                peer = other.lent.get(lent.peer)
                if peer is not None and not peer.gone:
                    self.pass_on(lent, peer, other)
                return True
        for lent in list(self.lent.values()):
            other = self.reaches(lent)
            if lent.dropping and (not lent.paired or lent.gone or self.links[lent.link].dead):
                if lent.paired and not lent.gone:
                    self.farewells.append(lent)
                self.dropped(lent)
                return True
            peer = None if other is None or not lent.paired else other.lent.get(lent.peer)
            if other is None or not lent.paired:
                continue
            if peer is None:
                # Who isn't known isn't heard; but who goes is told that nothing of it is used.
                if lent.dropping:
                    self.dropped(lent)
                    return True
                continue
            if self.pass_on(lent, peer, other):
                return True
        return False

    def pass_on(self, lent: Lent, peer: Lent, other: FakeRelay) -> bool:
        if lent.dropping and not peer.gone:
            peer.gone = lent.gone = True
            over = (lent.left and peer.left) or (lent.finished and lent.ended)
            if lent.broken or (peer.paired and not over):
                if not peer.broken:
                    other.break_it(peer)
            else:
                other.report(RelayKind.ENDED, peer)
                other.report_finished(peer)
            return True
        if lent.broken and not peer.broken:
            other.break_it(peer)
            return True
        if lent.closed and not lent.finished and not lent.broken:
            lent.finished = True
            peer.ended = True
            self.report_finished(lent)
            other.report(RelayKind.ENDED, peer)
            return True
        if lent.leaves and not peer.leaves:
            peer.leaves = True
            return True
        if lent.leaves and peer.leaves and peer.paired and not lent.left and not lent.closed:
            lent.left = peer.left = True
            self.answer(relay_wire.Number(RelayKind.LEFT, lent.number))
            other.answer(relay_wire.Number(RelayKind.LEFT, peer.number))
            return True
        return False

    def break_it(self, lent: Lent) -> None:
        lent.broken = True
        if not lent.dropping:
            self.host.severed.add((lent.arena, lent.slot))
        self.report(RelayKind.ENDED, lent)
        self.report_finished(lent)

    def report(self, kind: RelayKind, lent: Lent) -> None:
        """Report the end of a direction, once."""
        if kind not in lent.told:
            lent.told.add(kind)
            state = relay_wire.BROKEN if lent.broken else relay_wire.WHOLE
            self.answer(relay_wire.Number(kind, lent.number, state))

    def report_finished(self, lent: Lent) -> None:
        """Report the end of our direction, if our end is closed."""
        if lent.closed:
            self.report(RelayKind.FINISHED, lent)


class FakeSockets:
    """The `LinkSockets` of one host. A descriptor is the number of a connection and an end."""

    def __init__(self, world: World, host: Host, links: Links) -> None:
        self.world = world
        self.host = host
        self.links = links
        self.expected: dict[int, bytes] = {}
        self.dialled: set[int] = set()

    def expect(self, peer: IPAddress, number: int) -> bytes:
        self.expected[number] = ticket = f"{next(self.world.tickets):032}".encode()
        return ticket

    def dial(self, peer: IPAddress, number: int, ticket: bytes) -> None:
        self.dialled.add(number)
        self.world.loop.after(self.world.delay(), lambda: self.arrive(peer, number, ticket))

    def cancel(self, number: int) -> None:
        self.expected.pop(number, None)
        self.dialled.discard(number)

    def arrive(self, peer: IPAddress, number: int, ticket: bytes) -> None:
        """The peer's router checks the ticket, and acknowledges the sockets."""
        if number not in self.dialled:
            return
        other = self.world.by_address[peer].sockets
        theirs = next((n for n, known in other.expected.items() if known == ticket), None)
        if self.world.cut_tcp or theirs is None:
            self.cancel(number)
            self.links.sockets_failed(number, "refused")
            return
        made = [next(self.world.tickets) for _ in range(SOCKETS)]
        other.cancel(theirs)
        other.links.sockets_ready(theirs, [(one, 1) for one in made])  # type: ignore[misc]

        def acknowledged() -> None:
            if number in self.dialled:
                self.cancel(number)
                self.links.sockets_ready(number, [(one, 0) for one in made])  # type: ignore[misc]

        self.world.loop.after(self.world.delay(), acknowledged)


class Host:
    """A host with its registry, and with one process in each of two containers."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.address = IPv4Address(f"192.0.2.{number + 1}")
        self.node = f"node{number}"
        self.kernel = FakeKernel()
        self.severed: set[tuple[int, int]] = set()
        self.secrets = itertools.count(1_000_000 * (number + 1))
        self.instances = itertools.count(1)
        self.alive = True
        self.relay = FakeRelay(world, self)
        self.start()

    def start(self) -> None:
        """Start a new router."""
        self.instance = f"{self.number * 1000 + next(self.instances):032x}"
        self.post = FakePost()
        self.memory = FakeMemory()
        self.pairing = Pairing(
            self.post,
            self.kernel,
            self.memory,
            clock=self.world.loop.now,
            secret=lambda: next(self.secrets),
        )
        self.ruling = RelayRuling(
            self.pairing, self.world.loop, self.kernel, lambda pid: self.world.quota
        )
        self.remotes = Remotes(
            self.pairing,
            self.world.loop,
            lambda _: Line(self.world, self, self.instance),
            partial(self.tell_relay, self.instance),
            self.kernel,
            self.memory,
            lambda: None,
            self.make_sockets,
            self.world.rule or self.ruling.gate,
            trace=partial(self.trace, self.instance),
        )
        self.ruling.join(self.remotes)
        self.pairing.use_remote(self.remotes)
        self.pairing.replace_snapshot(Knowledge(self.facts()))
        self.remotes.learned()
        self.process_numbers = itertools.count(1)
        self.processes = {container: self.connect(container) for container in CONTAINERS}
        self.open()

    def connect(self, container: int) -> int:
        """A new process of a container."""
        process = next(self.process_numbers)
        assert self.pairing.connected(process, self.namespace(container), 4000 + process)
        self.pairing.hello(process, wire.Hello(wire.PROTOCOL_VERSION, layout.VERSION, "ab"))
        return process

    def make_sockets(self, _: Line, links: Links) -> FakeSockets:
        self.sockets = FakeSockets(self.world, self, links)
        return self.sockets

    def open(self) -> None:
        """The relay opens what the host has."""
        if self.number in self.world.cards:
            self.remotes.use(Transport.RDMA, "")
        if self.number in self.world.tcp:
            self.remotes.use(Transport.RELAY, "")

    def unplug(self) -> None:
        """The RDMA device is gone."""
        self.remotes.use(Transport.RDMA, "unplugged")
        self.world.hello_again(self)

    def transport(self, other: Host) -> Transport | None:
        """The transport of the link to another host, if it is up."""
        links = self.remotes.links
        return links.link(other.address).transport if links.is_up(other.address) else None

    def trace(
        self,
        instance: str,
        connection: RemoteConnection,
        before: EndState,
        event: Event,
        actions: tuple[Action, ...],
    ) -> None:
        """No event is invalid, and no end goes back to TCP alone whose peer was granted."""
        assert not isinstance(rule_for(before.phase, event.on), Invalid), (before.phase, event)
        if Do.GRANT in actions and connection.leads:
            peer = (connection.host.instance, connection.state.peer_number)
            self.world.granted.add(peer)
        if Do.UNDO_GRANT in actions:
            own = (instance, connection.number)
            assert own not in self.world.granted, "bytes may be in its ring"

    def tell_relay(
        self, instance: str, message: relay_wire.Message, descriptors: tuple[int, ...] = ()
    ) -> None:
        """Pass a message to the relay, unless it comes from a timer of a dead router."""
        if instance == self.instance:
            self.relay.say(message, descriptors)

    def namespace(self, container: int) -> int:
        return (self.number + 1) * 100 + container

    def ip(self, container: int) -> str:
        return f"10.0.4.{(self.number + 1) * 10 + container}"

    def facts(self) -> RouterSnapshot:
        every = tuple(
            f"10.0.4.{(host + 1) * 10 + container}"
            for host in range(self.world.size)
            for container in CONTAINERS
        )
        return RouterSnapshot(
            endpoints=tuple(
                EndpointFact(
                    id=f"e{container}",
                    network=NET,
                    addresses=(self.ip(container),),
                    namespace=self.namespace(container),
                )
                for container in CONTAINERS
            ),
            networks=(
                NetworkFact(
                    id=NET,
                    subnets=("10.0.4.0/24",),
                    vips={VIP: every},
                    peers=tuple(
                        f"192.0.2.{n + 1}" for n in range(self.world.size) if n != self.number
                    ),
                    **self.world.options,
                ),
            ),
            settings=RouterSettings(
                remote_ring=RING,
                relay_ring=RELAY_RING,
                limits=Limits(connections=1000),
                **self.world.settings,
            ),
            underlay=str(self.address),
        )

    def hello(self) -> peer_wire.PeerHello:
        return peer_wire.PeerHello(
            instance=self.instance,
            node=self.node,
            data_path=str(self.address),
            rdma=self.world.rdma or self.remotes.ready(Transport.RDMA),
            ring=RING,
            relay=self.number in self.world.tcp,
            relay_ring=RELAY_RING,
            tunnel_offload=self.pairing.knowledge.offload,
            verbs=self.number in self.world.verbs,
            verbs_cm=self.number in self.world.verbs_cm,
            verbs_groups=self.number in self.world.verbs_groups,
        )


@dataclass
class Line:
    """The `PeerSessions` of one host."""

    world: World
    host: Host
    instance: str

    @property
    def node(self) -> str:
        return self.host.node

    def congested(self, peer: IPAddress) -> bool:
        return (self.host.number, self.world.by_address[peer].number) in self.world.crowded

    def send(self, peer: IPAddress, message: peer_wire.Message) -> bool:
        if self.instance != self.host.instance:
            return False
        return self.world.carry(self.host, self.world.by_address[peer], message)


@dataclass(eq=False)
class Tcp:
    """A TCP connection: both ends, and whether their programs have them open."""

    ends: tuple[tuple[Host, int, Address, Address, int], tuple[Host, int, Address, Address, int]]
    """Host, container, local, remote, cookie."""
    open: list[bool] = field(default_factory=lambda: [True, True])
    requested: list[bool] = field(default_factory=lambda: [False, False])


class World:
    """Some hosts, with the sessions and links between them."""

    def __init__(
        self,
        size: int = 2,
        delays: Callable[[], float] = lambda: 0.001,
        *,
        cards: Container[int] = range(99),
        tcp: Container[int] = (),
        verbs: Container[int] = range(99),
        verbs_cm: Container[int] = range(99),
        verbs_groups: Container[int] = range(99),
        rule: EntryRule | None = None,
        ruled: bool = False,
        **settings: Any,
    ) -> None:
        """`cards`: the hosts with RDMA devices; `tcp`: those whose relays speak TCP. The others'
        routers are of a version that doesn't know of TCP; `verbs`: those that pair queue pairs with
        others', `verbs_cm`: those that know rdma_cm and datagrams between hosts, and
        `verbs_groups`: those that know multicast groups. `ruled`: connections enter TCP between
        relays by the rule, otherwise all do.
        """
        self.size = size
        self.settings = settings
        self.cards = cards
        self.tcp = tcp
        self.verbs = verbs
        self.verbs_cm = verbs_cm
        self.verbs_groups = verbs_groups
        self.rule = None if ruled else rule or Open()
        self.quota: float | None = None
        """Processors that each container may use."""
        self.options: dict[str, Any] = {}
        """Of the network."""
        self.tickets = itertools.count(1)
        self.loop = VirtualLoop()
        self.delay = delays
        self.rdma = False
        """All hosts say that they have devices, whether these are open or not."""
        self.cut_rdma = self.cut_tcp = False
        """No link of a transport can be made."""
        self.received = 1000
        """Messages that a link carries before it is down."""
        self.error = errno.ECONNRESET
        """What takes links down."""
        self.sessions: dict[frozenset[int], int] = {}
        """Pairs of hosts with a session, to its number."""
        self.crowded: set[tuple[int, int]] = set()
        """From which host to which one much waits to be sent."""
        self.clear_until: dict[tuple[int, int], float] = {}
        self._session_numbers = itertools.count(1)
        self._turning = False
        self.granted: set[tuple[str, int]] = set()
        self.hosts: list[Host] = []
        self.by_address: dict[IPAddress, Host] = {}
        for number in range(size):
            host = Host(self, number)
            self.hosts.append(host)
            self.by_address[host.address] = host
        self.connections: list[Tcp] = []
        self.tick()
        self._cookies = itertools.count(50_000)
        self._ports = itertools.count(5_000)

    def tick(self) -> None:
        """Once a second, as `InterHost.tick`."""
        for host in self.hosts:
            host.remotes.learned()
            host.ruling.tick()
        self.loop.after(1.0, self.tick)

    def cut(self, *, mend: bool = False) -> None:
        """No link can be made from now on."""
        self.cut_rdma = self.cut_tcp = not mend

    # --- sessions

    def connect_all(self) -> None:
        for a, b in itertools.combinations(self.hosts, 2):
            self.session(a, b)

    def session(self, a: Host, b: Host) -> None:
        """Start a session, if there is none."""
        pair = frozenset({a.number, b.number})
        if pair in self.sessions:
            return
        self.sessions[pair] = number = next(self._session_numbers)
        for one, other in ((a, b), (b, a)):
            self._later(
                one,
                other,
                number,
                partial(self._come_up, one, other),
            )

    @staticmethod
    def _come_up(one: Host, other: Host) -> None:
        one.remotes.up(other.address, other.hello())

    def ease(self, source: Host, target: Host) -> None:
        """What a host had to send has been sent."""
        self.crowded.discard((source.number, target.number))
        source.remotes.eased(target.address)

    def lose(self, a: Host, b: Host) -> None:
        """Lose a session, with the messages that are under way."""
        pair = frozenset({a.number, b.number})
        if self.sessions.pop(pair, None) is None:
            return
        for one, other in ((a, b), (b, a)):
            one.remotes.down(other.address, "lost")

    def carry(self, source: Host, target: Host, message: peer_wire.Message) -> bool:
        number = self.sessions.get(frozenset({source.number, target.number}))
        if number is None:
            return False
        if source.number not in self.tcp or target.number not in self.tcp:
            assert not getattr(message, "transport", ""), "the peer doesn't know it"
            assert not getattr(message, "ticket", b"")
        copy = next(iter(peer_wire.Frames().feed(peer_wire.pack(message))))
        self._later(target, source, number, lambda: target.remotes.message(source.address, copy))
        return True

    def _later(self, to: Host, of: Host, number: int, do: Callable[[], None]) -> None:
        """Deliver a message in order, if the session still exists."""
        pair = frozenset({to.number, of.number})

        def arrive() -> None:
            if self.sessions.get(pair) == number:
                do()

        self.in_order((of.number, to.number), arrive)

    def in_order(self, way: tuple[int, int], do: Callable[[], None]) -> None:
        """Do something later, and after everything before it in the same direction."""
        when = max(self.loop.now() + self.delay(), self.clear_until.get(way, 0.0) + 1e-6)
        self.clear_until[way] = when
        self.loop.after(when - self.loop.now(), do)

    def hello_again(self, host: Host) -> None:
        """Send a Hello to all peers, as `Sessions.introduce` does."""
        for other in self.hosts:
            if other is not host:
                self.carry(host, other, host.hello())

    # --- relays

    def exchange(self) -> None:
        """Let relays exchange states, a little later."""

        def turn() -> None:
            self._turning = False
            if any(host.relay.alive and host.relay.turn() for host in self.hosts):
                self.exchange()

        if not self._turning:
            self._turning = True
            self.loop.after(self.delay(), turn)

    def kill_relay(self, host: Host) -> None:
        """A relay dies, and another is started after a while."""
        old, host.relay = host.relay, FakeRelay(self, host)
        old.alive = False
        host.remotes.relay_died()
        self.hello_again(host)
        self.loop.after(0.5, lambda: self.relay_is_back(host))
        for other in self.hosts:
            self.down_of(other, host.number)

    def switch_off(self, host: Host) -> None:
        """A host is gone. The others notice that their sessions are silent, and nothing more while
        nothing is on the way to it.
        """
        host.alive = host.relay.alive = False
        for other in self.hosts:
            if other is not host:
                self.lose(host, other)

    def relay_is_back(self, host: Host) -> None:
        host.open()
        self.hello_again(host)

    def down_of(self, host: Host, peer: int) -> None:
        """A host's relay reports that its link to another host is down."""
        for number, mine in host.relay.links.items():
            if mine.other is not None and mine.other[0] == peer and not mine.dead:
                mine.dead = True
                host.relay.answer(
                    relay_wire.RelayOutcome(
                        RelayKind.DOWN, number, self.error, "retries exceeded", self.received
                    )
                )
        self.exchange()

    def break_link(self, a: Host, b: Host) -> None:
        self.down_of(a, b.number)
        self.down_of(b, a.number)

    def restart_router(self, host: Host) -> None:
        """Kill a router. Its relay brings connections back to TCP, resets those it can't, and
        ends.
        """
        for other in self.hosts:
            if other is not host:
                self.lose(host, other)
        old = host.relay
        for lent in old.lent.values():
            reached = old.reaches(lent)
            peer = None if reached is None else reached.lent.get(lent.peer)
            if (
                reached is not None
                and peer is not None
                and lent.paired
                and peer.paired
                and not peer.left
                and not peer.queue_pair
            ):
                peer.leaves = peer.left = True
                reached.answer(relay_wire.Number(RelayKind.LEFT, peer.number))
            else:
                host.severed.add((lent.arena, lent.slot))
                if reached is not None and peer is not None and not peer.broken:
                    reached.break_it(peer)
        old.alive = False
        host.relay = FakeRelay(self, host)
        host.start()
        for tcp in self.connections:
            for side in (0, 1):
                if tcp.ends[side][0] is host:
                    tcp.requested[side] = False
        for other in self.hosts:
            self.down_of(other, host.number)

    # --- programs

    def connect(self, client: tuple[int, int], server: tuple[int, int], vip: bool = False) -> Tcp:
        """A TCP connection between containers of two hosts."""
        a, b = self.hosts[client[0]], self.hosts[server[0]]
        local = at(f"{a.ip(client[1])}:{next(self._ports)}")
        real = at(f"{b.ip(server[1])}:80")
        seen = Address(ip_address(VIP), 80) if vip else real
        ends = (
            (a, client[1], local, seen, next(self._cookies)),
            (b, server[1], real, local, next(self._cookies)),
        )
        tcp = Tcp(ends)
        for host, container, one, other, cookie in ends:
            host.kernel.sockets[host.namespace(container), one, other] = cookie
        if vip:
            a.kernel.translations[a.namespace(client[1]), local, seen] = (real, local)
        self.connections.append(tcp)
        return tcp

    def request(self, tcp: Tcp, side: int) -> None:
        host, container, local, remote, cookie = tcp.ends[side]
        if not tcp.open[side] or tcp.requested[side]:
            return
        tcp.requested[side] = True
        host.pairing.request(host.processes[container], wire.Request(cookie, cookie, local, remote))

    def close(self, tcp: Tcp, side: int) -> None:
        """The program closes its end, and its library releases it."""
        if not tcp.open[side]:
            return
        tcp.open[side] = False
        host, container, local, remote, cookie = tcp.ends[side]
        del host.kernel.sockets[host.namespace(container), local, remote]
        process = host.processes[container]
        grant = self.grant(tcp, side)
        if grant is not None:
            message = wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token)
            host.pairing.release(process, message)
        else:
            host.pairing.note(process, wire.Note(0, cookie))

    def kill(self, host: Host, container: int, *, child: bool) -> None:
        """A process ends; `child`: its sockets live on in one. Another process takes its place."""
        for tcp in self.connections:
            for side in (0, 1):
                end = tcp.ends[side]
                if end[0] is not host or end[1] != container or not tcp.open[side]:
                    continue
                # Its child has no library, and asks for nothing.
                tcp.requested[side] = False
                if not child:
                    tcp.open[side] = False
                    del host.kernel.sockets[host.namespace(container), end[2], end[3]]
        host.pairing.gone(host.processes[container])
        host.processes[container] = host.connect(container)

    # --- what can be seen

    def grant(self, tcp: Tcp, side: int) -> wire.Grant | None:
        host, container, _, _, cookie = tcp.ends[side]
        grants = [
            answer
            for answer, _ in host.post.sent.get(host.processes[container], [])
            if isinstance(answer, wire.Grant) and answer.cookie == cookie
        ]
        return grants[-1] if grants else None

    def refusals(self, tcp: Tcp, side: int) -> list[int]:
        host, container, _, _, cookie = tcp.ends[side]
        return [
            answer.reason
            for answer, _ in host.post.sent.get(host.processes[container], [])
            if isinstance(answer, wire.Refuse) and answer.cookie == cookie
        ]

    def remote(self, tcp: Tcp, side: int) -> RemoteConnection | None:
        """The registry's end of a connection, while it is live."""
        host, *_, cookie = tcp.ends[side]
        for connection in host.remotes.connections:
            if connection.end.key == cookie and connection.state.phase in LIVE:
                return connection
        return None

    def check(self) -> None:
        """Assert what must hold at any time."""
        by_cookie: dict[EndKey, tuple[Tcp, int]] = {
            end[4]: (tcp, side) for tcp in self.connections for side, end in enumerate(tcp.ends)
        }
        for host in self.hosts:
            connections = host.remotes.connections
            for one in connections:
                if one.state.phase not in LIVE or not one.state.peer_number:
                    continue
                if one.end.key not in by_cookie:
                    continue
                tcp, side = by_cookie[one.end.key]
                there = tcp.ends[1 - side][0]
                assert one.host.address == there.address
                if one.host.instance != there.instance:
                    continue
                number = one.state.peer_number
                for other in there.remotes.connections:
                    if other.number == number and other.state.peer_number == one.number:
                        expected = tcp.ends[1 - side][4]
                        assert other.end.key == expected, "two ends of two connections"
            assert connections.room.registered == sum(one.bytes for one in connections)


def started(size: int = 2, **equipment: Any) -> World:
    """Hosts with sessions and links."""
    made = World(size, **equipment)
    made.connect_all()
    made.loop.run(1)
    return made
