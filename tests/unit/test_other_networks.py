"""Networks of other drivers: which are accelerated, and what the router learns of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface
from pathlib import Path
from typing import Any

import pytest

from dataplane.control import ANY_DEVICE, EndpointFact, NetworkFact, RouterSnapshot
from dataplane.router.knowledge import Knowledge
from driver.answers import parse_network
from driver.errors import EngineError
from driver.model import LocalContainer, NetworkView, Peer, Service, Subnet
from driver.other_networks import (
    AGAIN,
    PATIENCE,
    REPEAT,
    RETRY,
    SHARED_REPEAT,
    SOON,
    OtherNetwork,
    OtherNetworks,
    RefusedNetwork,
    why_not,
    with_others,
)

LABELLED = {"freeflow.accelerate": "on"}
ICC = "com.docker.network.bridge.enable_icc"


def a_container(number: int, *, network: str = "0") -> LocalContainer:
    return LocalContainer(
        id=f"c{number}",
        name=f"app-{number}",
        endpoint_id=f"e{network}{number}",
        address=IPv4Interface(f"172.2{network}.0.{number}/16"),
        ipv6=IPv6Interface(f"fd0{network}::{number}/64"),
    )


def a_view(network: str = "0", /, **changes: Any) -> NetworkView:
    made = NetworkView(
        id=network * 64,
        name=f"app{network}",
        driver="bridge",
        scope="local",
        subnets=(Subnet(IPv4Network(f"172.2{network}.0.0/16")),),
        labels=LABELLED,
    )
    return replace(made, **changes)


class FakeEngine:
    """Networks, and the paths of containers' namespaces."""

    def __init__(self, *views: NetworkView) -> None:
        self.views = {view.id: view for view in views}
        self.sandboxes: dict[str, str] = {}
        self.asked: list[str] = []
        self.read: list[str] = []
        """Networks in the order in which they were read."""
        self.lists = 0
        self.down = False
        self.busy: set[str] = set()

    def all_networks(self) -> tuple[NetworkView, ...]:
        self._answer()
        self.lists += 1
        return tuple(replace(view, containers=()) for view in self.views.values())

    def changed_networks(self) -> Iterator[str]:
        return iter(())

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        self._answer()
        self.read.append(network_id)
        view = self.views.get(network_id)
        return view if view is None or services else replace(view, services=())

    def sandbox_key(self, container_id: str) -> str | None:
        self._answer()
        if container_id in self.busy:
            raise EngineError("it doesn't answer in time")
        self.asked.append(container_id)
        return self.sandboxes.get(container_id)

    def _answer(self) -> None:
        if self.down:
            raise EngineError("it doesn't answer")


class Reader:
    """`OtherNetworks` with a fake engine and clock; `changes` counts the calls of `changed`."""

    def __init__(self, *views: NetworkView, on: bool = False) -> None:
        self.engine = FakeEngine(*views)
        self.changes = 0
        self.now = 100.0
        self.networks = OtherNetworks(
            self.engine,
            sandboxes=Path("/host/netns"),
            on=on,
            changed=self._changed,
            clock=lambda: self.now,
        )

    def _changed(self) -> None:
        self.changes += 1


