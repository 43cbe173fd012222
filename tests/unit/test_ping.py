"""`freeflow ping`: from where it is sent, and what is made of the answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, ip_address
from pathlib import Path

import msgspec
import pytest

from dataplane.control import PeerFact, RdmaFacts, RelayFacts, Statistics
from driver.errors import InvalidRequest, NotFound
from driver.model import IPAddress, LocalContainer, Service, Task
from plugin.echo import Probe
from plugin.ping import MAX_COUNT, Ping, PingRequest, PingResult
from tests.unit.facts import SANDBOXES, engine_view
from tests.unit.statuses import EP, NET
from tests.unit.test_snapshot import EP2, VIEW, VIP, World

MAC = "02:42:0a:00:04:08"
OTHER = "02:42:0a:00:04:09"


@dataclass
class FakeProber:
    """Answers `probe`, and records its arguments."""

    probe: Probe
    asked: list[tuple[Path, IPAddress, int, bool]] = field(default_factory=list)

    def __call__(self, sandbox: Path, address: IPAddress, count: int, vip: bool) -> Probe:
        self.asked.append((sandbox, address, count, vip))
        return self.probe


class PingWorld(World):
    """`World`, with host2 behind 192.0.2.2."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.sync.view = engine_view(hostnames={IPv4Address("192.0.2.2"): "host2"})
        self.prober = FakeProber(Probe([0.5], {"10.0.4.8": MAC}))
        self.there = {SANDBOXES / "abc"}

    def ping(self, address: str, count: int = 1) -> PingResult:
        ping = Ping(
            self.driver, self.kernel, self.sync, self.prober, lambda path: path in self.there
        )
        return ping(PingRequest(address, count))


@pytest.fixture
def world(tmp_path: Path) -> PingWorld:
    return PingWorld(tmp_path)


def test_container_of_another_host(world: PingWorld) -> None:
    """A container of another host is found behind the peer that the VXLAN device learned it
    from.
    """
    world.kernel.behind[MAC] = IPv4Address("192.0.2.2")
    found = world.ping("10.0.4.8", 3)
    assert world.prober.asked == [(SANDBOXES / "abc", ip_address("10.0.4.8"), 3, False)]
    assert (found.host, found.host_address, found.local) == ("host2", "192.0.2.2", False)
    assert (found.network, found.source, found.task) == ("backend", "10.0.4.7", "")
    assert (found.mac, found.path, found.sent) == (MAC, "overlay", 3)
    assert found.round_trips_ms == [0.5]


def test_peer_without_a_known_name(world: PingWorld) -> None:
    """A worker doesn't know other hosts' names, and shows their addresses."""
    world.sync.view = engine_view()
    world.kernel.behind[MAC] = IPv4Address("192.0.2.2")
    assert world.ping("10.0.4.8").host == "192.0.2.2"


def test_container_of_this_host(world: PingWorld) -> None:
    """A neighbour behind no peer is on this host."""
    found = world.ping("10.0.4.8")
    assert (found.host, found.host_address, found.local) == ("host1", "192.0.2.1", True)


def test_own_address(world: PingWorld) -> None:
    """The container's own address is on this host, though it is no neighbour."""
    world.prober.probe = Probe([0.1], {})
    found = world.ping("10.0.4.7")
    assert (found.local, found.mac) == (True, "02:42:0a:00:04:07")


def test_vip(world: PingWorld) -> None:
    """A VIP's host is that of the answering task, not of another neighbouring task."""
    neighbours = {"10.0.4.8": MAC, "10.0.4.9": OTHER}
    world.prober.probe = Probe([0.5], neighbours, IPv4Address("10.0.4.9"))
    world.kernel.behind[OTHER] = IPv4Address("192.0.2.2")
    found = world.ping(str(VIP))
    assert world.prober.asked[0][3]
    assert (found.task, found.mac, found.host) == ("10.0.4.9", OTHER, "host2")


