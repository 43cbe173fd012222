"""Connections and queue pairs between containers of two hosts over real verbs, with ordinary
programs and every failure.

Whatever is lost, bytes are delivered or the connection fails as by a reset. It never ends as if
nothing had happened. The order matters, because the last test switches a guest off. RDMA_LONG=1
makes the torture test longer, and many connections more. The hosts are nodes of one Swarm, by their
certificates; there is no engine.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from testbed.images import TOP
from testbed.process import wait_until
from testbed.vm import Guest, Process
from tests.dataplane.places import compile_c
from tests.unit.swarm_ca import Authority
from tests.vm.cluster import BUILT_LIBRARY, BUILT_RELAY, LIBRARY, SWARM, Host, cluster
from tests.vm.ping_pongs import BUILT_VERBS, FILES, FOLDER, PingPong, queue_pairs
from tests.vm.streams import PORT, SETTINGS, Streams, linked, rdma

ECHO: Final = "/src/tests/vm/programs/echo.py"
MANY: Final = "/src/tests/dataplane/programs/many.py"
SHORT: Final = timedelta(hours=6)
"""The lifetime of the second host's first certificate: longer than any run of these tests."""
LONG: Final = bool(os.environ.get("RDMA_LONG"))

pytestmark = [
    pytest.mark.skipif(
        not (BUILT_LIBRARY.exists() and BUILT_RELAY.exists() and FILES),
        reason="missing: make library relay verbs",
    ),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def hosts(pair: list[Guest], authority: Authority) -> Iterator[list[Host]]:
    settings = msgspec.structs.replace(SETTINGS, session_key="")
    options = [f"--swarm={SWARM}"]
    with cluster(pair, settings=settings, options=options, files=FILES, routers=False) as made:
        made[0].certify(authority.root, authority.node("node1"))
        made[1].certify(authority.root, authority.node("node2", lasts=SHORT))
        for host in made:
            host.start_router()
        linked(made)
        yield made


def moves_again(hosts: list[Host]) -> None:
    """Check that new connections and queue pairs use RDMA, and that nothing is left of them or of
    others.
    """
    linked(hosts)
    PingPong(hosts, 100, "-e").check()
    assert Streams(hosts, 5, 1).ends() == ["whole"] * 2
    wait_until("no queue pairs", lambda: not queue_pairs(hosts), 60)
    for host in hosts:
        wait_until(f"{host.guest.name}: no memory", lambda host=host: not rdma(host).memory, 60)  # type: ignore[misc]


def test_programs(hosts: list[Host]) -> None:
    """Unchanged redis and iperf3 run between two hosts: the device writes their bytes, and the
    processor copies none.
    """
    client, server = (host.containers[0] for host in hosts)
    before = rdma(hosts[0])
    redis = server.start(["redis-server", "--protected-mode", "no", "--save", ""])
    server.wait_listening(6379)
    content = random.Random(7).randbytes(100_000)
    sets = b"".join(
        b"*3\r\n$3\r\nSET\r\n$4\r\nk%03d\r\n$%d\r\n%b\r\n" % (i, len(content), content)
        for i in range(30)
    )
    address = str(server.ipv4)
    said = client.run(["redis-cli", "-h", address, "--pipe"], stdin=sets).stdout
    assert "errors: 0, replies: 30" in said
    got = client.run(
        ["sh", "-c", f"redis-cli -h {address} --raw get k009 | head -c {len(content)} | sha256sum"]
    )
    assert got.stdout.split()[0] == hashlib.sha256(content).hexdigest()
    redis.kill()
    iperf = server.start(["iperf3", "-s", "-1"])
    server.wait_listening(5201)
    client.run(["iperf3", "-c", address, "-t", "5", "--bidir"], timeout=240)
    assert iperf.wait(60) == 0
    time.sleep(1.5)
    after = rdma(hosts[0])
    assert after.device is not None
    assert after.device.startswith("rxe0 port 1, RoCE v2 ")
    assert after.granted > before.granted
    # The rate means nothing here.
    assert after.relay["bytes_out"] > 100_000
    assert after.relay["bytes_in"] > 0
    assert (after.relay["copied"], after.broken) == (0, 0)


@pytest.mark.parametrize(
    "options", [(500,), (500, "-e"), (50, "-s", "300000")], ids=["polls", "sleeps", "large"]
)
def test_queue_pairs(hosts: list[Host], options: tuple[Any, ...]) -> None:
    """Messages come through with the bytes that were sent, whether the program polls or sleeps, and
    the hosts' devices carry them.
    """
    before = rdma(hosts[0])
    PingPong(hosts, *options).check()
    time.sleep(1.5)
    after = rdma(hosts[0])
    assert after.granted > before.granted
    assert after.relay["bytes_out"] - before.relay["bytes_out"] > 100_000
    assert (after.relay["copied"], after.broken) == (0, 0)


@pytest.fixture
def moving(hosts: list[Host]) -> Iterator[list[Host]]:
    """The hosts, which let their devices move bytes between registered memory."""
    for host in hosts:
        networks = tuple(
            msgspec.structs.replace(network, verbs_direct=True) for network in host.facts().networks
        )
        settings = msgspec.structs.replace(host.settings, zero_copy=True)
        host.learn(networks=networks, settings=settings)
    yield hosts
    for host in hosts:
        host.learn()


def test_moved_writes(moving: list[Host], tmp_path: Path) -> None:
    """The devices write between registered memory: each byte is where it has to be and when, also
    if queue pairs or memory end meanwhile.
    """
    program = compile_c(
        TOP / "tests/verbs/moved_writes.c",
        tmp_path / "moved_writes",
        "-Wl,--no-as-needed",
        str(BUILT_VERBS / "libibverbs.so.1"),
    )
    preload = f"LD_PRELOAD={LIBRARY}:{FOLDER}/libibverbs.so.1"
    address = str(moving[1].containers[0].ipv4)
    for host in moving:
        host.guest.push(program, "/opt/moved_writes")
    for mode, rounds in (("bytes", 6), ("flush", 3), ("drain", 1), ("deregister", 1)):
        before = rdma(moving[0]).relay["moves"]
        ends = [
            host.containers[0].start(
                ["env", preload, "/opt/moved_writes", mode, address, str(side), str(rounds), "7"],
                accelerated=False,
            )
            for side, host in enumerate(moving)
        ]
        for end in ends:
            end.check(150)
        wait_until(mode, lambda before=before: rdma(moving[0]).relay["moves"] > before, 20)  # type: ignore[misc]
    for host in moving:
        wait_until("no memory", lambda host=host: not rdma(host).memory, 60)  # type: ignore[misc]
        assert (rdma(host).relay["corrupt"], rdma(host).relay["downs"]) == (0, 0)


def test_torture(hosts: list[Host], tmp_path: Path) -> None:
    """No byte is wrong with many threads on a connection, forks, signals and kills."""
    seconds = 120 if LONG else 8
    program = compile_c(TOP / "tests/dataplane/torture.c", tmp_path / "torture")
    for host in hosts:
        host.guest.push(program, "/opt/torture")
    a, b = (host.containers[0] for host in hosts)
    server = b.start(["/opt/torture", "server", str(b.ipv4), "7000"])
    b.wait_listening(7000)
    client = a.start(["/opt/torture", "client", str(b.ipv4), "7000", str(seconds), "42", "6", "2"])
    codes = (client.wait(seconds + 120), server.wait(60))
    assert codes == (0, 0), client.output + server.output
    assert rdma(hosts[0]).broken == 0


def test_cable_pulled(hosts: list[Host]) -> None:
    """After a link was down for some seconds, connections continue or are reset, none is cut short,
    and new ones and queue pairs work as before.
    """
    streams = Streams(hosts, 15)
    hosts[1].guest.set_carrier(False)
    time.sleep(3)
    hosts[1].guest.set_carrier(True)
    assert set(streams.ends()) <= {"whole", "reset"}
    moves_again(hosts)


def test_device_removed(hosts: list[Host]) -> None:
    """When a host loses its device, its connections end over the session or as by a reset, and new
    ones stay on TCP until the device is back.
    """
    streams = Streams(hosts, 25)
    guest = hosts[1].guest
    guest.run(["rdma", "link", "delete", "rxe0"])
    wait_until("no RDMA", lambda: bool(rdma(hosts[1]).why), 120)
    assert set(streams.ends()) <= {"whole", "reset"}
    a, b = (host.containers[0] for host in hosts)
    iperf = b.start(["iperf3", "-s", "-1"])
    b.wait_listening(5201)
    a.run(["iperf3", "-c", str(b.ipv4), "-n", "2M"])
    assert iperf.wait(60) == 0
    guest.run(["rdma", "link", "add", "rxe0", "type", "rxe", "netdev", "eth0"])
    moves_again(hosts)


def test_relay_killed(hosts: list[Host]) -> None:
    """When a relay is killed, its connections are reset at both ends, and the next relay carries
    new ones and queue pairs.
    """
    streams = Streams(hosts, 60)
    hosts[1].guest.run(["pkill", "-KILL", "-x", "freeflow-relay"])
    assert set(streams.ends(60)) == {"reset"}
    moves_again(hosts)


def test_router_killed(hosts: list[Host]) -> None:
    """When a router is killed, its relay makes connections fall back to TCP, and resets those that
    take longer than two seconds.
    """
    streams = Streams(hosts, 15)
    hosts[1].kill_router()
    assert set(streams.ends()) <= {"whole", "reset"}
    hosts[1].start_router()
    moves_again(hosts)


def echo(hosts: list[Host], port: int) -> tuple[Process, Process]:
    """Start a client and a server whose connection waits for a command to send."""
    a, b = (host.containers[0] for host in hosts)
    where = [str(b.ipv4), str(port)]
    server = b.start(["python3", "-ES", ECHO, "server", *where])
    b.wait_listening(port)
    return a.start(["python3", "-ES", ECHO, "client", *where, "2000003", "4"], stdin=True), server


def paths(hosts: list[Host], port: int) -> list[tuple[str, str | None]]:
    """Path and reason of each end of the connections to this port."""
    return [
        (connection.path, connection.reason)
        for host in hosts
        for connection in host.router.connections(host.containers[0].inode).connections
        if f"{connection.local} {connection.remote} ".count(f":{port} ")
    ]


def test_certificate_expired(hosts: list[Host], authority: Authority) -> None:
    """Without a session, connections continue over RDMA and new ones stay on TCP; with the renewed
    certificate everything works as before.
    """
    broken = [rdma(host).broken for host in hosts]
    streams, kept = Streams(hosts, 25), echo(hosts, 7200)
    wait_until("rdma", lambda: paths(hosts, 7200) == [("rdma", None)] * 2, 60)
    assert [rdma(host).no_sessions for host in hosts] == ["", ""]
    # The peer's certificate, by the first host's clock; then the second host's own, by its clock.
    later = f"+{SHORT.total_seconds() + 60:.0f} seconds"
    hosts[0].guest.run(["date", "-s", later])
    wait_until("no session", lambda: "expired" in rdma(hosts[0]).hosts[0].reason, 30)
    hosts[1].guest.run(["date", "-s", later])
    wait_until("no certificate", lambda: "expired" in rdma(hosts[1]).no_sessions, 30)
    late = echo(hosts, 7201)
    wait_until("why", lambda: paths(hosts, 7201) == [("overlay", "no-session")] * 2, 60)
    assert paths(hosts, 7200) == [("rdma", None)] * 2
    for client, server in (kept, late):
        client.write(b"now\n")
        assert client.check(120) == "the same\n"
        assert server.wait(60) == 0
    assert set(streams.ends()) == {"whole"}
    assert [rdma(host).broken for host in hosts] == broken
    assert [host.process.poll() for host in hosts if host.process is not None] == [None, None]
    hosts[1].certify(authority.root, authority.node("node2"))
    # The link was never down.
    wait_until("a session", lambda: all(rdma(host).hosts[0].session for host in hosts), 60)
    moves_again(hosts)


def test_postgresql(hosts: list[Host]) -> None:
    """pgbench over RDMA counts no failed transaction of PostgreSQL."""
    a, b = (host.containers[0] for host in hosts)
    b.guest.sh(
        "rm -rf /opt/pg; mkdir /opt/pg; chown postgres /opt/pg; su postgres -c '$(ls -d /usr/lib/postgresql/*/bin)/initdb -A trust -D /opt/pg'; "
        "echo 'host all all 10.78.0.0/16 trust' >>/opt/pg/pg_hba.conf",
        timeout=300,
    )
    inside = f"exec $(ls -d /usr/lib/postgresql/*/bin)/postgres -D /opt/pg -k /tmp -h {b.ipv4}"
    server = b.start(["setpriv", "--reuid=postgres", "--clear-groups", "sh", "-c", inside])
    b.wait_listening(5432)
    where = ["-h", str(b.ipv4), "-U", "postgres", "postgres"]
    a.run(["pgbench", "-i", "-q", *where], timeout=300)
    said = a.run(["pgbench", "-c", "4", "-T", "10", *where], timeout=300).stdout
    assert "number of failed transactions: 0" in said
    server.kill()


def test_many_connections(hosts: list[Host]) -> None:
    """Many connections share one queue pair, and every answer is right.

    With RDMA_LONG=1 there are a thousand, as in `test_two_hosts.py`.
    """
    count = 1000 if LONG else 50
    before = rdma(hosts[0])
    a, b = (host.containers[0] for host in hosts)
    server = b.start(["python3", "-ES", MANY, "server", str(b.ipv4), str(PORT)])
    b.wait_listening(PORT)
    asking = ["python3", "-ES", MANY, "client", str(b.ipv4), str(PORT), str(count)]
    client = a.start(asking, stdin=True)
    wait_until(f"{count} on rdma", lambda: rdma(hosts[0]).granted - before.granted >= count, 400)
    client.write(b"now\n")
    assert client.check(200) == f"whole {count}\n"
    assert server.wait(60) == 0
    assert rdma(hosts[0]).broken == before.broken


@pytest.mark.long
def test_nothing_on_the_way(hosts: list[Host]) -> None:
    """When the network is lost while nothing is on the way, connections and queue pairs that wait
    for the other host are reset after a while. Idle ones go on when the network is back.
    """
    client, server = echo(hosts, 7300)
    wait_until("rdma", lambda: paths(hosts, 7300) == [("rdma", None)] * 2, 60)
    streams, pairs = Streams(hosts, 300), PingPong(hosts, 1_000_000, "-e")
    wait_until("queue pairs", lambda: len(queue_pairs(hosts)) == 2, 60)
    client.write(b"rest\n")
    client.wait_for("rests")
    for process in (streams.server, pairs.server):
        process.kill(signal.SIGSTOP)
    time.sleep(3)
    hosts[1].guest.cut_underlay()
    assert set(Streams.words(streams.client, 120)) == {"reset"}
    assert pairs.client.wait(60) == 1
    assert "transport retry counter exceeded" in pairs.client.output + pairs.client.errors
    hosts[1].guest.heal_underlay()
    for process in (streams.server, pairs.server):
        process.kill(signal.SIGCONT)
    assert set(Streams.words(streams.server, 120)) == {"reset"}
    pairs.server.kill()
    client.write(b"now\n")
    assert client.check(120) == "rests\nthe same\n"
    assert server.wait(60) == 0
    moves_again(hosts)
