"""Which connections between two containers a bridge of the host's namespace carries as they are."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from pathlib import Path
from typing import Final, TypeVar

import pytest
from pyroute2 import IPRoute

from dataplane.control import ANY_DEVICE
from dataplane.router import conntrack
from dataplane.router.bridge_netfilter import is_filtered
from dataplane.router.library_wire import Address
from dataplane.router.socket_table import LinuxSocketTable, Namespaces
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace, set_up, wait_operational
from testbed.namespace_bed import TRACKING

T = TypeVar("T")

BRIDGE: Final = "br-test"
_IP_TRANSPARENT: Final = 19
_IPV6_TRANSPARENT: Final = 75
_NODAD: Final = 2


def sysctl(*settings: str) -> None:
    """Set values of the calling thread's namespace."""
    subprocess.run(["sysctl", "-qw", *settings], check=True)


@dataclass
class BridgedHost:
    """A host's namespace with a bridge, and three containers on it: a is .2, b is .3, c is .4."""

    namespace: int = field(default_factory=new_namespace)
    containers: dict[str, int] = field(default_factory=dict)

    def inside(self, function: Callable[[], T]) -> T:
        return in_netns(self.namespace, function)

    def build(self) -> None:
        def bridge() -> None:
            with IPRoute() as route:
                route.link("add", ifname=BRIDGE, kind="bridge")
                index = route.link_lookup(ifname=BRIDGE)[0]
                route.addr("add", index=index, address="10.66.0.1", prefixlen=24)
                route.addr("add", index=index, address="fd66::1", prefixlen=64, flags=_NODAD)
                for one in (index, route.link_lookup(ifname="lo")[0]):
                    route.link("set", index=one, state="up")

        self.inside(bridge)
        for number, name in enumerate("abc", start=2):
            self.containers[name] = new_namespace()
            self.inside(lambda n=name, at=number: self._plug(n, at))  # type: ignore[misc]

    def _plug(self, name: str, number: int) -> None:
        namespace = self.containers[name]
        with IPRoute() as route:
            route.link(
                "add",
                ifname=f"v{name}",
                kind="veth",
                peer={"ifname": "eth0", "net_ns_fd": namespace},
            )
            index = route.link_lookup(ifname=f"v{name}")[0]
            bridge = route.link_lookup(ifname=BRIDGE)[0]
            route.link("set", index=index, master=bridge, state="up")
        addresses = (IPv4Interface(f"10.66.0.{number}/24"), IPv6Interface(f"fd66::{number}/64"))
        in_netns(namespace, lambda: set_up("eth0", *addresses))
        wait_operational(f"v{name}")

    def netfilter(self, *, on: bool) -> None:
        """Let netfilter see the bridge's packets, and track connections."""
        value = int(on)
        self.inside(
            lambda: sysctl(
                f"net.bridge.bridge-nf-call-iptables={value}",
                f"net.bridge.bridge-nf-call-ip6tables={value}",
            )
        )

    def nft(self, rules: str) -> None:
        self.inside(lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True))

    def carries(
        self, one: Address, other: Address, bridge: str = BRIDGE, *, trusted: bool = False
    ) -> tuple[bool, bool]:
        """The answer for a connection's addresses as each end has them."""

        def ask() -> tuple[bool, bool]:
            namespaces = Namespaces(lambda _: None, time.monotonic)
            table = LinuxSocketTable(namespaces)
            try:
                return (
                    table.is_carried(bridge, one, other, trusted=trusted),
                    table.is_carried(bridge, other, one, trusted=trusted),
                )
            finally:
                namespaces.close()

        return self.inside(ask)

    @contextlib.contextmanager
    def connection(self, target: str = "10.66.0.3", server: str = "b") -> Iterator[socket.socket]:
        """A connection of a's, that a server in another container answers."""
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        listener = in_netns(self.containers[server], lambda: socket.socket(family))
        with listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("", 80))
            listener.listen()
            client = in_netns(
                self.containers["a"], lambda: socket.create_connection((target, 80), 5)
            )
            accepted, _ = listener.accept()
            with client, accepted:
                # An answer that carries data: conntrack has seen both directions.
                accepted.sendall(b"x")
                assert client.recv(1) == b"x"
                yield client

    def close(self) -> None:
        for namespace in (self.namespace, *self.containers.values()):
            os.close(namespace)


