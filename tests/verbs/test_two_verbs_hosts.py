"""Queue pairs between containers of two hosts, with the real libraries, routers and relays: over
the path `rdma`, where shared memory replaces the device, and over `relay`, TCP between the relays.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace

from dataplane.control import QueuePairFact
from testbed.namespace_bed import BedContainer
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, ROOT, compile_c
from tests.dataplane.two_hosts import HostBed, cut, two_hosts
from tests.verbs.conftest import HEADER, SECONDS
from tests.verbs.test_far import FAR, check_lost, finish
from tests.verbs.test_rdma_cm import PAIRS

RELAY: Final = ROOT / "build" / "freeflow-relay-memory"
INSIDE: Final = Path("/run/freeflow")
PROGRAMS: Final = ("rping", "ucmatose", "rstream", "ib_send_bw", "ib_send_lat", "udaddy")
"""Of those that connect by rdma_cm; the last two use datagrams."""
Hosts = tuple[HostBed, HostBed]

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or not RELAY.exists(), reason="missing: make library relay"
)


@pytest.fixture(params=["rdma", "relay"])
def hosts(request: pytest.FixtureRequest, library: Path) -> Iterator[Hosts]:
    """Two hosts with a container each, which have our libibverbs."""
    with two_hosts(library=LIBRARY, relay=RELAY, path=request.param) as made:
        for host in made:
            shutil.copytree(library.parent, host.shared / "verbs")
        yield made


@pytest.fixture(scope="module")
def far(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `far.c`."""
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup)")
    to = tmp_path_factory.mktemp("far") / "far"
    return compile_c(FAR, to, "-Wl,--no-as-needed", str(library))


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The file in which two processes tell each other what they have to know."""
    path = tmp_path / "board"
    path.write_bytes(bytes(4096))
    return path


def start(container: BedContainer, *command: str) -> subprocess.Popen[str]:
    """Start a program with verbs in a container."""
    verbs = INSIDE / "verbs"
    preload = f"{INSIDE / LIBRARY.name}:{verbs / 'libibverbs.so.1'}:{verbs / 'libibverbs.so'}"
    return container.popen(
        ["env", f"LD_PRELOAD={preload}", *command],
        accelerated=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both(
    hosts: Hosts, program: Path, mode: str, board: Path, *more: str
) -> list[subprocess.Popen[str]]:
    """Start the program in both containers."""
    containers = [container for host in hosts for container in host.containers.values()]
    return [
        start(container, str(program), mode, str(board), str(side), *more)
        for side, container in enumerate(containers)
    ]


def queue_pairs(host: HostBed) -> list[QueuePairFact]:
    """The queue pairs that a router knows."""
    return list(host.router.verbs().queue_pairs)


def until_empty(hosts: Hosts) -> None:
    """Wait until neither router knows of queue pairs, nor relay of connections."""
    until = time.monotonic() + patience(20)
    while any(map(queue_pairs, hosts)) or any(
        host.router.statistics().rdma.relay.get("connections", 0) for host in hosts
    ):
        assert time.monotonic() < until, list(map(queue_pairs, hosts))
        time.sleep(0.05)


@pytest.mark.parametrize(
    "command",
    [
        ["ib_send_lat", "-n", "300"],
        ["ib_send_lat", "-n", "300", "-e"],
        ["ib_write_bw", "-n", "300", "-q", "3"],
        ["ib_read_bw", "-n", "300"],
        ["ib_send_lat", "-c", "UD", "-n", "300"],
    ],
    ids=" ".join,
)
def test_perftest(hosts: Hosts, command: list[str]) -> None:
    """The programs of perftest run between hosts, and leave nothing behind."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"missing: {command[0]} (make setup)")
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    server = start(b, *command, "-F")
    until = time.monotonic() + patience(10)
    while not b.run(["ss", "-Htln", "sport = :18515"], accelerated=False).stdout:
        assert server.poll() is None, server.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    client = start(a, *command, "-F", str(b.ipv4))
    finish(server, client, seconds=60)
    until_empty(hosts)


