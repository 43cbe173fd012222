"""The source filter: frames that a container may send, and the count of refused ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import pytest

from driver import names
from driver.kernel.filter import link_local
from testbed.kernel_hosts import Container, Lab, a_network, heard, lab, octets
from tests.kernel.frames import (
    ALL_NODES_MAC,
    ARP,
    BROADCAST,
    IPV4,
    IPV6,
    REPLY,
    REQUEST,
    VLAN,
    advertisement,
    arp,
    ethernet,
    redirect,
    router_advertisement,
    send,
    solicitation,
    udp,
)

OTHER_MAC = "02:42:0a:09:00:63"
OTHER4 = IPv4Address("10.9.0.99")
OTHER6 = IPv6Address("fd42:7::99")
NOBODY4, NOBODY6 = IPv4Address(0), IPv6Address(0)


@dataclass(frozen=True)
class World:
    """`liar` sends; `beside` is on its host, `far` on another one."""

    lab: Lab
    liar: Container
    beside: Container
    far: Container

    def dropped(self) -> int:
        host = self.lab.hosts[0]
        return host.do(host.kernel.spoofed).get(names.short(self.liar.endpoint.id), 0)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with lab(2) as made:
        network = a_network()
        liar = made.hosts[0].container(network, 2)
        beside = made.hosts[0].container(network, 4)
        far = made.hosts[1].container(network, 3)
        made.mesh(network)
        assert liar.pings(far.ipv4)
        assert liar.pings(beside.ipv4)
        assert liar.pings(far.ipv6)
        yield World(made, liar, beside, far)


def _received(world: World, frame: bytes) -> tuple[bool, bool, int]:
    """Whether the container beside and the far one received a frame, and how many the filter
    counted."""
    listening = [box.packets() for box in (world.beside, world.far)]
    before = world.dropped()
    with world.liar.packets() as packets:
        send(packets, frame)
    # What is short arrives padded.
    got = [any(other.startswith(frame) for other in heard(each)) for each in listening]
    for each in listening:
        each.close()
    return got[0], got[1], world.dropped() - before


Maker = Callable[[str, IPv4Address, IPv6Address], bytes]

FORGED: dict[str, Maker] = {
    "IPv4 from another MAC": lambda mac, v4, v6: ethernet(
        OTHER_MAC, BROADCAST, IPV4, udp(v4, IPv4Address("10.9.0.255"), b"x")
    ),
    "IPv4 from another address": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, IPV4, udp(OTHER4, IPv4Address("10.9.0.255"), b"x")
    ),
    "IPv4 from no address": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, IPV4, udp(NOBODY4, IPv4Address("255.255.255.255"), b"x")
    ),
    "IPv6 from another MAC": lambda mac, v4, v6: ethernet(
        OTHER_MAC, ALL_NODES_MAC, IPV6, udp(v6, IPv6Address("ff02::1"), b"x")
    ),
    "IPv6 from another address": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, udp(OTHER6, IPv6Address("ff02::1"), b"x")
    ),
    "IPv6 from another's link-local address": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, udp(link_local(OTHER_MAC), IPv6Address("ff02::1"), b"x")
    ),
    "ARP reply for another's address": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, ARP, arp(REPLY, mac, OTHER4, v4)
    ),
    "ARP request in another's name": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, ARP, arp(REQUEST, mac, OTHER4, v4)
    ),
    "gratuitous ARP for another's address": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, ARP, arp(REQUEST, mac, OTHER4, OTHER4)
    ),
    "ARP with another's MAC inside": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, ARP, arp(REPLY, OTHER_MAC, v4, OTHER4)
    ),
    "ARP with another's MAC outside": lambda mac, v4, v6: ethernet(
        OTHER_MAC, BROADCAST, ARP, arp(REPLY, mac, v4, OTHER4)
    ),
    "neighbour advertisement for another's address": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, advertisement(mac, v6, OTHER6)
    ),
    "the same from the link-local address": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, advertisement(mac, link_local(mac), OTHER6)
    ),
    "the same behind hop-by-hop options": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, advertisement(mac, v6, OTHER6, behind_options=True)
    ),
    "neighbour advertisement in another's name": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, advertisement(mac, OTHER6, OTHER6)
    ),
    "router advertisement": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, router_advertisement(link_local(mac))
    ),
    "redirect": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, redirect(link_local(mac), OTHER6)
    ),
    "IPv4 in a VLAN": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, VLAN, b"\0\5\x08\0" + udp(OTHER4, IPv4Address("10.9.0.255"), b"x")
    ),
    "MPLS": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, 0x8847, b"\0\1\1\x40" + udp(OTHER4, IPv4Address("10.9.0.255"), b"x")
    ),
    "from the broadcast MAC": lambda mac, v4, v6: ethernet(
        BROADCAST, BROADCAST, IPV4, udp(v4, IPv4Address("10.9.0.255"), b"x")
    ),
    "another kind of frame from another MAC": lambda mac, v4, v6: ethernet(
        OTHER_MAC, BROADCAST, 0x88B5, bytes(50)
    ),
}

HONEST: dict[str, Maker] = {
    "IPv4": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, IPV4, udp(v4, IPv4Address("10.9.0.255"), b"x" * 20)
    ),
    "IPv6": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, udp(v6, IPv6Address("ff02::1"), b"x")
    ),
    "IPv6 from the own link-local address": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, udp(link_local(mac), IPv6Address("ff02::1"), b"x")
    ),
    "ARP request": lambda mac, v4, v6: ethernet(mac, BROADCAST, ARP, arp(REQUEST, mac, v4, OTHER4)),
    "gratuitous ARP": lambda mac, v4, v6: ethernet(mac, BROADCAST, ARP, arp(REQUEST, mac, v4, v4)),
    "ARP probe": lambda mac, v4, v6: ethernet(
        mac, BROADCAST, ARP, arp(REQUEST, mac, NOBODY4, OTHER4)
    ),
    "neighbour advertisement": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, advertisement(mac, v6, v6)
    ),
    "neighbour advertisement of the link-local address": lambda mac, v4, v6: ethernet(
        mac, ALL_NODES_MAC, IPV6, advertisement(mac, link_local(mac), link_local(mac))
    ),
    "neighbour solicitation": lambda mac, v4, v6: ethernet(
        mac, "33:33:ff:00:00:99", IPV6, solicitation(v6, OTHER6)
    ),
    "probe for duplicates": lambda mac, v4, v6: ethernet(
        mac, "33:33:ff:00:00:02", IPV6, solicitation(NOBODY6, v6)
    ),
    "another kind of frame": lambda mac, v4, v6: ethernet(mac, BROADCAST, 0x88B5, bytes(50)),
}


def _frame(world: World, maker: Maker) -> bytes:
    liar = world.liar
    return maker(liar.endpoint.mac, liar.ipv4, liar.ipv6)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_frame_is_dropped_and_counted(world: World, name: str) -> None:
    """A frame with a foreign address reaches no container of its host or another, and is counted
    once."""
    assert _received(world, _frame(world, FORGED[name])) == (False, False, 1)


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_frame_passes(world: World, name: str) -> None:
    """A frame with the sender's own addresses reaches all, and isn't counted."""
    assert _received(world, _frame(world, HONEST[name])) == (True, True, 0)


def test_forged_frames_teach_the_bridge_nothing(world: World) -> None:
    """After a flood of frames with another's MAC address, its owner is still reachable."""
    far_mac = world.far.endpoint.mac
    assert world.liar.pings(world.far.ipv4)
    with world.liar.packets() as packets:
        for _ in range(50):
            send(packets, ethernet(far_mac, BROADCAST, 0x88B5, bytes(50)))
    host = world.lab.hosts[0]
    learned = host.in_overlay("bridge", "fdb", "show")
    behind = [line for line in learned.splitlines() if line.startswith(far_mac)]
    assert behind
    assert all(names.vxlan(world.liar.network.id) in line for line in behind)
    assert world.beside.pings(world.far.ipv4)


