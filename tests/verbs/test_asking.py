"""Asking for the device, with a libfreeflow.so that does as the test wants: see `asking.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_rules_and_race, sources


@pytest.mark.timeout(int(SECONDS) + 120)
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_asking(tmp_path: Path, sanitizer: str) -> None:
    """Only services of the same build are used; each message is taken once and by one thread; what
    the router has said last of a GID holds, whichever socket is lost.
    """
    options = ["-rdynamic", *sources("client.c")]
    run_rules_and_race(compile_test("asking", tmp_path, sanitizer, *options))
