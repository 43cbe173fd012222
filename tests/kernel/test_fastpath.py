"""The fast path: every byte arrives, nothing takes it that shouldn't, and what runs is what status
says.

That all else works with it is said by the other tests here, whose hosts have it too.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import IPRoute

from dataplane.ebpf import Count, FdbEntry, Maps, PeerRoute, probe_kernel
from dataplane.ebpf.map_layout import DECAP6, ENCAP6
from dataplane.errors import KernelRefused
from driver import names
from driver.kernel import fdb
from driver.kernel.bpffs import PINS
from driver.kernel.fastpath.fastpath import Opened
from driver.model import IPAddress, Network
from testbed.ebpf_object import SOURCES, built
from testbed.kernel_hosts import (
    RUN,
    Container,
    KernelHost,
    Lab,
    a_network,
    an_endpoint,
    eventually,
    heard,
    lab,
    put_on_the_wire,
)
from testbed.patience import patience
from tests.kernel.frames import IPV4, IPV6, VLAN, ethernet, send, udp

DATA = os.urandom(16 << 20)


def count(container: Container) -> Count:
    """The counters of a container's fast path."""
    kernel = container.host.kernel
    return container.host.do(kernel.fastpath.counts)[names.host_veth(container.endpoint.id)]


def opened(host: KernelHost) -> Opened:
    """The parts of its plugin's fast path."""
    parts = host.kernel.fastpath.opened()
    assert parts is not None
    return parts


def maps_of(host: KernelHost) -> Maps:
    return opened(host).programs.maps


@dataclass(frozen=True)
class World:
    """`near` and `beside` on the first host, `far` on the second."""

    lab: Lab
    network: Network
    near: Container
    beside: Container
    far: Container


def _world(made: Lab, mtu: int = 1450) -> World:
    network = a_network(mtu=mtu)
    first, second = made.hosts[:2]
    near, beside = first.container(network, 2), first.container(network, 4)
    far = second.container(network, 3)
    made.mesh(network)
    assert near.pings(far.ipv4)
    assert near.pings(far.ipv6)
    assert near.pings(beside.ipv4)
    return World(made, network, near, beside, far)


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with lab(2) as made:
        if request.param == "clsact":
            for host in made.hosts:
                host.without_tcx()
        yield _world(made)


@pytest.fixture
def fresh() -> Iterator[World]:
    """A world that the test may damage."""
    with lab(2) as made:
        yield _world(made)


def outer(host: KernelHost, port: int = 4799) -> socket.socket:
    """Captures the packets that leave a host through its device."""

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("eth0", 3))
        made.settimeout(0.3)
        return made

    del port
    return host.do(make)


def leaving(packets: socket.socket) -> list[bytes]:
    """The VXLAN packets that left, from their IP header on, once no more come."""
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            frame, address = packets.recvfrom(65535)
            if address[2] == socket.PACKET_OUTGOING and frame[36:38] == struct.pack("!H", 4799):
                found.append(frame[14:])
    return found


def test_all_traffic_takes_the_fast_path(world: World) -> None:
    """TCP and UDP over IPv4 and IPv6, to another host and on the same one, arrive byte for byte,
    and all packets take the fast path as far as the kernel allows: before 6.3 only IPv4 between
    hosts."""
    for host in world.lab.hosts:
        assert (host.refresh().stage, host.refresh().reason) == ("tunnel", "")
    flags = opened(world.lab.hosts[0]).programs.support.flags
    before = [count(each) for each in (world.near, world.beside, world.far)]
    for target in (world.far, world.beside):
        for address in (target.ipv4, target.ipv6):
            assert world.near.send(address, DATA)
            assert all(world.near.echoes(address, size) for size in (1, 64, 1300))
    near, beside, far = (count(each) for each in (world.near, world.beside, world.far))
    for now, then, counted, families in (
        (near, before[0], "sent_bytes", 1 + bool(flags & ENCAP6)),
        (far, before[2], "nic_bytes", 1 + bool(flags & DECAP6)),
        (beside, before[1], "local_bytes", 2),
    ):
        assert getattr(now, counted) - getattr(then, counted) > families * len(DATA)
    assert near.nic_packets > before[0].nic_packets
    assert (far.vxlan_packets == before[2].vxlan_packets) == bool(flags & DECAP6)


def test_every_kernel_carries_all_bytes() -> None:
    """On any kernel the highest stage that it can run is on, all bytes arrive, and cleanup leaves
    nothing."""
    # Emulated machines are slow.
    data = DATA[: 1 << 20]
    with lab(2) as made:
        found = _world(made)
        best = probe_kernel(built()).stages[-1]
        assert [host.refresh().stage for host in made.hosts] == [best, best]
        for target in (found.far, found.beside):
            for address in (target.ipv4, target.ipv6):
                assert found.near.send(address, data)
                assert found.near.echoes(address, 20000, whole=False)
        counted = count(found.far)
        assert counted.received_bytes > 2 * len(data)
        assert (counted.nic_bytes > len(data)) == (best == "tunnel")
        assert count(found.beside).local_bytes > 2 * len(data)
        for host in made.hosts:
            host.do(host.kernel.cleanup)
            _nothing_is_left(host)


def test_fragments_of_every_size(world: World) -> None:
    """Datagrams that the container's kernel fragments arrive unchanged, and their fragments take
    the fast path (IPv4)."""
    before = count(world.far).nic_packets
    for size in (1422, 1423, 9000, 65507):
        assert world.near.echoes(world.far.ipv4, size, whole=False), size
        assert world.near.echoes(world.far.ipv6, min(size, 65487), whole=False), size
    assert count(world.far).nic_packets - before > 50