@pytest.fixture
def host() -> Iterator[BridgedHost]:
    if not Path("/proc/sys/net/bridge").exists():
        pytest.skip("needs br_netfilter")
    made = BridgedHost()
    made.build()
    made.nft(TRACKING)
    made.netfilter(on=True)
    yield made
    made.close()


def ends(client: socket.socket) -> tuple[Address, Address]:
    local, remote = client.getsockname(), client.getpeername()
    return (
        Address(ip_address(local[0]), local[1]),
        Address(ip_address(remote[0]), remote[1]),
    )


@pytest.mark.parametrize("target", ["10.66.0.3", "fd66::3"])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_connection_that_passes(host: BridgedHost, target: str, filtered: bool) -> None:
    """A connection that the firewall lets through is carried, and one that netfilter never sees."""
    host.netfilter(on=filtered)
    with host.connection(target) as client:
        assert host.carries(*ends(client)) == (True, True)


def test_a_bridge_with_its_own_setting(host: BridgedHost) -> None:
    """Netfilter sees the packets of a bridge whose own setting is on, whatever the namespace's
    is.
    """
    host.netfilter(on=False)
    settings = host.inside(lambda: [is_filtered(BRIDGE, version) for version in (4, 6)])
    assert settings == [False, False]
    host.inside(
        lambda: subprocess.run(
            ["ip", "link", "set", BRIDGE, "type", "bridge", "nf_call_iptables", "1"], check=True
        )
    )
    settings = host.inside(lambda: [is_filtered(BRIDGE, version) for version in (4, 6)])
    assert settings == [True, False]


@pytest.mark.parametrize("family", ["bridge", "netdev"])
def test_rules_below_those_for_ip(host: BridgedHost, family: str) -> None:
    """Where rules of the families bridge or netdev may keep containers apart, only a connection
    that the rules for IP have let pass is carried.
    """
    host.nft(f"table {family} apart {{\n chain unused {{\n }}\n}}")
    with host.connection() as client:
        assert host.carries(*ends(client)) == (True, True)
    host.netfilter(on=False)
    with host.connection() as client:
        assert host.carries(*ends(client)) == (False, False)
        host.nft(f"delete table {family} apart")
        assert host.carries(*ends(client)) == (True, True)


def test_an_unknown_driver(host: BridgedHost) -> None:
    """Where nobody knows what is between two containers, the host's connection tracking must know
    the connection, unless the user vouches for the network.
    """
    for seen in (True, False):
        host.netfilter(on=seen)
        with host.connection() as client:
            assert host.carries(*ends(client), ANY_DEVICE) == (seen, seen)
            assert host.carries(*ends(client), ANY_DEVICE, trusted=True) == (True, True)


def test_addresses_of_a_namespace(host: BridgedHost) -> None:
    """A container has the addresses of its interfaces, and no others; one that is removed it has no
    more, though a connection with it stays.
    """
    namespaces = Namespaces(lambda _: None, time.monotonic)
    try:
        inode = namespaces.hold(os.dup(host.containers["a"]))
        table = LinuxSocketTable(namespaces)
        for own, other in (("10.66.0.2", "10.66.0.3"), ("fd66::2", "fd66::3")):
            assert table.has_address(inode, ip_address(own))
            assert not table.has_address(inode, ip_address(other))
        assert not table.has_address(inode, ip_address("198.51.100.1"))
        assert not table.has_address(1, ip_address("10.66.0.2"))
        with host.connection() as client:
            in_netns(
                host.containers["a"],
                lambda: subprocess.run(
                    ["ip", "address", "del", "10.66.0.2/24", "dev", "eth0"], check=True
                ),
            )
            local, remote = ends(client)
            assert table.exists(inode, local, remote)
            assert not table.has_address(inode, local.ip)
        namespaces.release(inode)
    finally:
        namespaces.close()


