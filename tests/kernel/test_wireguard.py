"""Encrypted networks over real WireGuard: no byte of a container is on the underlay in the clear,
whatever happens, and a stream loses nothing.

The machine's own kernel may have no WireGuard; `tests/vm/test_kernels.py` runs this in virtual
machines. The hosts are namespaces, so the underlay is captured from outside of them. The order
matters: the first test needs hosts that know nothing of each other, and the last one sends in the
clear.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import pytest
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver import names
from driver.inner_addresses import inner_address
from driver.kernel.namespace import CLONE_NEWNET, ENCRYPTION_PIN, check, in_netns, libc
from driver.model import EncryptedPeer, IPAddress
from testbed.kernel_hosts import (
    RUN,
    TCP_PORT,
    Container,
    KernelHost,
    Lab,
    a_network,
    eventually,
    lab,
)
from testbed.patience import patience
from testbed.vm.capture import WireCapture

MARK: Final = b"in the clear: container."
PORT: Final = 4797
NETWORK: Final = replace(a_network(mtu=1370), encrypted=True)
_SO_RCVBUFFORCE: Final = 33
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6


def has_wireguard() -> bool:
    """Whether this machine's kernel has it."""

    def attempt() -> bool:
        check(libc.unshare(CLONE_NEWNET), "making a namespace")
        try:
            with IPRoute() as route:
                route.link("add", ifname="w", kind="wireguard")
        except NetlinkError:
            return False
        return True

    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(attempt()))
    thread.start()
    thread.join()
    return found == [True]


@pytest.fixture(scope="module", autouse=True)
def wireguard() -> None:
    if not has_wireguard():
        pytest.skip("needs a kernel with WireGuard")


@contextlib.contextmanager
def underlay(made: Lab) -> Iterator[WireCapture]:
    """Capture all frames between hosts; none is missed."""
    capture = WireCapture((MARK, *(bytes([2, 66, 10, 9, 0, number]) for number in (2, 3, 4))))
    ended = threading.Event()

    def listen() -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 26)
        opened.settimeout(0.2)
        return opened

    def read() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                frame, address = packets.recvfrom(1 << 16)
                # As it enters the bridge; it leaves by other ports.
                if address[0].startswith("u") and address[2] != socket.PACKET_OUTGOING:
                    capture.take(int(address[0][1:]), frame)

    with in_netns(made.underlay, listen) as packets:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield capture
        finally:
            ended.set()
            reader.join()
        lost = packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)[4:]
        assert lost == bytes(4), "frames that the capture has missed"


@dataclass
class EncryptedHosts:
    """Hosts with one container each on an encrypted network; no host knows another one yet."""

    made: Lab
    containers: list[Container] = field(default_factory=list)

    @property
    def hosts(self) -> list[KernelHost]:
        return self.made.hosts

    def keys(self, host: KernelHost) -> EncryptedPeer:
        """What a host's router tells its peers."""
        kernel = host.kernel.encryption
        keys = host.do(kernel.keys)
        assert keys is not None
        return EncryptedPeer(f"node{host.number}", host.address, keys, host.do(kernel.slot), PORT)

    def tell(self, *members: KernelHost) -> None:
        """Make these hosts, by default all, each other's peers, and forget others."""
        sharing = members or tuple(self.hosts)
        known = {host.number: self.keys(host) for host in sharing}
        for host in sharing:
            peers = [peer for number, peer in known.items() if number != host.number]
            inner: list[IPAddress] = [inner_address(peer.node, peer.slot) for peer in peers]
            host.do(partial(self._learn, host, peers, inner))

    @staticmethod
    def _learn(host: KernelHost, peers: list[EncryptedPeer], inner: list[IPAddress]) -> None:
        host.kernel.encryption.apply(f"node{host.number}", peers)
        host.kernel.set_peers(NETWORK.id, inner)

    def meet(self, *containers: Container) -> None:
        """Wait until containers reach each other."""
        for source in containers:
            for target in containers:
                if source is not target:
                    eventually("an answer", partial(marked, source, target), 30)


@pytest.fixture(scope="module")
def hosts() -> Iterator[EncryptedHosts]:
    """Three hosts with a container each; the same ones for all tests, because an emulated processor
    needs long to make them.
    """
    with lab(3) as made:
        encrypted = EncryptedHosts(made)
        for number, host in enumerate(made.hosts, 2):
            encrypted.containers.append(host.container(NETWORK, number))
        yield encrypted


def marked(source: Container, target: Container, size: int = 600) -> bool:
    """Whether a datagram full of marks returns."""
    data = (MARK * 60)[:size]
    with source.udp(target.ipv4, 0.5) as datagrams:
        datagrams.send(data)
        with contextlib.suppress(TimeoutError, ConnectionError):
            return datagrams.recv(65535) == data
    return False


