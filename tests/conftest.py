"""Settings for all tests: random inputs repeat in every run, and a busy machine gets more time.

`HYPOTHESIS_PROFILE=explore` uses other random inputs in each run.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

from testbed.patience import slowness

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Scale each test's time-out by the machine's load.

    A time-out, in pyproject.toml or at a test, is that of a quiet machine. It must end a test that
    hangs, and not one that is slow.
    """
    marker = item.get_closest_marker("timeout")
    given = dict(marker.kwargs) if marker else {}
    if marker and marker.args:
        given["timeout"] = marker.args[0]
    seconds = float(given.pop("timeout", None) or item.config.getini("timeout") or 0)
    if seconds and item.config.getoption("timeout", None) is None:
        item.add_marker(pytest.mark.timeout(timeout=seconds * slowness(), **given), append=False)
    return (yield)
