"""Measured figures in the documents are those of the stored results.

A document that quotes figures ends with a comment that says where each comes from: a phrase of its
text, and below it a field of docs/data/NAME.json for each figure of the phrase, in its order:

    <!-- measured
    redis with one client serves 22.7 times as many
    = same-host redis_p1_c1.ratio_to_overlay
    -->

The name `goals` stands for the aims of bench/goals.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

from bench.goals import goals

TOP: Final = Path(__file__).parents[2]
DATA: Final = TOP / "docs/data"
QUOTING: Final = {
    "README.md": ("](docs/pictures/ratios.svg)", "\n## Install\n"),
    "docs/benchmarks.md": (
        "\n## Within one host, with the library, two cores",
        "\n## Within one host, with the library, four cores",
    ),
    "docs/runtime.md": ("\n## What it costs\n", "\n## Other engines\n"),
}
"""Documents, and between which of their lines every measured figure must have a source."""
FIGURE: Final = r"(?<![\w.,-])(?:\d+\.\d+|\d{1,3}(?:,\d{3})+|\d+(?= (?:times|%|µs|ms|ns|requests/s)))(?![\w,-]|\.\d)"
"""What is measured: decimals, numbers of thousands, and those with a unit of results. A condition,
such as «50 connections» or «1 KiB», is none.
"""
VERSION: Final = r"(?:Linux|Docker|engine|engines) \d+\.\d+"


def flat(text: str) -> str:
    """Prose in one line, without tables, code blocks and versions."""
    text = re.sub(
        r"<!-- begin .*?<!-- end [\w-]+ -->|^\|.*?$|```.*?```", "", text, flags=re.S | re.M
    )
    return " ".join(re.sub(VERSION, "", text).split())


def sources(text: str) -> list[tuple[str, list[str]]]:
    """Phrases of a document, each with its fields."""
    found = re.search(r"^<!-- measured\n(.*?)^-->$", text, re.S | re.M)
    assert found is not None
    entries = re.findall(r"^([^=].*)\n= (.*)$", found[1], re.M)
    assert 2 * len(entries) == len(found[1].splitlines())
    return [(phrase, fields.split(", ")) for phrase, fields in entries]


def value(field: str) -> float:
    """The stored figure of `NAME case.field`."""
    name, _, place = field.partition(" ")
    if name == "goals":
        case, _, measure = place.partition(".")
        (limit,) = (goal.limit for goal in goals() if (goal.case, goal.measure) == (case, measure))
        return limit
    found: Any = json.loads((DATA / f"{name}.json").read_text())["results"]
    for part in place.split("."):
        found = found[part]
    return float(found)


def written(figure: float, like: str) -> str:
    """A figure with as many decimals, and with commas."""
    decimals = len(like.partition(".")[2])
    return f"{figure:,.{decimals}f}"


def wrong(text: str) -> list[str]:
    """What the sources of a document say otherwise than its text."""
    prose = flat(text.partition("<!-- measured")[0])
    found = []
    for phrase, fields in sources(text):
        figures = re.findall(FIGURE, phrase)
        if phrase not in prose:
            found.append(f"the text has no «{phrase}»")
        if len(figures) != len(fields):
            found.append(f"«{phrase}» has {len(figures)} figures, and {len(fields)} sources")
            continue
        for figure, field in zip(figures, fields, strict=True):
            said = written(value(field), figure)
            if said != figure:
                found.append(f"«{phrase}»: {field} is {said}, not {figure}")
    return found


def without_source(text: str, begin: str, end: str) -> list[str]:
    """Figures between two lines that no phrase has."""
    prose = flat(text.partition(begin)[2].partition(end)[0])
    for phrase, _ in sources(text):
        prose = prose.replace(phrase, "")
    return re.findall(FIGURE, prose)


@pytest.mark.parametrize("name", QUOTING)
def test_figures_are_measured(name: str) -> None:
    """Each figure of a document is the stored one, rounded."""
    assert wrong((TOP / name).read_text()) == []


@pytest.mark.parametrize("name", QUOTING)
def test_figures_have_sources(name: str) -> None:
    """Where a document quotes stored results, no figure is without a source."""
    text = (TOP / name).read_text()
    begin, end = QUOTING[name]
    assert begin in text
    assert end in text
    assert without_source(text, begin, end) == []


TEXT: Final = """
## a
redis serves 22.7 times as many, nginx {}
times, at a load of 50 connections on Linux 6.18; 1,546,531 requests/s.
## b
<!-- measured
redis serves 22.7 times as many, nginx {} times
= same-host redis_p1_c1.ratio_to_overlay, same-host nginx_keepalive.ratio_to_overlay
-->
"""


def test_the_check_finds_other_figures() -> None:
    """A figure that is not the stored one is found, and so is one without a source."""
    assert wrong(TEXT.format("2.5", "2.5")) == []
    (found,) = wrong(TEXT.format("2.6", "2.6"))
    assert "nginx_keepalive.ratio_to_overlay is 2.5, not 2.6" in found
    (found,) = wrong(TEXT.format("2.6", "2.5"))
    assert "has no" in found
    assert without_source(TEXT.format("2.5", "2.5"), "## a", "## b") == ["1,546,531"]


def test_the_runtime_costs_less_than_it_may() -> None:
    """freeflow-runc may add 5 ms to the start of a container, and adds less."""
    for case in ("alone", "alone_cpu", "create", "create_cpu"):
        assert value(f"runtime {case}.added") < 5
