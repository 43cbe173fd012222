"""Direct memory, without a router: see `standstill.c`, `direct_pages.c` and `extents.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SECONDS, compile_test, run_rules_and_race


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("program", ["standstill", "direct_pages", "extents"])
def test_pages(tmp_path: Path, program: str) -> None:
    """Pages are replaced by a file's and back while other threads write to them, and nothing is
    lost; children have what their parent had, and what a program does with its memory has the
    effect that it has without.
    """
    run_rules_and_race(compile_test(program, tmp_path, ""))
