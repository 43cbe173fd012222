"""`run.sh`, which runs all tests: what it does about tests that fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

RUN: Final = Path(__file__).parents[1] / "run.sh"
SETTINGS: Final = '[tool.pytest.ini_options]\nmarkers = ["long"]\n'
PASSES: Final = "def test_passes(): pass\n"
FAILS: Final = "def test_fails(): assert False\n"
ONCE: Final = """
from pathlib import Path
def test_once():
    before = Path("before")
    known = before.exists()
    before.touch()
    assert known
"""
"""Fails in the first run."""


def outcome(folder: Path, tests: str, swarm: str, vm: str) -> tuple[int, str]:
    """Run a project with these tests; its exit code and what it prints."""
    files = {"unit/test_a.py": tests, "swarm/test_b.py": swarm, "vm/test_c.py": vm}
    for name, text in files.items():
        path = folder / "tests" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (folder / "pyproject.toml").write_text(SETTINGS)
    shutil.copy(RUN, folder / "tests/run.sh")
    done = subprocess.run(
        ["tests/run.sh", sys.executable],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("part", [0, 1])
def test_one_passes_when_alone(tmp_path: Path, part: int) -> None:
    """A test of any part that passes alone is named in the end."""
    tests = [PASSES] * 3
    tests[part] = PASSES + ONCE
    code, said = outcome(tmp_path, *tests)
    assert code == 0, said
    assert said.count("1 passed") == 4
    assert said.splitlines()[-2].startswith("Passed only alone")
    assert said.splitlines()[-1].endswith("::test_once")


def test_one_fails_again(tmp_path: Path) -> None:
    """A test that fails again fails the run."""
    tests = [PASSES] * 3
    tests[2] = FAILS
    code, said = outcome(tmp_path, *tests)
    assert (code, said.count("1 failed"), "Passed only" in said) == (1, 2, False)


def test_many_fail(tmp_path: Path) -> None:
    """Many failures are no accident: none of these tests runs again."""
    tests = [PASSES] * 3
    tests[0] = "\n".join(FAILS.replace("fails", f"fails_{n}") for n in range(5)) + ONCE
    code, said = outcome(tmp_path, *tests)
    assert (code, "Once more" in said) == (1, False)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Tests that can't even be collected fail the run."""
    tests = [PASSES] * 3
    tests[1] = "import nothing_of_this_name\n"
    code, said = outcome(tmp_path, *tests)
    assert (code, "Once more" in said) == (1, False)