@pytest.mark.parametrize(
    ("changes", "off", "on"),
    [
        ({}, None, None),
        ({"labels": {}}, "no label", None),
        ({"labels": {"freeflow.accelerate": "off"}}, "is off", "is off"),
        ({"labels": {"freeflow.accelerate": "yes"}}, "no label", None),
        ({"labels": {"freeflow.accelerate": "true"}}, None, None),
        ({"labels": {"freeflow.accelerate": "false"}}, "is off", "is off"),
        ({"options": {ICC: "false"}}, "may not reach", "may not reach"),
        ({"options": {ICC: "F"}}, "may not reach", "may not reach"),
        ({"options": {ICC: "true"}}, None, None),
        ({"driver": "macvlan"}, None, None),
        (
            {"driver": "macvlan", "options": {"macvlan_mode": "bridge", "parent": "eth0"}},
            None,
            None,
        ),
        ({"driver": "macvlan", "options": {"macvlan_mode": "private"}}, "private", "private"),
        ({"driver": "ipvlan", "options": {"ipvlan_mode": ""}}, None, None),
        ({"driver": "ipvlan", "options": {"ipvlan_mode": "l3s"}}, "l3s", "l3s"),
        ({"driver": "ipvlan", "options": {"ipvlan_flag": "vepa"}}, "vepa", "vepa"),
        ({"driver": "weave"}, None, None),
        ({"driver": "weave", "labels": {"freeflow.accelerate": "trust"}}, None, None),
        ({"driver": "weave", "labels": {}}, "no label", "driver weave has"),
        ({"driver": "host"}, "no addresses", "no addresses"),
        ({"driver": "null", "labels": {}}, "no label", "no addresses"),
        ({"labels": {"freeflow.accelerate": "trust"}}, None, None),
        (
            {"labels": {"freeflow.accelerate": "trust"}, "options": {ICC: "false"}},
            "may not reach",
            "may not reach",
        ),
        ({"driver": "overlay"}, None, None),
        ({"driver": "overlay", "ingress": True}, "published", "published"),
        ({"driver": "freeflow:latest"}, "own", "own"),
        ({"internal": True}, None, None),
    ],
)
def test_which_networks(changes: dict[str, object], off: str | None, on: str | None) -> None:
    """A network is accelerated if its label or the setting says so, and off wins; the setting says
    nothing of drivers that nobody knows. Never one whose containers may not reach each other.
    """
    for setting, expected in ((False, off), (True, on)):
        said = why_not(a_view(**changes), setting)
        assert (said is None) == (expected is None)
        assert expected is None or expected in str(said)


def test_a_network_with_containers() -> None:
    """A network is known with the containers whose namespaces are there; the engine is asked for a
    namespace once.
    """
    reader = Reader(a_view(containers=(a_container(2), a_container(3))), a_view("1", labels={}))
    reader.engine.sandboxes = {"c2": "/var/run/docker/netns/aa", "c3": "/var/run/docker/netns/bb"}
    assert reader.networks.once() == REPEAT
    (known,) = reader.networks.known()
    assert (known.view.name, known.bridge) == ("app0", "br-000000000000")
    assert [(each.id, each.container, str(each.sandbox)) for each in known.endpoints] == [
        ("e02", "app-2", "/host/netns/aa"),
        ("e03", "app-3", "/host/netns/bb"),
    ]
    reader.networks.once()
    assert reader.engine.asked == ["c2", "c3"]
    assert reader.changes == 1


def test_what_is_expected_before_the_engine_answers() -> None:
    """Until the engine has said which networks there are, a container may have any address on one
    of them; then only in their subnets, also on one whose containers have no namespace yet. The
    router is told so even if there is no such network.
    """
    reader = Reader(a_view(containers=(a_container(2),)), a_view("1", labels={}))
    reader.engine.down = True
    reader.networks.once()
    assert (reader.networks.expected(), reader.changes) == (("0.0.0.0/0", "::/0"), 0)
    reader.engine.down = False
    reader.networks.once()
    assert reader.networks.expected() == ("172.20.0.0/16",)
    reader.engine.down = True
    reader.networks.once()
    assert reader.networks.expected() == ("172.20.0.0/16",)
    empty = Reader()
    empty.networks.once()
    assert (empty.networks.expected(), empty.changes) == ((), 1)


def test_the_bridge_has_a_name_of_its_own() -> None:
    """The name that the user gave the bridge is the one that the router learns."""
    options = {"com.docker.network.bridge.name": "docker0"}
    reader = Reader(a_view(containers=(a_container(2),), options=options))
    reader.engine.sandboxes = {"c2": "/netns/aa"}
    reader.networks.once()
    assert reader.networks.known()[0].bridge == "docker0"


