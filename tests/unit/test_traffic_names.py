"""What connections have carried, with the names of services, peers and hosts."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address
from pathlib import Path

import msgspec
import pytest

from dataplane.control import ConnectionTraffic, TrafficFacts
from driver.model import NetworkView
from driver.other_networks import OtherEndpoint, OtherNetwork
from plugin.paths import FAST
from plugin.traffic_names import AddressOwner, NamedTraffic, TrafficNames, TrafficReport
from tests.unit.facts import engine_view
from tests.unit.statuses import NET
from tests.unit.test_snapshot import TASK, VIP, World

FAR_MAC = "02:42:0a:00:04:09"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """`web` has the VIP 10.0.4.2 and the tasks .7 (here) and .8, `db` the task .9 on 192.0.2.2."""
    made = World(tmp_path)
    made.sync.view = engine_view(hostnames={IPv4Address("192.0.2.2"): "host2"})
    made.kernel.behind = {FAR_MAC: IPv4Address("192.0.2.2")}
    return made


def facts(*remotes: str, network: str = NET) -> TrafficFacts:
    return TrafficFacts(
        connections=tuple(
            ConnectionTraffic(
                namespace=1,
                container="web.1.abc",
                network=network,
                local="10.0.4.7:5000",
                remote=remote,
                path="overlay",
                reason="short",
                cookie=number,
                read=5.0,
            )
            for number, remote in enumerate(remotes)
        ),
        reasons={"short": "because"},
        read=5.5,
        router_cpu=1.5,
        relay_cpu=2.5,
        containers_relay_cpu={1: 0.5},
    )


def report(world: World, *remotes: str, network: str = NET) -> TrafficReport:
    found = facts(*remotes, network=network)
    return TrafficNames(world.driver, world.kernel, world.sync).report(found)


def peers(world: World, *remotes: str) -> list[tuple[str, str, str]]:
    found = report(world, *remotes).connections
    assert [each.service for each in found] == ["web"] * len(remotes)
    return [(each.peer, each.peer_service, each.host) for each in found]


def test_names(world: World) -> None:
    """A peer has its container's or task's name, its service, and its host if that is known."""
    assert peers(world, "10.0.4.7:1", "10.0.4.8:1", "10.0.4.9:1", "10.0.4.99:1", "8.8.8.8:1") == [
        ("web.1.abc", "web", "host1"),
        ("web.2", "web", ""),
        ("db.1", "db", "host2"),
        ("", "", ""),
        ("", "", ""),
    ]


def test_a_vip(world: World) -> None:
    """A VIP has its service's name, and a host if all of its tasks are there."""
    assert peers(world, "10.0.4.2:80") == [("web", "web", "host1")]
    world.change_state(table={VIP: (TASK, IPv4Address("10.0.4.9"))})
    assert peers(world, "10.0.4.2:80") == [("web", "web", "")]


def test_an_ipv6_address(world: World) -> None:
    """An IPv6 address of the network has the names of the IPv4 address in it, another one none."""
    prefix = world.driver.store.networks()[0].prefix6
    inside = prefix[int(IPv4Address("10.0.4.9"))]
    assert peers(world, f"[{inside}]:80", "[2001:db8::9]:80") == [
        ("db.1", "db", "host2"),
        ("", "", ""),
    ]


def test_a_host_without_a_name(world: World) -> None:
    """Only managers know other hosts' names; a worker shows the address."""
    world.sync.view = engine_view(manager=False)
    assert peers(world, "10.0.4.9:1") == [("db.1", "db", "192.0.2.2")]
    world.sync.view = None
    assert peers(world, "10.0.4.9:1", "10.0.4.7:1") == [
        ("db.1", "db", "192.0.2.2"),
        ("web.1.abc", "web", ""),
    ]


def test_nothing_is_known(world: World) -> None:
    """Connections are listed, too, before the engine has answered or if their network is gone."""
    world.sync.states.clear()
    (found,) = report(world, "10.0.4.9:1").connections
    assert (found.service, found.peer, found.host) == ("", "", "host2")
    (found,) = report(world, "10.0.4.9:1", network="gone").connections
    assert (found.service, found.peer, found.host) == ("", "", "")


def test_addresses(world: World) -> None:
    """All containers, tasks and VIPs of this host's networks are listed, those of other hosts with
    their hosts if these are known.
    """
    book = TrafficNames(world.driver, world.kernel, world.sync).addresses()
    assert book.networks[NET] == {
        "10.0.4.2": AddressOwner(name="web", service="web", host="host1", vip=True),
        "10.0.4.7": AddressOwner(name="web.1.abc", service="web", host="host1"),
        "10.0.4.8": AddressOwner(name="web.2", service="web"),
        "10.0.4.9": AddressOwner(name="db.1", service="db", host="host2"),
    }
    world.sync.states.clear()
    book = TrafficNames(world.driver, world.kernel, world.sync).addresses()
    assert book.networks == {NET: {}}


def test_a_network_of_another_driver(world: World) -> None:
    """On a network of another driver containers of this host have their names, and so has the
    network.
    """
    known = OtherNetwork(
        NetworkView(id="b", name="app", driver="bridge"),
        "br-b",
        tuple(
            OtherEndpoint(name, name, (ip_address(address),), Path("/netns/1"))
            for name, address in (("web-1", "172.20.0.2"), ("db-1", "fd00::3"))
        ),
    )
    named = TrafficNames(world.driver, world.kernel, world.sync, lambda: (known,))
    found = named.report(facts("172.20.0.2:80", "[fd00::3]:80", "172.20.0.1:80", network="b"))
    assert [(each.peer, each.host) for each in found.connections] == [
        ("web-1", "host1"),
        ("db-1", "host1"),
        ("", ""),
    ]
    assert found.networks["b"] == "app"
    assert named.addresses().networks["b"] == {
        "172.20.0.2": AddressOwner(name="web-1", host="host1"),
        "fd00::3": AddressOwner(name="db-1", host="host1"),
    }


def test_the_rest_is_the_routers(world: World) -> None:
    """All that the router says is passed on; the path is that of the packets."""
    world.kernel.taken = {FAR_MAC}
    found = report(world, "10.0.4.9:1")
    said = facts("10.0.4.9:1")
    for name in ("reasons", "read", "router_cpu", "relay_cpu", "containers_relay_cpu"):
        assert getattr(found, name) == getattr(said, name)
    assert (found.host, found.networks) == ("host1", {NET: "backend"})
    (one,) = found.connections
    (of_router,) = said.connections
    added = {"service": "web", "peer": "db.1", "peer_service": "db", "host": "host2"}
    facts_of = msgspec.structs.asdict(of_router) | added | {"path": FAST}
    assert one == NamedTraffic(**facts_of)
