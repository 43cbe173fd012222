"""What waits for room in the router's socket: see `outbox.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_rules_and_race


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_outbox(tmp_path: Path, sanitizer: str) -> None:
    """Messages for which there is no room are sent later, each once and in order."""
    run_rules_and_race(compile_test("outbox", tmp_path, sanitizer))
