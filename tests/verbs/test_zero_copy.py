"""WRITEs between registered memory of two hosts: relays move the bytes, where shared memory stands
for the device, and no ring carries them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace

from dataplane.control import RouterSettings
from testbed.process import wait_until
from tests.dataplane.places import LIBRARY, compile_c
from tests.dataplane.two_hosts import HostBed, two_hosts
from tests.verbs.conftest import HEADER
from tests.verbs.test_far import finish
from tests.verbs.test_two_verbs_hosts import RELAY, Hosts, queue_pairs, start, until_empty

PROGRAM: Final = Path(__file__).parent / "moved_writes.c"

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or not RELAY.exists(), reason="missing: make library relay"
)


def allow(host: HostBed) -> None:
    """Have the host's network allow direct memory."""
    facts = host.facts()
    networks = tuple(replace(network, verbs_direct=True) for network in facts.networks)
    host.router.replace_snapshot(replace(facts, networks=networks))


@pytest.fixture(scope="module")
def hosts(library: Path) -> Iterator[Hosts]:
    settings = RouterSettings(zero_copy=True)
    with two_hosts(library=LIBRARY, relay=RELAY, settings=settings) as made:
        for host in made:
            shutil.copytree(library.parent, host.shared / "verbs")
            allow(host)
        yield made


@pytest.fixture(scope="module")
def program(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `moved_writes.c`."""
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup)")
    to = tmp_path_factory.mktemp("moved") / "moved_writes"
    return compile_c(PROGRAM, to, "-Wl,--no-as-needed", str(library))


def relay_counts(host: HostBed) -> dict[str, int]:
    """The router hears them once in a second."""
    return dict(host.router.statistics().rdma.relay)


def play(hosts: Hosts, program: Path, mode: str, rounds: int) -> None:
    """Both processes, with a seed that a failure shows."""
    seed = str(int.from_bytes(os.urandom(4), "big"))
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    ends = [
        start(container, str(program), mode, str(b.ipv4), str(side), str(rounds), seed)
        for side, container in enumerate((a, b))
    ]
    finish(*ends, seconds=120)


@pytest.mark.parametrize(
    ("mode", "rounds", "moves"),
    [("bytes", 40, 15), ("flush", 9, 9), ("drain", 4, 4), ("deregister", 5, 5)],
)
def test_moved_writes(hosts: Hosts, program: Path, mode: str, rounds: int, moves: int) -> None:
    """Each byte is where it has to be and when, whatever becomes of queue pair and memory."""
    before = relay_counts(hosts[0]).get("moves", 0)
    play(hosts, program, mode, rounds)
    wait_until("moves", lambda: relay_counts(hosts[0]).get("moves", 0) - before >= moves, 20)
    until_empty(hosts)
    wait_until(
        "memory",
        lambda: all(relay_counts(host).get("registered", 1) == 0 for host in hosts),
        20,
    )
    assert all(relay_counts(host)["corrupt"] == 0 for host in hosts)
    assert not any(map(queue_pairs, hosts))
