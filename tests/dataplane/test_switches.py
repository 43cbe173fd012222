"""A process that confines itself, loads code that bypasses the library, gets an io_uring, or ends,
keeps its connections.
"""

from __future__ import annotations

import re

import pytest

from tests.dataplane.places import SOURCES, Places

SCENARIOS = re.findall(
    r'\{"(\w+)", \w+, \w+, (?:true|false)\}', (SOURCES / "switches.c").read_text()
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_switches(both: Places, scenario: str) -> None:
    """Bytes from before and after the switch arrive, and so does the end."""
    both.play("switches", scenario, DEEP_LIBRARY=str(both.programs / "deep.so"))
