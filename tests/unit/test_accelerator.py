"""Snapshots for the router: complete, after each change, and for each new router."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

import pytest

from dataplane.control import (
    Connections,
    PathCounts,
    RouterSettings,
    RouterSnapshot,
    Rule,
    Statistics,
)
from dataplane.errors import RouterAway
from driver.accelerator import REPEAT, RETRY, SANDBOX_RETRY, Accelerator, ThisHost, facts
from driver.model import Endpoint, LocalContainer, Network, NetworkView, Peer, Service, Subnet, Task
from driver.store import Store
from driver.vip_table import NetworkState
from testbed.patience import patience

NET, NET2 = "n" * 25, "m" * 25
VIP = IPv4Address("10.0.4.2")


def a_network(network_id: str = NET, **changes: object) -> Network:
    made = Network(
        id=network_id,
        vni=70012 if network_id == NET else 70013,
        port=4799,
        mtu=1450,
        prefix6=IPv6Network("fd00:1:2:3::/64"),
        subnets=(Subnet(IPv4Network("10.0.4.0/24")),),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def an_endpoint(number: int, network_id: str = NET) -> Endpoint:
    return Endpoint(
        id=f"{number:064x}",
        network_id=network_id,
        mac=f"02:42:0a:00:04:{number:02x}",
        ipv4=IPv4Interface(f"10.0.4.{number}/24"),
        ipv6=IPv6Interface(f"fd00:1:2:3::{number:x}/64"),
        sandbox_key=f"/var/run/docker/netns/s{number}",
    )


def a_state() -> NetworkState:
    tasks = tuple(Task(f"web.{n}", IPv4Address(f"10.0.4.{n}"), an_endpoint(n).id) for n in (7, 8))
    return NetworkState(
        view=NetworkView(
            id=NET,
            name="backend",
            driver="freeflow:latest",
            services=(Service("web", VIP, tasks),),
            containers=(LocalContainer("c7", "web.1.x", an_endpoint(7).id, None),),
        ),
        table={VIP: (IPv4Address("10.0.4.7"),)},
        seen=1.0,
    )


@dataclass
class FakeRouter:
    """Records snapshots; may be unreachable."""

    told: list[RouterSnapshot] = field(default_factory=list)
    away: bool = False
    heard: threading.Event = field(default_factory=threading.Event)

    def replace_snapshot(self, facts: RouterSnapshot) -> None:
        if self.away:
            raise RouterAway("nobody there")
        self.told.append(facts)
        self.heard.set()

    def statistics(self) -> Statistics:
        raise RouterAway("nobody there")

    def connections(self, namespace: int | None = None) -> Connections:
        raise RouterAway("nobody there")

    def paths(self) -> PathCounts:
        raise RouterAway("nobody there")


@dataclass
class FakeSandboxes:
    """Sandboxes by name; `inodes` of those that exist."""

    states: dict[str, NetworkState] = field(default_factory=dict)
    inodes: dict[str, int] = field(default_factory=dict)

    def sandbox(self, endpoint: Endpoint) -> Path | None:
        return Path(endpoint.sandbox_key) if endpoint.sandbox_key else None

    def state(self) -> dict[str, NetworkState]:
        return self.states

    def inode(self, path: Path) -> int | None:
        return self.inodes.get(path.name)


@dataclass
class World:
    store: Store
    router: FakeRouter
    sandboxes: FakeSandboxes
    accelerator: Accelerator
    now: list[float]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store = Store(tmp_path)
    router, sandboxes, now = FakeRouter(), FakeSandboxes(), [0.0]
    accelerator = Accelerator(
        store, sandboxes, router, RouterSettings(), clock=lambda: now[0], inode=sandboxes.inode
    )
    yield World(store, router, sandboxes, accelerator, now)
    accelerator.stop()


def test_facts() -> None:
    """A snapshot has each endpoint with its namespace, and each of their networks with its VIPs and
    all tasks."""
    told = facts(
        [a_network(acceleration=False, ipv6=True), a_network(NET2)],
        [an_endpoint(7), an_endpoint(9)],
        {NET: a_state()},
        {an_endpoint(7).id: (Path("/netns/s7"), 4711)},
        RouterSettings(acceleration=False),
    )
    (endpoint,) = told.endpoints
    assert endpoint.addresses == ("10.0.4.7", "fd00:1:2:3::7")
    assert (endpoint.namespace, endpoint.path, endpoint.container) == (4711, "/netns/s7", "web.1.x")
    (network,) = told.networks
    assert (network.id, network.name, network.acceleration) == (NET, "backend", False)
    assert network.subnets == ("10.0.4.0/24", "fd00:1:2:3::/64")
    # The second takes no new connections; those that it has count.
    assert network.vips == {"10.0.4.2": ("10.0.4.7", "10.0.4.8")}
    assert told.settings == RouterSettings(acceleration=False)


def test_a_networks_own_rule() -> None:
    """-o upgrade_operations changes the rule of that network alone, and nothing else of it."""
    own = a_network(options={"upgrade_operations": "9"})
    homes = {each.id: (Path("/netns/s"), 1) for each in (an_endpoint(7), an_endpoint(8, NET2))}
    settings = RouterSettings(rule=Rule(operations=3, spin=7))
    told = facts(
        [own, a_network(NET2)], [an_endpoint(7), an_endpoint(8, NET2)], {}, homes, settings
    )
    assert {each.id: each.rule for each in told.networks} == {
        NET: Rule(operations=9, spin=7),
        NET2: None,
    }


def test_other_hosts() -> None:
    """A snapshot has the other hosts of each network, never this one, whichever of its addresses
    Docker lists."""
    peers = tuple(Peer(str(n), IPv4Address(f"192.0.2.{n}")) for n in (3, 1, 2))
    state = a_state()
    assert state.view is not None
    known = {NET: replace(state, view=replace(state.view, peers=peers))}
    homes = {an_endpoint(7).id: (Path("/netns/s"), 1)}
    own = ThisHost(
        frozenset({IPv4Address("192.0.2.1"), IPv4Address("10.9.9.1")}),
        IPv4Address("10.9.9.1"),
        False,
    )
    network = a_network(options={"rdma": "off"})
    told = facts([network], [an_endpoint(7)], known, homes, RouterSettings(), own)
    assert told.networks[0].peers == ("192.0.2.2", "192.0.2.3")
    assert (told.networks[0].rdma, told.networks[0].relay) == (False, True)
    assert told.underlay == "10.9.9.1"
    assert told.tunnel_offload is False
    assert told.networks[0].verbs
    assert not told.networks[0].verbs_direct
    network = a_network(options={"relay": "off", "verbs": "off", "verbs_direct": "on"})
    told = facts([network], [an_endpoint(7)], known, homes, RouterSettings())
    assert (told.networks[0].peers, told.networks[0].rdma, told.underlay) == ((), True, "")
    assert not told.networks[0].relay
    assert not told.networks[0].verbs
    assert told.networks[0].verbs_direct


def test_told_once(world: World) -> None:
    """An unchanged snapshot isn't sent again; a changed one is sent whole."""
    world.store.put_network(a_network())
    world.accelerator.once()
    assert world.accelerator.once() == REPEAT
    assert len(world.router.told) == 1
    world.store.put_endpoint(an_endpoint(7))
    world.sandboxes.inodes["s7"] = 1
    world.accelerator.once()
    assert [len(each.endpoints) for each in world.router.told] == [0, 1]