class MarkedBytes:
    """A connection whose marked bytes flow until `end`, which checks that all have arrived."""

    def __init__(self, source: Container, target: Container) -> None:
        self._stream = source.do(
            lambda: socket.create_connection((str(target.ipv4), TCP_PORT), patience(20))
        )
        self._stream.settimeout(patience(60))
        self._ended = threading.Event()
        self._hash = hashlib.sha256()
        self._sent = 0
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        try:
            while not self._ended.wait(0.005):
                data = self._sent.to_bytes(8, "big") + MARK * 200
                self._stream.sendall(data)
                self._hash.update(data)
                self._sent += 1
        except OSError as error:
            self._failure = error

    def more(self, count: int = 20) -> None:
        """Wait until this many more pieces were sent."""
        until = self._sent + count
        eventually("more bytes", lambda: self._sent >= until or self._failure, 60)

    def end(self) -> None:
        self._ended.set()
        self._thread.join()
        assert self._failure is None
        with self._stream:
            self._stream.shutdown(socket.SHUT_WR)
            assert self._stream.recv(64) == self._hash.hexdigest().encode()


def nothing_in_the_clear(capture: WireCapture, *, some: bool = True) -> None:
    assert not capture.found, capture.found[0]
    assert capture.sent("udp/4799") == 0, capture.counts
    if some:
        assert capture.sent(f"udp/{PORT}") + capture.sent(f"udp/{PORT + 1}") > 0, capture.counts


def test_first_packets(hosts: EncryptedHosts) -> None:
    """Before a host knows its peers nothing leaves it, and afterwards all of it is encrypted, in
    packets of full size too.
    """
    one, other, _ = hosts.containers
    with underlay(hosts.made) as capture:
        assert not marked(one, other)
        nothing_in_the_clear(capture, some=False)
        hosts.tell()
        hosts.meet(one, other)
        # UDP and IPv4 take 28 bytes of the MTU.
        assert marked(other, one, NETWORK.mtu - 28)
        assert one.pings(other.ipv6)
    nothing_in_the_clear(capture)


def test_keys_change_under_load(hosts: EncryptedHosts) -> None:
    """While the hosts change to their standby keys and replace the former ones, twice, a stream
    loses nothing.
    """
    one, other, _ = hosts.containers
    with underlay(hosts.made) as capture:
        hosts.tell()
        hosts.meet(one, other)
        before = {key for host in hosts.hosts for key in hosts.keys(host).keys}
        stream = MarkedBytes(one, other)
        for slot in (1, 0):
            for host in hosts.hosts:
                host.do(partial(host.kernel.encryption.activate, slot))
                hosts.tell()
                stream.more()
            for host in hosts.hosts:
                host.do(partial(host.kernel.encryption.renew, 1 - slot, os.urandom(32)))
                hosts.tell()
                stream.more()
        stream.end()
        assert before.isdisjoint(key for host in hosts.hosts for key in hosts.keys(host).keys)
        hosts.meet(one, other)
    nothing_in_the_clear(capture)


def test_a_plugin_restarts_under_load(hosts: EncryptedHosts) -> None:
    """A plugin that starts again keeps keys and peers, and a stream does not notice."""
    one, other, _ = hosts.containers
    host = hosts.hosts[1]
    with underlay(hosts.made) as capture:
        hosts.tell()
        hosts.meet(one, other)
        before = hosts.keys(host)
        stream = MarkedBytes(one, other)
        host.kernel = host.new_kernel()
        stream.more()
        host.do(lambda: host.kernel.attach(NETWORK, other.endpoint))
        hosts.tell()
        stream.more()
        stream.end()
        assert hosts.keys(host) == before
    nothing_in_the_clear(capture)


def test_a_node_leaves_under_load(hosts: EncryptedHosts) -> None:
    """A node that has left reaches nobody and gets nothing, and a stream between the others loses
    nothing.
    """
    one, two, gone = hosts.containers
    with underlay(hosts.made) as capture:
        hosts.tell()
        hosts.meet(one, two, gone)
        stream = MarkedBytes(one, two)
        stream.more()
        hosts.tell(*hosts.hosts[:2])
        stream.more()
        assert not marked(gone, one)
        assert not marked(one, gone)
        stream.end()
        hosts.tell()
        hosts.meet(one, two, gone)
    nothing_in_the_clear(capture)


def test_a_host_begins_anew(hosts: EncryptedHosts) -> None:
    """A host whose devices are gone, as after a reboot, sends nothing until it has new ones, and is
    reached by its new keys; the others' stream does not notice.
    """
    one, two, new = hosts.containers
    host = hosts.hosts[2]
    with underlay(hosts.made) as capture:
        hosts.tell()
        hosts.meet(one, two, new)
        before = hosts.keys(host)
        stream = MarkedBytes(one, two)
        for slot in (0, 1):
            device = names.wireguard(slot)
            host.run("nsenter", f"--net={RUN / ENCRYPTION_PIN}", "ip", "link", "del", device)
        assert not marked(new, one)
        host.do(host.kernel.encryption.make)
        assert set(hosts.keys(host).keys).isdisjoint(before.keys)
        hosts.tell()
        hosts.meet(one, two, new)
        stream.end()
    nothing_in_the_clear(capture)


def test_a_capture_finds_what_is_in_the_clear(hosts: EncryptedHosts) -> None:
    """The same capture finds the mark on a network that is not encrypted."""
    plain = a_network(2)
    one, other = (host.container(plain, 7 + host.number) for host in hosts.hosts[:2])
    with underlay(hosts.made) as capture:
        hosts.made.mesh(plain)
        eventually("an answer", lambda: marked(one, other), 30)
        eventually("its frames", lambda: capture.found, 10)
    assert capture.sent("udp/4799") > 0
