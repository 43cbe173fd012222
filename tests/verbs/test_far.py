"""Queue pairs whose peers are on another host: over two relays, in memory and over TCP, with
`far_router.py`.
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

from dataplane.router.relay_wire import QUEUE_PAIR
from testbed.patience import patience
from testbed.process import wait_until
from testbed.relays import LOOPBACK, TCP
from tests.dataplane.places import LIBRARY, compile_c
from tests.relay.conftest import FAULTS, build
from tests.relay.test_faults import kept_up
from tests.verbs.conftest import HEADER, SECONDS
from tests.verbs.far_router import FarRouter, far_router
from tests.verbs.hand_router import hand_router
from tests.verbs.test_pair import PROGRAM, environment, free_port, listens, play

FAR: Final = Path(__file__).with_name("far.c")
LEAST: Final = 64 << 10
"""Bytes of the smallest ring."""
WAKINGS: Final = 8
"""Of a process that rests, in a second."""


@pytest.fixture(scope="module")
def relay(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relay with faults on request, and with sanitizers."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    folder = tmp_path_factory.mktemp("relay")
    return build(folder / "freeflow-relay", "address,undefined", *FAULTS)


@pytest.fixture(scope="module")
def far(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `far.c`."""
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup)")
    to = tmp_path_factory.mktemp("far") / "far"
    return compile_c(FAR, to, "-Wl,--no-as-needed", str(library))


@pytest.fixture(params=[LOOPBACK, TCP], ids=["memory", "tcp"])
def transport(request: pytest.FixtureRequest) -> int:
    """What carries the rings."""
    kind: int = request.param
    return kind


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The file in which two processes tell each other what they have to know."""
    path = tmp_path / "board"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    """Where the router listens."""
    return tmp_path / "router.sock"


def start(program: Path, library: Path, router: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start one process."""
    return subprocess.Popen(
        [program, *arguments],
        env=environment(library, router),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*ends: subprocess.Popen[str], seconds: float) -> None:
    """Wait for processes, which must not fail."""
    try:
        said = [end.communicate(timeout=patience(seconds)) for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.wait()
    assert [end.returncode for end in ends] == [0] * len(ends), said


@pytest.mark.parametrize(
    "options",
    [
        ["-n", "300"],
        ["-n", "100", "-s", "200000", "-c"],
        ["-n", "300", "-e"],
        ["-n", "50", "-s", "200000", "-e", "-c"],
    ],
    ids=" ".join,
)
def test_ping_pong(
    library: Path, relay: Path, socket_path: Path, transport: int, options: list[str]
) -> None:
    """The program's messages come through, its bytes are right, and the slots are given back."""
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"missing: {PROGRAM} (make setup)")
    with far_router(socket_path, relay, transport) as router:
        said = play(library, socket_path, [PROGRAM, "-g", "0", *options])
        router.await_releases(2)
        router.await_ends(2)
        assert router.hosts[0].counts()["corrupt"] == 0
    assert all("iters in" in text for text in said), said


