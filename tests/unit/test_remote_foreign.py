"""Connections between hosts on networks of other drivers: two hosts' registries, with fakes."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from dataplane.control import ANY_DEVICE
from dataplane.router.knowledge import Knowledge
from dataplane.router.reasons import Reason
from dataplane.router.remote_requests import OWNER_PATIENCE
from tests.unit.remote_world import VIP, Host, Tcp, World

CLIENT, SERVER = (0, 1), (1, 1)


def tell(host: Host, **changes: Any) -> None:
    """Send a host's router a snapshot in which the network is another driver's."""
    facts = host.facts()
    networks = tuple(
        replace(each, foreign=True, vips={}, balanced=(VIP,), **changes) for each in facts.networks
    )
    host.pairing.replace_snapshot(Knowledge(replace(facts, networks=networks)))
    host.remotes.learned()


def made(**changes: Any) -> World:
    """Two hosts with RDMA and such a network."""
    world = World(2)
    for host in world.hosts:
        tell(host, **changes)
    world.connect_all()
    world.loop.run(1)
    return world


def paired(world: World, tcp: Tcp) -> list[bool]:
    """Request a path for both ends, and let some time pass; whether they have it."""
    for side in (0, 1):
        world.request(tcp, side)
    world.loop.run(1)
    return [world.grant(tcp, side) is not None for side in (0, 1)]


def noted(tcp: Tcp, side: int) -> Reason:
    """Why an end stays on TCP, as its router notes it."""
    host, container, _, _, cookie = tcp.ends[side]
    return Reason(host.pairing.containers[host.namespace(container)].notes[cookie][0])


@pytest.mark.parametrize(("client", "server"), [(CLIENT, SERVER), (SERVER, CLIENT)])
def test_two_hosts(client: tuple[int, int], server: tuple[int, int]) -> None:
    """Both ends of a connection that neither host changes get a path, whichever leads."""
    world = made()
    assert paired(world, world.connect(client, server)) == [True, True]


@pytest.mark.parametrize("side", [0, 1])
def test_an_end_that_its_container_translates(side: int) -> None:
    """If the namespace of either end leads its connection elsewhere, the router of that host says
    so, and both ends stay on TCP.
    """
    world = made()
    tcp = world.connect(CLIENT, SERVER)
    host, container, local, remote, _ = tcp.ends[side]
    other = tcp.ends[1 - side][2]
    elsewhere = (other._replace(port=other.port + 1), local)
    host.kernel.translations[host.namespace(container), local, remote] = elsewhere
    assert paired(world, tcp) == [False, False]
    assert Reason.INTERCEPTED in (noted(tcp, 0), noted(tcp, 1))
    assert paired(world, world.connect(CLIENT, SERVER)) == [True, True]


@pytest.mark.parametrize("side", [0, 1])
def test_an_end_that_has_lost_its_address(side: int) -> None:
    """A host doesn't vouch for a container that has an address no more, though the driver hasn't
    noticed yet.
    """
    world = made()
    tcp = world.connect(CLIENT, SERVER)
    host, container, local, _, _ = tcp.ends[side]
    host.kernel.moved.add((host.namespace(container), local.ip))
    assert paired(world, tcp) == [False, False]
    assert Reason.NO_ENDPOINT in (noted(tcp, 0), noted(tcp, 1))


@pytest.mark.parametrize("side", [0, 1])
def test_a_host_that_takes_the_connection_apart(side: int) -> None:
    """Where nobody knows what the driver has in a host's namespace, each host is asked whether it
    carries the connection as it is.
    """
    world = made(bridge=ANY_DEVICE, trusted=True)
    tcp = world.connect(CLIENT, SERVER)
    host, _, local, remote, _ = tcp.ends[side]
    host.kernel.intercepted.add((ANY_DEVICE, local, remote))
    assert paired(world, tcp) == [False, False]
    assert Reason.INTERCEPTED in (noted(tcp, 0), noted(tcp, 1))
    assert paired(world, world.connect(CLIENT, SERVER)) == [True, True]


@pytest.mark.parametrize("side", [0, 1])
def test_an_end_that_changes_before_the_grant(side: int) -> None:
    """Each host asks for the proofs again before it grants its end. The other host then takes back
    what it has granted.
    """
    world = made()
    tcp = world.connect(CLIENT, SERVER)
    for each in (0, 1):
        world.request(tcp, each)
    host, container, local, _, _ = tcp.ends[side]
    while not list(host.remotes.connections):
        world.loop.run(0.0001)
    host.kernel.moved.add((host.namespace(container), local.ip))
    world.loop.run(2)
    assert world.grant(tcp, side) is None
    granted = world.grant(tcp, 1 - side) is not None
    assert bool(tcp.ends[1 - side][0].memory.finished) == granted


def test_a_vip() -> None:
    """A connection to a VIP stays on TCP, whatever the client's connection tracking says."""
    world = made()
    tcp = world.connect(CLIENT, SERVER, vip=True)
    assert paired(world, tcp) == [False, False]
    assert noted(tcp, 0) is Reason.BALANCED


def test_a_host_without_the_network() -> None:
    """A host whose plugin doesn't accelerate the network claims nothing on it: the connection stays
    on TCP on both.
    """
    world = World(2)
    for host, acceleration in zip(world.hosts, (True, False), strict=True):
        tell(host, acceleration=acceleration)
    world.connect_all()
    world.loop.run(1)
    tcp = world.connect(CLIENT, SERVER)
    world.request(tcp, 0)
    world.loop.run(OWNER_PATIENCE + 1)
    assert noted(tcp, 0) is Reason.NO_ENDPOINT


def test_a_network_within_hosts() -> None:
    """On a network whose connections move only within a host nothing is asked of other hosts."""
    world = made(rdma=False, relay=False, peers=())
    tcp = world.connect(CLIENT, SERVER)
    assert paired(world, tcp) == [False, False]
    assert [noted(tcp, side) for side in (0, 1)] == [Reason.NO_ENDPOINT] * 2
    assert not world.hosts[0].remotes.wanted()
