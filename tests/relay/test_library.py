"""Programs with the library on two hosts whose relays use the loopback transport, or TCP.

Routers and library are the real ones, as in tests/dataplane/test_two_hosts.py; the relays are built
with sanitizers.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY, ROOT, compile_c
from tests.dataplane.two_hosts import HostBed, two_hosts

SENDER = """
import hashlib, os, random, socket, sys, time
s = socket.create_connection((sys.argv[1], 7300))
content = random.Random(7).randbytes(1 << 20)
for _ in range(4):
    s.sendall(b"warm"), s.recv(4)
for number in range(int(sys.argv[2])):
    s.sendall(content)
    if "paced" in sys.argv[3]:
        time.sleep(0.01)
if "die" in sys.argv[3]:
    os.kill(os.getpid(), 9)
s.shutdown(socket.SHUT_WR)
assert s.recv(100) == b"all", "the other end has not had it all"
assert s.recv(100) == b""
"""
TAKER = """
import random, socket, sys
listener = socket.create_server(("", 7300))
print("listening", flush=True)
s, _ = listener.accept()
content = random.Random(7).randbytes(1 << 20)
for _ in range(4):
    s.recv(4, socket.MSG_WAITALL), s.sendall(b"warm")
had, said = 0, ""
try:
    while data := s.recv(200000):
        at = 0
        while at < len(data):
            begin = (had + at) % len(content)
            part = data[at : at + len(content) - begin]
            assert part == content[begin : begin + len(part)], f"wrong after {had + at}"
            at += len(part)
        had += len(data)
    s.sendall(b"all")
    said = "end"
except OSError as error:
    said = error.strerror
print(had, said, flush=True)
"""


@pytest.fixture(scope="module", params=["rdma", "relay"])
def hosts(request: pytest.FixtureRequest, binary: Path) -> Iterator[tuple[HostBed, HostBed]]:
    """Two hosts with a container each, and a link between their relays."""
    with two_hosts(library=LIBRARY, relay=binary, path=request.param) as (one, other):
        one.wait_linked()
        other.wait_linked()
        yield one, other


def both(
    hosts: tuple[HostBed, HostBed], megabytes: int, how: str
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Start both programs."""
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    taker = b.popen(["python3", "-c", TAKER], **pipes)
    assert taker.stdout is not None
    taker.stdout.readline()
    return a.popen(["python3", "-c", SENDER, str(b.ipv4), str(megabytes), how], **pipes), taker


def moved(hosts: tuple[HostBed, HostBed]) -> int:
    """Bytes that the first relay has sent."""
    return hosts[0].router.statistics().rdma.relay.get("bytes_out", 0)


@pytest.fixture
def before(hosts: tuple[HostBed, HostBed]) -> int:
    """Bytes sent before the test. A router reads its relay's counters every second."""
    time.sleep(1.1)
    return moved(hosts)


def wait_moved(hosts: tuple[HostBed, HostBed], size: int) -> None:
    """Wait until the router's statistics show that many bytes."""
    until = time.monotonic() + patience(20)
    while moved(hosts) < size:
        assert time.monotonic() < until, moved(hosts)
        time.sleep(0.05)


def test_a_stream_is_whole_and_ends_as_it_should(
    hosts: tuple[HostBed, HostBed], before: int
) -> None:
    """A stream arrives whole, through a half-close by its sender and a close by its reader."""
    sender, taker = both(hosts, 40, "paced")
    assert sender.communicate(timeout=patience(60))[0] == ""
    assert taker.communicate(timeout=patience(20))[0].split() == [str(40 << 20), "end"]
    wait_moved(hosts, before + (5 << 20))


def test_what_a_killed_program_had_sent_arrives(
    hosts: tuple[HostBed, HostBed], before: int
) -> None:
    """All bytes that a killed program had sent arrive, then the end, as over TCP."""
    sender, taker = both(hosts, 40, "paced, die")
    sender.wait(patience(60))
    assert taker.communicate(timeout=patience(20))[0].split() == [str(40 << 20), "end"]
    wait_moved(hosts, before + (5 << 20))


def test_redis_and_iperf3_run(hosts: tuple[HostBed, HostBed], before: int) -> None:
    """redis and iperf3, with event loops and threads, run over relays."""
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    b.popen(["redis-server", "--save", "", "--protected-mode", "no", "--port", "6400"])
    server = b.popen(["iperf3", "-s", "-1"])
    until = time.monotonic() + patience(20)
    while b.run(["ss", "-Htln", "sport = :6400 or sport = :5201"]).stdout.count("LISTEN") < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    command = ["redis-benchmark", "-h", str(b.ipv4), "-p", "6400", "-c", "8", "-n", "4000"]
    assert "GET" in a.run([*command, "-t", "set,get", "-q"]).stdout
    assert "receiver" in a.run(["iperf3", "-c", str(b.ipv4), "-t", "2", "-P", "2"]).stdout
    assert server.wait(patience(20)) == 0
    wait_moved(hosts, before + 30_000_000)


def test_many_threads_on_each_connection_stay_whole(
    hosts: tuple[HostBed, HostBed], before: int, folder: Path
) -> None:
    """The torture test of tests/dataplane passes between hosts."""
    program = str(compile_c(ROOT / "tests" / "dataplane" / "torture.c", folder / "torture"))
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    until = time.monotonic() + patience(20)
    # On a busy machine two seconds may be over before a connection has moved.
    while moved(hosts) < before + 1_000_000:
        assert time.monotonic() < until, moved(hosts) - before
        server = b.popen([program, "server", str(b.ipv4), "7400"], **pipes)
        time.sleep(0.3)
        client = a.popen([program, "client", str(b.ipv4), "7400", "2", "42", "8", "4"], **pipes)
        said = (
            client.communicate(timeout=patience(90))[0],
            server.communicate(timeout=patience(20))[0],
        )
        assert (client.returncode, server.returncode) == (0, 0), said
        time.sleep(1.1)
