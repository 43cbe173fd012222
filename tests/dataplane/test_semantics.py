"""Calls, flags, options and signals mean the same on a ring as on TCP, or the connection falls back
to TCP.
"""

from __future__ import annotations

import re
from typing import Final

import pytest

from tests.dataplane.places import SOURCES, Places

_ROW: Final = re.compile(r'\{"(\w+)", \w+, \w+, (?:true|false)\}')
SCENARIOS: Final = _ROW.findall((SOURCES / "semantics.c").read_text())
FORTIFIED: Final = ("print", "print_answer", "vectors_64", "peek_all")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_semantics(both: Places, scenario: str) -> None:
    """Each scenario ends in the same way with and without the library."""
    both.play("semantics", scenario)


@pytest.mark.parametrize("scenario", FORTIFIED)
def test_fortified(both: Places, scenario: str) -> None:
    """Programs built with the C library's checked calls (_FORTIFY_SOURCE) behave the same."""
    both.play("semantics-fortified", scenario)
