"""Processes that send each other datagrams: see `gossip.c`."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.conftest import HEADER
from tests.verbs.hand_router import hand_router
from tests.verbs.router import router
from tests.verbs.test_pair import environment


class Gossip:
    """A process of the program."""

    def __init__(self, program: Path, library: Path, socket: Path) -> None:
        self.process = subprocess.Popen(
            [program],
            env=environment(library, socket),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.number = self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def say(self, line: str) -> str:
        """Give it a line; returns what it answers."""
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()


@pytest.fixture(scope="module")
def program(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `gossip.c`."""
    if shutil.which("gcc") is None or not HEADER.exists() or not LIBRARY.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup), {LIBRARY} (make library)")
    to = tmp_path_factory.mktemp("gossip") / "gossip"
    source = Path(__file__).with_name("gossip.c")
    return compile_c(source, to, "-Wl,--no-as-needed", str(library))


@contextlib.contextmanager
def processes(program: Path, library: Path, socket: Path, count: int) -> Iterator[list[Gossip]]:
    """So many of them; others that the caller adds are ended, too."""
    made: list[Gossip] = []
    try:
        made.extend(Gossip(program, library, socket) for _ in range(count))
        yield made
    finally:
        for each in made:
            each.process.kill()
            each.process.communicate()


def check_all(gossips: list[Gossip], count: int = 20) -> None:
    """Check that each reaches each, itself too."""
    for each in gossips:
        for other in gossips:
            assert each.say(f"send {other.number} {count}") == "sent"
    for each in gossips:
        assert each.say(f"await {count * len(gossips)}") == f"got {count * len(gossips)}"


def test_each_to_each(program: Path, library: Path, tmp_path: Path) -> None:
    """All datagrams arrive, at processes that sleep, and two processes share one slot."""
    with (
        router(tmp_path) as made,
        processes(program, library, made.socket, 3) as gossips,
    ):
        check_all(gossips)
        check_all(gossips)


def test_killed(program: Path, library: Path, tmp_path: Path) -> None:
    """Whoever sends to a process that was killed goes on, and so do all others; another process may
    come in its place.
    """
    with (
        router(tmp_path) as made,
        processes(program, library, made.socket, 3) as gossips,
    ):
        check_all(gossips)
        gone = gossips.pop()
        gone.process.kill()
        gone.process.communicate()
        for each in gossips:
            assert each.say(f"send {gone.number} 50") == "sent"
        check_all(gossips)
        gossips.append(Gossip(program, library, made.socket))
        check_all(gossips)


def test_router_restarts(program: Path, library: Path, tmp_path: Path) -> None:
    """Datagrams go on without a router, and with another one, by which new processes come."""
    with (
        router(tmp_path) as made,
        processes(program, library, made.socket, 2) as gossips,
    ):
        check_all(gossips)
        made.kill()
        check_all(gossips)
        made.start()
        check_all(gossips)
        gossips.append(Gossip(program, library, made.socket))
        check_all(gossips)


def test_group(program: Path, library: Path, tmp_path: Path) -> None:
    """What is sent to a group comes once to each member, of whatever process."""
    with (
        router(tmp_path) as made,
        processes(program, library, made.socket, 3) as gossips,
    ):
        for each in gossips[:2]:
            assert each.say("join") == "done"
        time.sleep(patience(0.5))  # for the router to hear of it
        for each in gossips:
            assert each.say("cast 10") == "sent"
        for each in gossips[:2]:
            assert each.say("await 30") == "got 30"
        assert gossips[0].say("leave") == "done"
        assert gossips[2].say("join") == "done"
        time.sleep(patience(0.5))
        assert gossips[1].say("cast 10") == "sent"
        for each in gossips[1:]:
            assert each.say("await 10") == "got 10"


def test_slots_are_given_back(program: Path, library: Path, tmp_path: Path) -> None:
    """A slot that has ended is released by both sides."""
    path = tmp_path / "router.sock"
    with (
        hand_router(path) as made,
        processes(program, library, path, 1) as gossips,
    ):
        assert gossips[0].say(f"send {gossips[0].number} 10") == "sent"
        assert gossips[0].say("await 10") == "got 10"
        assert made.sought == 0
        other = Gossip(program, library, path)
        gossips.append(other)
        for releases in (2, 4):
            made.give_datagrams(made.clients[0], made.clients[1])
            numbers = list(made.arenas[0].incarnations.values())
            made.end_datagrams(numbers[-1])
            made.await_releases(releases)
        assert sorted(side for _, side, _ in made.releases) == [0, 0, 1, 1]


def test_slots_that_are_given_back_to_a_busy_router(
    program: Path, library: Path, tmp_path: Path
) -> None:
    """Slots are released also if the router's socket has had no room for that."""
    path = tmp_path / "router.sock"
    # A message takes more than 512 bytes of the socket's buffer.
    count = int(Path("/proc/sys/net/core/wmem_default").read_text()) // 512 + 100
    with (
        hand_router(path) as made,
        processes(program, library, path, 2) as gossips,
    ):
        with made.reads_nothing():
            for _ in range(count):
                made.give_datagrams(made.clients[0], made.clients[1])
            # A process takes what has come before it answers.
            check_all(gossips[:1])
        made.await_releases(2 * (count - 1))


def test_flood_of_slots(program: Path, library: Path, tmp_path: Path) -> None:
    """Slots that a process has not asked for, and has no use for, do it no harm."""
    path = tmp_path / "router.sock"
    with (
        hand_router(path) as made,
        processes(program, library, path, 2) as gossips,
    ):
        for _ in range(60):
            made.give_datagrams(made.clients[0], made.clients[1])
        made.await_releases(118)
        for each in gossips:
            assert each.say(f"send {each.number} 10") == "sent"
            assert each.say("await 10") == "got 10"


def test_slots_of_strangers(program: Path, library: Path, tmp_path: Path) -> None:
    """A process takes only some of the slots that others ask for: the arena of each takes
    descriptors, and those of the library are few.
    """
    path = tmp_path / "router.sock"
    most = 8
    with (
        hand_router(path) as made,
        processes(program, library, path, 1) as gossips,
    ):
        limit = 32 * most, 32 * most
        resource.prlimit(gossips[0].process.pid, resource.RLIMIT_NOFILE, limit)
        gossips.extend(Gossip(program, library, path) for _ in range(most + 3))
        one, *strangers, asked, late, later = made.clients
        for stranger in strangers:
            made.give_datagrams(stranger, one)
        made.give_datagrams(one, asked, request=1)
        refused = [made.give_datagrams(each, one)[0].number for each in (late, later)]
        made.await_releases(2)
        assert [(arena, side) for arena, side, _ in made.releases] == [
            (each, 1) for each in refused
        ]
        # One goes, and another one may come. The strangers release what they were given before.
        made.end_datagrams(made.arenas[0].incarnations[0])
        made.give_datagrams(late, one)
        made.give_datagrams(later, one)
        made.await_releases(7)
        ended = made.arenas[0].number
        assert sorted((arena, side) for arena, side, _ in made.releases[2:]) == sorted(
            [(ended, 0), (ended, 1), *((each, 0) for each in refused), (refused[1], 1)]
        )
        assert gossips[0].say(f"send {gossips[0].number} 10") == "sent"
        assert gossips[0].say("await 10") == "got 10"