@pytest.mark.parametrize(
    "command",
    [
        ["ib_send_lat", "-n", "300"],
        ["ib_send_lat", "-n", "300", "-e"],
        ["ib_write_lat", "-n", "300"],
        ["ib_read_lat", "-n", "300"],
        ["ib_atomic_lat", "-n", "300"],
        ["ib_write_bw", "-n", "300", "-q", "3"],
        ["ib_read_bw", "-n", "300"],
        ["ib_send_bw", "-n", "300", "-b"],
    ],
    ids=" ".join,
)
def test_perftest(
    library: Path, relay: Path, socket_path: Path, transport: int, command: list[str]
) -> None:
    """The programs of perftest run."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"missing: {command[0]} (make setup)")
    port = free_port()
    run = [*command, "-F", "-p", str(port)]
    with far_router(socket_path, relay, transport):
        server = start(Path(run[0]), library, socket_path, *run[1:])
        until = time.monotonic() + patience(10)
        while not listens(port):
            assert server.poll() is None, server.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)
        client = start(Path(run[0]), library, socket_path, *run[1:], "127.0.0.1")
        finish(server, client, seconds=60)


def torture(
    far: Path, library: Path, router: Path, board: Path
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """Start two processes that do everything at once."""
    seed = str(int.from_bytes(os.urandom(4), "big"))
    common = (str(board), "0", SECONDS, seed)
    one = start(far, library, router, "torture", *common)
    return one, start(far, library, router, "torture", str(board), "1", SECONDS, seed)


@pytest.mark.timeout(2 * int(SECONDS) + 200)
@pytest.mark.parametrize("ring", [LEAST, 1 << 20])
def test_torture(
    far: Path,
    library: Path,
    relay: Path,
    socket_path: Path,
    board: Path,
    transport: int,
    ring: int,
) -> None:
    """Everything at once arrives byte for byte."""
    with far_router(socket_path, relay, transport, ring) as router:
        finish(*torture(far, library, socket_path, board), seconds=int(SECONDS) + 90)
        for host in router.hosts:
            counts = host.counts()
            assert (counts["corrupt"], counts["broken"]) == (0, 0)


@pytest.mark.timeout(2 * int(SECONDS) + 200)
def test_links_that_get_lost(
    far: Path, library: Path, relay: Path, socket_path: Path, board: Path, transport: int
) -> None:
    """The same holds if the relays' link is lost all the time, and made again."""
    faults = (
        "short=9,again=9,reset=400,seed=5"
        if transport == TCP
        else "delay=200,shuffle=1,lose=60,seed=5"
    )
    with (
        far_router(socket_path, relay, transport, device=faults) as router,
        kept_up(*router.hosts) as made,
    ):
        finish(*torture(far, library, socket_path, board), seconds=int(SECONDS) + 90)
        assert made[0] > 2
        for host in router.hosts:
            counts = host.counts()
            assert (counts["corrupt"], counts["broken"]) == (0, 0)
        assert router.hosts[0].counts()["resumed"]


@pytest.fixture
def peers(
    far: Path, library: Path, relay: Path, socket_path: Path, board: Path, transport: int
) -> Iterator[tuple[FarRouter, list[subprocess.Popen[str]]]]:
    """Two processes that have sent to each other, and have no receives: the first one is on the
    first host.
    """
    with far_router(socket_path, relay, transport) as router:
        ends = [start(far, library, socket_path, "peer", str(board), "0")]
        try:
            # Processes get their hosts in the order in which they open the device.
            wait_until("the first process", lambda: any(each.gid for each in router.clients))
            ends.append(start(far, library, socket_path, "peer", str(board), "1"))
            for end in ends:
                assert end.stdout is not None
                assert end.stdout.readline() == "sent\n"
            # They wait for each other's receives.
            time.sleep(0.3)
            assert [end.poll() for end in ends] == [None, None]
            yield router, ends
        finally:
            for end in ends:
                end.kill()
                end.wait()


def check_lost(end: subprocess.Popen[str]) -> None:
    """The oldest request fails, the other one is flushed, and the program has an event."""
    said, complaint = end.communicate(timeout=patience(30))
    assert [word.strip() for word in said.split(",")] == [
        "transport retry counter exceeded",
        "Work Request Flushed Error",
        "local work queue catastrophic error",
    ], complaint


Peers = tuple[FarRouter, list[subprocess.Popen[str]]]


def test_peer_is_killed(peers: Peers) -> None:
    """When a process is killed, its peer on the other host hears of it."""
    _, (one, other) = peers
    one.kill()
    check_lost(other)


LAST: Final = [("1", "polling", "shared"), ("100000", "sleeping", "own")]
"""Messages of `far last`."""