def test_a_namespace_whose_container_has_ended(host: BridgedHost) -> None:
    """A namespace is its container's as long as the path that the driver knows leads to it."""
    paths: dict[int, Path | None] = {}
    namespaces = Namespaces(paths.get, time.monotonic)
    try:
        table = LinuxSocketTable(namespaces)
        inode = namespaces.hold(os.dup(host.containers["a"]))
        for name, listed in (("a", True), ("b", False)):
            paths[inode] = Path(f"/proc/{os.getpid()}/fd/{host.containers[name]}")
            assert table.is_listed(inode) == listed
        for path in (None, Path("/run/there/is/none")):
            paths[inode] = path
            assert not table.is_listed(inode)
        namespaces.release(inode)
    finally:
        namespaces.close()


@pytest.mark.parametrize("family", ["10.66.0", "fd66:"])
def test_a_connection_that_does_not_exist(host: BridgedHost, family: str) -> None:
    """Where netfilter sees all packets, two sockets without packets between them aren't a
    connection: containers that the firewall keeps apart could make them.
    """
    dot = ":" if family.startswith("fd") else "."
    forged = (
        Address(ip_address(f"{family}{dot}2"), 1000),
        Address(ip_address(f"{family}{dot}3"), 2000),
    )
    assert host.carries(*forged) == (False, False)
    host.netfilter(on=False)
    assert host.carries(*forged) == (True, True)


def test_a_connection_that_the_firewall_drops(host: BridgedHost) -> None:
    """A first packet that the firewall drops makes no connection, however often it is sent."""
    host.nft("add rule inet tracking forward tcp dport 81 drop")
    client = in_netns(host.containers["a"], socket.socket)
    with client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.connect(("10.66.0.3", 81))
        local = Address(ip_address("10.66.0.2"), client.getsockname()[1])
        remote = Address(ip_address("10.66.0.3"), 81)
        assert host.carries(local, remote) == (False, False)


def test_a_connection_whose_answers_the_firewall_drops(host: BridgedHost) -> None:
    """A rule that lets the first packet pass and drops the answers makes no connection either,
    though the kernel keeps an entry of the packet, and has seen an answer.
    """
    host.nft("insert rule inet tracking forward ip saddr 10.66.0.3 drop")
    listener = in_netns(host.containers["b"], lambda: socket.create_server(("", 80)))
    client = in_netns(host.containers["a"], socket.socket)
    with listener, client:
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.connect(("10.66.0.3", 80))
        local = Address(ip_address("10.66.0.2"), client.getsockname()[1])
        remote = Address(ip_address("10.66.0.3"), 80)
        tracking = conntrack.Conntrack(host.namespace)
        entry = tracking.find(local, remote)
        tracking.close()
        assert entry is not None
        assert (entry.is_translated, entry.established) == (False, False)
        assert host.carries(local, remote) == (False, False)


def test_a_connection_that_is_translated(host: BridgedHost) -> None:
    """A connection that the host leads to another container isn't one with the container whose
    address the client sees.
    """
    # Without it br_netfilter drops what is translated.
    host.inside(lambda: sysctl("net.ipv4.ip_forward=1"))
    host.nft("""
        table ip translating {
            chain prerouting {
                type nat hook prerouting priority -100
                ip daddr 10.66.0.3 tcp dport 80 dnat to 10.66.0.4
            }
        }
    """)
    with host.connection("10.66.0.3", server="c") as client:
        assert host.carries(*ends(client)) == (False, False)
        host.netfilter(on=False)
        assert host.carries(*ends(client)) == (False, False)


