"""Frames to the overlay's UDP port from senders that are no peers: forged frames, and frames that
would move an address.

Each attack is run over the kernel path and over the fast path, because each path has its own table
of addresses.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

import pytest

from driver import names
from driver.kernel import guard_rules
from driver.kernel.namespace import in_netns
from driver.model import Network
from testbed.kernel_hosts import (
    Container,
    KernelHost,
    Lab,
    a_network,
    eventually,
    lab,
    new_namespace,
    put_on_the_wire,
)
from testbed.patience import patience
from tests.kernel.frames import IPV4, ethernet, udp

FORGED = b"forged"
SESSIONS = 4801


@dataclass
class Scene:
    """Two peers with a container each, and a host that is no peer."""

    lab: Lab
    network: Network
    near: Container
    far: Container

    @property
    def outsider(self) -> KernelHost:
        return self.lab.hosts[2]

    def mesh(self) -> None:
        first, second = self.lab.hosts[:2]
        for one, other in ((first, second), (second, first)):
            one.set_peers(self.network, other)
            one.refresh()

    def wrapped(self, frame: bytes) -> bytes:
        return struct.pack("!II", 0x08000000, self.network.vni << 8) + frame

    def forged(self, to: Container) -> bytes:
        """A datagram to one of the containers, with the other's address as its source."""
        source = self.near if to is self.far else self.far
        inner = udp(source.ipv4, to.ipv4, FORGED)
        return self.wrapped(ethernet(source.endpoint.mac, to.endpoint.mac, IPV4, inner))

    def moving(self) -> bytes:
        """A frame that claims the far container's address for its sender."""
        frame = ethernet(self.far.endpoint.mac, "02:99:00:00:00:01", 0x88B5, bytes(46))
        return self.wrapped(frame)


@pytest.fixture(scope="module", params=["kernel path", "fast path"])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with lab(3) as made:
        network = a_network()
        if request.param == "kernel path":
            for host in made.hosts:
                host.without_fast_path()
        near, far = (host.container(network, 2 + n) for n, host in enumerate(made.hosts[:2]))
        scene = Scene(made, network, near, far)
        scene.mesh()
        assert near.echoes(far.ipv4)
        assert far.echoes(near.ipv4)
        yield scene


@contextlib.contextmanager
def alien(host: KernelHost) -> Iterator[int]:
    """The namespace of a container of another network, as Docker's bridge makes it: it reaches the
    outside with its host's address.
    """
    namespace = new_namespace()
    try:
        host.run("ip", "link", "add", "docker0", "type", "bridge")
        host.run("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
        host.run("ip", "link", "set", "docker0", "up")
        link = f"/proc/{os.getpid()}/fd/{namespace}"
        host.run("ip", "link", "add", "v0", "type", "veth", "peer", "name", "eth0", "netns", link)
        host.run("ip", "link", "set", "v0", "master", "docker0", "up")
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        # As on hosts that do not check sources.
        for where in ("all", "docker0"):
            host.run("sysctl", "-qw", f"net.ipv4.conf.{where}.rp_filter=0")
        host.run(
            *(
                "nft",
                "add table ip nat; add chain ip nat p { type nat hook postrouting priority 100; }; ",
            ),
            "add rule ip nat p ip saddr 172.17.0.0/16 oifname != docker0 masquerade",
        )

        def address() -> None:
            for command in (
                "ip addr add 172.17.0.2/16 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
                "ip route add default via 172.17.0.1",
            ):
                subprocess.run(command.split(), check=True)

        in_netns(namespace, address)
        yield namespace
    finally:
        host.run("nft", "delete table ip nat", check=False)
        for link in ("v0", "docker0"):
            host.run("ip", "link", "del", link, check=False)
        os.close(namespace)


Sender = Callable[[bytes, str], None]
"""Sends a datagram to the overlay's port at an address."""


def _socket(source: str = "") -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # Like VXLAN, without a checksum (SO_NO_CHECK).
    made.setsockopt(socket.SOL_SOCKET, 11, 1)
    if source:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TRANSPARENT, 1)
        made.bind((source, 4799))
    return made


@contextlib.contextmanager
def attacker(scene: Scene, kind: str) -> Iterator[Sender]:
    """A sender that is no peer and has an ordinary socket."""
    near_host = scene.lab.hosts[0]
    with contextlib.ExitStack() as stack:
        if kind == "container":
            namespace = stack.enter_context(alien(near_host))
            made = stack.enter_context(in_netns(namespace, _socket))
        elif kind == "container as a peer":
            namespace = stack.enter_context(alien(near_host))
            peer = str(scene.lab.hosts[1].address)
            in_netns(
                namespace,
                lambda: subprocess.run(["ip", "addr", "add", peer, "dev", "lo"], check=True),
            )
            made = stack.enter_context(in_netns(namespace, lambda: _socket(peer)))
        elif kind == "host":
            made = stack.enter_context(scene.outsider.do(_socket))
        else:
            made = stack.enter_context(near_host.do(_socket))
        if kind.startswith("user"):
            yield lambda data, to: _as_nobody(near_host, kind, data, to)
        else:
            yield lambda data, to: _send(made, data, to)


