"""The registry with fakes around it: processes that record their answers, and sockets that tests
declare.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, TypeVar

from dataplane.control import EndpointFact, Limits, NetworkFact, RouterSettings, RouterSnapshot
from dataplane.errors import KernelRefused
from dataplane.router import layout
from dataplane.router import library_wire as wire
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import Address, Answer, IPAddress
from dataplane.router.pairing import Pairing
from dataplane.router.seams import Sent, SocketEnd
from dataplane.router.tcp_counters import TcpCounters
from dataplane.router.verbs_wire import VerbsAnswer

M = TypeVar("M", bound=Answer | VerbsAnswer)

NET: Final = "n1"
OTHER: Final = "n2"
VIP: Final = "10.0.4.100"
AWAY: Final = "10.0.4.200"
QUIET: Final = TcpCounters(0, 0, 0, 0, 1398)


def at(text: str) -> Address:
    """The address in ADDRESS:PORT."""
    host, _, port = text.rpartition(":")
    return Address(ip_address(host.strip("[]")), int(port))


@dataclass
class FakePost:
    """Records the answers to each process. Processes in `full` take none; those in `busy` have read
    little.
    """

    sent: dict[int, list[tuple[Answer | VerbsAnswer, int | None]]] = field(default_factory=dict)
    full: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)

    def send(self, process: int, answer: Answer | VerbsAnswer, *descriptors: int) -> bool:
        if process in self.full:
            return False
        self.sent.setdefault(process, []).append((answer, descriptors[0] if descriptors else None))
        return True

    def has_room(self, process: int) -> bool:
        return process not in self.full | self.busy


@dataclass
class FakeKernel:
    """Sockets: (namespace, local, remote) → cookie. All are connected but those in `closing`."""

    sockets: dict[tuple[int, Address, Address], int] = field(default_factory=dict)
    closing: set[tuple[int, Address, Address]] = field(default_factory=set)
    translations: dict[tuple[int, Address, Address], tuple[Address, Address]] = field(
        default_factory=dict
    )
    traffic: dict[int, TcpCounters] = field(default_factory=dict)
    """By cookie."""
    intercepted: set[tuple[str, Address, Address]] = field(default_factory=set)
    """Bridges, each with both addresses of a connection that the host doesn't carry as it is."""
    moved: set[tuple[int, IPAddress]] = field(default_factory=set)
    """Addresses that a namespace doesn't have any more."""
    unlisted: set[int] = field(default_factory=set)
    """Namespaces that are others' than the snapshot says."""
    sampled: int = 0
    """Counters of so many sockets were read."""

    def is_open(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        key = (namespace, local, remote)
        return self.sockets.get(key) == cookie and key not in self.closing

    def exists(self, namespace: int, local: Address, remote: Address) -> bool:
        return (namespace, local, remote) in self.sockets

    def is_held(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        return self.sockets.get((namespace, local, remote)) == cookie

    def counters(self, namespace: int, ends: Sequence[SocketEnd]) -> list[TcpCounters | None]:
        self.sampled += len(ends)
        return [
            self.traffic.get(cookie, QUIET)
            if self.is_open(namespace, local, remote, cookie)
            else None
            for local, remote, cookie in ends
        ]

    def translated(
        self, namespace: int, local: Address, remote: Address
    ) -> tuple[Address, Address] | None:
        return self.translations.get((namespace, local, remote))

    def is_translated(self, namespace: int, local: Address, remote: Address) -> bool:
        found = self.translated(namespace, local, remote)
        return found not in (None, (remote, local), (local, remote))

    def is_listed(self, namespace: int) -> bool:
        return namespace not in self.unlisted

    def has_address(self, namespace: int, ip: IPAddress) -> bool:
        return (namespace, ip) not in self.moved

    def is_carried(self, bridge: str, local: Address, remote: Address, *, trusted: bool) -> bool:
        assert bridge
        ends = {(bridge, local, remote), (bridge, remote, local)}
        return not ends & self.intercepted


@dataclass
class FakeMemory:
    """Arenas are numbers from 1000 on, bells from 50000. Closing one twice, or never, is an
    error.
    """

    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1000))
    bell_numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(50_000))
    arenas: set[int] = field(default_factory=set)
    prepared: list[tuple[int, int, int]] = field(default_factory=list)
    reclaimed: list[tuple[int, int]] = field(default_factory=list)
    left: list[tuple[int, int]] = field(default_factory=list)
    bells: set[int] = field(default_factory=set)
    severed: list[tuple[int, int]] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    alarmed: list[int] = field(default_factory=list)
    rung: list[int] = field(default_factory=list)
    files: dict[int, int] = field(default_factory=dict)
    """Bytes of those that are no arenas."""
    protected: list[int] = field(default_factory=list)
    handed: set[int] = field(default_factory=set)
    """Hearing ends that the router has closed."""
    weight: int = 12288
    says: tuple[Sent, Sent] | None = (Sent(0, 0), Sent(0, 0))
    """What the senders of each slot say."""
    refuses: bool = False

    def make(self, ring_size: int = layout.RING_SIZE, remote: bool = False) -> int:
        if self.refuses:
            raise KernelRefused("no memory")
        number = next(self.numbers)
        self.arenas.add(number)
        return number

    def make_file(self, size: int) -> int:
        number = self.make()
        self.files[number] = size
        return number

    def protect(self, memory: int) -> None:
        assert memory in self.arenas
        self.protected.append(memory)

    def prepare(self, memory: int, slot: int, incarnation: int) -> None:
        assert memory in self.arenas
        self.prepared.append((memory, slot, incarnation))

    def reclaim(self, memory: int, slot: int) -> bool:
        assert memory in self.arenas
        self.reclaimed.append((memory, slot))
        return True

    def leave(self, memory: int, slot: int) -> None:
        assert memory in self.arenas
        self.left.append((memory, slot))

    def sever(self, memory: int, slot: int) -> None:
        assert memory in self.arenas
        self.severed.append((memory, slot))

    def finish(self, memory: int, slot: int) -> None:
        assert memory in self.arenas
        self.finished.append((memory, slot))

    def alarm(self, memory: int) -> None:
        assert memory in self.arenas
        self.alarmed.append(memory)

    def make_bell(self) -> tuple[int, int]:
        number = next(self.bell_numbers)
        self.bells.add(number)
        return -number, number

    def close_hearing(self, descriptor: int) -> None:
        assert -descriptor in self.bells
        self.handed.add(descriptor)

    def ring(self, descriptor: int) -> None:
        assert descriptor in self.bells
        self.rung.append(descriptor)

    def sent(self, memory: int, slot: int) -> tuple[Sent, Sent] | None:
        assert memory in self.arenas
        return self.says

    def used(self, memory: int) -> int:
        assert memory in self.arenas
        return self.weight

    def close(self, memory: int) -> None:
        self.arenas.remove(memory)

    def close_bell(self, descriptor: int) -> None:
        self.bells.remove(descriptor)