def test_a_published_port_without_a_new_source(host: BridgedHost) -> None:
    """A client that reaches a server by a port of the host, and by the server's address from the
    same port, has two connections. Their sockets' addresses fit crosswise, and no two are a pair.
    """
    host.inside(lambda: sysctl("net.ipv4.ip_forward=1"))
    host.nft("""
        table ip publishing {
            chain prerouting {
                type nat hook prerouting priority -100
                ip daddr 10.66.0.1 tcp dport 8080 dnat to 10.66.0.3:80
            }
        }
    """)
    # As Docker sets it without docker-proxy: the bridge sends packets back where they came from.
    for name in "ab":
        host.inside(
            lambda n=name: subprocess.run(  # type: ignore[misc]
                ["bridge", "link", "set", "dev", f"v{n}", "hairpin", "on"], check=True
            )
        )

    def dial(port: int, target: tuple[str, int]) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("10.66.0.2", port))
        made.settimeout(5)
        made.connect(target)
        return made

    listener = in_netns(host.containers["b"], lambda: socket.create_server(("", 80)))
    with listener:
        a = host.containers["a"]
        with in_netns(a, lambda: dial(0, ("10.66.0.1", 8080))) as published:
            first, seen = listener.accept()
            assert seen == published.getsockname()
            with first, in_netns(a, lambda: dial(seen[1], ("10.66.0.3", 80))) as direct:
                second, other = listener.accept()
                with second:
                    # The mirror image of `direct` is `first`, which is connected with `published`.
                    assert other != seen
                    assert first.getpeername() == direct.getsockname()
                    assert host.carries(*ends(direct)) == (False, False)


def test_a_container_that_translates(host: BridgedHost) -> None:
    """What rules of a container's own namespace do with its connections is noticed there."""
    rules = """
        table ip own {
            chain output {
                type nat hook output priority -100
                ip daddr 10.66.0.3 tcp dport 80 dnat to 10.66.0.4
            }
        }
    """
    namespaces = Namespaces(lambda _: None, time.monotonic)
    try:
        inode = namespaces.hold(os.dup(host.containers["a"]))
        table = LinuxSocketTable(namespaces)
        with host.connection() as client:
            assert not table.is_translated(inode, *ends(client))
        in_netns(
            host.containers["a"],
            lambda: subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True),
        )
        with host.connection(server="c") as client:
            assert table.is_translated(inode, *ends(client))
        namespaces.release(inode)
    finally:
        namespaces.close()


def test_a_kernel_that_does_not_tell(host: BridgedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer about translations no connection counts as untranslated, whether netfilter
    sees the bridge's packets or not.
    """
    # A kernel without nf_conntrack_netlink knows no such message either.
    monkeypatch.setattr(conntrack, "_GET", 0x1F << 8 | 1)
    namespaces = Namespaces(lambda _: None, time.monotonic)
    try:
        inode = namespaces.hold(os.dup(host.containers["a"]))
        for filtered in (True, False):
            host.netfilter(on=filtered)
            with host.connection() as client:
                assert host.carries(*ends(client)) == (False, False)
                assert host.carries(*ends(client), trusted=True) == (False, False)
                assert LinuxSocketTable(namespaces).is_translated(inode, *ends(client))
        namespaces.release(inode)
    finally:
        namespaces.close()


@pytest.mark.parametrize("target", ["10.66.0.3", "fd66::3"])
def test_a_proxy_of_the_host(host: BridgedHost, target: str) -> None:
    """A program of the host that speaks with a container in another's name is between the two."""
    wide = ":" in target
    with host.connection(target) as client:
        local, remote = ends(client)

        def take_over() -> socket.socket:
            made = socket.socket(socket.AF_INET6 if wide else socket.AF_INET)
            level = socket.IPPROTO_IPV6 if wide else socket.IPPROTO_IP
            made.setsockopt(level, _IPV6_TRANSPARENT if wide else _IP_TRANSPARENT, 1)
            made.setblocking(False)
            made.bind((str(local.ip), local.port))
            with contextlib.suppress(BlockingIOError):
                made.connect((str(remote.ip), remote.port))
            return made

        with host.inside(take_over):
            assert host.carries(local, remote) == (False, False)
        assert host.carries(local, remote) == (True, True)
