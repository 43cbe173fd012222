"""Direct memory, without a router: see `standstill.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SECONDS, compile_test, run_rules_and_race


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("program", ["standstill"])
def test_pages(tmp_path: Path, program: str) -> None:
    """All other threads stand still for a moment, and nothing that they write is lost."""
    run_rules_and_race(compile_test(program, tmp_path, ""))
