"""Packets between hosts: protocols, sizes, kinds of underlays, and changing peers."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Interface

import pytest
from pyroute2 import IPRoute

from driver import names
from driver.kernel.namespace import OVERLAY_PIN
from driver.model import Endpoint, IPAddress
from testbed.kernel_hosts import (
    RUN,
    TCP_PORT,
    Container,
    KernelHost,
    Lab,
    a_network,
    eventually,
    heard,
    identifier,
    lab,
    octets,
)
from testbed.patience import patience, within

SIZES = (0, 1, 64, 1000, 1300)
UNDERLAYS = ((1500, False), (9000, False), (1500, True), (9000, True))


@pytest.fixture(
    params=UNDERLAYS, ids=[f"ipv{6 if six else 4} underlay, MTU {mtu}" for mtu, six in UNDERLAYS]
)
def any_underlay(request: pytest.FixtureRequest) -> Iterator[Lab]:
    mtu, six = request.param
    with lab(2, mtu=mtu, ipv6_underlay=six) as made:
        yield made


def _pair(made: Lab, mtu: int = 1450) -> tuple[Container, Container]:
    """A container on each of the first two hosts, which are peers."""
    network = a_network(mtu=mtu)
    near = made.hosts[0].container(network, 2)
    far = made.hosts[1].container(network, 3)
    made.mesh(network)
    return near, far


def _both(container: Container) -> tuple[IPAddress, IPAddress]:
    return container.ipv4, container.ipv6


def test_everything_passes_over_every_underlay(any_underlay: Lab) -> None:
    """TCP, UDP and ping over IPv4 and IPv6, in both directions and on one host, arrive unchanged at
    the underlay's MTU."""
    host = any_underlay.hosts[0]
    mtu = host.do(host.kernel.underlay_mtu)
    assert mtu == host.mtu - (50 if host.address.version == 4 else 70)
    near, far = _pair(any_underlay, mtu)
    beside = host.container(near.network, 4)
    data = os.urandom(8 << 20)
    for one, other in ((near, far), (far, near), (near, beside)):
        for address in _both(other):
            assert one.pings(address)
            assert one.send(address, data)
            assert all(one.echoes(address, size) for size in SIZES)


def test_the_largest_packet_passes_and_no_larger_one(any_underlay: Lab) -> None:
    """A packet of the MTU passes unfragmented; for one byte more the sender gets an error."""
    host = any_underlay.hosts[0]
    mtu = host.do(host.kernel.underlay_mtu)
    near, far = _pair(any_underlay, mtu)
    for address, headers in ((far.ipv4, 28), (far.ipv6, 48)):
        assert near.echoes(address, mtu - headers)
        with near.udp(address) as datagrams, pytest.raises(OSError) as caught:
            datagrams.send(bytes(mtu - headers + 1))
        assert caught.value.errno == errno.EMSGSIZE


def test_tcp_segments_fill_the_mtu(any_underlay: Lab) -> None:
    """TCP segments are as large as the MTU allows: less 20 or 40 bytes for IP, 20 for TCP, 12 for
    timestamps."""
    host = any_underlay.hosts[0]
    mtu = host.do(host.kernel.underlay_mtu)
    near, far = _pair(any_underlay, mtu)
    for address, headers in ((far.ipv4, 52), (far.ipv6, 72)):
        with near.connect(address) as stream:
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) == mtu - headers


def test_an_mtu_larger_than_the_underlays(two: Lab) -> None:
    """With -o mtu=4000 over an underlay of 1500 no packet is lost silently: TCP finds the path MTU,
    datagrams are fragmented, or refused where they must not be."""
    near, far = _pair(two, 4000)
    for address, headers in ((far.ipv4, 28), (far.ipv6, 48)):
        with pytest.raises(OSError) as caught:
            near.echoes(address, 4000 - headers)
        assert caught.value.errno == errno.EMSGSIZE
        assert near.send(address, os.urandom(4 << 20))
        assert near.echoes(address, 4000 - headers, whole=False)
        assert near.echoes(address, 60000, whole=False)


def test_datagrams_of_every_size(two: Lab) -> None:
    """UDP datagrams of every size arrive unchanged, in fragments."""
    near, far = _pair(two)
    for size in (1422, 1423, 1472, 1500, 9000, 30000, 65507):
        assert near.echoes(far.ipv4, size, whole=False), size
        assert near.echoes(far.ipv6, min(size, 65487), whole=False), size


def test_a_smaller_mtu_than_the_underlays(two: Lab) -> None:
    """With -o mtu=1280, the minimum of IPv6, all traffic passes."""
    near, far = _pair(two, 1280)
    assert near.send(far.ipv4, os.urandom(1 << 20))
    assert near.send(far.ipv6, os.urandom(1 << 20))
    assert near.echoes(far.ipv6, 1280 - 48)


