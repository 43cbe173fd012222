"""The ring alone, between two threads: see `ring.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c

SOURCE = Path(__file__).with_name("ring.c")
SECONDS = os.environ.get("TORTURE_SECONDS", "4")


@pytest.mark.timeout(int(SECONDS) + 60)
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
@pytest.mark.parametrize("play", ["stress", "hostile"])
def test_ring(tmp_path: Path, play: str, sanitizer: str) -> None:
    """Each byte is right, no wake-up is lost, and no invalid header makes an end use memory outside
    the ring.
    """
    if shutil.which("gcc") is None:
        pytest.skip("missing: gcc")
    options = ["-std=gnu11", "-D_GNU_SOURCE"]
    if sanitizer:
        # GCC warns that ThreadSanitizer doesn't see fences; all that they order here is atomic.
        options += [f"-fsanitize={sanitizer}", "-Wno-tsan"]
    program = compile_c(SOURCE, tmp_path / "ring", *options)
    seed = str(int.from_bytes(os.urandom(4), "big"))
    done = subprocess.run(
        [program, play, SECONDS, seed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (seed, done.stdout, done.stderr)
