"""Asking for the device, with a libfreeflow.so that does as the test wants: see `asking.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c
from tests.verbs.conftest import BUILD, HEADER
from tests.verbs.test_notify import TESTED

SOURCE = Path(__file__).with_name("asking.c")
SECONDS = os.environ.get("TORTURE_SECONDS", "1")


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
def test_asking(tmp_path: Path, sanitizer: str) -> None:
    """Only services of the same build are used; each message is taken once and by one thread; what
    the router has said last of a GID holds, whichever socket is lost.
    """
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER}")
    options = ["-std=gnu11", "-D_GNU_SOURCE", "-rdynamic"]
    options += [str(BUILD.with_name(f"{name}.c")) for name in (*TESTED, "client")]
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wno-tsan"]
    program = compile_c(SOURCE, tmp_path / "asking", *options)
    seed = str(int.from_bytes(os.urandom(4), "big"))
    for arguments in (["rules"], ["race", SECONDS, seed]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