def test_vip_whose_task_is_not_known(world: PingWorld) -> None:
    """If conntrack doesn't tell which task answered, no host is shown."""
    world.prober.probe = Probe([0.5], {"10.0.4.8": MAC})
    found = world.ping(str(VIP))
    assert (found.task, found.mac, found.host, found.host_address) == ("", "", "", "")
    assert found.round_trips_ms == [0.5]


def test_nobody_there(world: PingWorld) -> None:
    """An address without an answer has no host."""
    world.prober.probe = Probe([], {})
    found = world.ping("10.0.4.99")
    assert (found.host, found.host_address, found.local, found.round_trips_ms) == (
        "",
        "",
        False,
        [],
    )


def test_ipv6(world: PingWorld) -> None:
    """The network's IPv6 prefix belongs to it."""
    prefix = world.driver.store.networks()[0].prefix6
    address = str(prefix[5])
    world.prober.probe = Probe([0.3], {address: MAC})
    assert world.ping(address).network == "backend"
    assert isinstance(world.prober.asked[0][1], IPv6Address)


def test_a_container_whose_namespace_is_there(world: PingWorld) -> None:
    """The echo is sent from a container that has its namespace, not from one that is only about to
    start.
    """
    world.driver.create_endpoint(NET, EP2, ipv4=IPv4Interface("10.0.4.30/24"))
    world.driver.join(NET, EP2, "/var/run/docker/netns/second")
    world.there = {SANDBOXES / "second"}
    assert world.ping("10.0.4.8").source == "10.0.4.30"


def test_no_container_here(world: PingWorld) -> None:
    """Without a container of this host on the network the error shows how to start one."""
    world.there.clear()
    with pytest.raises(NotFound, match=r"docker run -d --network backend IMAGE"):
        world.ping("10.0.4.8")
    world.driver.delete_endpoint(NET, EP)
    with pytest.raises(NotFound, match=r"no container of this host is on network backend"):
        world.ping("10.0.4.8")


def test_address_of_no_network(world: PingWorld) -> None:
    """An address outside all networks is refused by name."""
    with pytest.raises(NotFound, match=r"203\.0\.113\.1 is in no FreeFlow network"):
        world.ping("203.0.113.1")


@pytest.mark.parametrize("name", ["", "none", "we", "10.0.4.0/24", "10.0.4.300", "web.front", "."])
def test_what_nothing_is_called(world: PingWorld, name: str) -> None:
    """An unknown name is refused; the remedy lists the known ones."""
    with pytest.raises(NotFound, match=r"is called .*; freeflow status"):
        world.ping(name)
    assert not world.prober.asked


@pytest.mark.parametrize(
    ("name", "full", "address"),
    [
        ("web", "web", "10.0.4.2"),
        ("web.backend", "web", "10.0.4.2"),
        ("web.2", "web.2", "10.0.4.8"),
        ("web.1", "web.1", "10.0.4.7"),
        ("web.1.abc", "web.1.abc", "10.0.4.7"),
        ("web.1.abc.backend", "web.1.abc", "10.0.4.7"),
        ("db", "db.1", "10.0.4.9"),
        ("db.1", "db.1", "10.0.4.9"),
        ("c0ffee", "box", "10.0.4.20"),
        ("box", "box", "10.0.4.20"),
    ],
)
def test_names(world: PingWorld, name: str, full: str, address: str) -> None:
    """Services, tasks and containers of this host have names; a service without a VIP stands for
    its only task.
    """
    box = LocalContainer("c0ffee" + "0" * 58, "box", EP2, IPv4Interface("10.0.4.20/24"))
    world.change_state(view=replace(VIEW, containers=(*VIEW.containers, box)))
    found = world.ping(name)
    assert (found.name, found.address) == (full, address)
    assert world.prober.asked[-1][1] == ip_address(address)
    assert world.ping(address).name == ""


def test_task_by_its_number(world: PingWorld) -> None:
    """A task may be given by service and number, without the rest of its name."""
    tasks = tuple(Task(f"web.{n}.x5d8k2", IPv4Address(f"10.0.4.{n}"), "e") for n in (1, 10, 11))
    world.change_state(view=replace(VIEW, services=(Service("web", VIP, tasks),), containers=()))
    assert world.ping("web.1").address == "10.0.4.1"
    assert world.ping("web.10").address == "10.0.4.10"


