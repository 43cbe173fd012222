"""Children get a connection on a ring as they get one on TCP: programs, children that the C library
makes, and many at once.
"""

from __future__ import annotations

import re

import pytest

from tests.dataplane.places import SOURCES, Places
from tests.dataplane.test_programs import PYTHON, check, serving

SCENARIOS = re.findall(
    r'\{"(\w+)", \w+, \w+, (?:true|false)\}', (SOURCES / "children.c").read_text()
)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_children(both: Places, scenario: str) -> None:
    """The child's output arrives before that of its parent afterwards, and the connection
    continues.
    """
    both.play("children", scenario)


def test_commands(both: Places) -> None:
    """A Python server's connection can be a command's input and output in each way of subprocess,
    os and multiprocessing.
    """
    program = str(SOURCES / "commands.py")
    for _ in both.attempts(lambda: both.has_upgraded(15)):
        port = next(both.ports)
        with serving(both, [PYTHON, program, "server", str(port)], port):
            check(both, "commands.py", "client", both.address, str(port))