def test_multicast_and_broadcast_reach_all(three: Lab) -> None:
    """Broadcast and multicast datagrams reach every container of the network on all hosts."""
    network = a_network()
    sender = three.hosts[0].container(network, 2)
    others = [host.container(network, 3 + n) for n, host in enumerate(three.hosts)]
    three.mesh(network)

    def listener(group: str) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.settimeout(patience(2))
        made.bind(("", 7070))
        if group.startswith("2"):
            own = socket.inet_aton(group) + (socket.if_nametoindex("eth0")).to_bytes(4, "little")
            made.setsockopt(
                socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, own[:4] + bytes(4) + own[4:]
            )
        return made

    for group in ("10.9.0.255", "239.7.7.7"):
        listening = [other.do(lambda g=group: listener(g)) for other in others]  # type: ignore[misc]

        def shout(to: str = group) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                made.bind((str(sender.ipv4), 0))
                made.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, sender.ipv4.packed)
                made.sendto(b"all", (to, 7070))

        sender.do(shout)
        for each in listening:
            with each:
                assert each.recv(16) == b"all", group


def test_two_networks_are_apart(two: Lab) -> None:
    """Networks with the same subnet on the same hosts are isolated: no reply and no frame
    crosses."""
    first, second = a_network(1), a_network(2)
    near = two.hosts[0].container(first, 2)
    far = two.hosts[1].container(first, 3)
    # The other network has what is asked for, also on the same host.
    strangers = [host.container(second, 4) for host in two.hosts]
    listening = [stranger.packets() for stranger in strangers]
    two.mesh(first)
    two.mesh(second)
    assert near.pings(far.ipv4)
    for address in _both(strangers[0]):
        with pytest.raises(OSError):
            near.connect(address, 0.5)
    assert not near.echoes(strangers[1].ipv4)
    for each in listening:
        assert octets(near.endpoint.mac) not in [frame[6:12] for frame in heard(each)]


def _docker_overlay(made: Lab, host: KernelHost, vni: int) -> Container:
    """A container on an overlay like Docker's: VXLAN on port 4789, made on the host, moved into a
    namespace."""
    number = host.number
    network = a_network(90)
    endpoint = Endpoint(
        id=identifier(90 + number),
        network_id=network.id,
        mac=f"02:42:0a:c8:00:{number:02x}",
        ipv4=IPv4Interface(f"10.200.0.{number}/24"),
    )
    box = Container(host, network, endpoint)
    host.containers.append(box)

    def make() -> None:
        with IPRoute() as route:
            route.link(
                "add",
                ifname="vx",
                kind="vxlan",
                address=endpoint.mac,
                vxlan_id=vni,
                vxlan_port=4789,
                vxlan_learning=1,
                net_ns_fd=box.namespace,
            )

    host.do(make)
    box.run("ip", "addr", "add", str(endpoint.ipv4), "dev", "vx")
    box.run("ip", "link", "set", "vx", "up")
    for other in made.hosts:
        if other is not host:
            to = ("dst", str(other.address))
            box.run("bridge", "fdb", "append", "00:00:00:00:00:00", "dev", "vx", *to)
    box.serve()
    return box


def test_beside_an_overlay_of_docker(two: Lab) -> None:
    """An overlay of Docker's with the same VNI on port 4789 works on the same hosts without
    interference."""
    near, far = _pair(two)
    one, other = (_docker_overlay(two, host, near.network.vni) for host in two.hosts)
    listening = far.packets()
    data = os.urandom(1 << 20)
    for _ in range(2):
        assert near.send(far.ipv4, data)
        assert one.send(other.ipv4, data)
    senders = {frame[6:12] for frame in heard(listening)}
    assert octets(near.endpoint.mac) in senders
    assert not senders & {octets(box.endpoint.mac) for box in (one, other)}
    for host in two.hosts:
        host.do(host.kernel.cleanup)
    assert one.send(other.ipv4, data)


def test_on_the_port_of_docker_itself(two: Lab) -> None:
    """With VXLAN_PORT=4789 our devices and Docker's share the port, distinguished by VNI."""
    network = a_network(port=4789)
    for host in two.hosts:
        host.run("ip", "link", "add", "vx", "type", "vxlan", "id", "4097", "dstport", "4789")
        host.run("ip", "link", "set", "vx", "up")
    near, far = (host.container(network, 2 + n) for n, host in enumerate(two.hosts))
    two.mesh(network)
    assert near.send(far.ipv4, b"both")


def test_peers_added_and_removed(three: Lab) -> None:
    """Added peers are reached at once, removed ones no more, and set_peers returns the added
    ones."""
    first, second, third = three.hosts
    network = a_network()
    near, far, third_box = (host.container(network, 2 + n) for n, host in enumerate(three.hosts))
    for host in (second, third):
        host.set_peers(network, first)
    assert not near.echoes(far.ipv4, tries=1)
    assert first.set_peers(network, second) == {second.address}
    assert near.echoes(far.ipv4)
    assert first.set_peers(network, second, third) == {third.address}
    assert near.echoes(third_box.ipv4)
    assert first.set_peers(network, third) == frozenset()
    shown = first.in_overlay("bridge", "fdb", "show", "dev", names.vxlan(network.id))
    floods = [line for line in shown.splitlines() if line.startswith("00:00:00:00:00:00")]
    assert len(floods) == 1
    assert str(third.address) in floods[0]
    assert first.set_peers(network) == frozenset()
    shown = first.in_overlay("bridge", "fdb", "show", "dev", names.vxlan(network.id))
    assert "00:00:00:00:00:00" not in shown


