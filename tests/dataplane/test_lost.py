"""Descriptors that were closed or replaced without the library are what the kernel says they
are.
"""

from __future__ import annotations

import re

import pytest

from tests.dataplane.places import SOURCES, Places

SCENARIOS = re.findall(r'\{"(\w+)", \w+, \w+, (?:true|false)\}', (SOURCES / "lost.c").read_text())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lost(both: Places, scenario: str) -> None:
    """A file with a former connection's number is read, written and waited for as itself, and other
    connections continue.
    """
    both.play("lost", scenario)
