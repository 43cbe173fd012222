"""Counters of TCP connections by sock_diag: what they say, and what reading them costs."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from dataplane.router.library_wire import Address
from dataplane.router.seams import SocketEnd
from dataplane.router.socket_table import AT_ONCE, Diag, diag_in
from dataplane.router.tcp_counters import INFO_WANTED

SO_COOKIE = 57


@pytest.fixture
def diag() -> Iterator[Diag]:
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    made = diag_in(namespace)
    os.close(namespace)
    yield made
    made.close()


@contextlib.contextmanager
def connections(count: int) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connections over loopback: client and server."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        made: list[tuple[socket.socket, socket.socket]] = []
        try:
            for _ in range(count):
                client = socket.create_connection(listener.getsockname()[:2])
                made.append((client, listener.accept()[0]))
            yield made
        finally:
            for client, server in made:
                client.close()
                server.close()


def end(connected: socket.socket) -> SocketEnd:
    local, remote = connected.getsockname(), connected.getpeername()
    cookie = int.from_bytes(connected.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
    return (
        Address(ip_address(local[0]), local[1]),
        Address(ip_address(remote[0]), remote[1]),
        cookie,
    )


def test_what_they_count(diag: Diag) -> None:
    """Segments with data and bytes are counted in each direction, those without data are not."""
    with connections(3) as made:
        client, server = made[0]
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(10):
            client.sendall(b"x" * 100)
            assert len(server.recv(1000)) == 100
        server.sendall(b"y" * 7)
        client.recv(100)
        ends = [end(client), end(server), end(made[1][0])]
        one, other, quiet = diag.counters(ends)
        assert one is not None
        assert other is not None
        assert one.segment > 500
        assert one[:4] == (1, 10, 7, 1000)
        assert other[:4] == (10, 1, 1000, 7)
        assert quiet is not None
        assert quiet[:4] == (0, 0, 0, 0)


def test_a_socket_that_is_gone(diag: Diag) -> None:
    """A closed socket has no counters, nor has another one with its addresses; the rest do."""
    with connections(3) as made:
        ends = [end(client) for client, _ in made]
        made[1][0].close()
        local, remote, cookie = ends[2]
        first, gone, wrong = diag.counters([ends[0], ends[1], (local, remote, cookie + 1)])
        assert first is not None
        assert gone is None
        assert wrong is None


def test_a_list_with_counters(diag: Diag) -> None:
    """A list of all connections has the same counters as each alone, or none if none are wanted."""
    with connections(2) as made:
        client, server = made[0]
        client.sendall(b"x" * 100)
        assert len(server.recv(1000)) == 100
        _, _, cookie = end(client)
        found = {each.cookie: each.counters for each in diag.connected(INFO_WANTED) if each}
        assert found[cookie] == diag.counters([end(client)])[0]
        counters = found[cookie]
        assert counters is not None
        assert counters[:4] == (0, 1, 0, 100)
        assert counters.retransmits == 0
        assert 0 < counters.round_trip < 1_000_000
        assert {each.counters for each in diag.connected() if each} == {None}


class Counted:
    """A netlink socket that counts its calls."""

    def __init__(self, inner: socket.socket) -> None:
        self.inner = inner
        self.calls = 0

    def send(self, data: bytes) -> int:
        self.calls += 1
        return self.inner.send(data)

    def recv(self, size: int) -> bytes:
        self.calls += 1
        return self.inner.recv(size)

    def close(self) -> None:
        self.inner.close()


def test_what_they_cost(diag: Diag) -> None:
    """A socket costs one system call and its share of another, with a thousand as with ten
    thousand.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(12_000, before[1]), before[1]))
    counted = Counted(diag._netlink._socket)
    diag._netlink._socket = counted  # type: ignore[assignment]
    seconds = {}
    try:
        with connections(5_000) as made:
            ends = [end(one) for both in made for one in both]
            for count in (1_000, 10_000):
                counted.calls = 0
                began = time.thread_time()
                for at in range(0, count, AT_ONCE):
                    found = diag.counters(ends[at : min(at + AT_ONCE, count)])
                    assert None not in found
                seconds[count] = time.thread_time() - began
                assert counted.calls <= count * (1 + 1 / AT_ONCE) + 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    print({count: f"{1e6 * spent / count:.1f} us each" for count, spent in seconds.items()})
    assert seconds[10_000] / 10_000 <= 3 * seconds[1_000] / 1_000