@pytest.mark.parametrize("messages", LAST, ids=" ".join)
def test_peer_ends_with_its_last_message(
    far: Path,
    library: Path,
    relay: Path,
    socket_path: Path,
    board: Path,
    transport: int,
    messages: tuple[str, ...],
) -> None:
    """What a process has executed completes at its peer, though it ends at once: on another host,
    and on the same one.
    """
    for _ in range(2):
        with far_router(socket_path, relay, transport):
            exchange_last(far, library, socket_path, board, messages)
        with hand_router(socket_path):
            exchange_last(far, library, socket_path, board, messages)


def exchange_last(
    far: Path, library: Path, router: Path, board: Path, messages: tuple[str, ...]
) -> None:
    """Run the two processes of `far last`, of which the second one kills itself."""
    board.write_bytes(bytes(4096))
    ends = [start(far, library, router, "last", str(board), side, *messages) for side in "01"]
    try:
        said = [end.communicate(timeout=patience(60)) for end in ends]
    finally:
        for end in ends:
            end.kill()
            end.wait()
    assert [end.returncode for end in ends] == [0, -signal.SIGKILL], said


def test_relay_is_killed(peers: Peers) -> None:
    """When a relay is killed, both ends hear of it."""
    router, ends = peers
    router.hosts[1].process.send_signal(signal.SIGKILL)
    router.hosts[1].process.wait()
    router.lose_host(1)
    for end in ends:
        check_lost(end)


def test_link_is_given_up(peers: Peers) -> None:
    """When the relays can't reach each other for good, both ends hear of it."""
    router, ends = peers
    for host in router.hosts:
        host.number("UNLINK", 1)
    for end in ends:
        check_lost(end)


def test_network_is_not_carried_any_more(peers: Peers) -> None:
    """A queue pair for which one router tells its relay to leave has no TCP: it is lost, at both
    ends.
    """
    router, ends = peers
    (arena,) = [each for each in router.far if each.first.relay is router.hosts[0]]
    (end,) = arena.ends.values()
    router.hosts[0].number("LEAVE", end.number)
    for process in ends:
        check_lost(process)


def test_hosts_that_do_not_reach_each_other(peers: Peers) -> None:
    """A queue pair with open requests is lost when the router gives up those that wait."""
    router, ends = peers
    give_up(router)
    check_lost(ends[0])


def give_up(router: FarRouter) -> None:
    """The other host is gone, without a word: give up whoever waits for it."""
    router.hosts[1].process.kill()
    router.hosts[1].process.wait()
    router.hosts[0].expect("DOWN", number=1)
    router.hosts[0].number("EXPIRE", 1, 1 | QUEUE_PAIR << 16)


@pytest.fixture
def idle_peers(
    far: Path, library: Path, relay: Path, socket_path: Path, board: Path, transport: int
) -> Iterator[Peers]:
    """Two processes whose queue pairs have nothing to do."""
    with far_router(socket_path, relay, transport) as router:
        ends = [
            start(far, library, socket_path, "rest", str(board), str(side)) for side in range(2)
        ]
        try:
            for end in ends:
                assert end.stdout is not None
                assert end.stdout.readline() == "rests\n", end.communicate()
            yield router, ends
        finally:
            for end in ends:
                end.kill()
                end.wait()


def test_idle_queue_pairs_can_wait(idle_peers: Peers) -> None:
    """An idle queue pair is not given up."""
    router, _ = idle_peers
    give_up(router)
    assert router.hosts[0].counts()["broken"] == 0


def switches(process: int) -> int:
    """How often the threads of a process have gone to sleep."""
    tasks = Path(f"/proc/{process}/task").glob("*/status")
    lines = [line for task in tasks for line in task.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


def test_idle_queue_pairs_rest(idle_peers: Peers) -> None:
    """Neither relays nor processes do anything for queue pairs that have nothing to do."""
    router, ends = idle_peers
    time.sleep(1.5)
    before = [switches(end.pid) for end in ends]
    slept = [host.counts()["sleeps"] for host in router.hosts]
    time.sleep(1)
    for end, count in zip(ends, before, strict=True):
        assert switches(end.pid) - count <= WAKINGS
    for host, count in zip(router.hosts, slept, strict=True):
        assert host.counts()["sleeps"] - count <= 4
