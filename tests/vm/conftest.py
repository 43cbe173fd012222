"""Tests in virtual machines need root and QEMU; a skip names what is missing.

No test asserts a rate: see testbed/vm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.vm import Guest, guests, missing_tools

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_tools()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vm)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.fixture(scope="session")
def pair() -> Iterator[list[Guest]]:
    """Two guests with an RDMA device each, `rxe0`. A test leaves them as it found them, because
    their boot takes as long as many tests.
    """
    with guests(2) as made:
        for guest in made:
            guest.rxe_up()
        yield made