def test_a_changed_mac_or_address_is_silenced(world: World) -> None:
    """A container that changes its MAC or IP address is cut off until it restores it."""
    liar, mac = world.liar, world.liar.endpoint.mac
    liar.run("ip", "link", "set", "eth0", "address", OTHER_MAC)
    assert not liar.echoes(world.far.ipv4, tries=1)
    liar.run("ip", "link", "set", "eth0", "address", mac)
    assert liar.echoes(world.far.ipv4)
    liar.run("ip", "addr", "add", f"{OTHER4}/24", "dev", "eth0")
    liar.run("ip", "route", "replace", f"{world.far.ipv4}", "dev", "eth0", "src", str(OTHER4))
    before = world.dropped()
    assert not liar.echoes(world.far.ipv4, tries=1)
    assert world.dropped() > before
    liar.run("ip", "addr", "del", f"{OTHER4}/24", "dev", "eth0")
    liar.run("ip", "route", "del", str(world.far.ipv4), check=False)
    assert liar.echoes(world.far.ipv4)


def test_a_chosen_mac_address_is_the_filters(two: Lab) -> None:
    """With --mac-address that address passes, and the derived one doesn't."""
    network = a_network()
    box = two.hosts[0].container(network, 2, mac="02:aa:bb:cc:dd:ee")
    far = two.hosts[1].container(network, 3)
    two.mesh(network)
    assert "02:aa:bb:cc:dd:ee" in box.run("ip", "link", "show", "eth0")
    assert box.echoes(far.ipv4)
    assert box.echoes(far.ipv6)
    listening = far.packets()
    derived = ethernet("02:42:0a:09:00:02", BROADCAST, 0x88B5, bytes(50))
    with box.packets() as packets:
        send(packets, derived)
    assert octets("02:42:0a:09:00:02") not in {frame[6:12] for frame in heard(listening)}