@pytest.mark.parametrize("offload", ["tx-udp_tnl-segmentation", "tso", "gso"])
def test_without_offloads(world: World, offload: str) -> None:
    """Bulk data arrives byte for byte where the device, or the container's, leaves segmentation to
    the kernel."""
    host = world.lab.hosts[0]
    try:
        if offload.startswith("tx-"):
            host.run("ethtool", "-K", "eth0", offload, "off")
        else:
            world.near.run("ethtool", "-K", "eth0", offload, "off")
        before = count(world.near).sent_bytes
        assert world.near.send(world.far.ipv4, DATA)
        assert world.near.send(world.far.ipv6, DATA)
        assert count(world.near).sent_bytes - before > len(DATA)
    finally:
        host.run("ethtool", "-K", "eth0", "tx-udp_tnl-segmentation", "on")
        world.near.run("ethtool", "-K", "eth0", "tso", "on", "gso", "on")


@pytest.mark.parametrize("tos", [0, 0x20, 0x22, 0x21, 0x23])
@pytest.mark.parametrize("family", [4, 6])
def test_the_header_is_the_kernels_own(world: World, family: int, tos: int) -> None:
    """On the wire a packet is as the kernel's VXLAN device would encapsulate it: each field of the
    outer headers but the identification, the source port too, and each byte inside."""
    to = world.far.ipv4 if family == 4 else world.far.ipv6
    host = world.lab.hosts[0]
    seen = []
    with world.near.udp(to) as datagrams:
        if family == 4:
            datagrams.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        else:
            datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        for short in (True, False):
            before = count(world.near).sent_packets
            if not short:
                host.do(lambda: _forget_peers(host))
            with outer(host) as packets:
                datagrams.send(b"x" * 100)
                assert datagrams.recv(200) == b"x" * 100
                (packet,) = [each for each in leaving(packets) if b"x" * 100 in each]
            assert (count(world.near).sent_packets > before) == short
            seen.append(packet)
        host.do(opened(host).neighbours.write)
    made, ordinary = (each[:4] + each[6:10] + each[12:] for each in seen)
    # The inner packet is another one: its own identification and checksum differ in IPv4.
    inner = 42 if family == 4 else len(made)
    assert made[:inner] == ordinary[:inner]
    for each in seen:
        assert _sum(each[:20]) == 0xFFFF
        assert len(each) == struct.unpack_from("!H", each, 2)[0]
        assert struct.unpack_from("!H", each, 24)[0] == len(each) - 20


def _forget_peers(host: KernelHost) -> None:
    maps = maps_of(host)
    for net, address in maps.all_peers():
        maps.drop_peer(net, address)
    opened(host).neighbours.routes.clear()


