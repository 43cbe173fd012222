"""What the page shows: the map, edges, and the feed that all browsers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest

from dataplane.errors import RouterAway
from dataplane.router.reasons import Reason
from driver.errors import EngineError, FreeFlowError
from plugin import page_traffic, page_view
from plugin.page_feed import INTERVAL, MAP_AGE, PageFeed, PageSource
from plugin.page_traffic import Edge, TrafficView, traffic_view
from plugin.page_view import UNNAMED, MapView, map_view
from plugin.rates import measure
from plugin.status import OtherNetworkStatus
from plugin.traffic_names import AddressBook, AddressOwner
from testbed.example_swarm import (
    BACKEND,
    STEP,
    ExampleConnection,
    ExampleContainer,
    ExampleSwarm,
    shop,
    with_problem,
)
from tests.unit.statuses import ADDRESSES, NET, finding, status

T = TypeVar("T")


def nodes(swarm: ExampleSwarm) -> MapView:
    return map_view(swarm.status(), swarm.addresses())


def traffic(swarm: ExampleSwarm) -> TrafficView:
    before, now = swarm.traffic(), swarm.traffic()
    return traffic_view(measure(now, before), now, nodes(swarm), STEP)


def edge(swarm: ExampleSwarm, one: ExampleContainer, other: ExampleContainer) -> Edge:
    ends = sorted((f"container/{one.name}", f"container/{other.name}"))
    (found,) = [each for each in traffic(swarm).edges if [each.a, each.b] == ends]
    return found


# --- the map


def test_containers_have_service_and_host() -> None:
    """Each container is listed once, this host's first, with its service, host and addresses."""
    found = map_view(status(), ADDRESSES)
    assert [(each.name, each.service, each.host, each.own) for each in found.containers] == [
        ("web.1.abc", "web", "host1", True),
        ("db.1.def", "db", "host2", False),
    ]
    assert found.containers[0].addresses == ["10.0.4.7"]
    assert found.containers[0].networks == ["backend"]


def test_a_container_on_two_networks_is_one_node() -> None:
    """A container keeps one node, with the names and addresses of all of its networks."""
    other = OtherNetworkStatus("b", "app", "bridge", containers={"web.1.abc": ["172.20.0.2"]})
    there = {"172.20.0.2": AddressOwner(name="web.1.abc", host="host1")}
    book = AddressBook(networks={**ADDRESSES.networks, "b": there})
    first = map_view(status(other_networks=[other]), book).containers[0]
    assert (first.service, first.own) == ("web", True)
    assert first.networks == ["app", "backend"]
    assert first.addresses == ["10.0.4.7", "172.20.0.2"]


def test_names_of_two_hosts_are_two_nodes() -> None:
    """A container of another host with the name of one here is another node, and so are their
    connections.
    """
    swarm = ExampleSwarm()
    here, there = (
        swarm.add("", host, f"10.0.1.{number}", "redis")
        for number, host in enumerate(("alpha", "beta"), 1)
    )
    client = swarm.add("web", "alpha", "10.0.1.9")
    swarm.connect(client, here, "shm", 1000)
    swarm.connect(client, there, "relay", 1000)
    assert [(each.name, each.host, each.own) for each in nodes(swarm).containers] == [
        ("redis", "alpha", True),
        ("web.1", "alpha", True),
        ("redis", "beta", False),
    ]
    ends = [{each.a, each.b} for each in traffic(swarm).edges]
    first, second, third = (each.key for each in nodes(swarm).containers)
    assert ends == [{second, first}, {second, third}]


def test_services_lead_to_their_tasks() -> None:
    """A service has its VIP, the nodes of its tasks, and those that this host's containers get."""
    web, db = map_view(status(), ADDRESSES).services
    assert (web.key, web.vip, web.balance) == (f"service/{NET}/web", "10.0.4.2", "even")
    assert web.tasks == ["container/web.1.abc", "container/db.1.def"]
    assert (db.vip, db.balance) == ("", "dnsrr")
    assert db.tasks == ["10.0.4.9"]


def test_hosts_say_how_they_are_connected() -> None:
    """Hosts have networks, session and link of the relays; this host comes first."""
    alpha, beta, gamma = nodes(shop()).hosts
    assert (alpha.name, alpha.own, alpha.session) == ("alpha", True, None)
    assert (beta.session, beta.link, beta.transport) == (True, "up", "rdma")
    assert gamma.why_not_rdma == "the other host has no RDMA device"
    assert gamma.networks == ["backend"]


def test_problems_are_those_of_status() -> None:
    """What `freeflow status` finds is shown with cause and remedy."""
    found = map_view(status(problems=[finding()]), ADDRESSES)
    assert not found.healthy
    assert found.problems == [finding()]


