"""The real router of a host full of processes and connections: it keeps up, and frees
everything.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.control import Limits, RouterSettings
from dataplane.router import library_wire as wire
from testbed.namespace_bed import BedContainer, NamespaceBed, bed
from testbed.patience import patience, within
from tests.dataplane.library import SO_COOKIE, Library, addresses_of

PROCESSES = 1000
CONNECTIONS = 10_000
PER_PAIR = CONNECTIONS // (PROCESSES // 2)
NEEDED = CONNECTIONS + 6 * PROCESSES


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Allow enough descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (NEEDED, max(NEEDED, before[1])))
    except (OSError, ValueError):
        pytest.skip(f"needs {NEEDED} descriptors, and may have {before[1]}")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def cpu_seconds(made: NamespaceBed) -> float:
    """CPU time of the router so far."""
    assert made.process is not None
    fields = Path(f"/proc/{made.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(made: NamespaceBed) -> int:
    """Bytes of the router's memory."""
    assert made.process is not None
    pages = int(Path(f"/proc/{made.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


SERVER = f"""
import socket, sys
listener = socket.create_server(("0.0.0.0", 7700), backlog=4096)
print("listens", flush=True)
kept = [listener.accept() for _ in range({CONNECTIONS})]
for connection, peer in kept:
    cookie = int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, {SO_COOKIE}, 8), "little")
    print(cookie, peer[1], flush=True)
sys.stdin.read()
"""
"""Holds the servers' ends: no process may have the descriptors of both."""


def connections(a: BedContainer, b: BedContainer) -> list[tuple[socket.socket, int]]:
    """Many real connections from one container to the other: the client's end and the server's
    cookie.
    """
    server = b.popen(
        [sys.executable, "-c", SERVER],
        accelerated=False,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "listens\n"
    address = (str(b.ipv4), 7700)
    clients = a.do(
        lambda: [
            socket.create_connection(address, timeout=patience(10)) for _ in range(CONNECTIONS)
        ]
    )
    lines = (server.stdout.readline().split() for _ in clients)
    cookies = {int(port): int(cookie) for cookie, port in lines}
    return [(client, cookies[client.getsockname()[1]]) for client in clients]


def processes(made: NamespaceBed, container: BedContainer) -> list[Library]:
    path = made.shared / "router.sock"

    def connect() -> list[Library]:
        return [Library.connect(path, None) for _ in range(PROCESSES // 2)]

    found = container.do(connect)
    for library in found:
        library.hear(wire.Welcome)
    return found


def granted(library: Library) -> tuple[int, int]:
    """Arena and slot of a grant; the memory is closed."""
    grant, memory = library.hear(wire.Grant)
    assert memory is not None
    os.close(memory)
    library.received.remove(memory)
    return grant.arena, grant.slot


def test_a_full_host(descriptors: None) -> None:
    """A thousand processes upgrade ten thousand connections; then the router idles, and in the end
    it has freed everything.
    """
    limits = Limits(asks=100_000, messages=1 << 20)
    with bed("a", "b", settings=RouterSettings(limits=limits)) as made:
        a, b = made.containers.values()
        ends = connections(a, b)
        clients, servers = processes(made, a), processes(made, b)
        before = cpu_seconds(made)
        for number, (client, cookie) in enumerate(ends):
            pair = number // PER_PAIR
            clients[pair].ask(client)
            local, remote = addresses_of(client)
            servers[pair].say(wire.Request(number, cookie, remote, local))
            assert granted(clients[pair]) == granted(servers[pair])
        spent = cpu_seconds(made) - before
        found = made.router.statistics()
        assert (found.processes, found.connections, found.waiting) == (PROCESSES, CONNECTIONS, 0)
        # A pair of connections of one process pair shares an arena: a descriptor each, not one per
        # connection.
        assert found.arenas == PROCESSES // 2
        assert spent / CONNECTIONS < 0.001
        assert resident(made) < 200 << 20
        time.sleep(1.1)
        idle = cpu_seconds(made)
        time.sleep(2)
        assert cpu_seconds(made) - idle < 0.2
        begin = time.monotonic()
        listed = made.router.connections().connections
        assert time.monotonic() - begin < within(5)
        assert len(listed) == 2 * CONNECTIONS
        assert {each.path for each in listed} == {"shm"}
        for library in (*clients, *servers):
            library.discard()
        deadline = time.monotonic() + patience(10)
        while made.router.statistics().processes or made.router.statistics().arenas:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for client, _ in ends:
            client.close()
        print(f"CPU per upgrade {spent / CONNECTIONS * 1e6:.0f} µs, {resident(made) >> 20} MiB")