def _sum(data: bytes) -> int:
    total = int(sum(struct.unpack(f"!{len(data) // 2}H", data)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_congestion_marks_are_kept(world: World) -> None:
    """A packet that a router of the underlay marked (ECN) reaches the container marked, by the
    kernel path."""
    host = world.lab.hosts[0]
    before = count(world.far)
    listening = world.far.packets()
    source, to = world.near.ipv4, world.far.ipv4
    packet = bytearray(udp(source, to, b"marked" * 10))
    packet[1] = 2
    packet[10:12] = bytes(2)
    packet[10:12] = struct.pack("!H", 0xFFFF - _sum(bytes(packet[:20])))
    frame = ethernet(world.near.endpoint.mac, world.far.endpoint.mac, IPV4, bytes(packet))
    vxlan = struct.pack("!II", 0x08000000, world.network.vni << 8) + frame

    put_on_the_wire(host, world.lab.hosts[1], vxlan, tos=3)
    # The sender knows nothing of it, and its refusal quotes it.
    (got,) = [each for each in heard(listening) if b"marked" in each and each[23] == 17]
    assert got[15] & 3 == 3
    assert count(world.far).vxlan_packets == before.vxlan_packets + 1


def test_forged_frames_go_nowhere(world: World) -> None:
    """A frame with another container's MAC or IP address, or an IP packet in a VLAN tag, is dropped
    and counted by the filter as without the fast path, whether its destination is on this host or
    another one."""
    host = world.lab.hosts[0]
    other4, other6 = IPv4Address("10.9.0.99"), IPv6Address("fd42:7::99")
    own = world.near.endpoint.mac
    for target in (world.far, world.beside):
        to = target.endpoint.mac
        listening = target.packets()
        forged = [
            ethernet("02:42:0a:09:00:63", to, IPV4, udp(world.near.ipv4, target.ipv4, b"forged")),
            ethernet(own, to, IPV4, udp(other4, target.ipv4, b"forged")),
            ethernet(own, to, IPV4, udp(target.ipv4, target.ipv4, b"forged")),
            ethernet(own, to, IPV6, udp(other6, target.ipv6, b"forged")),
            ethernet(own, to, VLAN, b"\0\5\x08\0" + udp(world.near.ipv4, target.ipv4, b"forged")),
        ]
        short = names.short(world.near.endpoint.id)
        before = host.do(host.kernel.spoofed).get(short, 0)
        with world.near.packets() as packets:
            send(packets, *forged)
        assert not [each for each in heard(listening) if b"forged" in each]
        assert host.do(host.kernel.spoofed)[short] - before == len(forged)


def test_a_host_that_is_no_peer_moves_no_address(fresh: World) -> None:
    """A packet from a host that is no peer, or with another network's identifier, moves no address
    and doesn't take the fast path."""
    victim, stranger = fresh.lab.hosts
    fresh.lab.hosts[0].set_peers(fresh.network)
    victim.refresh()
    before = count(fresh.near)
    frame = ethernet(
        "02:42:0a:09:00:09",
        fresh.near.endpoint.mac,
        IPV4,
        udp(IPv4Address("10.9.0.9"), fresh.near.ipv4, b"strange"),
    )

    def shout(vni: int) -> None:
        packet = struct.pack("!II", 0x08000000, vni << 8) + frame
        put_on_the_wire(stranger, victim, packet)

    for vni in (fresh.network.vni, fresh.network.vni + 1):
        shout(vni)
    assert count(fresh.near).nic_packets == before.nic_packets
    assert "02:42:0a:09:00:09" not in victim.do(
        lambda: victim.kernel.fastpath.learned(fresh.network.id)
    )
    # The same from a peer does.
    victim.set_peers(fresh.network, stranger)
    victim.refresh()
    shout(fresh.network.vni)
    assert count(fresh.near).nic_packets == before.nic_packets + 1
    learned = victim.do(lambda: victim.kernel.learned(fresh.network.id))
    assert learned["02:42:0a:09:00:09"] == stranger.address


def test_nobody_takes_an_address_of_this_host(fresh: World) -> None:
    """A peer's packet with the MAC address of a container of this host doesn't move that address:
    the container stays reachable."""
    host, peer = fresh.lab.hosts
    frame = ethernet(
        fresh.beside.endpoint.mac,
        fresh.near.endpoint.mac,
        IPV4,
        udp(fresh.beside.ipv4, fresh.near.ipv4, b"thief"),
    )

    put_on_the_wire(peer, host, struct.pack("!II", 0x08000000, fresh.network.vni << 8) + frame)
    before = count(fresh.beside).local_packets
    assert fresh.near.echoes(fresh.beside.ipv4)
    assert count(fresh.beside).local_packets > before


def test_an_address_that_moves_is_followed_at_once() -> None:
    """A container that starts on another host with its old address is reached there from its
    announcement on."""
    with lab(3) as made:
        network = a_network()
        near = made.hosts[0].container(network, 2)
        old = made.hosts[1].container(network, 3)
        made.hosts[2].container(network, 5)
        made.mesh(network)
        assert near.echoes(old.ipv4)
        made.hosts[1].remove(old)
        new = made.hosts[2].container(network, 3)
        assert near.echoes(new.ipv4, tries=1, timeout=patience(3))
        learned = made.hosts[0].do(
            lambda: made.hosts[0].kernel.locate(network.id, new.endpoint.mac)
        )
        assert learned == made.hosts[2].address
        # And to the host itself.
        made.hosts[2].remove(new)
        here = made.hosts[0].container(network, 3)
        assert near.echoes(here.ipv4, tries=1, timeout=patience(3))
        assert (
            made.hosts[0].do(lambda: made.hosts[0].kernel.locate(network.id, here.endpoint.mac))
            is None
        )


def test_a_silent_address_takes_the_kernel_path(fresh: World) -> None:
    """Packets to an address that sent nothing for a minute take the kernel path, and the fast path
    again after its reply."""
    host = fresh.lab.hosts[0]
    assert fresh.near.echoes(fresh.far.ipv4)

    def age() -> None:
        maps = maps_of(host)
        for net, mac, entry in maps.fdb_entries():
            if not entry.index:
                maps.put_fdb_entry(net, mac, replace(entry, seen=max(0, entry.seen - 61 * 10**9)))

    host.do(age)
    assert not host.do(lambda: host.kernel.uses_fastpath(fresh.network.id, fresh.far.endpoint.mac))
    before = count(fresh.near).sent_packets
    with fresh.near.udp(fresh.far.ipv4) as datagrams:
        datagrams.send(b"first")
        assert datagrams.recv(16) == b"first"
        assert count(fresh.near).sent_packets == before
        datagrams.send(b"second")
        assert datagrams.recv(16) == b"second"
    assert count(fresh.near).sent_packets > before


def test_a_plugin_that_has_died_leaves_nothing_to_chance(fresh: World) -> None:
    """Some minutes after the last check of firewall and routes, packets to and from other hosts
    take the kernel path."""
    host = fresh.lab.hosts[0]

    def expire() -> None:
        maps = maps_of(host)
        maps.decide(replace(maps.current(), lease=1))

    host.do(expire)
    before = count(fresh.near)
    assert fresh.near.send(fresh.far.ipv4, DATA)
    now = count(fresh.near)
    assert now == before
    host.refresh()
    assert fresh.near.send(fresh.far.ipv4, DATA)
    assert count(fresh.near).sent_packets > now.sent_packets


@pytest.mark.parametrize("without", [0, 1])
def test_a_peer_without_it(without: int) -> None:
    """Where one of two hosts has EBPF=off, all bytes arrive in both directions, and the other host
    still uses the fast path."""
    with lab(2) as made:
        made.hosts[without].without_fast_path()
        found = _world(made)
        for one, other in ((found.near, found.far), (found.far, found.near)):
            assert one.send(other.ipv4, DATA)
            assert one.send(other.ipv6, DATA)
            assert one.echoes(other.ipv4, 30000, whole=False)
        plain, short = made.hosts[without], made.hosts[1 - without]
        assert plain.refresh().stage == ""
        assert short.refresh().stage == "tunnel"
        box = found.far if without == 0 else found.near
        assert count(box).sent_bytes > len(DATA)
        assert count(box).nic_bytes > len(DATA)


def test_off_for_one_network(fresh: World) -> None:
    """Packets of a network with `-o ebpf=off` take the kernel path, also when the network used the
    fast path before."""
    host = fresh.lab.hosts[0]
    other = replace(a_network(2), options={"ebpf": "off"})
    boxes = [each.container(other, 2 + n) for n, each in enumerate(fresh.lab.hosts)]
    fresh.lab.mesh(other)
    assert boxes[0].send(boxes[1].ipv4, DATA)
    counts = host.do(host.kernel.fastpath.counts)
    assert names.host_veth(boxes[0].endpoint.id) not in counts
    assert not host.do(lambda: host.kernel.uses_fastpath(other.id, boxes[1].endpoint.mac))
    switched = replace(fresh.network, options={"ebpf": "off"})
    for box in (fresh.near, fresh.beside):
        host.do(lambda b=box: host.kernel.attach(switched, b.endpoint))  # type: ignore[misc]
    assert host.do(host.kernel.fastpath.counts) == {}
    assert fresh.near.send(fresh.far.ipv4, DATA)
    assert fresh.near.send(fresh.beside.ipv4, DATA)


def test_an_ipv6_underlay_has_the_lower_stages() -> None:
    """Over an IPv6 underlay the fast path decapsulates packets, and status says why it does not
    encapsulate."""
    with lab(2, ipv6_underlay=True) as made:
        network = a_network(mtu=1430)
        near, far = (host.container(network, 2 + n) for n, host in enumerate(made.hosts))
        beside = made.hosts[0].container(network, 4)
        made.mesh(network)
        stage = made.hosts[0].refresh()
        assert stage.stage == "receive"
        assert "IPv6" in stage.reason
        assert near.send(far.ipv4, DATA)
        assert near.send(beside.ipv6, DATA)
        assert count(far).vxlan_bytes > len(DATA)
        assert count(beside).local_bytes > len(DATA)
        assert count(near).sent_packets == 0


def test_the_bridge_gets_addresses_of_the_fast_path(fresh: World) -> None:
    """Where bridge and VXLAN device have forgotten an address that the fast path uses, they get it
    again, so packets of the kernel path aren't flooded."""
    host = fresh.lab.hosts[0]
    device = names.vxlan(fresh.network.id)
    mac = fresh.far.endpoint.mac
    host.in_overlay("bridge", "fdb", "del", mac, "dev", device, "self")
    host.in_overlay("bridge", "fdb", "del", mac, "dev", device, "master")
    assert fresh.near.echoes(fresh.far.ipv4)
    host.do(opened(host).neighbours.refresh_bridges)
    shown = host.in_overlay("bridge", "fdb", "show", "dev", device)
    lines = [line for line in shown.splitlines() if line.startswith(mac)]
    assert any(str(fresh.lab.hosts[1].address) in line for line in lines)
    assert any("master" in line for line in lines)


def test_a_former_peer_gets_no_frames(fresh: World) -> None:
    """When a host is no peer any more, frames to the addresses that were there go to no single host
    but to all peers, also later and when the host is a peer again: an address may have moved."""
    host, peer = fresh.lab.hosts
    mac = fresh.far.endpoint.mac
    assert fresh.near.echoes(fresh.far.ipv4)
    assert host.do(lambda: host.kernel.locate(fresh.network.id, mac)) == peer.address
    host.set_peers(fresh.network)
    host.do(opened(host).neighbours.refresh_bridges)
    assert host.do(lambda: host.kernel.locate(fresh.network.id, mac)) is None
    host.set_peers(fresh.network, peer)
    host.do(opened(host).neighbours.refresh_bridges)
    assert host.do(lambda: host.kernel.locate(fresh.network.id, mac)) is None
    assert not host.do(lambda: host.kernel.uses_fastpath(fresh.network.id, mac))
    assert fresh.near.echoes(fresh.far.ipv4)
    assert host.do(lambda: host.kernel.locate(fresh.network.id, mac)) == peer.address


def test_a_new_peer_is_reported_once(fresh: World) -> None:
    """A host learns of a new peer by the call that names it, whatever another network's call does
    at the same time: endpoints are announced to the peers that the call returns."""
    host, peer = fresh.lab.hosts
    other = a_network(2)
    host.container(other, 7)
    host.set_peers(fresh.network)
    fdb_set_peers = fdb.set_peers

    def between(*arguments: Any) -> frozenset[IPAddress]:
        monkey.setattr(fdb, "set_peers", fdb_set_peers)
        host.kernel.set_peers(other.id, [peer.address])
        return fdb_set_peers(*arguments)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(fdb, "set_peers", between)
        assert host.set_peers(fresh.network, peer) == {peer.address}
    assert host.set_peers(fresh.network, peer) == frozenset()


def test_counters_are_whole(fresh: World) -> None:
    """All bytes that a container received are counted, on whichever path they came."""
    host = fresh.lab.hosts[0]
    name = names.host_veth(fresh.beside.endpoint.id)
    before = host.do(host.kernel.links)[name]["tx_bytes"]
    assert fresh.near.send(fresh.beside.ipv4, DATA)
    assert fresh.far.send(fresh.beside.ipv4, DATA)
    assert host.do(host.kernel.links)[name]["tx_bytes"] - before > 2 * len(DATA)


# --- routers in containers


def forward(router: Container, device: str, server: IPv4Address) -> None:
    """The container passes what is sent to its port 7000 on to the server's, and masquerades."""
    nat = ("iptables", "-t", "nat")
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    router.run(*nat, "-F")
    to = ("-j", "DNAT", "--to-destination", f"{server}:7000")
    router.run(*nat, "-A", "PREROUTING", "-p", "tcp", "--dport", "7000", *to)
    router.run(*nat, "-A", "POSTROUTING", "-o", device, "-j", "MASQUERADE")


@pytest.mark.parametrize("offload", ["on", "off"])
def test_a_container_that_leads_outside(fresh: World, offload: str) -> None:
    """A container that forwards packets addressed to itself to another network of its own (DNAT)
    forwards bulk data unchanged, whatever its other device leaves to the kernel: the tunnel GSO
    type of GSO packets does no harm there."""
    router, client = fresh.beside, fresh.far
    outside = Container(router.host, fresh.network, an_endpoint(fresh.network, 9))
    try:
        outside.serve()

        def connect() -> None:
            with IPRoute() as route:
                there = {"ifname": "eth0", "net_ns_fd": outside.namespace}
                route.link("add", ifname="eth1", kind="veth", peer=there)

        router.do(connect)
        for box, device, address in ((router, "eth1", "10.66.0.1"), (outside, "eth0", "10.66.0.2")):
            box.run("ip", "addr", "add", f"{address}/24", "dev", device)
            box.run("ip", "link", "set", device, "up")
        features = ("tso", "gso", "tx-udp_tnl-segmentation", "tx")
        router.run(
            "ethtool", "-K", "eth1", *(part for each in features for part in (each, offload))
        )
        forward(router, "eth1", IPv4Address("10.66.0.2"))
        assert client.send(router.ipv4, DATA)
    finally:
        outside.close()


def test_a_container_that_returns_packets(fresh: World) -> None:
    """A container that rewrites packets addressed to itself and forwards them (DNAT) forwards bulk
    data unchanged."""
    router, client, server = fresh.beside, fresh.far, fresh.near
    forward(router, "eth0", server.ipv4)
    assert client.send(router.ipv4, DATA)
    # From this host's container to the other's, both segmented and whole.
    forward(router, "eth0", client.ipv4)
    assert server.send(router.ipv4, DATA)
    fourth = fresh.lab.hosts[1].container(fresh.network, 5)
    assert fourth.send(router.ipv4, DATA)
    fresh.lab.hosts[0].run("ethtool", "-K", "eth0", "tx-udp_tnl-segmentation", "off")
    assert fourth.send(router.ipv4, DATA)


def test_packets_to_forward_take_the_kernel_path(fresh: World) -> None:
    """Once a container is found to rewrite packets addressed to itself, the kernel decapsulates
    packets for it; when it no longer does, the fast path does so again."""
    host, router = fresh.lab.hosts[0], fresh.near

    def look() -> None:
        host.do(lambda: host.kernel.check_forwarding(router.endpoint.id, router.namespace))

    def ways() -> tuple[int, int]:
        before = count(router)
        assert fresh.far.send(router.ipv4, DATA)
        now = count(router)
        return now.nic_packets - before.nic_packets, now.vxlan_packets - before.vxlan_packets

    look()
    nic, vxlan = ways()
    assert nic > 0
    assert vxlan == 0
    # Docker's own rules, for its name server, mean nothing.
    dns = ("-d", "127.0.0.11", "-p", "udp", "--dport", "53")
    router.run("iptables", "-t", "nat", "-A", "POSTROUTING", *dns, "-j", "MASQUERADE")
    look()
    assert ways()[1] == 0
    rule = ("PREROUTING", "-p", "tcp", "--dport", "9", "-j", "REDIRECT", "--to-ports", "7000")
    router.run("iptables", "-t", "nat", "-A", *rule)
    look()
    nic, vxlan = ways()
    assert nic == 0
    assert vxlan > 0
    # It stays so when the endpoint is seen to again.
    host.do(lambda: host.kernel.attach(fresh.network, router.endpoint))
    assert ways()[0] == 0
    router.run("iptables", "-t", "nat", "-D", *rule)
    look()
    assert ways()[1] == 0


# --- what keeps it off


def _reason(host: KernelHost) -> str:
    """Why the tunnel is off after a refresh that reads the firewall's rules again."""
    opened(host).tunnel.firewall.due = 0.0
    return host.refresh().reason


def test_ipsec_turns_encapsulation_off(fresh: World) -> None:
    """While the host has IPsec policies, no packet bypasses them, and status says so."""
    host = fresh.lab.hosts[0]
    policy = ("ip", "xfrm", "policy")
    host.run(
        *policy, "add", "src", "192.0.2.1", "dst", "192.0.2.2", "dir", "out", "action", "block"
    )
    assert "IPsec" in _reason(host)
    before = count(fresh.near)
    assert fresh.near.send(fresh.far.ipv4, DATA)
    now = count(fresh.near)
    assert (now.sent_packets, now.nic_packets) == (before.sent_packets, before.nic_packets)
    host.run(*policy, "delete", "src", "192.0.2.1", "dst", "192.0.2.2", "dir", "out")
    assert _reason(host) == ""


RULES = {
    "a rule that drops the port": "add rule ip t in udp dport 4799 drop",
    "a rule that drops the peer": "add rule ip t in ip saddr 10.1.0.2 drop",
    "a rule that limits": "add rule ip t in udp dport 4000-5000 limit rate over 10/second drop",
    "a rule in a chain that another jumps to": (
        "add chain ip t deep; add rule ip t in iifname eth0 jump deep; add rule ip t deep drop"
    ),
    "a rule whose condition isn't understood": "add rule ip t in meta length 1000-65535 drop",
    "a mark on what leaves": "add rule ip t out ip daddr 10.1.0.0/24 meta mark set 1",
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_may_match_turns_it_off(fresh: World, name: str) -> None:
    """No packet bypasses a firewall rule that may match it: encapsulation is off, all bytes arrive,
    and it is on again without the rule."""
    host = fresh.lab.hosts[0]
    base = (
        "add table ip t; add chain ip t in { type filter hook input priority 0; }; "
        "add chain ip t out { type filter hook output priority 0; }; "
    )
    host.run("nft", base + RULES[name])
    assert "firewall" in _reason(host)
    before = count(fresh.near)
    fresh.near.echoes(fresh.far.ipv4, tries=1)
    assert count(fresh.near).sent_packets == before.sent_packets
    if "drops" in name:
        assert not fresh.near.echoes(fresh.far.ipv4, tries=1)
    host.run("nft", "flush", "ruleset")
    assert _reason(host) == ""
    # Where the other one is is learned anew, from its first answer.
    assert fresh.near.echoes(fresh.far.ipv4)
    assert fresh.near.echoes(fresh.far.ipv4)
    assert count(fresh.near).sent_packets > before.sent_packets


DOCKER = """
iptables -N DOCKER; iptables -N DOCKER-USER; iptables -P FORWARD DROP
iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -p udp --dport 4799 -j DROP
iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
iptables -t nat -N DOCKER
iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
iptables -t nat -A POSTROUTING -s 172.18.0.2/32 -d 172.18.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
iptables -t nat -A DOCKER -i docker0 -j RETURN
iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.18.0.2:80
iptables -t raw -A PREROUTING -d 172.18.0.2/32 ! -i docker_gwbridge -j DROP
iptables -A INPUT -p tcp --dport 22 -j ACCEPT
iptables -A INPUT -p udp --dport 53 -j DROP
"""


def test_dockers_rules_are_no_obstacle(fresh: World) -> None:
    """With the rules of an engine and its DOCKER-USER chain, which never see the overlay's packets,
    the fast path stays on."""
    host = fresh.lab.hosts[0]
    for line in DOCKER.strip().splitlines():
        for command in line.split("; "):
            host.run(*command.split())
    assert _reason(host) == ""
    assert fresh.near.send(fresh.far.ipv4, DATA)


def test_a_device_that_is_not_ethernet(fresh: World) -> None:
    """Where a tunnel without Ethernet headers leads to peers, the kernel encapsulates, and status
    says so."""
    host = fresh.lab.hosts[0]
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    host.run("ip", "tuntap", "add", "t0", "mode", "tun")
    host.run("ip", "link", "set", "t0", "up")
    host.run("ip", "route", "add", f"{fresh.lab.hosts[1].address}/32", "dev", "t0")
    stage = host.refresh()
    assert (stage.stage, stage.devices) == ("receive", ())
    assert "not Ethernet" in stage.reason
    host.run("ip", "link", "del", "t0")
    assert host.refresh().stage == "tunnel"


# --- what may change


def test_another_device_is_followed(fresh: World) -> None:
    """When the underlay's address moves to another device (here a bridge over the old one), the
    fast path uses that device."""
    host = fresh.lab.hosts[0]
    host.run("ip", "link", "add", "br0", "type", "bridge")
    host.run("ip", "link", "set", "br0", "up")
    host.run("ip", "addr", "flush", "dev", "eth0")
    host.run("ip", "link", "set", "eth0", "master", "br0")
    host.run("ip", "addr", "add", f"{host.address}/24", "dev", "br0")
    assert host.refresh().devices == ("br0",)
    fresh.lab.hosts[1].run("ip", "neigh", "flush", "all")
    eventually("the other host", lambda: fresh.near.echoes(fresh.far.ipv4, tries=1))
    before = count(fresh.near)
    assert fresh.near.send(fresh.far.ipv4, DATA)
    assert fresh.far.send(fresh.near.ipv4, DATA)
    now = count(fresh.near)
    assert now.sent_bytes - before.sent_bytes > len(DATA)
    assert now.nic_bytes - before.nic_bytes > len(DATA)


def test_a_smaller_mtu_of_the_underlay(fresh: World) -> None:
    """When the underlay's MTU falls below the need of the network, no packet is lost silently:
    larger packets take the kernel path, which reports the error to the sender."""
    host = fresh.lab.hosts[0]
    host.run("ip", "link", "set", "eth0", "mtu", "1400")
    host.refresh()
    before = count(fresh.near).sent_packets
    assert fresh.near.send(fresh.far.ipv4, DATA)
    assert fresh.near.send(fresh.far.ipv6, DATA)
    assert count(fresh.near).sent_packets > before


def test_the_pair_is_made_again(fresh: World) -> None:
    """When the veth pair between the namespaces was deleted, the next refresh makes it again."""
    host = fresh.lab.hosts[0]
    host.run("ip", "link", "del", names.OUTSIDE)
    host.refresh()
    before = count(fresh.near).sent_packets
    assert fresh.near.send(fresh.far.ipv4, DATA)
    assert count(fresh.near).sent_packets > before


def test_a_detached_program_is_attached_again(fresh: World) -> None:
    """When all programs were detached from the host's device, ours is attached again some seconds
    later; until then all bytes arrive."""
    host = fresh.lab.hosts[0]
    attached = opened(host).tunnel.attached
    pin = RUN / PINS / "links-host" / str(next(iter(attached)))
    if host.run("ls", str(pin), check=False):
        host.run("bpftool", "link", "detach", "pinned", str(pin))
    else:
        host.run("tc", "qdisc", "del", "dev", "eth0", "clsact")
    assert fresh.far.send(fresh.near.ipv4, DATA)
    attached.update(dict.fromkeys(attached, float("-inf")))
    host.refresh()
    before = count(fresh.near).nic_packets
    assert fresh.far.send(fresh.near.ipv4, DATA)
    assert count(fresh.near).nic_packets > before


# --- the plugin's life


def test_it_outlives_the_plugin(fresh: World) -> None:
    """A connection stays on the fast path while the plugin is dead; the next process takes over
    learned addresses and counters."""
    host = fresh.lab.hosts[0]
    with fresh.near.connect(fresh.far.ipv4) as stream:
        stream.sendall(b"one ")
        host.do(host.kernel.close)
        stream.sendall(DATA)
        second = host.new_kernel()
        host._kernels.remove(host.kernel)
        host.kernel = second
        host.do(second.prepare)
        assert host.do(lambda: _remote_entries(host)) != []
        for box in (fresh.near, fresh.beside):
            host.do(lambda b=box: second.attach(fresh.network, b.endpoint))  # type: ignore[misc]
        host.set_peers(fresh.network, fresh.lab.hosts[1])
        assert count(fresh.near).sent_bytes > len(DATA)
        assert host.refresh().stage == "tunnel"
        before = count(fresh.near).sent_bytes
        stream.sendall(DATA)
        stream.shutdown(socket.SHUT_WR)
        assert len(stream.recv(64)) == 64
    assert count(fresh.near).sent_bytes - before > len(DATA)


@pytest.mark.parametrize("change", ["FF_SLOTS 2048", "FF_LAYOUT 1"])
def test_an_upgrade_is_not_felt(fresh: World, tmp_path: Path, change: str) -> None:
    """A plugin with other programs, whose maps have another size or layout, takes over without
    losing a byte; no pin of the earlier one is left."""
    sources = tmp_path / "ebpf"
    shutil.copytree(SOURCES, sources)
    name, number = change.split()
    header = (sources / "overlay.h").read_text()
    assert f"#define {change}\n" in header
    newer = header.replace(f"#define {change}\n", f"#define {name} {int(number) + 1}\n")
    (sources / "overlay.h").write_text(newer)
    host = fresh.lab.hosts[0]
    host.programs = tmp_path / "newer.o"
    subprocess.run([sources / "build.sh", host.programs], check=True)
    old = RUN / PINS / "v0"
    with fresh.near.connect(fresh.far.ipv4) as stream:
        stream.sendall(DATA)
        if name == "FF_LAYOUT":
            # As if the maps that are used now were of the other version.
            host.run("mv", str(RUN / PINS / "v1"), str(old))
        host.do(host.kernel.close)
        host._kernels.remove(host.kernel)
        host.kernel = host.new_kernel()
        host.do(host.kernel.prepare)
        stream.sendall(DATA)
        for box in (fresh.near, fresh.beside):
            host.do(lambda b=box: host.kernel.attach(fresh.network, b.endpoint))  # type: ignore[misc]
        host.set_peers(fresh.network, fresh.lab.hosts[1])
        assert host.refresh().stage == "tunnel"
        assert fresh.near.echoes(fresh.far.ipv4)
        before = count(fresh.near).sent_bytes
        stream.sendall(DATA)
        stream.shutdown(socket.SHUT_WR)
        assert len(stream.recv(64)) == 64
    assert count(fresh.near).sent_bytes - before > len(DATA)
    assert host.run("ls", str(old), check=False) == ""


def _remote_entries(host: KernelHost) -> list[object]:
    return [entry for _, _, entry in maps_of(host).fdb_entries() if not entry.index]


def test_switched_off_it_leaves_nothing(fresh: World) -> None:
    """A plugin that starts with EBPF=off detaches the programs of its predecessor; connections
    continue."""
    host = fresh.lab.hosts[0]
    with fresh.near.connect(fresh.far.ipv4) as stream:
        stream.sendall(DATA)
        host.without_fast_path()
        stage = host.refresh()
        assert (stage.stage, stage.reason) == ("", "setting EBPF=off")
        stream.sendall(DATA)
        stream.shutdown(socket.SHUT_WR)
        assert len(stream.recv(64)) == 64
    _nothing_is_left(host)
    assert fresh.near.send(fresh.beside.ipv4, DATA)


@pytest.mark.parametrize("tcx", [True, False])
def test_cleanup_leaves_nothing(tcx: bool) -> None:
    """After cleanup none of our programs, pins, qdiscs, devices and mounts are left, and qdiscs and
    filters of others are."""
    with lab(2) as made:
        host = made.hosts[0]
        host.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
        host.run(
            *[
                "tc",
                "filter",
                "add",
                "dev",
                "eth0",
                "ingress",
                "prio",
                "7",
                "protocol",
                "ip",
                "u32",
                "match",
                "u32",
                "0",
                "0",
                "classid",
                "1:1",
            ]
        )
        if not tcx:
            host.without_tcx()
        _world(made)
        removed = host.do(host.kernel.cleanup)
        assert names.INSIDE in removed
        _nothing_is_left(host, "clsact")
        assert "u32" in host.run("tc", "filter", "show", "dev", "eth0", "ingress")
        other = made.hosts[1]
        other.do(other.kernel.cleanup)
        _nothing_is_left(other)


def _nothing_is_left(host: KernelHost, qdisc: str = "") -> None:
    assert (
        host.run(
            "find", str(RUN), "-name", "bpf*", "-o", "-name", "links-*", "-o", "-name", "filters-*"
        )
        == ""
    )
    assert "bpf" not in host.run("tc", "filter", "show", "dev", "eth0", "ingress")
    assert ("clsact" in host.run("tc", "qdisc", "show", "dev", "eth0")) == (qdisc == "clsact")
    assert names.PAIR not in host.run("ip", "-br", "link")
    assert str(PINS) not in host.run("cat", "/proc/self/mounts")
    shown = host.run("bpftool", "net", "show", "dev", "eth0", check=False)
    assert "ff_" not in shown


def test_an_endpoint_that_went_leaves_nothing(fresh: World) -> None:
    """Each deleted endpoint leaves the maps, and with the last one its network does."""
    host = fresh.lab.hosts[0]
    maps = maps_of(host)
    host.remove(fresh.beside)
    assert host.do(lambda: len(maps.port_indexes())) == 2
    host.remove(fresh.near)
    host.do(lambda: host.kernel.remove_network(fresh.network.id))
    host.refresh()
    assert host.do(lambda: list(maps.fdb_entries())) == []
    assert host.do(maps.all_networks) == []
    assert host.do(maps.all_peers) == {}
    assert host.do(maps.port_indexes) == set()


def _fill(host: KernelHost, table: str) -> None:
    """Fill a map with entries of networks that don't exist, without the plugin's knowledge."""
    maps = maps_of(host)
    with contextlib.suppress(KernelRefused):
        for number in range(70_000):
            if table == "peers":
                maps.put_peer(
                    9999, IPv4Address(number), PeerRoute(1, IPv4Address(1), 1500, IPv4Address(1))
                )
            elif table == "places":
                mac = number.to_bytes(6, "big").hex(":")
                maps.put_fdb_entry(9999, mac, FdbEntry(0, IPv4Address(1), time.monotonic_ns()))
            else:
                maps.put_network(number, 1, 9999)


def test_a_full_table_of_peers() -> None:
    """A peer without room in the map is reached by the kernel path and all others as before; status
    says how many, and why. Once there is room it is reached by the fast path."""
    with lab(3) as made:
        network = a_network()
        near, far, third = (host.container(network, 2 + n) for n, host in enumerate(made.hosts))
        made.mesh(network)
        host = near.host
        host.set_peers(network, far.host)
        host.do(lambda: _fill(host, "peers"))
        host.set_peers(network, far.host, third.host)
        # What is done each second goes on.
        opened(host).cleaner.due = time.monotonic() + 60
        stage = host.refresh()
        assert stage.stage == "tunnel"
        (said,) = stage.full
        assert "1 peers" in said
        assert near.echoes(third.ipv4)
        before = count(near).sent_packets
        assert near.echoes(far.ipv4)
        assert count(near).sent_packets > before
        opened(host).neighbours.refresh_soon()
        assert host.refresh().full == ()
        assert near.echoes(third.ipv4)
        assert host.do(lambda: host.kernel.uses_fastpath(network.id, third.endpoint.mac))


def test_a_full_table_of_addresses(fresh: World) -> None:
    """Addresses on other hosts are dropped to make room for a container of this host."""
    host = fresh.lab.hosts[0]
    host.do(lambda: _fill(host, "places"))
    box = host.container(fresh.network, 9)
    assert host.do(lambda: host.kernel.uses_fastpath(fresh.network.id, box.endpoint.mac))
    assert box.echoes(fresh.near.ipv4)


def test_a_full_table_of_networks(fresh: World) -> None:
    """A container without room in the maps is reached by the kernel path, and status says so until
    it is gone."""
    host = fresh.lab.hosts[0]
    host.do(lambda: _fill(host, "networks"))
    other = a_network(2)
    boxes = [each.container(other, 2 + n) for n, each in enumerate(fresh.lab.hosts)]
    fresh.lab.mesh(other)
    assert boxes[0].echoes(boxes[1].ipv4)
    (said,) = host.refresh().full
    assert "1 containers" in said
    host.remove(boxes[0])
    assert host.refresh().full == ()


def test_containers_do_not_wait(fresh: World) -> None:
    """A container is added and removed at once while a refresh takes long, or programs are being
    attached."""
    host = fresh.lab.hosts[0]
    kernel = host.kernel
    with kernel.fastpath.upkeep:
        began = time.monotonic()
        endpoint = an_endpoint(fresh.network, 9)
        host.do(lambda: kernel.attach(fresh.network, endpoint))
        host.do(lambda: kernel.detach(fresh.network.id, endpoint.id))
        assert time.monotonic() - began < 20
    host.refresh()


def test_the_flood_list_is_restored(fresh: World) -> None:
    """A peer that another process removed from the flood list is restored when the peers are set
    again."""
    host, other = fresh.lab.hosts
    vxlan = names.vxlan(fresh.network.id)
    host.in_overlay(
        "bridge", "fdb", "del", "00:00:00:00:00:00", "dev", vxlan, "dst", str(other.address)
    )
    assert host.set_peers(fresh.network, other) == {other.address}
    assert f"dst {other.address}" in host.in_overlay("bridge", "fdb", "show", "dev", vxlan)
