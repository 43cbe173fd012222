"""`python -m bench quick` with real namespaces and programs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.measures import measures
from bench.quick import absent_programs
from testbed.patience import patience

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

COUNTING = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((destructor)) static void count(void)
{
        const char *path = getenv("FREEFLOW_STATS");
        FILE *file = path ? fopen(path, "a") : NULL;

        if (file) {
                fputs("{\\"tracked\\":2,\\"receivers\\":1,\\"senders\\":1}\\n", file);
                fclose(file);
        }
}
"""


def quick(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", "quick", "--rounds", "1", "--seconds", "0.2", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )


def programs_of(prefix: str) -> list[str]:
    """Command lines of running programs that name a path with the prefix."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if prefix in line:
            found.append(line)
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores are needed")
def test_each_variant_has_a_figure(tmp_path: Path) -> None:
    """A case runs on TCP, AF_UNIX and the bare ring, and no program is left afterwards."""
    done = quick(
        "--cases", "pingpong_64b_two_cores,stream_16k,idle_cpu", "--json", TMPDIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"pingpong_64b_two_cores", "stream_16k", "idle_cpu"}
    for name in ("pingpong_64b_two_cores", "stream_16k"):
        for variant in ("tcp", "unix", "ring"):
            assert found[name][variant]["median"] > 0
            assert found[name][variant]["cpu_us"] > 0
        assert "freeflow" not in found[name]
        assert found[name]["upgraded"] is None
    assert set(found["idle_cpu"]) >= {"tcp", "unix"}
    assert not programs_of(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_library_is_loaded_and_its_counters_are_read(tmp_path: Path) -> None:
    """With --library one variant loads it; the share of upgraded connections is its count."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing")
    source, library = tmp_path / "counting.c", tmp_path / "counting.so"
    source.write_text(COUNTING)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    words = ("--cases", "pingpong_64b_one_core", "--variants", "tcp,freeflow", "--json")
    done = quick(*words, "--library", str(library), "--no-router")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["pingpong_64b_one_core"]
    assert found["freeflow"]["median"] > 0
    assert found["upgraded"] == 0.5
    assert "unix" not in found


def test_command_runs_meanwhile(tmp_path: Path) -> None:
    """The command of --setup gets the namespaces, and ends with the measurement."""
    note = tmp_path / "note"
    setup = f'nsenter --net="$BENCH_SERVER" hostname -I; echo $$ $BENCH_SERVER_ADDRESS >{note}; echo go; exec sleep 60'
    done = quick("--cases", "pingpong_64b_one_core", "--variants", "tcp", "--setup", setup)
    assert done.returncode == 0, done.stderr
    pid, address = note.read_text().split()
    assert not Path("/proc", pid).exists()
    assert address.startswith("10.")


def test_unknown_case_is_refused() -> None:
    """A pattern that matches no case is an error that lists the cases."""
    done = quick("--cases", "pingpong_1b")
    assert done.returncode != 0
    assert "no case is called pingpong_1b" in done.stderr
    assert "pingpong_64b_one_core" in done.stderr


def test_missing_programs_are_named_by_their_packages(tmp_path: Path) -> None:
    """If programs of a case are missing, their packages are named."""
    some = [one for one in measures() if one.case.name in ("redis_p1_c1", "memcached_c50")]
    assert absent_programs(some, path=str(tmp_path)) == [
        *("gcc", "memcached", "redis-server", "redis-tools"),
    ]