def test_peers_are_mended_by_the_next_process(two: Lab) -> None:
    """The first set_peers of a new plugin process restores a flood list that was changed."""
    near, far = _pair(two)
    host, other = two.hosts
    device = names.vxlan(near.network.id)
    entry = ("00:00:00:00:00:00", "dev", device, "dst")
    host.in_overlay("bridge", "fdb", "del", *entry, str(other.address))
    host.in_overlay("bridge", "fdb", "append", *entry, "10.1.0.99")
    second = host.new_kernel()
    added = host.do(lambda: second.set_peers(near.network.id, [other.address]))
    assert added == {other.address}
    assert "10.1.0.99" not in host.in_overlay("bridge", "fdb", "show", "dev", device)
    assert near.echoes(far.ipv4)


def test_a_cut_underlay_heals_by_itself(two: Lab) -> None:
    """A connection survives an unplugged cable; nothing has to be made again."""
    near, far = _pair(two)
    with near.connect(far.ipv4) as stream:
        stream.sendall(b"before ")
        two.link(two.hosts[1], "down")
        assert not near.echoes(far.ipv4, tries=1, timeout=0.3)
        stream.sendall(b"while ")
        two.link(two.hosts[1], "up")
        eventually("the other host", lambda: near.echoes(far.ipv4, tries=1), 10)
        stream.sendall(b"after")
        stream.shutdown(socket.SHUT_WR)
        stream.settimeout(patience(15))
        assert len(stream.recv(64)) == 64


def test_where_an_address_lives_is_learned(two: Lab) -> None:
    """`locate` gives the peer behind a learned MAC address, and none for one of this host or an
    unknown one."""
    near, far = _pair(two)
    assert near.pings(far.ipv4)
    host, other = two.hosts
    mac = far.endpoint.mac

    def locate(which: str) -> IPAddress | None:
        return host.do(lambda: host.kernel.locate(near.network.id, which))

    assert locate(mac) == other.address
    assert locate(mac.upper()) == other.address
    assert locate(near.endpoint.mac) is None
    assert locate("02:42:0a:09:00:fe") is None


def test_counters_are_the_kernels(two: Lab) -> None:
    """A veth's counters have the bytes that a container sent."""
    near, far = _pair(two)
    host = two.hosts[0]
    name = names.host_veth(near.endpoint.id)
    before = host.do(host.kernel.links)[name]["rx_bytes"]
    assert near.send(far.ipv4, bytes(1 << 20))
    assert host.do(host.kernel.links)[name]["rx_bytes"] - before > 1 << 20


def test_connections_outlive_the_plugin(two: Lab) -> None:
    """A connection continues while the plugin is dead, and after the next process has repaired
    everything."""
    near, far = _pair(two)
    host = two.hosts[0]
    with near.connect(far.ipv6) as stream:
        stream.sendall(b"one ")
        second = host.new_kernel()
        host.do(second.prepare)
        host.do(lambda: second.attach(near.network, near.endpoint))
        host.do(lambda: second.set_peers(near.network.id, [two.hosts[1].address]))
        stream.sendall(b"two")
        stream.shutdown(socket.SHUT_WR)
        assert len(stream.recv(64)) == 64


def test_an_endpoint_that_is_gone_is_not_reached(two: Lab) -> None:
    """After detach the address is unreachable, and other containers aren't affected."""
    near, far = _pair(two)
    beside = two.hosts[1].container(near.network, 4)
    assert near.echoes(far.ipv4)
    two.hosts[1].remove(far)
    assert not near.echoes(far.ipv4, tries=1)
    assert near.echoes(beside.ipv4)


def test_the_overlay_namespace_holds_no_socket_of_containers(one: Lab) -> None:
    """A container that connects to the bridge's own MAC address reaches no one."""
    network = a_network()
    box = one.hosts[0].container(network, 2)
    box.run("ip", "neigh", "replace", "10.9.0.77", "lladdr", _bridge_mac(one), "dev", "eth0")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        box.do(lambda: socket.create_connection(("10.9.0.77", TCP_PORT), timeout=0.5))
    assert time.monotonic() - started < within(5)


def _bridge_mac(made: Lab) -> str:
    host = made.hosts[0]
    listed = host.run(
        *("nsenter", f"--net={RUN / OVERLAY_PIN}", "ip", "-br", "link", "show", "type", "bridge")
    )
    return listed.split()[2]
