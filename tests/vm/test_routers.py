"""Routers and containers of two guests: shared memory within a host, RDMA between hosts."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator

import pytest

from dataplane.control import ConnectionFact
from testbed.process import wait_until
from testbed.vm import Guest
from tests.vm.cluster import BUILT_LIBRARY, BUILT_RELAY, Container, Host, cluster

ECHO = "/src/tests/vm/programs/echo.py"
SIZE = 2_000_003
REDIS = ("redis-server", "--protected-mode", "no", "--save", "", "--port", "6379")

pytestmark = pytest.mark.skipif(
    not (BUILT_LIBRARY.exists() and BUILT_RELAY.exists()),
    reason=f"missing: {BUILT_LIBRARY} or {BUILT_RELAY} (make library relay)",
)


@pytest.fixture(scope="module")
def hosts(pair: list[Guest]) -> Iterator[list[Host]]:
    with cluster(pair, containers=2) as made:
        for host in made:
            host.wait_linked()
        yield made


def held(host: Host, container: Container, path: str) -> list[ConnectionFact]:
    """The connections of a container that are on a path now."""
    listed = host.router.connections(container.inode).connections
    return [connection for connection in listed if connection.path == path]


def redis_over(path: str, one: Host, other: Host) -> None:
    """A client and redis on two hosts, or on one, exchange the right bytes, and their connections
    move to a path.
    """
    client, server = one.containers[0], other.containers[-1]
    started = server.start(REDIS)
    server.wait_listening(6379)
    content = random.Random(7).randbytes(150_000)
    commands = b"".join(
        b"*3\r\n$3\r\nSET\r\n$4\r\nk%03d\r\n$%d\r\n%b\r\n" % (i, len(content), content)
        for i in range(8)
    )
    address = str(server.ipv4)
    said = client.run(["redis-cli", "-h", address, "--pipe"], stdin=commands).stdout
    assert "errors: 0, replies: 8" in said
    get = "redis-cli -h {} --raw get k00{} | head -c {} | sha256sum"
    gets = "; ".join(get.format(address, i, len(content)) for i in (0, 7))
    got = client.run(["sh", "-c", gets]).stdout.split()[::2]
    assert got == [hashlib.sha256(content).hexdigest()] * 2
    # Fifty requests a second each, because more would leave an emulated processor no time.
    asking = ["redis-cli", "-h", address, "-r", "-1", "-i", "0.02", "incr", "asked"]
    running = [client.start(asking) for _ in range(4)]

    def moved() -> bool:
        return all(len(held(h, c, path)) >= 4 for h, c in ((one, client), (other, server)))

    wait_until(f"connections on {path}", moved, 150)
    for process in [*running, started]:
        process.kill()


def test_redis_within_a_guest_moves_to_shared_memory(hosts: list[Host]) -> None:
    """Within a host, bytes arrive unchanged over `shm`."""
    redis_over("shm", hosts[0], hosts[0])


def moved_bytes(host: Host) -> tuple[int, int]:
    """The bytes that a host's relay has sent and received; nothing was broken."""
    rdma = host.router.statistics().rdma
    assert rdma is not None
    assert (rdma.broken, rdma.relay.get("corrupt", 0)) == (0, 0)
    return rdma.relay.get("bytes_out", 0), rdma.relay.get("bytes_in", 0)


def moved_since(host: Host, before: tuple[int, int], size: int) -> bool:
    """Whether a host's relay has moved this many bytes in each direction."""
    return all(now - then >= size for now, then in zip(moved_bytes(host), before, strict=True))


def settled(host: Host) -> tuple[int, int]:
    """The same count, once it includes earlier connections: relays report once a second."""
    last = moved_bytes(host)
    for _ in range(30):
        time.sleep(1.5)
        now = moved_bytes(host)
        if now == last:
            return now
        last = now
    raise AssertionError(f"{host.guest.name}: its relay goes on moving bytes that nobody sends")


def test_redis_across_guests_moves_to_rdma(hosts: list[Host]) -> None:
    """Wait until a container's connections are on `rdma` at both ends."""
    redis_over("rdma", *hosts)


@pytest.mark.parametrize("version", [4, 6])
def test_what_goes_over_rdma_is_the_same(hosts: list[Host], version: int) -> None:
    """A stream in both directions at once arrives unchanged, and the relays have moved it."""
    one, other = hosts if version == 4 else hosts[::-1]
    client, server = one.containers[0], other.containers[0]
    address = str(server.ipv4 if version == 4 else server.ipv6)
    before = settled(one)
    started = server.start(["python3", ECHO, "server", address, "7200"])
    server.wait_listening(7200)
    arguments = ["client", address, "7200", str(SIZE), str(version)]
    running = client.start(["python3", ECHO, *arguments], stdin=True)
    # Its path is known a moment before its ends switch.
    wait_until(
        "the connection on rdma",
        lambda: (
            held(one, client, "rdma")
            and held(other, server, "rdma")
            and moved_since(one, before, 1)
        ),
        150,
    )
    running.write(b"now\n")
    assert running.check(150) == "the same\n"
    assert started.wait() == 0
    # Relays report once a second.
    wait_until("the bytes that the relays moved", lambda: moved_since(one, before, SIZE), 60)


def test_the_containers_of_two_guests_reach_each_other(hosts: list[Host]) -> None:
    """Frames of full size pass over the overlay, whatever the routers say to each other."""
    one, other = hosts
    client, server = one.containers[0], other.containers[0]
    started = server.start(["iperf3", "-s", "-1"])
    server.wait_listening(5201)
    client.run(["iperf3", "-c", str(server.ipv4), "-n", "5M"])
    assert started.wait() == 0
    client.run(["ping", "-c", "1", "-M", "do", "-s", "4000", str(server.ipv6)], accelerated=False)


def test_a_router_that_crashed_is_another_one(hosts: list[Host]) -> None:
    """After a router was killed and started again, connections move to shared memory and to RDMA as
    before.
    """
    host = hosts[1]
    host.kill_router()
    host.start_router()
    redis_over("shm", host, host)
    for host in hosts:
        host.wait_linked()
    redis_over("rdma", *hosts)
