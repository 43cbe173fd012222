"""A Swarm that does not exist, for pictures and tests of the page: what a plugin would answer.

`ExampleSwarm` has a shop of some services on three hosts; `crowd` has as many containers as wanted.
Each report of traffic comes `STEP` seconds after the one before, by the example's own clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from dataplane.control import (
    PeerFact,
    RdmaFacts,
    RelayFacts,
    RingTraffic,
    TcpTraffic,
)
from dataplane.router.reasons import Reason
from plugin.page_feed import PageSource
from plugin.status import (
    EndpointStatus,
    Finding,
    HostStatus,
    NetworkStatus,
    PeerStatus,
    RouterStatus,
    ServiceStatus,
    Status,
)
from plugin.traffic_names import AddressBook, AddressOwner, NamedTraffic, TrafficReport

STEP: Final = 2.0
BACKEND: Final = "p3l8f1w0gk2c9d7h5m6n4b0aq"
HOSTS: Final = ("alpha", "beta", "gamma")


@dataclass
class ExampleContainer:
    """A container or task on the network `backend`."""

    name: str
    address: str
    service: str
    host: str = HOSTS[0]


@dataclass
class ExampleConnection:
    """A connection. `rate`: bytes per second in each direction; `vip`: how its client knows it."""

    client: ExampleContainer
    server: ExampleContainer
    path: str
    rate: int
    port: int
    reason: Reason | None = None
    vip: str = ""
    moved: float = 0.0
    """When it left TCP, by the example's clock."""


@dataclass
class ExampleSwarm:
    """Containers, connections and problems; tests change them."""

    containers: list[ExampleContainer] = field(default_factory=list)
    links: list[ExampleConnection] = field(default_factory=list)
    vips: dict[str, str] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    clock: float = 1000.0

    def source(self) -> PageSource:
        """What the page asks."""
        return PageSource(self.status, self.addresses, self.traffic)

    def add(self, service: str, host: str, address: str, name: str = "") -> ExampleContainer:
        """Another container; its name is a task's unless another one is given."""
        number = sum(each.service == service for each in self.containers) + 1
        made = ExampleContainer(name or f"{service}.{number}", address, service, host)
        self.containers.append(made)
        return made

    def connect(
        self,
        client: ExampleContainer,
        server: ExampleContainer,
        path: str,
        rate: int,
        reason: Reason | None = None,
        vip: str = "",
    ) -> ExampleConnection:
        """Another connection."""
        made = ExampleConnection(client, server, path, rate, 40000 + len(self.links), reason, vip)
        self.links.append(made)
        return made

    def move(self, link: ExampleConnection, path: str) -> None:
        """A connection leaves TCP; its bytes so far stay TCP's."""
        link.path, link.reason, link.moved = path, None, self.clock

    def status(self) -> Status:
        """As of a healthy host with these problems."""
        own = [each for each in self.containers if each.host == HOSTS[0]]
        endpoints = [
            EndpointStatus(str(number), each.name, f"{each.address}/16", "", "", joined=True)
            for number, each in enumerate(own)
        ]
        services = sorted({each.service for each in self.containers if each.service})
        network = NetworkStatus(
            id=BACKEND,
            name="backend",
            vni=4097,
            port=4799,
            mtu=1450,
            prefix6="",
            subnets=["10.0.0.0/16"],
            internal=False,
            ipv6=False,
            path="overlay+ebpf",
            acceleration=True,
            endpoints=endpoints,
            peers=[
                PeerStatus(name, f"192.0.2.{number}", own=number == 1)
                for number, name in enumerate(HOSTS, 1)
            ],
            services=[self._service(name) for name in services],
            synced=0.2,
        )
        return Status(
            version="0.1.0",
            healthy=not self.problems,
            uptime=3600.0,
            host=HostStatus(
                hostname=HOSTS[0],
                engine="28.5.2",
                swarm=True,
                manager=True,
                node_id="n1",
                address="192.0.2.1",
                underlay="eth0",
                underlay_mtu=1500,
                kernel="6.12.48",
            ),
            settings={},
            networks=[network],
            problems=self.problems,
            calls=[],
            router=RouterStatus(up=True, rdma=RdmaFacts(hosts=_PEERS), relay=RelayFacts()),
        )

    def addresses(self) -> AddressBook:
        """Who has which address."""
        owners = {
            each.address: AddressOwner(name=each.name, service=each.service, host=each.host)
            for each in self.containers
        }
        owners |= {
            vip: AddressOwner(name=service, service=service, vip=True)
            for service, vip in self.vips.items()
        }
        return AddressBook(networks={BACKEND: owners})

    def traffic(self) -> TrafficReport:
        """What the ends on this host have carried by now."""
        self.clock += STEP
        ends = []
        for number, link in enumerate(self.links):
            if link.client.host == HOSTS[0]:
                ends.append(self._end(2 * number, link, of_client=True))
            if link.server.host == HOSTS[0]:
                ends.append(self._end(2 * number + 1, link, of_client=False))
        return TrafficReport(
            connections=tuple(ends),
            reasons={link.reason.word: link.reason.sentence for link in self.links if link.reason},
            read=self.clock,
            router_cpu=self.clock * 0.015,
            relay_cpu=self.clock * 0.21,
            host=HOSTS[0],
            networks={BACKEND: "backend"},
        )

    def _service(self, name: str) -> ServiceStatus:
        tasks = [each.address for each in self.containers if each.service == name]
        return ServiceStatus(name, self.vips.get(name, ""), tasks, here=tasks)

    def _end(self, cookie: int, link: ExampleConnection, *, of_client: bool) -> NamedTraffic:
        own, peer = (link.client, link.server) if of_client else (link.server, link.client)
        vip = link.vip if of_client else ""
        client = f"{link.client.address}:{link.port}"
        server = f"{vip or link.server.address}:80"
        in_ring = link.path in ("shm", "rdma", "relay")
        by_tcp = int(link.rate * (link.moved if in_ring else self.clock))
        by_ring = int(link.rate * self.clock) - by_tcp
        messages = by_ring // 512 if link.path == "shm" else None
        ring = RingTraffic(
            incarnation=1,
            bytes_in=by_ring,
            bytes_out=by_ring,
            messages_in=messages,
            messages_out=messages,
        )
        tcp = TcpTraffic(
            bytes_in=by_tcp,
            bytes_out=by_tcp,
            segments_in=by_tcp // 1448,
            segments_out=by_tcp // 1448,
            retransmits=by_tcp // 1448 // 900,
            round_trip=55 if link.client.host == link.server.host else 310,
        )
        return NamedTraffic(
            namespace=4026532000 + self.containers.index(own),
            container=own.name,
            network=BACKEND,
            local=client if of_client else server,
            remote=server if of_client else client,
            path=link.path,
            reason=None if link.reason is None else link.reason.word,
            age=self.clock - link.moved,
            cookie=cookie,
            read=self.clock,
            tcp=tcp,
            ring=ring if in_ring else None,
            service=own.service,
            peer=peer.service if vip else peer.name,
            peer_service=peer.service,
            host=peer.host,
        )


