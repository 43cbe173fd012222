"""Pairing on networks whose packets cross a bridge of the host's own namespace: the registry, with
fakes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from dataplane.control import RouterSnapshot
from dataplane.router import library_wire as wire
from dataplane.router.bridge_netfilter import is_filtered
from dataplane.router.conntrack import Direction, TrackedConnection
from dataplane.router.knowledge import Knowledge
from dataplane.router.reasons import Reason
from tests.unit.router_world import NET, VIP, World, at

BRIDGE = "br-0123456789ab"


def bridged(facts: RouterSnapshot) -> RouterSnapshot:
    """The same with a bridge below network n1, and no service there."""
    networks = tuple(
        replace(each, kind="bridge", foreign=True, bridge=BRIDGE, vips={}, rdma=False, relay=False)
        if each.id == NET
        else each
        for each in facts.networks
    )
    return replace(facts, networks=networks)


@pytest.fixture
def world() -> World:
    made = World()
    made.pairing.replace_snapshot(Knowledge(bridged(made.facts)))
    return made


def test_two_containers_on_a_bridge(world: World) -> None:
    """Both ends of a connection that the host carries as it is get a slot."""
    a, b = world.process(1), world.process(2)
    world.connect(a, b, 5000)
    assert [len(world.grants(each)) for each in (a, b)] == [1, 1]


def test_a_connection_that_the_host_takes_apart(world: World) -> None:
    """Where the host translates or ends a connection, or doesn't know it, both ends stay on TCP,
    are told so once, and don't wait; the next connection is looked at anew.
    """
    a, b = world.process(1), world.process(2)
    ends = (at("10.0.4.1:5000"), at("10.0.4.2:80"))
    world.kernel.intercepted.add((BRIDGE, *ends))
    world.connect(a, b, 5000)
    assert not world.grants(a) + world.grants(b)
    for process in (a, b):
        ((refuse, _),) = world.heard(process, wire.Refuse)
        assert (refuse.reason, refuse.passes) == (Reason.REMOTE, False)
        assert not world.pairing.processes[process].waiting
    notes = world.pairing.containers[1].notes.values()
    assert [reason for reason, _ in notes] == [Reason.INTERCEPTED]
    world.connect(a, b, 5001)
    assert len(world.grants(a)) == 1


def test_a_container_with_itself(world: World) -> None:
    """The host isn't asked about a container's connections to its own address, since it doesn't see
    them.
    """
    a, b = world.process(1), world.process(1)
    ends = (at("10.0.4.1:5000"), at("10.0.4.1:80"))
    world.kernel.intercepted.add((BRIDGE, *ends))
    world.connect(a, b, 5000)
    assert [len(world.grants(each)) for each in (a, b)] == [1, 1]


def test_a_connection_that_a_container_translates(world: World) -> None:
    """Where either container's namespace leads a connection elsewhere, or changes its source, the
    two sockets whose addresses fit are no pair; where it only tracks the connection, they are.
    """
    client, server = at("10.0.4.1:5000"), at("10.0.4.2:80")
    tracked = (server, client)
    for port, (namespace, ends, found) in enumerate(
        [
            (1, (client, server), (at("10.0.4.3:80"), client)),
            (1, (client, server), (server, at("10.0.4.1:6000"))),
            (2, (server, client), (at("10.0.4.2:8080"), client)),
            (1, (client, server), tracked),
            (2, (server, client), tracked),
        ]
    ):
        a, b = world.process(1), world.process(2)
        world.kernel.translations = {(namespace, *ends): found}
        world.connect(a, b, 5000)
        assert len(world.grants(a)) == (port > 2), port


@pytest.mark.parametrize("namespace", [1, 2])
def test_an_address_that_has_gone(world: World, namespace: int) -> None:
    """A container that doesn't have its address any more is no end: the engine may have given it to
    another one, of which the router learns later. Both may ask again.
    """
    a, b = world.process(1), world.process(2)
    world.kernel.moved = {(namespace, at(f"10.0.4.{namespace}:1").ip)}
    world.connect(a, b, 5000)
    for process in (a, b):
        assert [refuse.passes for refuse, _ in world.heard(process, wire.Refuse)] == [True]
    world.kernel.moved = set()
    world.connect(a, b, 5001)
    assert len(world.grants(a)) == 1


def test_a_namespace_that_is_anothers_now(world: World) -> None:
    """A namespace whose number was that of a container that has ended gets nothing in that
    container's place, and no refusal for good.
    """
    a, b = world.process(1), world.process(2)
    world.kernel.unlisted = {1}
    world.connect(a, b, 5000)
    world.open_and_ask(a, "10.9.9.9:5000", "10.9.9.1:80")
    refused = [refuse for each in (a, b) for refuse, _ in world.heard(each, wire.Refuse)]
    assert [each.passes for each in refused] == [True] * 3
    assert not world.grants(a) + world.grants(b)
    assert world.pairing.counts.refused[Reason.NO_ENDPOINT] == 3


def test_an_address_that_is_not_known_yet(world: World) -> None:
    """An address of the network that its own container isn't listed with yet is refused for now;
    one of elsewhere, such as the loopback device's, for good.
    """
    a = world.process(1)
    for own in ("10.0.4.77", "127.0.0.1"):
        world.open_and_ask(a, f"{own}:5000", "10.0.4.2:80")
    assert [refuse.passes for refuse, _ in world.heard(a, wire.Refuse)] == [True, False]


@pytest.mark.parametrize("made_again", [False, True])
def test_a_request_whose_network_goes(world: World, made_again: bool) -> None:
    """A request that waits while its network is removed, or made again, is refused for now."""
    a = world.process(1)
    world.open_and_ask(a, "10.0.4.1:5000", "10.0.4.2:80")
    facts = bridged(world.facts)
    networks = tuple(replace(each, id=f"{each.id}-again") for each in facts.networks)
    endpoints = tuple(replace(each, network=f"{each.network}-again") for each in facts.endpoints)
    if not made_again:
        networks, endpoints = (), ()
    world.pairing.replace_snapshot(
        Knowledge(replace(facts, networks=networks, endpoints=endpoints))
    )
    assert [refuse.passes for refuse, _ in world.heard(a, wire.Refuse)] == [True]


def test_a_load_balancer_of_another_driver() -> None:
    """A connection to or from an address behind which another driver chooses a task stays on TCP
    for good, whatever the containers' sockets and connection tracking say.
    """
    world = World()
    facts = bridged(world.facts)
    networks = tuple(replace(each, balanced=(VIP, "10.0.4.3")) for each in facts.networks)
    world.pairing.replace_snapshot(Knowledge(replace(facts, networks=networks)))
    a, b = world.process(1), world.process(3)
    world.translate(1, "10.0.4.1:5000", f"{VIP}:80", "10.0.4.3:80")
    world.open_and_ask(a, "10.0.4.1:5000", f"{VIP}:80")
    world.connect(a, b, 5001)
    refused = [refuse for refuse, _ in world.heard(a, wire.Refuse)]
    assert [each.passes for each in refused] == [False, False]
    notes = world.pairing.containers[1].notes.values()
    assert {reason for reason, _ in notes} == {Reason.BALANCED}


def test_addresses_without_a_container(world: World) -> None:
    """An address of the network that no container is listed with is refused for now: the host's
    own, or that of a container that has just started.
    """
    a = world.process(1)
    for peer in ("10.0.4.254:80", f"{VIP}:80"):
        world.open_and_ask(a, "10.0.4.1:5000", peer)
    refused = [refuse for refuse, _ in world.heard(a, wire.Refuse)]
    assert [each.passes for each in refused] == [True, True]
    notes = world.pairing.containers[1].notes.values()
    assert {reason for reason, _ in notes} == {Reason.NO_ENDPOINT}
    world.open_and_ask(a, "10.0.4.1:5000", "192.0.2.1:80")
    assert world.pairing.counts.refused[Reason.FOREIGN] == 1


def test_a_network_without_a_bridge() -> None:
    """A network of another driver that has nothing in the host's namespace: the host isn't asked,
    the containers' namespaces are.
    """
    world = World()
    facts = bridged(world.facts)
    networks = tuple(replace(each, bridge="") for each in facts.networks)
    world.pairing.replace_snapshot(Knowledge(replace(facts, networks=networks)))
    a, b = world.process(1), world.process(2)
    world.connect(a, b, 5000)
    assert len(world.grants(a)) == 1
    world.translate(1, "10.0.4.1:5001", "10.0.4.2:80", "10.0.4.3:80")
    world.connect(a, b, 5001)
    assert len(world.grants(a)) == 1


def test_other_networks_ask_nothing_of_the_host(world: World) -> None:
    """A network of FreeFlow's has nothing of the host's between its containers: it isn't asked."""
    plain = World()
    plain.kernel.intercepted.add(("", at("10.0.4.1:5000"), at("10.0.4.2:80")))
    a, b = plain.process(1), plain.process(2)
    plain.connect(a, b, 5000)
    assert len(plain.grants(a)) == 1


