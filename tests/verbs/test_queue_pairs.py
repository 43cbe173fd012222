"""Queue pairs through the functions that programs call, without a router: see `queue_pairs.c` and
`queue_torture.c`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c
from tests.verbs.conftest import BUILD, HEADER
from tests.verbs.test_notify import TESTED

SOURCES = [str(BUILD.with_name(f"{name}.c")) for name in TESTED]
SECONDS = os.environ.get("TORTURE_SECONDS", "1")
SANITIZERS = ("", "address,undefined", "thread")


def build(name: str, folder: Path, sanitizer: str) -> Path:
    """One of the programs, with a sanitizer or without."""
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER}")
    options = list(SOURCES)
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wno-tsan"]
    return compile_c(Path(__file__).with_name(f"{name}.c"), folder / name, *options)


@pytest.fixture(scope="module", params=SANITIZERS)
def torture(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """`queue_torture`, built once for each sanitizer."""
    return build("queue_torture", tmp_path_factory.mktemp("torture"), request.param)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_operations_and_errors(tmp_path: Path, sanitizer: str) -> None:
    """Each operation arrives byte for byte, each error is told to both sides as a device tells it,
    and limits, order and attributes are those of a device.
    """
    program = build("queue_pairs", tmp_path, sanitizer)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.timeout(2 * int(SECONDS) + 200)
@pytest.mark.parametrize("kind", ["local", "remote"])
@pytest.mark.parametrize("mode", ["threads", "processes", "posters", "hostile"])
def test_torture(torture: Path, mode: str, kind: str) -> None:
    """Everything at once arrives byte for byte, also from threads that share a queue pair; and a
    hostile peer changes nothing but what it was given.
    """
    seed = str(int.from_bytes(os.urandom(4), "big"))
    arguments = [mode, kind, SECONDS, seed]
    done = subprocess.run([torture, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
