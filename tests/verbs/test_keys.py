"""The keys of memory alone: see `keys.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_rules_and_race


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_keys(tmp_path: Path, sanitizer: str) -> None:
    """A key leads to its own memory and allows no more than it should; nobody touches memory whose
    key is removed.
    """
    run_rules_and_race(compile_test("keys", tmp_path, sanitizer))
