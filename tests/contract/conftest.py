"""Fixtures of the contract tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.contract.golden import forget_all
from tests.contract.places import KINDS, Place, Places


@pytest.fixture(scope="package")
def places() -> Iterator[Places]:
    with contextlib.ExitStack() as stack:
        yield Places(stack)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(places: Places, kind: str) -> Iterator[Place]:
    """A place with default settings; the test fails if anything is left afterwards."""
    with places.get(kind, {}) as made:
        yield made
        forget_all(made)
        assert made.links() == frozenset()
