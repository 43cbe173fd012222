"""The rule for TCP between relays, with real programs, routers and relays on two hosts."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RelayRule, RouterSettings
from testbed.patience import patience
from tests.dataplane.places import LIBRARY
from tests.dataplane.two_hosts import HostBed, two_hosts

TOP: Final = Path(__file__).parents[2]
RELAY: Final = TOP / "build/freeflow-relay"
PINGS: Final = Path(__file__).parent / "programs/pings.py"
PORT: Final = 7100
Hosts = tuple[HostBed, HostBed]

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or not RELAY.exists(), reason="missing: make library relay"
)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    # A busy machine is slow: what has to be reached is little, and what is alone is as ever.
    rule = RelayRule(busy=20, connections=6, messages=200, pause=5)
    settings = RouterSettings(relay_rule=rule)
    with two_hosts(
        library=LIBRARY, relay=RELAY, path="relay", ruled=True, settings=settings
    ) as made:
        yield made


@contextlib.contextmanager
def pings(hosts: Hosts, count: int, rate: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A program with so many busy connections to the other host's server."""
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    python = [sys.executable, str(PINGS)]
    where = [str(b.ipv4), str(PORT)]
    server = b.popen([*python, "server", *where], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    client = a.popen(
        [*python, "client", *where, str(count), str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield client
    said, _ = client.communicate(timeout=patience(30))
    assert said == "right\n"
    server.kill()


def paths(host: HostBed) -> Counter[tuple[str, str | None]]:
    return Counter((fact.path, fact.reason) for fact in host.router.connections().connections)


def until(hosts: Hosts, wanted: tuple[str, str | None], count: int, seconds: float = 15) -> None:
    """Wait until both hosts say so of so many connections."""
    deadline = time.monotonic() + patience(seconds)
    while not all(paths(host)[wanted] == count for host in hosts):
        said = [paths(host) for host in hosts]
        assert time.monotonic() < deadline, (said, [host.log() for host in hosts])
        time.sleep(0.2)


def test_many_enter(hosts: Hosts) -> None:
    """Sixteen busy connections enter the relay, and no byte is lost."""
    with pings(hosts, 16):
        until(hosts, ("relay", None), 16)


def test_few_stay(hosts: Hosts) -> None:
    """Two busy connections stay on TCP, and both hosts say that they are too few."""
    with pings(hosts, 2):
        until(hosts, ("overlay", "few"), 2)
        time.sleep(5)
        until(hosts, ("overlay", "few"), 2, 1)


def test_the_rest_fall_silent(hosts: Hosts) -> None:
    """When all connections but one fall silent the pair goes back to TCP, whole, with the reason
    `slow`; when all are busy again nothing enters during the pause.
    """
    with pings(hosts, 16) as client:
        until(hosts, ("relay", None), 16)
        assert client.stdin is not None
        client.stdin.write("1\n")
        client.stdin.flush()
        deadline = time.monotonic() + patience(20)
        while any(path == "relay" for host in hosts for path, _ in paths(host)):
            assert time.monotonic() < deadline, [paths(host) for host in hosts]
            time.sleep(0.2)
        until(hosts, ("overlay", "slow"), 16)
        client.stdin.write("16\n")
        client.stdin.flush()
        time.sleep(2)
        assert not any(path == "relay" for host in hosts for path, _ in paths(host))
        for host in hosts:
            (container,) = host.router.statistics().containers
            assert 0 < container.relay_cpu < 60
