"""One process with 4,000 connections beside one with two: see `fair.c`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.dataplane.places import ROOT, compile_c

SOURCE = Path(__file__).with_name("fair.c")
TESTED = ("link.c", "source.c", "mirror_scan.c", "usage.c")


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    sources = [str(ROOT / "dataplane" / "relay" / name) for name in TESTED]
    return compile_c(SOURCE, folder / "fair", "-fno-strict-aliasing", *sources)


def figures(program: Path, owners: int) -> dict[str, float]:
    said = subprocess.run([program, str(owners)], capture_output=True, check=True)
    found: dict[str, float] = json.loads(said.stdout)
    return found


def test_a_process_with_few_connections_has_its_share(program: Path) -> None:
    """In bulk a process with two connections gets as much as one with 4,000, and its messages go
    out in the turn in which they come.
    """
    found = figures(program, 2)
    assert 0.45 < found["share"] < 0.55
    assert found["waits"] == 1


def test_a_turn_scans_some_connections_of_each_process(program: Path) -> None:
    """A turn scans all connections of a small process, and so many of a large one that none is
    left out for long.
    """
    found = figures(program, 2)
    assert found["missed"] == 0
    assert found["scans"] <= 256
    assert found["turns"] <= 16


def test_connections_of_one_process_share_its_turn(program: Path) -> None:
    """Without the difference between processes, two of 4,002 connections get little."""
    found = figures(program, 1)
    assert found["share"] < 0.02
    assert found["waits"] > 10
