"""`python -m bench relay` works, in a run that is too short to mean anything."""

from __future__ import annotations

from pathlib import Path

from bench import relay
from tests.dataplane.places import compile_c


def test_every_case_has_its_figures(binary: Path, folder: Path) -> None:
    """A single message costs one WRITE and one doorbell; the table has all cases."""
    tool = compile_c(relay.TOOL, folder / "relayload")
    said: list[str] = []
    rows = relay.measure(binary, tool, 1, 0.02, said.append)
    assert len(said) == len(rows) == 9
    alone = rows["delay_64b"]
    assert 0 < alone["value"] <= alone["p99"]
    assert 0.9 < alone["per_message"]["writes"] < 1.5
    assert 0.9 < alone["per_message"]["posts"] < 3
    bulk = rows["stream_65536b"]
    assert bulk["value"] > 0 < bulk["per_core"]
    assert bulk["per_megabyte"]["writes"] > 15
    table = relay.table(rows)
    assert all(name in table for name in rows)
