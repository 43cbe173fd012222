"""Bells between threads, in the library and in the relay: see `bells.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import ROOT, compile_c

SOURCE = Path(__file__).with_name("bells.c")
DATAPLANE = ROOT / "dataplane"
TESTED = (
    "library/bells.c",
    "library/real.c",
    "relay/answers.c",
    "relay/arenas.c",
    "relay/context.c",
    "relay/usage.c",
)
ROUNDS = int(os.environ.get("BELL_ROUNDS", "10000"))


@pytest.fixture(scope="module", params=["", "address,undefined", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, without and with sanitizers."""
    if shutil.which("gcc") is None:
        pytest.skip("missing: gcc")
    options = ["-fno-strict-aliasing"]
    if request.param:
        # GCC warns that ThreadSanitizer doesn't see fences; all that they order here is atomic.
        options += [f"-fsanitize={request.param}", "-Wno-tsan"]
    folder = tmp_path_factory.mktemp("bells")
    sources = [str(DATAPLANE / name) for name in TESTED]
    return compile_c(SOURCE, folder / "bells", *options, *sources)


@pytest.mark.timeout(120 + ROUNDS // 200)
@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("waiter", ["library", "relay", "process"])
def test_no_wakeup_is_lost(program: Path, waiter: str, moment: str) -> None:
    """A sleeper wakes up for all that is published, though most rings are left out, and also if
    its bell becomes known in the middle.
    """
    seed = str(int.from_bytes(os.urandom(4), "big"))
    done = subprocess.run(
        [program, waiter, moment, str(ROUNDS), seed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (seed, done.stdout, done.stderr)


@pytest.mark.parametrize("waiter", ["library", "relay", "process"])
def test_a_bell_rings_once_until_its_waiter_looks(program: Path, waiter: str) -> None:
    """However many connections get something, a waiter that has not looked is rung once."""
    subprocess.run([program, waiter, "once", "100", "1"], check=True)