def test_ambiguous_names(world: PingWorld) -> None:
    """A name with several addresses is refused with a list of unique names."""
    other = replace(
        VIEW, id="other", name="front", services=(Service("web", IPv4Address("10.0.5.2"), ()),)
    )
    tasks = tuple(Task(f"db.{n}", IPv4Address(f"10.0.4.{n}"), "e") for n in range(30, 50))
    world.sync.states["other"] = replace(world.sync.states[NET], view=other)
    with pytest.raises(
        InvalidRequest, match=r"web\.backend \(10\.0\.4\.2\), web\.front \(10\.0\.5\.2\); give"
    ):
        world.ping("web")
    assert world.ping("web.backend").address == "10.0.4.2"
    world.change_state(view=replace(VIEW, services=(Service("db", None, tasks),)))
    with pytest.raises(InvalidRequest, match=r"db\.30\.backend .* and others; give"):
        world.ping("db")


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1])
def test_count(world: PingWorld, count: int) -> None:
    """The number of echoes is bounded."""
    with pytest.raises(InvalidRequest, match="count"):
        world.ping("10.0.4.8", count)
    assert not world.prober.asked


def known(rdma_facts: RdmaFacts, relay_facts: RelayFacts, /, **peer: object) -> Statistics:
    """What the router says; the peer is host2."""
    made = PeerFact(address="192.0.2.2", session=True, link="up")
    hosts = (msgspec.structs.replace(made, **peer),)
    return Statistics(rdma=msgspec.structs.replace(rdma_facts, hosts=hosts), relay=relay_facts)


RDMA = RdmaFacts(device="mlx5_0")
NONE = RdmaFacts(why="this host has no RDMA device")
RELAY = RelayFacts()
OFF = RelayFacts(on=False)
OVER_TCP: dict[str, object] = {
    "relay": True,
    "transport": "relay",
    "why_not_rdma": "its host has no RDMA device",
}


@pytest.mark.parametrize(
    ("said", "options", "path", "reason"),
    [
        (known(RDMA, RELAY, rdma=True, relay=True, transport="rdma"), {}, "rdma", ""),
        (known(RDMA, RELAY, **OVER_TCP), {}, "relay", "no RDMA: its host has no RDMA device"),
        (known(NONE, RELAY, **OVER_TCP), {}, "relay", "no RDMA: its host has no RDMA device"),
        (known(NONE, OFF, rdma=True), {}, "overlay", "this host has no RDMA device"),
        (known(RDMA, OFF), {}, "overlay", "its host has no RDMA device, and its relay no TCP"),
        (known(RDMA, RELAY, **OVER_TCP), {"relay": "off"}, "overlay", "no TCP"),
        (
            known(RDMA, RELAY, rdma=True, relay=True, transport="relay"),
            {"relay": "off"},
            "overlay",
            "relay is off for the network",
        ),
        (
            known(RDMA, RELAY, **OVER_TCP),
            {"relay": "off", "rdma": "off"},
            "overlay",
            "are off for the network or this host",
        ),
        (known(RDMA, RELAY, **OVER_TCP, link="down"), {}, "overlay", "link down"),
        (known(RDMA, RELAY, session=False, reason="silent"), {}, "overlay", "silent"),
    ],
)
def test_path_of_tcp(
    world: PingWorld, said: Statistics, options: dict[str, str], path: str, reason: str
) -> None:
    """ping says over which path TCP to another host's container can go, and why no faster one."""
    network = world.driver.store.networks()[0]
    world.driver.store.put_network(replace(network, options={**network.options, **options}))
    world.kernel.behind[MAC] = IPv4Address("192.0.2.2")
    world.router.said = said
    found = Ping(
        world.driver,
        world.kernel,
        world.sync,
        world.prober,
        lambda path: path in world.there,
        world.router,
    )(PingRequest("10.0.4.8", 1))
    assert found.tcp == path
    assert reason in found.reason
    assert bool(reason) == bool(found.reason)
