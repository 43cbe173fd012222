"""Queue pairs of type UD, without a router: see `datagrams.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_test, some_seed, sources


@pytest.fixture(scope="module", params=SANITIZERS)
def program(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """`datagrams`, built once for each sanitizer."""
    folder = tmp_path_factory.mktemp("datagrams")
    return compile_test("datagrams", folder, request.param, *sources())


def test_rules(program: Path) -> None:
    """A datagram arrives with its header, or is lost as it may be; nobody waits for a peer that is
    not there or takes nothing, and groups get what is sent to them.
    """
    run_test(program, "rules")


@pytest.mark.parametrize("mode", ["hostile", "threads"])
def test_all_at_once(program: Path, mode: str) -> None:
    """Whatever a peer writes into its ring harms nothing, and threads may send and take at once."""
    run_test(program, mode, SECONDS, str(some_seed()))
