"""gloo's ibverbs transport, which PyTorch's jobs use, between two containers: see `gloo.cc`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from testbed.namespace_bed import NamespaceBed
from tests.verbs.test_applications import Application, finish, inside, made, start

pytestmark = pytest.mark.kernel
__all__ = ["made"]

SOURCE = Path(__file__).with_name("gloo.cc")
HEADER = Path("/usr/include/gloo/transport/ibverbs/device.h")


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums(made: NamespaceBed, ranks: int) -> None:
    """Processes sum and broadcast vectors of all sizes; each value is right."""
    if shutil.which("g++") is None or not HEADER.exists():
        pytest.skip(f"missing: g++, {HEADER} (make setup)")
    # Not in pytest's folder, which is root's alone.
    with TemporaryDirectory(prefix="freeflow-gloo-") as name:
        folder = Path(name)
        program = folder / "gloo"
        subprocess.run(["g++", "-std=c++17", "-O1", SOURCE, "-o", program, "-lgloo"], check=True)
        folder.chmod(0o777)
        boxes = list(made.containers.values())
        running = [
            start(
                boxes[rank % len(boxes)],
                inside(Application("gloo", 0, "", ()), f"{program} {folder} {rank} {ranks}"),
            )
            for rank in range(ranks)
        ]
        assert [finish(process) for process in running] == ["done\n"] * ranks
