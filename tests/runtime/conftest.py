"""Builds freeflow-runc once: as it is shipped but with other paths, and with sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.runtime.world import RuntimeWorld

TOP = Path(__file__).parents[2]


def build(folder: Path, *sanitizer: str) -> Path:
    output = folder / "freeflow-runc"
    subprocess.run(
        [TOP / "plugin/runtime/build.sh", output, *sanitizer],
        env={**os.environ, "FREEFLOW_TEST": "1"},
        check=True,
    )
    return output


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="session")
def checked_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build(tmp_path_factory.mktemp("runtime-checked"), "address,undefined")


@pytest.fixture
def world(program: Path, tmp_path: Path) -> RuntimeWorld:
    return RuntimeWorld(program, tmp_path)
