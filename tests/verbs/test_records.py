"""Records between two sides: see `records.c`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.verbs.conftest import SANITIZERS, SECONDS, compile_test, run_test, some_seed


@pytest.fixture(scope="module", params=SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled program, without a sanitizer and with each."""
    return compile_test("records", tmp_path_factory.mktemp("records"), request.param)


def seeds() -> tuple[str, str]:
    """Two seeds: the least bit says whether the ring is a local one, or has another size."""
    number = some_seed()
    return str(number | 1), str(number & ~1)


def test_rules(program: Path) -> None:
    """A record with one wrong field, or out of order, is rejected; room is shared out as promised,
    and records lie around the ring's end unharmed.
    """
    run_test(program, "rules")


@pytest.mark.timeout(2 * int(SECONDS) + 180)
@pytest.mark.parametrize("sides", ["threads", "processes"])
def test_both_sides(program: Path, sides: str) -> None:
    """Both sides send, write, read and answer as much as they may: each byte is right, no answer
    lacks room, and neither side stops.
    """
    for seed in seeds():
        run_test(program, "stress", sides, SECONDS, seed)


@pytest.mark.timeout(2 * int(SECONDS) + 180)
@pytest.mark.parametrize("sides", ["threads", "processes"])
def test_relayed(program: Path, sides: str) -> None:
    """The same holds if bytes come in parts, and relays report late what was taken."""
    for seed in seeds():
        run_test(program, "relayed", sides, SECONDS, seed)


@pytest.mark.timeout(2 * int(SECONDS) + 180)
def test_hostile(program: Path) -> None:
    """Whatever the other side writes into the ring, what is taken is valid, and nothing outside the
    ring is used.
    """
    for seed in seeds():
        run_test(program, "hostile", SECONDS, seed)
