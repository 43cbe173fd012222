"""Routers and containers of two guests: the library within a host, and what is between hosts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import pytest

from dataplane.control import Connection
from tests.dataplane.places import LIBRARY
from tests.testbed.process import wait_until
from tests.testbed.vm import Guest
from tests.vm.cluster import Container, Host, cluster

REDIS = ("redis-server", "--protected-mode", "no", "--save", "", "--port", "6379")

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason=f"missing: {LIBRARY} (make library)")


@pytest.fixture(scope="module")
def hosts(pair: list[Guest]) -> Iterator[list[Host]]:
    with cluster(pair, containers=2, library=LIBRARY) as made:
        yield made


def held(host: Host, container: Container, path: str) -> list[Connection]:
    """Connections of a container that are on a path now."""
    found = host.router.connections(container.inode).connections
    return [each for each in found if each.path == path]


def test_a_connection_within_a_guest_moves_to_shared_memory(hosts: list[Host]) -> None:
    """redis between two containers of one guest: byte for byte, and on `shm`."""
    host = hosts[0]
    client, server = host.containers
    started = server.start(REDIS)
    server.wait_listening(6379)
    content = random.Random(7).randbytes(200_000)
    commands = b"".join(
        b"*3\r\n$3\r\nSET\r\n$4\r\nk%03d\r\n$%d\r\n%b\r\n" % (i, len(content), content)
        for i in range(10)
    )
    address = str(server.ipv4)
    said = client.run(["redis-cli", "-h", address, "--pipe"], stdin=commands).stdout
    assert "errors: 0, replies: 10" in said
    got = client.run(
        ["sh", "-c", f"redis-cli -h {address} --raw get k009 | head -c {len(content)} | sha256sum"]
    )
    assert got.stdout.split()[0] == hashlib.sha256(content).hexdigest()
    bench = client.start(
        ["redis-benchmark", "-h", address, "-t", "set", "-c", "4", "-n", "1000000", "-q"]
    )
    wait_until("connections on shm", lambda: len(held(host, client, "shm")) >= 4, 60)
    bench.kill()
    started.kill()


def test_the_containers_of_two_guests_reach_each_other(hosts: list[Host]) -> None:
    """Over the overlay, with frames of full size, whatever their routers say to each other."""
    one, other = hosts
    client, server = one.containers[0], other.containers[0]
    started = server.start(["iperf3", "-s", "-1"])
    server.wait_listening(5201)
    client.run(["iperf3", "-c", str(server.ipv4), "-n", "5M"])
    assert started.wait() == 0
    client.run(["ping", "-c", "1", "-M", "do", "-s", "4000", str(server.ipv6)], accelerated=False)


def test_a_router_that_crashed_is_another_one(hosts: list[Host]) -> None:
    """After `kill_router` and `start_router`, connections are upgraded again."""
    host = hosts[1]
    host.kill_router()
    host.start_router()
    client, server = host.containers
    started = server.start(REDIS)
    server.wait_listening(6379)
    bench = client.start(
        ["redis-benchmark", "-h", str(server.ipv4), "-t", "set", "-c", "2", "-n", "1000000", "-q"]
    )
    wait_until("connections on shm", lambda: len(held(host, client, "shm")) >= 2, 60)
    bench.kill()
    started.kill()
