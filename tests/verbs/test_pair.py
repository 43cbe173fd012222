"""Programs of rdma-core, with the router: mostly two processes whose queue pairs it pairs."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from testbed import wait_until
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, compile_c
from tests.verbs.conftest import HEADER
from tests.verbs.hand_router import HandRouter, hand_router
from tests.verbs.router import OWN, router

PROGRAM = "ibv_rc_pingpong"
SLEEPER = Path(__file__).with_name("sleeper.c")


def listens(port: int) -> bool:
    """Whether somebody listens at this port of this host."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def play(library: Path, path: Path, command: Sequence[str]) -> list[str]:
    """What the two processes of a program print."""
    with playing(library, path, command) as ends:
        said = [end.communicate(timeout=patience(30))[0] for end in ends]
    assert [end.returncode for end in ends] == [0, 0], said
    return said


@contextlib.contextmanager
def playing(
    library: Path, path: Path, command: Sequence[str]
) -> Iterator[list[subprocess.Popen[str]]]:
    """The two processes of a program, which are killed in the end."""
    port = free_port()
    command = [*command, "-p", str(port)]
    ends: list[subprocess.Popen[str]] = []
    try:
        for arguments in ([], ["127.0.0.1"]):
            ends.append(
                subprocess.Popen(
                    [*command, *arguments],
                    env=environment(library, path),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            until = time.monotonic() + patience(10)
            while not arguments and not listens(port):
                assert ends[0].poll() is None, ends[0].communicate()[0]
                assert time.monotonic() < until
                time.sleep(0.01)
        yield ends
    finally:
        for end in ends:
            end.kill()
            end.wait()


def check_given_back(router: HandRouter) -> None:
    """Check that both processes have given the slot back, and told that their queue pairs have
    ended.
    """
    router.await_releases(2)
    router.await_ends(2)
    assert sorted(side for _, side, _ in router.releases) == [0, 1]


@pytest.mark.parametrize(
    "options",
    [
        ["-n", "1000"],
        ["-n", "300", "-s", "200000", "-c"],
        ["-n", "300", "-s", "200000", "-r", "1", "-c"],
        ["-n", "300", "-N", "-c"],
        ["-n", "1000", "-e"],
        ["-n", "100", "-s", "200000", "-e", "-c"],
    ],
    ids=" ".join,
)
def test_ping_pong(library: Path, tmp_path: Path, options: list[str]) -> None:
    """The program's messages come through, its bytes are right, and the slot is given back."""
    if shutil.which(PROGRAM) is None or not LIBRARY.exists():
        pytest.skip(f"missing: {PROGRAM} (make setup), {LIBRARY} (make library)")
    path = tmp_path / "router.sock"
    with hand_router(path) as router:
        said = play(library, path, [PROGRAM, "-g", "0", *options])
        check_given_back(router)
    assert all("iters in" in text for text in said), said


@pytest.mark.parametrize("options", [["-n", "1000"], ["-n", "1000", "-e"]], ids=" ".join)
def test_with_the_real_router(library: Path, tmp_path: Path, options: list[str]) -> None:
    """The router itself pairs them, too."""
    if shutil.which(PROGRAM) is None or not LIBRARY.exists():
        pytest.skip(f"missing: {PROGRAM} (make setup), {LIBRARY} (make library)")
    with router(tmp_path) as made:
        said = play(library, made.socket, [PROGRAM, "-g", "0", *options])

        # Each side sends 1000 messages of 4096 bytes. The last words of the one that ends second
        # are lost if the router has something to tell it when it is gone.
        wait_until("one to be counted", lambda: made.client.statistics().verbs.operations >= 1000)
        counts = made.client.statistics().verbs
    assert all("iters in" in text for text in said), said
    assert counts.operations <= 2000
    assert counts.bytes == counts.operations * 4096


@pytest.mark.parametrize("options", [["-n", "100000000"], ["-n", "100000000", "-e"]], ids=" ".join)
def test_what_queue_pairs_do(library: Path, tmp_path: Path, options: list[str]) -> None:
    """While programs run, the router hears of what their queue pairs do, not often, and a router
    that replaces it hears of that, too.
    """
    if shutil.which(PROGRAM) is None or not LIBRARY.exists():
        pytest.skip(f"missing: {PROGRAM} (make setup), {LIBRARY} (make library)")
    with router(tmp_path) as made:

        def done() -> list[int]:
            return sorted(each.operations for each in made.client.verbs().queue_pairs)

        with playing(library, made.socket, [PROGRAM, "-g", "0", *options]) as ends:
            wait_until("both to tell", lambda: len(done()) == 2 and done()[0] > 0, 20, 0.02)
            changes, before = 0, done()
            until = time.monotonic() + 3
            while time.monotonic() < until:
                now = done()
                changes += now != before
                before = now
                time.sleep(0.02)
            # Two processes, each once a second at most.
            assert 1 <= changes <= 8
            made.restart()
            wait_until("a new router to hear", lambda: len(done()) == 2 and done()[0] > 0, 20, 0.1)
            assert made.client.statistics().verbs.operations < min(done())
            assert [end.poll() for end in ends] == [None, None]


@pytest.fixture(scope="module")
def sleeper(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program `sleeper.c`."""
    if shutil.which("gcc") is None or not HEADER.exists() or not LIBRARY.exists():
        pytest.skip(f"missing: gcc, {HEADER} (make setup), {LIBRARY} (make library)")
    to = tmp_path_factory.mktemp("sleeper") / "sleeper"
    return compile_c(SLEEPER, to, "-Wl,--no-as-needed", str(library))


def test_program_that_sleeps(library: Path, sleeper: Path, tmp_path: Path) -> None:
    """A write is executed though its target polls nothing but the memory, and a process with queue
    pairs that has nothing to do sleeps.
    """
    path = tmp_path / "router.sock"
    with hand_router(path):
        done = subprocess.run(
            [sleeper],
            env=environment(library, path),
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )
    assert done.returncode == 0, (done.stdout, done.stderr)


def test_peer_is_killed(library: Path, sleeper: Path, tmp_path: Path) -> None:
    """When a process is killed its peer's oldest request fails, the others are flushed, and the
    program has an event.
    """
    with router(tmp_path) as made:
        ends = [
            subprocess.Popen(
                [sleeper, "peer"],
                env=environment(library, made.socket),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        try:
            numbers = [line_of(end) for end in ends]
            for end, number in zip(ends, reversed(numbers), strict=True):
                assert end.stdin
                end.stdin.write(f"{number}\n")
                end.stdin.flush()
            assert [line_of(end) for end in ends] == ["sent", "sent"]
            time.sleep(0.3)
            assert [end.poll() for end in ends] == [None, None]
            ends[0].kill()
            said, _ = ends[1].communicate(timeout=patience(30))
        finally:
            for end in ends:
                end.kill()
                end.wait()
    words = [word.strip() for word in said.split(",")]
    assert words == [
        "transport retry counter exceeded",
        "Work Request Flushed Error",
        "local work queue catastrophic error",
    ]


def test_a_program_that_watches(library: Path, tmp_path: Path) -> None:
    """ibv_asyncwatch hears that the container has got another address."""
    if shutil.which("ibv_asyncwatch") is None or not LIBRARY.exists():
        pytest.skip(f"missing: ibv_asyncwatch (make setup), {LIBRARY} (make library)")
    with (
        router(tmp_path, {OWN: ("10.0.4.1",)}) as made,
        subprocess.Popen(
            ["ibv_asyncwatch"],
            env=environment(library, made.socket),
            stdout=subprocess.PIPE,
            text=True,
        ) as watching,
    ):
        try:
            assert line_of(watching).startswith("freeflow0: async event FD")
            made.learn({OWN: ("10.0.4.1", "10.0.4.9")})
            assert line_of(watching) == "event_type IBV_EVENT_GID_CHANGE (18), port 1"
        finally:
            watching.kill()


def line_of(end: subprocess.Popen[str]) -> str:
    """The next line that a process prints."""
    assert end.stdout
    return end.stdout.readline().strip()


def environment(library: Path, path: Path) -> dict[str, str]:
    """The environment of a program with verbs, whose router listens at this path."""
    return {"LD_PRELOAD": f"{LIBRARY}:{library}", "FREEFLOW_ROUTER": str(path)}
