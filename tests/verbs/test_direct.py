"""Direct memory, without a router: see `standstill.c`, `direct_pages.c`, `extents.c` and
`direct.c`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import (
    SANITIZERS,
    SECONDS,
    compile_test,
    run_rules_and_race,
    run_test,
    sources,
)


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("program", ["standstill", "direct_pages", "extents"])
def test_pages(tmp_path: Path, program: str) -> None:
    """Pages are replaced by a file's and back while other threads write to them, and nothing is
    lost; children have what their parent had, and what a program does with its memory has the
    effect that it has without.
    """
    run_rules_and_race(compile_test(program, tmp_path, ""))


@pytest.mark.parametrize("sanitizer", SANITIZERS[:2])
def test_direct(tmp_path: Path, sanitizer: str) -> None:
    """What can be executed without a record is, byte for byte and in order; what the other side
    would refuse is refused.
    """
    run_test(compile_test("direct", tmp_path, sanitizer, *sources()))
