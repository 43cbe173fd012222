"""Kernel tests need root and a few programs; a skip says which is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.kernel_hosts import Lab, lab, missing_tools


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_tools()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.fixture
def one() -> Iterator[Lab]:
    """One host."""
    with lab(1) as made:
        yield made


@pytest.fixture
def two() -> Iterator[Lab]:
    """Two hosts."""
    with lab(2) as made:
        yield made


@pytest.fixture
def three() -> Iterator[Lab]:
    """Three hosts."""
    with lab(3) as made:
        yield made
