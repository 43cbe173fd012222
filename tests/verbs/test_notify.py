"""Completion queues with their channels, asynchronous events and the device's attributes, without
queue pairs: see `notify.c`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_rules_and_race, sources


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_notify(tmp_path: Path, sanitizer: str) -> None:
    """Queues, channels and contexts answer as those of a device; each event comes to a program that
    sleeps, and none of a queue that is gone.
    """
    run_rules_and_race(compile_test("notify", tmp_path, sanitizer, *sources()))