def test_the_map_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of other hosts over the limit are counted and not listed."""
    monkeypatch.setattr(page_view, "CONTAINERS", 4)
    swarm = shop()
    found = nodes(swarm)
    assert len(found.containers) == 4
    assert all(each.own for each in found.containers)
    assert found.left_out == len(swarm.containers) - 4


# --- edges


def test_both_ends_are_one_connection() -> None:
    """A connection between two containers of this host counts once, with its rates."""
    swarm = ExampleSwarm()
    one, other = (swarm.add(name, "alpha", f"10.0.1.{name}", name) for name in ("1", "2"))
    swarm.connect(one, other, "shm", 1000)
    found = edge(swarm, one, other)
    assert (found.connections, found.path) == (1, "shm")
    assert (found.to_a, found.to_b) == (1000.0, 1000.0)
    assert traffic(swarm).paths["shm"].connections == 1


def test_directions() -> None:
    """Bytes are given for each direction, whichever end is asked."""
    swarm = ExampleSwarm()
    one, other = swarm.add("a", "alpha", "10.0.1.1"), swarm.add("b", "beta", "10.0.1.2")
    link = swarm.connect(one, other, "overlay", 1000)
    before, now = swarm.traffic(), swarm.traffic()
    (end,) = now.connections
    assert end.tcp is not None
    uneven = msgspec.structs.replace(end.tcp, bytes_in=end.tcp.bytes_in + 600)
    later = msgspec.structs.replace(now, connections=(msgspec.structs.replace(end, tcp=uneven),))
    (found,) = traffic_view(measure(later, before), later, nodes(swarm), STEP).edges
    assert (found.a, found.b) == (f"container/{link.client.name}", f"container/{other.name}")
    assert (found.to_b, found.to_a) == (1000.0, 1300.0)


@pytest.mark.parametrize("listed_first", ["client", "server"])
def test_a_vip_leads_to_the_task(listed_first: str) -> None:
    """An end that knows its peer by a VIP belongs to the task that has the other end."""
    swarm = ExampleSwarm(vips={"db": "10.0.0.2"})
    one, other = swarm.add("web", "alpha", "10.0.1.1"), swarm.add("db", "alpha", "10.0.1.2")
    swarm.connect(one, other, "shm", 1000, vip="10.0.0.2")
    report = swarm.traffic()
    ends = report.connections if listed_first == "client" else report.connections[::-1]
    report = msgspec.structs.replace(report, connections=ends)
    (found,) = traffic_view(measure(report, None), report, nodes(swarm), 0.0).edges
    assert (found.a, found.b) == ("container/db.1", "container/web.1")
    assert found.connections == 1


def test_a_vip_of_another_host_stays_a_service() -> None:
    """Where no end of this host says which task it is, the edge leads to the service."""
    swarm = ExampleSwarm(vips={"db": "10.0.0.2"})
    one, other = swarm.add("web", "alpha", "10.0.1.1"), swarm.add("db", "beta", "10.0.1.2")
    swarm.connect(one, other, "relay", 1000, vip="10.0.0.2")
    (found,) = traffic(swarm).edges
    assert (found.a, found.b) == ("container/web.1", f"service/{BACKEND}/db")


def test_paths_of_one_pair_are_edges_of_their_own() -> None:
    """Two containers have an edge for each path, with the reasons of its connections."""
    swarm = ExampleSwarm()
    one, other = swarm.add("a", "alpha", "10.0.1.1"), swarm.add("b", "beta", "10.0.1.2")
    swarm.connect(one, other, "relay", 1000)
    for _ in range(2):
        swarm.connect(one, other, "overlay", 100, Reason.FEW)
    swarm.connect(one, other, "overlay", 100, Reason.BULK)
    relay, overlay = traffic(swarm).edges
    assert (relay.path, relay.reasons) == ("relay", {})
    assert (overlay.path, overlay.connections) == ("overlay", 3)
    assert overlay.reasons == {"few": 2, "bulk": 1}
    assert overlay.to_b == 300.0


def test_new_connections_have_no_rates() -> None:
    """Rates are null before there are two reports."""
    swarm = ExampleSwarm()
    one, other = swarm.add("a", "alpha", "10.0.1.1"), swarm.add("b", "beta", "10.0.1.2")
    swarm.connect(one, other, "overlay", 1000)
    report = swarm.traffic()
    (found,) = traffic_view(measure(report, None), report, nodes(swarm), 0.0).edges
    assert (found.to_a, found.to_b, found.messages, found.retransmits) == (None,) * 4
    assert found.round_trip_ms == 0.31


def test_unknown_peers_are_one_node() -> None:
    """However many addresses without a name a container speaks with, they are one node."""
    swarm = ExampleSwarm()
    one = swarm.add("a", "alpha", "10.0.1.1")
    for number in range(50):
        swarm.links.append(
            ExampleConnection(
                one, ExampleContainer("", f"203.0.113.{number}", "", ""), "overlay", 10, 5
            )
        )
    found = traffic(swarm)
    assert [(each.a, each.b, each.connections) for each in found.edges] == [
        (UNNAMED, "container/a.1", 50)
    ]


def test_edges_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges with the fewest bytes are left out and counted; sums by path include them."""
    monkeypatch.setattr(page_traffic, "EDGES", 3)
    swarm = shop()
    everything = traffic(swarm)
    assert len(everything.edges) == 3
    assert everything.left_out > 0
    assert sum(each.connections for each in everything.paths.values()) == len(swarm.links)
    rates = [(each.to_a or 0) + (each.to_b or 0) for each in everything.edges]
    assert rates == sorted(rates, reverse=True)


