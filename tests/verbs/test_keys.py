"""The keys of memory alone: see `keys.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c

SOURCE = Path(__file__).with_name("keys.c")
SECONDS = os.environ.get("TORTURE_SECONDS", "1")


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
def test_keys(tmp_path: Path, sanitizer: str) -> None:
    """A key leads to its own memory and allows no more than it should; nobody touches memory whose
    key is removed.
    """
    if shutil.which("gcc") is None:
        pytest.skip("missing: gcc")
    options = ["-std=gnu11", "-D_GNU_SOURCE"]
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wno-tsan"]
    program = compile_c(SOURCE, tmp_path / "keys", *options)
    seed = str(int.from_bytes(os.urandom(4), "big"))
    for arguments in (["rules"], ["race", SECONDS, seed]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