@pytest.mark.parametrize(
    ("everywhere", "own", "filtered"),
    [
        (None, None, False),
        ("0", False, False),
        ("0", None, True),
        ("1", False, True),
        ("0", True, True),
    ],
)
@pytest.mark.parametrize("version", [4, 6])
def test_settings_of_br_netfilter(
    tmp_path: Path, version: int, everywhere: str | None, own: bool | None, filtered: bool
) -> None:
    """Netfilter sees a bridge's packets if the namespace's setting or the bridge's own is on, or
    can't be read; not without br_netfilter.
    """

    def setting(bridge: str, of: int) -> bool:
        assert (bridge, of) == (BRIDGE, version)
        if own is None:
            raise OSError("no such bridge")
        return own

    if everywhere is not None:
        kind = {4: "iptables", 6: "ip6tables"}[version]
        path = tmp_path / f"proc/sys/net/bridge/bridge-nf-call-{kind}"
        path.parent.mkdir(parents=True)
        path.write_text(f"{everywhere}\n")
    assert is_filtered(BRIDGE, version, tmp_path, setting) == filtered


def test_translated_connections() -> None:
    """A connection is translated if answers come from another address than its first packet went
    to, or go to another than it came from.
    """
    one, two, other = at("10.0.4.1:5000"), at("10.0.4.2:80"), at("10.0.4.3:80")
    there, back = Direction(one, two), Direction(two, one)
    assert not TrackedConnection(there, back, established=True).is_translated
    assert TrackedConnection(there, Direction(other, one), established=True).is_translated
    assert TrackedConnection(there, Direction(two, other), established=True).is_translated
