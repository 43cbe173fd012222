"""What freeflow-runc costs at each start, in system calls: time depends on the machine."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.runtime_start import NOTHING, RuntimeCalls, added_row, again, measure
from plugin.cli.program import HEAD, identify
from testbed.patience import patience
from tests.runtime.world import RuntimeWorld

TOP = Path(__file__).parents[2]

STRACE = shutil.which("strace") or ""
needs_strace = pytest.mark.skipif(not STRACE, reason="missing: strace")

_CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)$", re.MULTILINE)


def calls(world: RuntimeWorld, command: str) -> Counter[str]:
    """System calls of the program and its child, up to the start of the real runtime."""
    world.runtime.unlink(missing_ok=True)
    world.runtime.symlink_to(shutil.which("true") or "/bin/true")
    trace = world.top / "trace"
    subprocess.run(
        [STRACE, "-f", "-o", trace, world.program, *world.arguments(command)],
        env={
            "PATH": str(world.runtime.parent),
            "FREEFLOW_TEST_ROOT": str(world.top),
            "FREEFLOW_TEST_PATIENCE": "100",
        },
        cwd=world.bundle,
        check=True,
        timeout=60,
    )
    before, _, _ = trace.read_text().partition(f'execve("{world.runtime}"')
    return Counter(name for name, _ in _CALL.findall(before))


@needs_strace
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


@needs_strace
def test_a_start_without_it(world: RuntimeWorld) -> None:
    """Other containers cost less, and other commands of the runtime next to nothing."""
    world.describe({"bridge": ""})
    world.put(world.config())
    assert calls(world, "create").total() < 90
    assert calls(world, "state").total() < 25


def test_the_shipped_program(tmp_path: Path) -> None:
    """What is shipped needs no library of the host, and no variable leads it to other files."""
    program = tmp_path / "freeflow-runc"
    environment = {name: os.environ[name] for name in os.environ if name != "FREEFLOW_TEST"}
    subprocess.run([TOP / "plugin/runtime/build.sh", program], env=environment, check=True)
    content = program.read_bytes()
    assert b"FREEFLOW_TEST" not in content
    found = identify(content[:HEAD])
    assert found is not None
    assert not found.dynamic


@needs_strace
def test_work_that_takes_too_long(world: RuntimeWorld) -> None:
    """If the work stops in the middle, the container starts as it is, and nothing stays behind."""
    before = world.put(world.config())
    arguments = world.arguments("create")
    stop = "inject=openat2:signal=SIGSTOP"
    subprocess.run(
        [STRACE, "-f", "-qq", "-e", "trace=openat2", "-e", stop, world.program, *arguments],
        env={"PATH": str(world.runtime.parent), "FREEFLOW_TEST_ROOT": str(world.top)},
        cwd=world.bundle,
        check=True,
        timeout=patience(60),
    )
    assert world.passed() == arguments
    assert world.result() == before


def bench_calls(world: RuntimeWorld) -> RuntimeCalls:
    """The calls that `python -m bench runtime` measures, in the world instead of a host."""
    world.runtime.unlink(missing_ok=True)
    world.runtime.symlink_to(NOTHING)
    return RuntimeCalls(
        enter=(),
        root=Path("/"),
        bundle=world.bundle,
        identifier=world.id,
        program=str(world.program),
        runc=str(world.runtime),
        environment={
            "PATH": str(world.runtime.parent),
            "FREEFLOW_TEST_ROOT": str(world.top),
            "FREEFLOW_TEST_PATIENCE": "100",
        },
    )


def test_the_benchmark(world: RuntimeWorld) -> None:
    """What is measured of a start is one with the library, beside one without; a call that doesn't
    add it is an error and no figure.
    """
    before = again(world.config(), "/bench/again")
    assert json.loads(before)["linux"]["cgroupsPath"] == "/bench/again"
    assert "hooks" not in json.loads(before)
    calls = bench_calls(world)
    rows = measure("alone", "a start", calls, before, 3, random.Random(1))
    assert set(rows) == {"alone", "alone_cpu"}
    assert all(row["runs"] == 3 for row in rows.values())
    assert rows["alone"]["freeflow"] > 0
    world.describe({"bridge": ""})
    with pytest.raises(BenchError, match="the library is not where it should be"):
        measure("alone", "a start", calls, before, 3, random.Random(1))


def test_what_a_round_adds() -> None:
    """What is added is the median of the differences within a round, not that of the medians."""
    row = added_row("x", [1.0, 5.0, 9.0], [3.0, 8.0, 10.0])
    assert (row["direct"], row["freeflow"]) == (5.0, 8.0)
    assert (row["added_low"], row["added"], row["added_high"], row["added_p99"]) == (1.5, 2, 2.5, 3)
