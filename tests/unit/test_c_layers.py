"""The C files of each folder stand in layers: a file includes, and calls, only lower ones."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
LIBRARY = "dataplane/library"
FOLDERS = [
    LIBRARY,
    "dataplane/relay",
    "dataplane/ebpf",
    "dataplane/verbs",
    "plugin/runtime",
    "bench/tools",
]

_NOISE = re.compile(r"/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|__attribute__\(\(.*?\)\)+", re.DOTALL)
"""Comments, strings and attributes."""
_INCLUDE = re.compile(r'^#include "([^"/]+)\.h"', re.MULTILINE)
_DEFINITION = re.compile(
    r"^ *(?!static\b|typedef\b)[A-Za-z_][\w \*()]*?\b(\w+)\([^;{}]*\)\n\{", re.MULTILINE
)
_CALL = re.compile(r"(?<![\w.>])(\w+)\(")


def sources(folder: str) -> dict[str, str]:
    """The text of each module of a folder: `name.c` and `name.h` together, by name."""
    texts: dict[str, str] = {}
    for path in sorted((TOP / folder).glob("*.[ch]")):
        name = path.name.split(".")[0]
        texts[name] = texts.get(name, "") + path.read_text()
    return texts


def includes(folder: str) -> dict[str, set[str]]:
    """Which modules of its folder each module includes."""
    return {
        name: set(_INCLUDE.findall(text)) & sources(folder).keys() - {name}
        for name, text in sources(folder).items()
    }


def calls(folder: str) -> dict[str, set[str]]:
    """Which modules of its folder each module calls, by the names of the functions that they
    define.
    """
    texts = {name: _NOISE.sub(" ", text) for name, text in sources(folder).items()}
    home = {
        function: name for name, text in texts.items() for function in _DEFINITION.findall(text)
    }
    return {
        name: {home[function] for function in _CALL.findall(text) if function in home} - {name}
        for name, text in texts.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_includes_a_higher_one(folder: str) -> None:
    """The files of a folder can be put in an order in which each includes only earlier ones."""
    assert not circle(includes(folder))


def test_no_file_of_the_library_calls_a_higher_one() -> None:
    """Calls go the way of the includes. Where a lower file has to call a higher one there is a hook
    (hooks.h).
    """
    assert not circle(calls(LIBRARY))


def test_one_file_changes_the_state_of_a_connection() -> None:
    """Only flow.c stores an end's stage and a flow's phase."""
    store = re.compile(
        r"(?:atomic_)?(?:store|exchange|compare)\w*\(\s*&[\w>.\-]*\b(?:stage|phase),"
    )
    assert [name for name, text in sources(LIBRARY).items() if store.search(text)] == ["flow"]