def _send(made: socket.socket, data: bytes, to: str) -> None:
    with contextlib.suppress(PermissionError):
        made.sendto(data, (to, 4799))


_PROGRAM = """
import os, socket, sys
uid = int(sys.argv[1])
os.setgid(uid); os.setuid(uid)
made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
made.setsockopt(socket.SOL_SOCKET, 11, 1)
try:
    made.sendto(bytes.fromhex(sys.argv[2]), (sys.argv[3], 4799))
except PermissionError:
    pass
"""


def _as_nobody(host: KernelHost, kind: str, data: bytes, to: str) -> None:
    uid = kind.split()[1]
    host.run(sys.executable, "-c", _PROGRAM, uid, data.hex(), to)


ALIENS = ["container", "container as a peer", "user 65534", "user 0", "host"]


@pytest.mark.parametrize("kind", ALIENS)
def test_nobody_else_puts_frames_into_a_network(scene: Scene, kind: str) -> None:
    """A frame to the overlay's port of any host reaches no container if it comes from a container
    of another network, a user of a host, or a host that is no peer.
    """
    targets = (scene.near, scene.far)
    listening = [tap.packets() for tap in targets]
    with attacker(scene, kind) as send:
        for target in targets:
            for _ in range(3):
                send(scene.forged(target), str(target.host.address))
    seen = [frame for tap in listening for frame in _all(tap) if FORGED in frame]
    assert not seen
    # The same frame from a peer's own kernel arrives, so the frame is valid.
    put_on_the_wire(scene.near.host, scene.far.host, scene.forged(scene.far))
    assert [frame for frame in _all(listening[1]) if FORGED in frame]


@pytest.mark.parametrize("kind", ALIENS)
def test_nobody_else_moves_an_address(scene: Scene, kind: str) -> None:
    """While such a sender claims a remote container's address all the time, that container stays
    reachable where it is.
    """
    near_host = scene.lab.hosts[0]
    stop = threading.Event()
    with attacker(scene, kind) as send:

        def claim() -> None:
            while not stop.wait(0.005):
                send(scene.moving(), str(near_host.address))

        thread = threading.Thread(target=claim)
        thread.start()
        try:
            time.sleep(0.2)
            # Longer than the fast path keeps an entry without new packets.
            assert [
                scene.near.echoes(scene.far.ipv4, tries=1, timeout=patience(2)) for _ in range(8)
            ] == [True] * 8
        finally:
            stop.set()
            thread.join()
        assert _learned(near_host, scene) <= {scene.lab.hosts[1].address}


def test_what_an_outsider_taught_is_forgotten(scene: Scene) -> None:
    """When the rules were removed, the next refresh restores them, and the one after it removes
    what the device learned from other senders meanwhile.
    """
    first, second = scene.lab.hosts[:2]
    first.run("nft", "flush", "ruleset")
    with attacker(scene, "host") as send:
        send(scene.moving(), str(first.address))
        eventually("learned", lambda: scene.outsider.address in _learned(first, scene))
    first.refresh()
    assert _learned(first, scene) <= {second.address}
    assert scene.near.echoes(scene.far.ipv4)
    assert guard_rules.NAME in first.run("nft", "list", "tables")


def test_a_place_that_the_card_has_heard_stays() -> None:
    """Without any rule, frames that do not pass the NIC do not replace what it has just learned
    from a peer: packets go on to that peer.
    """
    with lab(3) as made:
        network = a_network()
        near, far = (host.container(network, 2 + n) for n, host in enumerate(made.hosts[:2]))
        scene = Scene(made, network, near, far)
        scene.mesh()
        assert near.echoes(far.ipv4)
        host = made.hosts[0]
        host.run("nft", "delete", "table", "inet", guard_rules.NAME)
        with alien(host) as namespace, in_netns(namespace, _socket) as taking:
            until = time.monotonic() + 3
            while time.monotonic() < until:
                _send(taking, scene.moving(), str(host.address))
                time.sleep(0.01)
            assert [near.echoes(far.ipv4, tries=1, timeout=patience(2)) for _ in range(4)] == [
                True
            ] * 4