def test_a_network_without_a_bridge_of_the_hosts() -> None:
    """A network of another driver has no bridge in the host's namespace, and what the engine lists
    for its own VIPs is no container.
    """
    balancer = replace(a_container(5), id="lb-app0", endpoint_id="e05")
    reader = Reader(a_view(driver="overlay", containers=(a_container(2), balancer)))
    reader.engine.sandboxes = {"c2": "/netns/2"}
    assert reader.networks.once() == REPEAT
    (known,) = reader.networks.known()
    assert (known.bridge, [each.id for each in known.endpoints]) == ("", ["e02"])
    whole = with_others(RouterSnapshot(), [known], number)
    assert (whole.networks[0].kind, whole.networks[0].foreign) == ("overlay", True)
    assert reader.engine.asked == ["c2"]


def test_a_container_that_just_starts() -> None:
    """A container without a namespace is looked at soon again, for a while; it comes as soon as it
    has one.
    """
    reader = Reader(a_view(containers=(a_container(2),)))
    assert reader.networks.once() == SOON
    assert reader.networks.known()[0].endpoints == ()
    reader.now += 8
    assert reader.networks.once() == 2
    reader.now += PATIENCE
    assert reader.networks.once() == REPEAT
    reader.engine.sandboxes = {"c2": "/netns/aa"}
    reader.networks.once()
    assert len(reader.networks.known()[0].endpoints) == 1


def test_a_container_that_starts_slowly() -> None:
    """A container for which the engine doesn't answer delays no other container."""
    reader = Reader(a_view(containers=(a_container(2), a_container(3))))
    reader.engine.sandboxes = {"c3": "/netns/bb"}
    reader.engine.busy = {"c2"}
    assert reader.networks.once() == SOON
    assert [each.id for each in reader.networks.known()[0].endpoints] == ["e03"]


def test_networks_that_ask_in_vain() -> None:
    """A network that asks by its label and can't be accelerated is named with the reason; one that
    doesn't ask is not, nor FreeFlow's own.
    """
    reader = Reader(
        a_view("0", options={ICC: "false"}),
        a_view("1", labels={}, options={ICC: "false"}),
        a_view("2", driver="freeflow:latest"),
        a_view("3"),
    )
    reader.networks.once()
    asking = reader.networks.asking()
    assert [each.view.name for each in asking] == ["app3", "app0"]
    assert isinstance(asking[1], RefusedNetwork)
    assert "may not reach" in asking[1].reason


def test_an_event_before_its_fact() -> None:
    """An event is followed by two looks, because the first may come before the engine lists it."""
    reader = Reader(a_view())
    reader.networks.wake()
    assert reader.networks.once() == AGAIN
    assert reader.networks.once() == REPEAT


def many_networks(count: int) -> tuple[NetworkView, ...]:
    """Every other one with the label."""
    return tuple(
        a_view(id=f"{number:064x}", labels=LABELLED if number % 2 else {})
        for number in range(count)
    )


def test_hundreds_of_networks() -> None:
    """Of many networks only the one is read of which an event tells, twice; events of networks that
    don't ask for acceleration cost nothing. All are read again after a while.
    """
    reader = Reader(*many_networks(1000))
    assert reader.networks.once() == REPEAT
    assert (len(reader.engine.read), reader.engine.lists) == (500, 1)
    reader.engine.read.clear()
    reader.networks.hint(f"{7:064x}")
    reader.now += 1
    assert reader.networks.once() == AGAIN
    reader.now += AGAIN
    assert reader.networks.once() == REPEAT - 2
    assert reader.engine.read == [f"{7:064x}"] * 2
    for number in range(0, 1000, 2):
        reader.networks.hint(f"{number:064x}")
    reader.now += 1
    assert reader.networks.once() == REPEAT - 3
    assert len(reader.engine.read) == 2
    reader.now += REPEAT - 3
    reader.networks.once()
    assert len(reader.engine.read) == 2 + 499
    assert reader.changes == 1


def test_an_event_while_the_engine_is_silent() -> None:
    """A change that couldn't be read is read as soon as the engine answers again."""
    reader = Reader(a_view(containers=(a_container(2),)))
    reader.engine.sandboxes = {"c2": "/netns/aa"}
    reader.networks.once()
    reader.engine.views["0" * 64] = a_view()
    reader.networks.hint("0" * 64)
    reader.engine.down = True
    assert reader.networks.once() == RETRY
    reader.engine.down = False
    reader.networks.once()
    assert reader.networks.known()[0].endpoints == ()


