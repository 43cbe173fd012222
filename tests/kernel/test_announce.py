"""Moved addresses: announcements at Join correct neighbour tables and bridges at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from ipaddress import IPv6Address

from driver import names
from driver.announcer import Announcer
from driver.kernel.announce import gratuitous_arp, unsolicited_advertisement
from driver.model import Endpoint
from testbed.kernel_hosts import (
    Container,
    KernelHost,
    Lab,
    a_network,
    eventually,
    heard,
    identifier,
)
from testbed.patience import patience
from tests.kernel.frames import ADVERTISEMENT, ARP, BROADCAST, IPV6, REQUEST, arp, ethernet
from tests.unit.steps import SteppedKernel, Steps

NEW_MAC = "02:42:0a:09:00:aa"


def _neighbour(container: Container, address: object) -> str:
    """The MAC address that a container's neighbour table has for an address."""
    listed = json.loads(container.run("ip", "-j", "neigh", "show", str(address), "dev", "eth0"))
    return str(listed[0].get("lladdr", "")) if listed else ""


def _behind(host: KernelHost, container: Container) -> str:
    """The host behind which a VXLAN device has a container's MAC address."""
    device = names.vxlan(container.network.id)
    shown = host.in_overlay("bridge", "fdb", "show", "dev", device)
    lines = [line for line in shown.splitlines() if line.startswith(container.endpoint.mac)]
    return next((line.split(" dst ")[1].split()[0] for line in lines if " dst " in line), "")


def test_an_address_with_another_mac_address(three: Lab) -> None:
    """When an address moves to another host with another MAC address, peers' neighbour tables are
    right before the new container sends anything (IPv4 and IPv6)."""
    network = a_network()
    client = three.hosts[0].container(network, 2)
    old = three.hosts[1].container(network, 3)
    # Networks have their links on every host with an endpoint.
    three.hosts[2].container(network, 4)
    three.mesh(network)
    for address in (old.ipv4, old.ipv6):
        assert client.pings(address)
        assert _neighbour(client, address) == old.endpoint.mac
    three.hosts[1].remove(old)

    host = three.hosts[2]
    moved = Container(host, network, replace(old.endpoint, id=identifier(7), mac=NEW_MAC))
    host.containers.append(moved)
    host.do(lambda: host.kernel.attach(network, moved.endpoint))
    host.do(lambda: host.kernel.announce(network.id, [moved.endpoint]))
    for address in (moved.ipv4, moved.ipv6):
        assert _neighbour(client, address) == NEW_MAC
    assert _behind(three.hosts[0], moved) == str(host.address)
    moved.plug_in()
    moved.serve()
    for address in (moved.ipv4, moved.ipv6):
        assert client.echoes(address)


def test_a_mac_address_that_moved_to_another_host(three: Lab) -> None:
    """When an address and its MAC address move to another host, all frames go there from the first
    on."""
    network = a_network()
    client = three.hosts[0].container(network, 2)
    old = three.hosts[1].container(network, 3)
    beside = three.hosts[1].container(network, 5)
    three.mesh(network)
    assert client.pings(old.ipv4)
    assert client.pings(beside.ipv4)
    assert _behind(three.hosts[0], old) == str(three.hosts[1].address)
    three.hosts[1].remove(old)
    moved = three.hosts[2].container(network, 3)
    three.mesh(network)
    host = three.hosts[2]
    # As the sync loop does for peers that are new.
    host.do(lambda: host.kernel.announce(network.id, [moved.endpoint]))
    assert _behind(three.hosts[0], moved) == str(three.hosts[2].address)
    assert _behind(three.hosts[1], moved) == str(three.hosts[2].address)
    assert client.echoes(moved.ipv4, tries=1)
    assert client.echoes(moved.ipv6, tries=1)
    assert beside.echoes(moved.ipv4, tries=1)


def test_a_mac_address_that_came_to_this_host(two: Lab) -> None:
    """An address that moves from a peer to this host is reached here, by containers of both
    hosts."""
    network = a_network()
    client = two.hosts[0].container(network, 2)
    old = two.hosts[1].container(network, 3)
    beside = two.hosts[1].container(network, 5)
    two.mesh(network)
    assert client.echoes(old.ipv4)
    two.hosts[1].remove(old)
    host = two.hosts[0]
    moved = host.container(network, 3)
    assert client.echoes(moved.ipv4, tries=1)
    assert beside.echoes(moved.ipv4, tries=1)
    assert host.do(lambda: host.kernel.locate(network.id, moved.endpoint.mac)) is None