def test_a_container_is_never_unfiltered(one: Lab) -> None:
    """An endpoint has its filter as soon as attach returns, and its port carries no frame
    before."""
    network = a_network()
    host = one.hosts[0]
    beside = host.container(network, 4)
    liar = host.container(network, 2)
    listening = beside.packets()
    with liar.packets() as packets:
        send(packets, ethernet(OTHER_MAC, BROADCAST, 0x88B5, bytes(50)))
    host.do(lambda: host.kernel.attach(network, liar.endpoint))
    with liar.packets() as packets:
        send(packets, ethernet(OTHER_MAC, BROADCAST, 0x88B5, bytes(50)))
    assert octets(OTHER_MAC) not in {frame[6:12] for frame in heard(listening)}


def test_fragments_pass(world: World) -> None:
    """Fragments of the sender's own packets pass (IPv4 and IPv6), though they have no ports or
    types."""
    before = world.dropped()
    assert world.liar.echoes(world.far.ipv4, 20000, whole=False)
    assert world.liar.echoes(world.far.ipv6, 20000, whole=False)
    assert world.dropped() == before


def test_the_filter_goes_with_its_endpoint(one: Lab) -> None:
    """An endpoint's counters and chain go with it, and a new one starts from zero."""
    network = a_network()
    host = one.hosts[0]
    liar = host.container(network, 2)
    with liar.packets() as packets:
        send(packets, ethernet(OTHER_MAC, BROADCAST, 0x88B5, os.urandom(50)))
    short = names.short(liar.endpoint.id)
    assert host.do(host.kernel.spoofed)[short] == 1
    host.remove(liar)
    assert short not in host.do(host.kernel.spoofed)
    again = host.container(network, 2)
    assert host.do(host.kernel.spoofed).get(names.short(again.endpoint.id), 0) == 0
