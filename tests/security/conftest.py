"""Attacks run in fresh network namespaces and need root; a skip names what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.kernel_hosts import missing_tools

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_tools()
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))