# --- the feed


class Asked:
    """A source that counts how often it is asked."""

    def __init__(self) -> None:
        self.swarm = with_problem(shop())
        self.counts = {"status": 0, "addresses": 0, "traffic": 0}
        self.time = 50.0
        self.fails: FreeFlowError | None = None
        self.no_traffic: FreeFlowError | None = None
        made = self.swarm.source()
        self.source = PageSource(
            lambda: self.count("status", made.status),
            lambda: self.count("addresses", made.addresses),
            lambda: self.count("traffic", made.traffic),
        )
        self.feed = PageFeed(self.source, lambda: self.time)

    def count(self, name: str, answer: Callable[[], T]) -> T:
        self.counts[name] += 1
        if self.fails is not None:
            raise self.fails
        if name == "traffic" and self.no_traffic is not None:
            raise self.no_traffic
        return answer()

    def traffic(self) -> TrafficView:
        return msgspec.json.decode(self.feed.latest().traffic, type=TrafficView)


def test_many_browsers_cost_as_much_as_one() -> None:
    """Within an interval the plugin is asked once, and the map is asked for less often."""
    asked = Asked()
    for _ in range(100):
        asked.feed.latest()
    assert asked.counts == {"status": 1, "addresses": 1, "traffic": 1}
    asked.time += INTERVAL
    asked.feed.latest()
    assert asked.counts == {"status": 1, "addresses": 1, "traffic": 2}
    asked.time += MAP_AGE
    asked.feed.latest()
    assert asked.counts == {"status": 2, "addresses": 2, "traffic": 3}


def test_an_equal_map_keeps_its_number() -> None:
    """A map gets another number only if it differs."""
    asked = Asked()
    first = asked.feed.latest().map_number
    asked.time += MAP_AGE
    assert asked.feed.latest().map_number == first
    asked.swarm.add("web", "alpha", "10.0.1.99")
    asked.time += MAP_AGE
    assert asked.feed.latest().map_number == first + 1


def test_rates_are_of_the_last_interval() -> None:
    """Rates are those since the report before, unless nobody has asked for a while."""
    asked = Asked()
    assert asked.traffic().interval == 0.0
    asked.time += INTERVAL
    assert asked.traffic().interval == STEP
    asked.swarm.clock += 60
    asked.time += 60
    assert asked.traffic().interval == 0.0


def test_a_router_that_is_down() -> None:
    """Without the router the map stays, and the page says why there are no connections."""
    asked = Asked()
    asked.no_traffic = RouterAway("the router does not answer")
    found = asked.traffic()
    assert found.error == "the router does not answer"
    assert not found.edges
    asked.no_traffic = None
    asked.time += INTERVAL
    assert asked.traffic().edges


def test_a_failure_is_kept_for_an_interval_too() -> None:
    """While there is no status, all browsers together ask once in an interval."""
    asked = Asked()
    asked.fails = EngineError("it is silent")
    for _ in range(10):
        with pytest.raises(EngineError):
            asked.feed.latest()
    assert asked.counts["status"] == 1
    asked.fails = None
    asked.time += INTERVAL
    assert asked.feed.latest().map_number == 1


def test_names_are_harmless() -> None:
    """Control characters and changes of direction in names become escapes."""
    asked = Asked()
    asked.swarm.containers[0].name = "a\u202e\x1b[31mb"
    asked.swarm.containers[0].host = "alpha"
    text = asked.feed.latest().map.decode()
    assert "a\\\\u202e\\\\x1b[31mb" in text
    assert "\u202e" not in text