@pytest.mark.parametrize("change", ["chain", "rule", "element", "table"])
def test_rules_that_somebody_changes_come_back(change: str) -> None:
    """Whatever part of the table is removed, the next refresh restores it, and rules of other
    programs stay.
    """
    with lab(2) as made:
        network = a_network()
        near = made.hosts[0].container(network, 2)
        made.hosts[1].container(network, 3)
        made.mesh(network)
        host = near.host
        host.run("nft", "add table inet mine; add chain inet mine c")
        before = _rules(host)
        host.run(
            "nft",
            {
                "chain": f"flush chain inet {guard_rules.NAME} strangers",
                "rule": f"insert rule inet {guard_rules.NAME} strangers accept",
                "element": f"add element inet {guard_rules.NAME} peers4 {{ 4799 . 10.1.0.3 }}",
                "table": f"delete table inet {guard_rules.NAME}",
            }[change],
        )
        assert _rules(host) != before
        eventually("back", lambda: host.refresh() and _rules(host) == before)
        assert "table inet mine" in host.run("nft", "list", "tables")


def test_hosts_come_and_go() -> None:
    """A new peer is admitted at once, a former peer is not, and two networks on one port have the
    peers of both.
    """
    with lab(3) as made:
        one, two = a_network(1), a_network(2)
        first, second, third = made.hosts
        near, far = first.container(one, 2), second.container(one, 3)
        near2, far2 = first.container(two, 4), third.container(two, 5)
        for host, other, network in (
            (first, second, one),
            (second, first, one),
            (third, first, two),
        ):
            host.set_peers(network, other)
        first.set_peers(two)
        assert near.echoes(far.ipv4)
        assert not near2.echoes(far2.ipv4, tries=1)
        first.set_peers(two, third)
        assert near2.echoes(far2.ipv4)
        assert near.echoes(far.ipv4)
        assert first.do(first.kernel.guarded).ports == (4799,)
        first.set_peers(two)
        assert not far2.echoes(near2.ipv4, tries=1)
        assert near.echoes(far.ipv4)


def test_they_outlive_the_plugin() -> None:
    """While no plugin runs, the rules stay, and a plugin that starts keeps them until it knows the
    peers itself.
    """
    with lab(3) as made:
        network = a_network()
        near, far = made.hosts[0].container(network, 2), made.hosts[1].container(network, 3)
        made.mesh(network)
        host = made.hosts[0]
        before = _rules(host)
        host.kernel.close()
        host._kernels.remove(host.kernel)
        assert _rules(host) == before
        host.kernel = host.new_kernel()
        host.do(host.kernel.prepare)
        host.do(lambda: host.kernel.attach(network, near.endpoint))
        host.refresh()
        assert host.do(host.kernel.guarded).ports == (4799,)
        assert near.echoes(far.ipv4)
        host.set_peers(network, made.hosts[1])
        assert "10.1.0.3" not in _rules(host)
        assert near.echoes(far.ipv4)


def test_nothing_is_cut_off_while_peers_are_unknown() -> None:
    """A port is not guarded, and status says so, before all peers of its networks are known."""
    with lab(2) as made:
        network = a_network()
        near, far = (host.container(network, 2 + n) for n, host in enumerate(made.hosts))
        made.hosts[1].set_peers(network, made.hosts[0])
        made.hosts[0].refresh()
        said = made.hosts[0].do(made.hosts[0].kernel.guarded)
        assert (said.ports, "aren't known yet" in said.reason) == ((), True)
        assert far.echoes(near.ipv4)


def test_who_was_turned_away_is_said(scene: Scene) -> None:
    """Status lists addresses that have sent to the port and are no peers."""
    with attacker(scene, "host") as send:
        send(scene.moving(), str(scene.lab.hosts[0].address))
    host = scene.lab.hosts[0]
    eventually("listed", lambda: scene.outsider.address in host.do(host.kernel.guarded).strangers)


@pytest.mark.parametrize("own", [True, False])
def test_the_session_port_is_no_containers(own: bool) -> None:
    """A container that gets its host's address by masquerading, or an unprivileged user, does not
    reach the port of another host's router; the host's root does, and containers reach other ports
    of that host. So it is also where the hosts share a network of another driver only.
    """
    with lab(2) as made:
        network = a_network()
        for host in made.hosts:
            host.sessions = SESSIONS
            host.kernel = host.new_kernel()
        for n, host in enumerate(made.hosts if own else ()):
            host.container(network, 2 + n)
        host, peer = made.hosts
        if own:
            made.mesh(network)
        else:
            host.do(lambda: host.kernel.set_routers(frozenset({peer.address})))
            host.do(host.kernel.refresh)
        listeners = [
            peer.do(lambda p=port: socket.create_server((str(peer.address), p)))  # type: ignore[misc]
            for port in (SESSIONS, SESSIONS + 1)
        ]
        to = str(peer.address)
        with alien(host) as namespace:
            assert not in_netns(namespace, lambda: _reaches(to, SESSIONS))
            assert in_netns(namespace, lambda: _reaches(to, SESSIONS + 1))
        assert host.do(lambda: _reaches(to, SESSIONS))
        program = f"import os, socket, encodings.idna; os.setuid(65534); socket.create_connection(('{to}', {SESSIONS}), 1)"
        with pytest.raises(AssertionError, match=r"PermissionError|TimeoutError|timed out"):
            host.run(sys.executable, "-c", program)
        for listener in listeners:
            listener.close()
        if not own:
            host.do(lambda: host.kernel.set_routers(frozenset()))
            host.do(host.kernel.refresh)
            assert guard_rules.NAME not in host.run("nft", "list", "tables")


