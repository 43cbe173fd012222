"""Completion queues alone: see `completion.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c
from tests.verbs.conftest import HEADER

SOURCE = Path(__file__).with_name("completion.c")
SECONDS = os.environ.get("TORTURE_SECONDS", "1")


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
def test_completion(tmp_path: Path, sanitizer: str) -> None:
    """Each completion comes once and in order, each event that a program waits for comes, and a
    queue that is too full says so.
    """
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER}")
    options = ["-std=gnu11", "-D_GNU_SOURCE"]
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wno-tsan"]
    program = compile_c(SOURCE, tmp_path / "completion", *options)
    seed = str(int.from_bytes(os.urandom(4), "big"))
    for arguments in (["rules"], ["race", SECONDS, seed]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
