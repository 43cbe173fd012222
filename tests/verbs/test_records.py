"""Records between two sides: see `records.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c

SOURCE = Path(__file__).with_name("records.c")
SECONDS = os.environ.get("TORTURE_SECONDS", "1")
SANITIZERS = ("", "address,undefined", "thread")


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program, without a sanitizer and with each."""
    if shutil.which("gcc") is None:
        pytest.skip("missing: gcc")
    options = ["-std=gnu11", "-D_GNU_SOURCE"]
    if request.param:
        options += [f"-fsanitize={request.param}", "-fno-sanitize-recover=all", "-Wno-tsan"]
    return compile_c(SOURCE, tmp_path_factory.mktemp("records") / "records", *options)


def run(program: Path, *arguments: str) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def seeds() -> tuple[str, str]:
    """Two seeds: the least bit says whether the ring is a local one, or has another size."""
    number = int.from_bytes(os.urandom(4), "big")
    return str(number | 1), str(number & ~1)


def test_rules(program: Path) -> None:
    """A record with one wrong field, or out of order, is rejected; room is shared out as promised,
    and records lie around the ring's end unharmed.
    """
    run(program, "rules")


@pytest.mark.timeout(2 * int(SECONDS) + 180)
@pytest.mark.parametrize("sides", ["threads", "processes"])
def test_both_sides(program: Path, sides: str) -> None:
    """Both sides send, write, read and answer as much as they may: each byte is right, no answer
    lacks room, and neither side stops.
    """
    for seed in seeds():
        run(program, "stress", sides, SECONDS, seed)


@pytest.mark.timeout(2 * int(SECONDS) + 180)
@pytest.mark.parametrize("sides", ["threads", "processes"])
def test_relayed(program: Path, sides: str) -> None:
    """The same holds if bytes come in parts, and relays report late what was taken."""
    for seed in seeds():
        run(program, "relayed", sides, SECONDS, seed)


@pytest.mark.timeout(2 * int(SECONDS) + 180)
def test_hostile(program: Path) -> None:
    """Whatever the other side writes into the ring, what is taken is valid, and nothing outside the
    ring is used.
    """
    for seed in seeds():
        run(program, "hostile", SECONDS, seed)