def test_ipv6_underlay() -> None:
    """The same rules hold over an IPv6 underlay."""
    with lab(3, ipv6_underlay=True) as made:
        network = a_network(mtu=1430)
        near, far = (host.container(network, 2 + n) for n, host in enumerate(made.hosts[:2]))
        scene = Scene(made, network, near, far)
        scene.mesh()
        assert near.echoes(far.ipv4)
        listening = far.packets()

        def shout() -> None:
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as made_:
                made_.setsockopt(socket.IPPROTO_UDP, 101, 1)  # UDP_NO_CHECK6_TX
                for _ in range(3):
                    _send(made_, scene.forged(far), str(made.hosts[1].address))

        made.hosts[2].do(shout)
        made.hosts[0].do(shout)
        assert not [frame for frame in _all(listening) if FORGED in frame]


def test_another_address_than_the_swarm_lists() -> None:
    """Hosts whose overlay has another address than Docker advertises (UNDERLAY, --data-path-addr)
    reach each other; a host in none of that interface's networks does not, and neither does a
    container.
    """
    with lab(3) as made:
        network = a_network()
        lists = {}
        for host in made.hosts:
            lists[host] = IPv4Address(f"10.2.0.{host.number}")
            if host is not made.hosts[2]:
                host.run("ip", "addr", "add", f"{lists[host]}/24", "dev", "eth0")
        made.hosts[2].run("ip", "addr", "flush", "dev", "eth0")
        made.hosts[2].run("ip", "addr", "add", "10.3.0.3/24", "dev", "eth0")
        made.hosts[2].run("ip", "route", "add", "10.1.0.0/24", "dev", "eth0")
        for host in made.hosts[:2]:
            host.listed = lists[host]
            host.kernel = host.new_kernel()
            host.run("ip", "route", "add", "10.3.0.0/24", "dev", "eth0")
        near, far = (host.container(network, 2 + n) for n, host in enumerate(made.hosts[:2]))
        for host, other in (made.hosts[:2], made.hosts[1::-1]):
            host.do(lambda h=host, o=other: h.kernel.set_peers(network.id, [lists[o]]))  # type: ignore[misc]
            host.refresh()
        assert near.echoes(far.ipv4)
        scene = Scene(made, network, near, far)
        listening = far.packets()
        with attacker(scene, "host") as send:
            send(scene.forged(far), str(made.hosts[1].address))
        with attacker(scene, "container") as send:
            send(scene.forged(far), str(made.hosts[1].address))
        assert not [frame for frame in _all(listening) if FORGED in frame]
        assert near.echoes(far.ipv4)


def test_cleanup_takes_the_rules_away() -> None:
    """`freeflow cleanup` leaves no rule, and neither does the removal of the last network."""
    with lab(2) as made:
        network = a_network()
        near = made.hosts[0].container(network, 2)
        made.hosts[1].container(network, 3)
        made.mesh(network)
        made.hosts[1].do(made.hosts[1].kernel.cleanup)
        assert guard_rules.NAME not in made.hosts[1].run("nft", "list", "ruleset")
        host = made.hosts[0]
        host.remove(near)
        host.do(lambda: host.kernel.remove_network(network.id))
        host.refresh()
        assert guard_rules.NAME not in host.run("nft", "list", "ruleset")


def _reaches(to: str, port: int) -> bool:
    try:
        socket.create_connection((to, port), 1.5).close()
    except OSError:
        return False
    return True


def _rules(host: KernelHost) -> str:
    return host.run("nft", "-s", "list", "table", "inet", guard_rules.NAME, check=False)


def _learned(host: KernelHost, scene: Scene) -> set[IPv4Address]:
    """The host at which the VXLAN device has the far container's address."""
    lines = host.in_overlay(
        "bridge", "fdb", "show", "dev", names.vxlan(scene.network.id)
    ).splitlines()
    return {
        IPv4Address(line.split()[line.split().index("dst") + 1])
        for line in lines
        if line.startswith(scene.far.endpoint.mac) and " dst " in line
    }


def _all(packets: socket.socket) -> list[bytes]:
    frames = []
    with contextlib.suppress(TimeoutError):
        while True:
            frames.append(packets.recv(65535))
    return frames
