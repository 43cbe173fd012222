"""A process that confines itself, loads code bound past the library, gets an io_uring, or ends,
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
    """What is said before and after the switch arrives, and the end too."""
    both.play("switches", scenario, DEEP_LIBRARY=str(both.programs / "deep.so"))
