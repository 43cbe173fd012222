"""gloo's ibverbs transport, which PyTorch's jobs use, between two containers: see `gloo.cc`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from testbed.namespace_bed import BedContainer, NamespaceBed
from tests.verbs.test_applications import Application, finish, inside, made, start

pytestmark = pytest.mark.kernel
__all__ = ["made"]

SOURCE = Path(__file__).with_name("gloo.cc")
HEADER = Path("/usr/include/gloo/transport/ibverbs/device.h")


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums(made: NamespaceBed, ranks: int) -> None:
    """Processes sum and broadcast vectors of all sizes; each value is right."""
    add_up(list(made.containers.values()), ranks)


@cache
def _folder() -> TemporaryDirectory[str]:
    """Of the program, until the end of the tests. pytest's folder is root's alone."""
    return TemporaryDirectory(prefix="freeflow-gloo-")


@cache
def gloo_program() -> Path:
    """It is compiled once, because that takes longest."""
    program = Path(_folder().name) / "gloo"
    subprocess.run(["g++", "-std=c++17", "-O1", SOURCE, "-o", program, "-lgloo"], check=True)
    program.parent.chmod(0o755)
    return program


def add_up(boxes: Sequence[BedContainer], ranks: int) -> None:
    """Run the program with its processes in these containers, in turn."""
    if shutil.which("g++") is None or not HEADER.exists():
        pytest.skip(f"missing: g++, {HEADER} (make setup)")
    program = gloo_program()
    with TemporaryDirectory(prefix="freeflow-gloo-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        running = [
            start(
                boxes[rank % len(boxes)],
                inside(Application("gloo", 0, "", ()), f"{program} {folder} {rank} {ranks}"),
            )
            for rank in range(ranks)
        ]
        assert [finish(process) for process in running] == ["done\n"] * ranks