def test_a_network_that_is_made_again() -> None:
    """A network with the same name and subnet as one that was removed is another one, known with
    its own containers only; so is one that is made with the label instead of without.
    """
    reader = Reader(a_view(containers=(a_container(2),)), a_view("2", labels={}))
    reader.engine.sandboxes = {"c2": "/netns/aa", "c3": "/netns/bb"}
    reader.networks.once()
    again = a_view("1", name="app0", containers=(a_container(3, network="0"),))
    reader.engine.views = {again.id: again, "3" * 64: a_view("3", name="app2")}
    reader.networks.hint(again.id)
    reader.networks.once()
    one, other = reader.networks.known()
    assert (one.view.id, [each.container for each in one.endpoints]) == (again.id, ["app-3"])
    assert (other.view.id, other.endpoints) == ("3" * 64, ())


def test_a_container_leaves() -> None:
    """A container that has left its network is forgotten, and its namespace with it."""
    reader = Reader(a_view(containers=(a_container(2), a_container(3))))
    reader.engine.sandboxes = {"c2": "/netns/aa", "c3": "/netns/bb"}
    reader.networks.once()
    reader.engine.views["0" * 64] = a_view(containers=(a_container(3),))
    reader.networks.hint("0" * 64)
    reader.networks.once()
    assert [each.id for each in reader.networks.known()[0].endpoints] == ["e03"]
    reader.engine.views["0" * 64] = a_view(containers=(a_container(2), a_container(3)))
    reader.networks.once()
    assert reader.engine.asked == ["c2", "c3", "c2"]
    assert reader.changes == 3


def test_a_silent_engine() -> None:
    """While the engine doesn't answer, the last answer holds."""
    reader = Reader(a_view(containers=(a_container(2),)))
    reader.engine.sandboxes = {"c2": "/netns/aa"}
    reader.networks.once()
    known = reader.networks.known()
    reader.engine.down = True
    assert reader.networks.once() == RETRY
    assert reader.networks.known() == known
    assert reader.changes == 1


def read(*views: NetworkView) -> tuple[OtherNetwork, ...]:
    """The networks, each container with a namespace of its own."""
    reader = Reader(*views)
    reader.engine.sandboxes = {f"c{n}": f"/netns/{n}" for n in range(10)}
    reader.networks.once()
    return reader.networks.known()


def number(_endpoint: str, path: Path) -> int | None:
    """The namespace of container N is N; containers 9 have none."""
    return None if path.name == "9" else int(path.name)


FREEFLOW = RouterSnapshot(
    endpoints=(EndpointFact(id="f", network="n", addresses=("172.21.0.3",), namespace=3),),
    networks=(NetworkFact(id="n", subnets=("172.21.0.0/16",)),),
)


def test_the_routers_snapshot() -> None:
    """The router learns a network's driver, bridge and subnets, and each container's addresses; of
    FreeFlow's networks it knows the same as before.
    """
    whole = with_others(FREEFLOW, read(a_view(containers=(a_container(2), a_container(9)))), number)
    assert whole.networks[0] == FREEFLOW.networks[0]
    assert whole.endpoints[0] == FREEFLOW.endpoints[0]
    (network,), (endpoint,) = whole.networks[1:], whole.endpoints[1:]
    assert (network.kind, network.bridge) == ("bridge", "br-000000000000")
    assert (network.subnets, network.rdma, network.relay) == (("172.20.0.0/16",), False, False)
    assert (endpoint.namespace, endpoint.addresses) == (2, ("172.20.0.2", "fd00::2"))
    assert Knowledge(whole).accelerated >= Knowledge(FREEFLOW).accelerated


THIS_HOST = IPv4Address("192.0.2.1")
PEERS = (Peer("one", THIS_HOST), Peer("two", IPv4Address("192.0.2.2")))
TRUSTED = {"freeflow.accelerate": "trust"}