@pytest.mark.parametrize("name", PROGRAMS)
def test_rdma_cm(hosts: Hosts, name: str) -> None:
    """Programs that connect by rdma_cm find each other between hosts, and leave nothing behind."""
    if shutil.which(name) is None:
        pytest.skip(f"missing: {name} (make setup)")
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    server, client = ([word.format(b.ipv4) for word in words] for words in PAIRS[name])
    served = start(b, *server)
    until = time.monotonic() + patience(20)
    while (asked := start(a, *client)).wait(patience(60)):
        # It has come too early.
        said = asked.communicate()
        assert served.poll() is None, (said, served.communicate())
        assert time.monotonic() < until, said
    finish(asked, served, seconds=60)
    until_empty(hosts)


def test_a_group(hosts: Hosts) -> None:
    """What is sent to a multicast group reaches a member on another host, and leaves nothing."""
    if shutil.which("mckey") is None:
        pytest.skip("missing: mckey (make setup)")
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    member = start(b, "mckey", "-m", "239.0.0.7", "-b", str(b.ipv4))
    until = time.monotonic() + patience(30)
    while member.poll() is None and time.monotonic() < until:
        # It may not have joined yet.
        finish(start(a, "mckey", "-m", "239.0.0.7", "-s", "-b", str(a.ipv4)), seconds=60)
    finish(member, seconds=60)
    until_empty(hosts)


@pytest.mark.timeout(2 * int(SECONDS) + 200)
def test_torture(hosts: Hosts, far: Path, board: Path) -> None:
    """Everything at once arrives byte for byte, and both routers show how."""
    seed = str(int.from_bytes(os.urandom(4), "big"))
    ends = both(hosts, far, "torture", board, SECONDS, seed)
    until = time.monotonic() + patience(20)
    paths: set[str] = set()
    while not paths and time.monotonic() < until and ends[0].poll() is None:
        paths = {fact.path for host in hosts for fact in queue_pairs(host)} - {""}
        time.sleep(0.02)
    finish(*ends, seconds=int(SECONDS) + 90)
    assert paths == {hosts[0].path}
    until_empty(hosts)


@pytest.fixture
def peers(hosts: Hosts, far: Path, board: Path) -> list[subprocess.Popen[str]]:
    """Two processes that have sent to each other, and have no receives."""
    ends = both(hosts, far, "peer", board)
    for end in ends:
        assert end.stdout is not None
        assert end.stdout.readline() == "sent\n", end.communicate()
    until = time.monotonic() + patience(10)
    while {fact.path for host in hosts for fact in queue_pairs(host)} != {hosts[0].path}:
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.2)
    assert [end.poll() for end in ends] == [None, None]
    return ends


def test_peer_is_killed(hosts: Hosts, peers: list[subprocess.Popen[str]]) -> None:
    """When a process is killed, its peer on the other host hears of it."""
    peers[0].kill()
    check_lost(peers[1])
    until_empty(hosts)


def test_relay_is_killed(hosts: Hosts, peers: list[subprocess.Popen[str]]) -> None:
    """When a relay is killed, both ends hear of it."""
    os.kill(hosts[1].relay_pid(), signal.SIGKILL)
    for end in peers:
        check_lost(end)
    until_empty(hosts)


def test_router_is_killed(hosts: Hosts, peers: list[subprocess.Popen[str]]) -> None:
    """When a router is killed, its relay ends what has no TCP to fall back to."""
    hosts[1].kill_router()
    for end in peers:
        check_lost(end)
    hosts[1].start_router()
    until_empty(hosts)


def test_network_is_not_carried_any_more(hosts: Hosts, peers: list[subprocess.Popen[str]]) -> None:
    """When one host turns verbs off, both ends hear of it."""
    hosts[0].learn(settings=replace(hosts[0].settings, verbs=False))
    for end in peers:
        check_lost(end)
    until_empty(hosts)


def test_lost_cable(hosts: Hosts, peers: list[subprocess.Popen[str]]) -> None:
    """Hosts that don't reach each other for a while go on where they were."""
    cut(hosts[0])
    time.sleep(2)
    cut(hosts[0], up=True)
    time.sleep(1)
    assert [end.poll() for end in peers] == [None, None]
    peers[0].kill()
    check_lost(peers[1])
    until_empty(hosts)
