"""What freeflow-runc costs at each start, in system calls: time depends on the machine."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest

from tests.runtime.world import RuntimeWorld

STRACE = shutil.which("strace") or ""
pytestmark = pytest.mark.skipif(not STRACE, reason="missing: strace")

_CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)$", re.MULTILINE)


def calls(world: RuntimeWorld, command: str) -> Counter[str]:
    """System calls of the program and its child, up to the start of the real runtime."""
    world.runtime.unlink(missing_ok=True)
    world.runtime.symlink_to(shutil.which("true") or "/bin/true")
    trace = world.top / "trace"
    subprocess.run(
        [STRACE, "-f", "-o", trace, world.program, *world.arguments(command)],
        env={"PATH": str(world.runtime.parent), "FREEFLOW_TEST_ROOT": str(world.top)},
        cwd=world.bundle,
        check=True,
        timeout=60,
    )
    before, _, _ = trace.read_text().partition(f'execve("{world.runtime}"')
    return Counter(name for name, _ in _CALL.findall(before))


def test_a_start_with_the_library(world: RuntimeWorld) -> None:
    """An accelerated start makes fewer than 100 system calls, and none of them sleeps but for the
    child's result: 5 ms are enough for thousands.
    """
    world.put(world.config())
    found = calls(world, "create")
    assert b"libfreeflow.so" in world.result()
    assert found.total() < 100, found
    assert not {"fsync", "fdatasync", "nanosleep", "clock_nanosleep", "flock"} & set(found)
    assert found["poll"] + found["ppoll"] == 1


def test_a_start_without_it(world: RuntimeWorld) -> None:
    """Other containers cost less, and other commands of the runtime next to nothing."""
    world.describe({"bridge": ""})
    world.put(world.config())
    assert calls(world, "create").total() < 90
    assert calls(world, "state").total() < 25
