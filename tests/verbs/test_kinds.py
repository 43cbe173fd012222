"""Two processes of programs that use queue pairs of type UC or UD, or shared receive queues."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.dataplane.places import LIBRARY
from tests.verbs import test_pair
from tests.verbs.hand_router import hand_router
from tests.verbs.router import router

PING_PONGS = (
    "ibv_uc_pingpong -g 0 -n 1000",
    "ibv_uc_pingpong -g 0 -n 200 -s 200000 -e",
    "ibv_srq_pingpong -g 0 -n 1000 -q 4",
    "ibv_srq_pingpong -g 0 -n 500 -s 100000 -e",
    "ibv_ud_pingpong -g 0 -n 1000",
    "ibv_ud_pingpong -g 0 -n 500 -s 4000 -e",
)
PERFTESTS = (
    "ib_send_lat -x 0 -c UC -n 500",
    "ib_send_bw -x 0 -c UC -n 500 -s 4096",
    "ib_write_lat -x 0 -c UC -n 500",
    "ib_write_bw -x 0 -c UC -n 500",
    "ib_send_lat -x 0 --use-srq -n 500",
    "ib_send_bw -x 0 --use-srq -n 500 -q 4",
    "ib_send_bw -x 0 --use-srq -n 500 -e -b",
    "ib_send_lat -x 0 -c UD -n 500",
    "ib_send_lat -x 0 -c UD -n 500 -e",
    "ib_send_bw -x 0 -c UD -n 500 -q 2",
    "ib_send_bw -x 0 -c UD -n 500 -b",
)


def run(library: Path, path: Path, command: Sequence[str]) -> list[str]:
    """What the two processes print; skipped without the program."""
    if shutil.which(command[0]) is None or not LIBRARY.exists():
        pytest.skip(f"missing: {command[0]} (make setup), {LIBRARY} (make library)")
    return test_pair.play(library, path, command)


@pytest.mark.parametrize("command", PING_PONGS)
def test_ping_pong(library: Path, tmp_path: Path, command: str) -> None:
    """Messages go to and fro."""
    path = tmp_path / "router.sock"
    with hand_router(path):
        said = run(library, path, command.split())
    assert all("iters in" in text for text in said), said


@pytest.mark.parametrize("command", PERFTESTS)
def test_perftest(library: Path, tmp_path: Path, command: str) -> None:
    """The program comes to its end, and prints what it has measured."""
    path = tmp_path / "router.sock"
    with hand_router(path):
        said = run(library, path, [*command.split(), "-F"])
    assert all("#bytes" in text for text in said), said


@pytest.mark.parametrize("kind", ["uc", "ud", "srq"])
def test_with_the_real_router(library: Path, tmp_path: Path, kind: str) -> None:
    """The router itself serves them."""
    with router(tmp_path) as made:
        said = run(library, made.socket, [f"ibv_{kind}_pingpong", "-g", "0", "-n", "1000"])
    assert all("iters in" in text for text in said), said