def test_a_new_router_is_told_all(world: World) -> None:
    """A router that has just started gets a snapshot, even if nothing has changed."""
    world.accelerator.once()
    world.accelerator.router_started()
    world.accelerator.once()
    assert len(world.router.told) == 2


def test_a_router_that_is_away(world: World) -> None:
    """An unreachable router is tried again, and then gets the current state."""
    world.router.away = True
    assert world.accelerator.once() == RETRY
    world.store.put_network(a_network())
    world.store.put_endpoint(an_endpoint(7))
    world.sandboxes.inodes["s7"] = 1
    world.router.away = False
    assert world.accelerator.once() == REPEAT
    (told,) = world.router.told
    assert len(told.endpoints) == 1


def test_a_sandbox_that_comes_late(world: World) -> None:
    """Docker up to 27 mounts a container's namespace after Join: it is checked often, but not for
    ever."""
    world.store.put_network(a_network())
    world.store.put_endpoint(an_endpoint(7))
    assert world.accelerator.once() == SANDBOX_RETRY
    world.sandboxes.inodes["s7"] = 5
    assert world.accelerator.once() == REPEAT
    assert world.router.told[-1].endpoints[0].namespace == 5
    del world.sandboxes.inodes["s7"]
    world.accelerator.once()
    world.now[0] += 60
    assert world.accelerator.once() == REPEAT


def test_it_tells_by_itself(world: World) -> None:
    """A change is sent soon, by a thread."""
    world.accelerator.start()
    assert world.router.heard.wait(patience(5))
    world.router.heard.clear()
    world.store.put_network(a_network())
    world.store.put_endpoint(an_endpoint(7))
    world.sandboxes.inodes["s7"] = 5
    world.accelerator.wake()
    assert world.router.heard.wait(patience(5))
    assert world.router.told[-1].endpoints