class _OnHost(SteppedKernel):
    """The kernel of a host, for threads that aren't the host's own."""

    def __init__(self, host: KernelHost) -> None:
        super().__init__(Steps())
        self._host = host

    def announce(
        self, network_id: str, endpoints: Iterable[Endpoint], *, again: bool = False
    ) -> None:
        kernel = self._host.kernel
        self._host.do(lambda: kernel.announce(network_id, endpoints, again=again))


def test_a_host_that_hears_of_the_new_peer_late(three: Lab) -> None:
    """An address moves to a host that an old peer doesn't know yet, while its former host stays a
    peer: all frames go to the new host soon after the old peer knows it."""
    network = a_network()
    first, second, third = three.hosts
    client = first.container(network, 2)
    old = second.container(network, 3)
    second.container(network, 5)
    first.set_peers(network, second)
    second.set_peers(network, first)
    first.refresh()
    assert client.echoes(old.ipv4)
    second.remove(old)
    moved = Container(third, network, replace(old.endpoint, ipv6=None))
    third.containers.append(moved)
    third.do(lambda: third.kernel.attach(network, moved.endpoint))
    # Otherwise its kernel sends frames by itself, from which the first host learns.
    moved.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    moved.plug_in()
    third.set_peers(network, first, second)
    announcer = Announcer(_OnHost(third), again=(0.1, 0.2, 0.4, 0.8, 1.6))
    announcer.endpoint_joined(moved.endpoint)
    # The guard of the first host drops what comes from the third.
    assert _behind(first, old) == str(second.address)
    first.set_peers(network, second, third)
    first.refresh()
    eventually("the move", lambda: _behind(first, moved) == str(third.address))
    assert announcer.worker.join(patience(5))
    assert client.pings(moved.ipv4, count=1)


def test_an_endpoint_that_has_gone_is_not_announced(three: Lab) -> None:
    """A late announcement doesn't take back an address that has moved to another host."""
    network = a_network()
    first, second, third = three.hosts
    client = first.container(network, 2)
    old = second.container(network, 3)
    second.container(network, 5)
    third.container(network, 4)
    three.mesh(network)
    second.remove(old)
    moved = third.container(network, 3)
    assert client.echoes(moved.ipv4)
    for again in (False, True):
        second.do(partial(second.kernel.announce, network.id, [old.endpoint], again=again))
        assert _behind(first, moved) == str(third.address)
        assert client.echoes(moved.ipv4, tries=1)


def test_announcements_are_well_formed(two: Lab) -> None:
    """Peers receive one gratuitous ARP (RFC 5227) and one unsolicited NA (RFC 4861) with a valid
    checksum."""
    network = a_network()
    far = two.hosts[1].container(network, 3)
    box = two.hosts[0].container(network, 2)
    two.mesh(network)
    listening = far.packets()
    host = two.hosts[0]
    host.do(lambda: host.kernel.announce(network.id, [box.endpoint]))
    frames = [frame for frame in heard(listening) if frame[6:12].hex(":") == box.endpoint.mac]
    expected = ethernet(
        box.endpoint.mac, BROADCAST, ARP, arp(REQUEST, box.endpoint.mac, box.ipv4, box.ipv4)
    )
    assert [frame[: len(expected)] for frame in frames if frame[12:14] == b"\x08\x06"] == [expected]
    assert gratuitous_arp(box.endpoint.mac, box.ipv4) == expected
    # The container's own kernel sends other messages of IPv6.
    advertised = [
        frame
        for frame in frames
        if frame[12:14] == IPV6.to_bytes(2, "big") and frame[54] == ADVERTISEMENT
    ]
    assert advertised == [unsolicited_advertisement(box.endpoint.mac, box.ipv6)]
    assert advertised[0][14 + 8 : 14 + 24] == IPv6Address("fd42:7::2").packed


def test_the_kernel_believes_the_checksum(two: Lab) -> None:
    """A neighbour with a wrong entry accepts the advertisement: with a bad checksum it would
    not."""
    network = a_network()
    far = two.hosts[1].container(network, 3)
    box = two.hosts[0].container(network, 2)
    two.mesh(network)
    for address in (box.ipv4, box.ipv6):
        far.run(
            *("ip", "neigh", "replace", str(address), "lladdr", "02:00:00:00:00:99"),
            *("dev", "eth0", "nud", "stale"),
        )
    host = two.hosts[0]
    host.do(lambda: host.kernel.announce(network.id, [box.endpoint]))
    assert [_neighbour(far, address) for address in (box.ipv4, box.ipv6)] == [box.endpoint.mac] * 2
