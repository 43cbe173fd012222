"""Completion queues with their channels, asynchronous events and the device's attributes, without
queue pairs: see `notify.c`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import compile_c
from tests.verbs.conftest import BUILD, HEADER

SOURCE = Path(__file__).with_name("notify.c")
TESTED = (
    "attribute_masks",
    "attributes",
    "channel",
    "completion",
    "cq",
    "devices",
    "executor",
    "files",
    "interfaces",
    "keys",
    "memory",
    "numbers",
    "opening",
    "port",
    "post",
    "post_ex",
    "progress",
    "qp",
    "queue_pair",
    "record",
    "requester",
    "sysfs",
    "work",
)
SECONDS = os.environ.get("TORTURE_SECONDS", "1")


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", ["", "address,undefined", "thread"])
def test_notify(tmp_path: Path, sanitizer: str) -> None:
    """Queues, channels and contexts answer as those of a device; each event comes to a program that
    sleeps, and none of a queue that is gone.
    """
    if shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip(f"missing: gcc, {HEADER}")
    options = ["-std=gnu11", "-D_GNU_SOURCE"]
    options += [str(BUILD.with_name(f"{name}.c")) for name in TESTED]
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-Wno-tsan"]
    program = compile_c(SOURCE, tmp_path / "notify", *options)
    seed = str(int.from_bytes(os.urandom(4), "big"))
    for arguments in (["rules"], ["race", SECONDS, seed]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