def knowledge(settings: RouterSettings | None = None, *, off: bool = False) -> Knowledge:
    """See `facts`."""
    return Knowledge(facts(settings, off=off))


def facts(settings: RouterSettings | None = None, *, off: bool = False) -> RouterSnapshot:
    """Containers 1 to 4 on network n1 as 10.0.4.1 to .4 and fd00::1 to ::4, container 1 also on n2
    as 10.0.5.1.

    VIP leads to 2 and 3; AWAY to 2, and to 10.0.4.66, which is on another host.
    """
    endpoints = [
        EndpointFact(id=f"e{n}", network=NET, addresses=(f"10.0.4.{n}", f"fd00::{n}"), namespace=n)
        for n in range(1, 5)
    ]
    endpoints.append(EndpointFact(id="x1", network=OTHER, addresses=("10.0.5.1",), namespace=1))
    leading: dict[str, tuple[str, ...]] = {
        VIP: ("10.0.4.2", "10.0.4.3"),
        AWAY: ("10.0.4.2", "10.0.4.66"),
    }
    return RouterSnapshot(
        endpoints=tuple(endpoints),
        networks=(
            NetworkFact(
                id=NET,
                acceleration=not off,
                subnets=("10.0.4.0/24", "fd00::/64"),
                vips=leading,
            ),
            NetworkFact(id=OTHER, subnets=("10.0.5.0/24",)),
        ),
        settings=settings or RouterSettings(),
    )


class World:
    """The registry, its fakes, and the actions of a library."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.post = FakePost()
        self.kernel = FakeKernel()
        self.memory = FakeMemory()
        self.now = 100.0
        secrets = itertools.count(70_001)
        self.pairing = Pairing(
            self.post,
            self.kernel,
            self.memory,
            clock=lambda: self.now,
            secret=lambda: next(secrets),
        )
        self.facts = facts(RouterSettings(limits=limits or Limits()))
        self.pairing.replace_snapshot(Knowledge(self.facts))
        self._processes = itertools.count(1)
        self._cookies = itertools.count(50_000)
        self._numbers = itertools.count(1)

    def process(self, namespace: int, *, hello: bool = True) -> int:
        """A process of a container connects."""
        number = next(self._processes)
        assert self.pairing.connected(number, namespace, 4000 + number)
        if hello:
            self.pairing.hello(number, wire.Hello(wire.PROTOCOL_VERSION, layout.VERSION, "ab"))
        return number

    def socket(self, namespace: int, local: str, remote: str) -> int:
        """Add a connected socket; its cookie."""
        cookie = next(self._cookies)
        self.kernel.sockets[namespace, at(local), at(remote)] = cookie
        return cookie

    def translate(self, namespace: int, local: str, vip: str, server: str) -> None:
        """Let connection tracking know where a connection to a VIP leads."""
        self.kernel.translations[namespace, at(local), at(vip)] = at(server), at(local)

    def ask(self, process: int, cookie: int, local: str, remote: str) -> None:
        """Send a request of a process."""
        ask = wire.Request(next(self._numbers), cookie, at(local), at(remote))
        self.pairing.request(process, ask)

    def open_and_ask(self, process: int, local: str, remote: str) -> int:
        """Open one end of a connection and send its request; the socket's cookie."""
        namespace = self.pairing.processes[process].namespace
        cookie = self.socket(namespace, local, remote)
        self.ask(process, cookie, local, remote)
        return cookie

    def connect(self, client: int, server: int, port: int, *, to: int = 80) -> tuple[int, int]:
        """Send the requests of both ends of a connection between two processes' containers; their
        cookies.
        """
        a = self.pairing.processes[client].namespace
        b = self.pairing.processes[server].namespace
        one = self.open_and_ask(client, f"10.0.4.{a}:{port}", f"10.0.4.{b}:{to}")
        return one, self.open_and_ask(server, f"10.0.4.{b}:{to}", f"10.0.4.{a}:{port}")

    def heard(self, process: int, kind: type[M]) -> list[tuple[M, int | None]]:
        """The answers to a process, of one kind."""
        return [
            (answer, descriptor)
            for answer, descriptor in self.post.sent.get(process, [])
            if isinstance(answer, kind)
        ]

    def grants(self, process: int) -> list[wire.Grant]:
        return [grant for grant, _ in self.heard(process, wire.Grant)]

    def refusals(self, process: int) -> list[int]:
        return [refuse.reason for refuse, _ in self.heard(process, wire.Refuse)]

    def release(self, process: int, grant: wire.Grant) -> None:
        self.pairing.release(
            process, wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token)
        )