_PEERS: Final = (
    PeerFact(
        address="192.0.2.2",
        name="beta",
        session=True,
        rdma=True,
        relay=True,
        link="up",
        transport="rdma",
        connections=1,
    ),
    PeerFact(
        address="192.0.2.3",
        name="gamma",
        session=True,
        relay=True,
        link="up",
        transport="relay",
        encryption="messages",
        why_not_rdma="the other host has no RDMA device",
        connections=1,
    ),
)


def shop() -> ExampleSwarm:
    """A shop: containers of six services on three hosts, and connections on all paths."""
    made = ExampleSwarm(vips={"web": "10.0.0.2", "api": "10.0.0.3", "redis": "10.0.0.4"})
    web = [made.add("web", host, f"10.0.1.{number}") for number, host in enumerate(HOSTS, 1)]
    api = [
        made.add("api", host, f"10.0.2.{number}")
        for number, host in enumerate(("alpha", "alpha", "alpha", "beta", "gamma"), 1)
    ]
    redis = made.add("redis", "alpha", "10.0.3.1")
    database = made.add("postgres", "beta", "10.0.4.1")
    search = made.add("search", "gamma", "10.0.5.1")
    tool = made.add("", "alpha", "10.0.6.1", "backup")
    for number, task in enumerate(api[:3]):
        made.connect(web[0], task, "shm", 900_000 * (3 - number), vip=made.vips["api"])
        made.connect(task, redis, "shm", 2_500_000 * (number + 1), vip=made.vips["redis"])
        made.connect(task, database, "rdma", 9_000_000 // (number + 1))
    made.connect(api[0], search, "relay", 700_000)
    made.connect(api[1], search, "relay", 500_000)
    made.connect(web[1], api[0], "overlay+ebpf", 60_000, Reason.FEW)
    made.connect(web[2], api[1], "overlay+ebpf", 25_000, Reason.FEW)
    made.connect(tool, database, "overlay+ebpf", 40_000_000, Reason.NO_LIBRARY)
    made.connect(tool, redis, "overlay", 3_000, Reason.NO_LIBRARY)
    return made


def crowd(containers: int, links: int) -> ExampleSwarm:
    """Containers of ten services on three hosts, and connections on one."""
    made = ExampleSwarm()
    for number in range(containers):
        host = HOSTS[0] if number < containers * 3 // 5 else HOSTS[1 + number % 2]
        made.add(f"service{number % 10}", host, f"10.0.{number // 250}.{number % 250 + 1}")
    own = [each for each in made.containers if each.host == HOSTS[0]]
    for number in range(links):
        client, server = own[number % len(own)], made.containers[(number * 7 + 1) % containers]
        if client is not server:
            made.connect(client, server, "overlay", 1000 + number, Reason.SHORT)
    return made


def with_problem(swarm: ExampleSwarm) -> ExampleSwarm:
    """The same with a problem that `freeflow status` reports."""
    cause = "the underlay's MTU of 1400 is too small for the network's of 1450"
    problem = Finding("warning", "large packets of backend may be lost", cause, "freeflow doctor")
    swarm.problems.append(problem)
    return swarm


def renamed(swarm: ExampleSwarm, old: str, new: str) -> None:
    """Give a container another name, as hostile as a test likes."""
    for each in swarm.containers:
        if each.name == old:
            each.name = new