@pytest.mark.parametrize(
    ("changes", "rdma", "relay"),
    [
        ({"driver": "overlay"}, True, True),
        ({"driver": "overlay", "options": {"encrypted": ""}}, False, False),
        ({"driver": "overlay", "options": {"encrypted": ""}, "labels": TRUSTED}, False, False),
        ({"driver": "overlay", "scope": "local"}, False, False),
        ({"driver": "macvlan"}, False, False),
        ({"driver": "macvlan", "labels": TRUSTED}, True, False),
        ({"driver": "weave"}, False, False),
        ({"driver": "weave", "labels": TRUSTED}, True, False),
        ({"driver": "weave", "labels": TRUSTED, "scope": "local"}, False, False),
        ({"driver": "bridge", "labels": TRUSTED}, False, False),
    ],
)
def test_networks_between_hosts(changes: dict[str, Any], rdma: bool, relay: bool) -> None:
    """Connections between hosts move on a network that the Swarm knows by one ID: on Docker's
    overlay unless it is encrypted, on others if the user vouches for them, and these by RDMA only.
    Where they don't, no other host is told of the network.
    """
    settings = {"scope": "swarm", "peers": PEERS, "containers": (a_container(2),), **changes}
    whole = with_others(RouterSnapshot(), read(a_view(**settings)), number, {THIS_HOST})
    (network,) = whole.networks
    assert (network.rdma, network.relay, network.verbs) == (rdma, relay, False)
    assert network.peers == (("192.0.2.2",) if rdma else ())
    unknown = with_others(RouterSnapshot(), read(a_view(**settings)), number)
    assert unknown.networks[0].peers == ()


def test_what_is_between_two_containers() -> None:
    """The router learns that nobody knows what an unknown driver has between two containers, and
    for which networks the user vouches.
    """
    for labels, trusted in ((LABELLED, False), (TRUSTED, True)):
        view = a_view(driver="weave", labels=labels, containers=(a_container(2),))
        (network,) = with_others(RouterSnapshot(), read(view), number).networks
        assert (network.bridge, network.trusted) == (ANY_DEVICE, trusted)


def test_load_balancers() -> None:
    """The router learns the VIPs of an overlay's services, and the address from which this host's
    load balancer sends; hosts that come are noticed without an event.
    """
    balancer = replace(a_container(5), id="lb-app0", endpoint_id="e05", ipv6=None)
    services = (
        Service("web", IPv4Address("172.20.0.9"), ()),
        Service("names-only", None, ()),
    )
    reader = Reader(
        a_view(
            driver="overlay",
            scope="swarm",
            containers=(a_container(2), balancer),
            services=services,
        )
    )
    reader.engine.sandboxes = {"c2": "/netns/2"}
    assert reader.networks.once() == SHARED_REPEAT
    whole = with_others(RouterSnapshot(), reader.networks.known(), number)
    assert whole.networks[0].balanced == ("172.20.0.5", "172.20.0.9")
    assert Knowledge(whole).networks["0" * 64].vips == {}


def test_networks_without_containers_are_left_out() -> None:
    """A network none of whose containers has a namespace isn't told, as FreeFlow's own."""
    assert with_others(FREEFLOW, read(a_view(containers=(a_container(9),))), number) == FREEFLOW


def test_addresses_that_tell_no_container() -> None:
    """An address of two containers of one network, or of one container on two networks, is no
    one's: no pair could be proven by it.
    """
    twice = replace(a_container(4), address=IPv4Interface("172.20.0.2/16"), ipv6=None)
    taken = replace(a_container(3, network="1"), ipv6=None)
    networks = read(a_view(containers=(a_container(2), twice)), a_view("1", containers=(taken,)))
    whole = with_others(FREEFLOW, networks, number)
    found = {each.id: each.addresses for each in whole.endpoints}
    assert found == {"f": ("172.21.0.3",), "e02": ("fd00::2",), "e04": (), "e13": ()}


def test_labels_of_the_engine() -> None:
    """A network's labels are read from the engine's answer; Go's null means none."""
    assert parse_network({"Id": "x", "Labels": LABELLED}).labels == LABELLED
    assert parse_network({"Id": "x", "Labels": None}).labels == {}
