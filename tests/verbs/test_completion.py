"""Completion queues alone: see `completion.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_rules_and_race


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_completion(tmp_path: Path, sanitizer: str) -> None:
    """Each completion comes once and in order, each event that a program waits for comes, and a
    queue that is too full says so.
    """
    run_rules_and_race(compile_test("completion", tmp_path, sanitizer))
