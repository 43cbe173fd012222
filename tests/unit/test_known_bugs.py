"""docs/known-bugs.md: every known bug has existing tests, or a reason why it has none."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
DOCUMENT = (TOP / "docs/known-bugs.md").read_text()
OWN = "\n## Found in FreeFlow itself\n"
"""The second table; its rows have a class of faults instead of references."""


def _rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their headings."""
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| reference", "| class", "| ---"))
    ]


REPORTED, FOUND = map(_rows, DOCUMENT.split(OWN))
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")

REFERENCES = frozenset(
    [
        "swarmkit#2913",
        "weave#3382",
        "weave#3734",
        "moby#51554",
        "moby#28630",
        "moby#32815",
        "weave#2906",
        "moby#32789",
        "moby#37641",
        "contiv#974",
        "contiv#975",
        "contiv#1121",
        "weave#3161",
        "weave#3116",
        "libnetwork#1699",
        "moby#29471",
        "moby#30024",
        "moby#29447",
        "moby#29544",
        "moby#23990",
        "moby#31360",
        "moby#33570",
        "moby#22615",
        "moby#33871",
        "libnetwork#813",
        "libnetwork#882",
        "docker-net-dhcp#23",
        "docker-net-dhcp#44",
        "libnetwork-plugin#49",
        "moby#30348",
        "libnetwork#414",
        "libnetwork-plugin#60",
        "macvlan-docker-plugin#9",
        "docker-ovs-plugin#6",
        "contiv#267",
        "moby#36964",
        "moby#37089",
        "moby#33437",
        "moby#49921",
        "swarmkit#2639",
        "moby#33793",
        "moby#35101",
        "moby#32604",
        "libnetwork#1738",
        "libnetwork#1702",
        "weave#2805",
        "moby#34783",
        "swarmkit#2392",
        "moby#35099",
        "moby#39391",
        "moby#26548",
        "moby#35246",
        "moby#47369",
        "opa-docker-authz#87",
        "rexray#1352",
        "moby#34864",
        "moby#38575",
        "moby#36988",
        "python/cpython#80004",
        "python/cpython#11671",
        "discourse/discourse#43767",
        "brianmario/mysql2#1467",
        "libuv#3979",
        "libuv#4638",
        "uvloop#752",
        "file/file#179",
        "memcached#444",
        "gperftools#1275",
        "php/php-src#10670",
        "php/php-src#18612",
        "systemd#20586",
        "proxychains-ng#181",
    ]
)
"""The reports of users of network plugins, as far as they were collected. Add a new report here and
there.
"""


def _tests(path: Path) -> set[str]:
    """Names of a file's tests, those in classes too."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_report_has_a_row() -> None:
    """No report is forgotten, and none is listed twice."""
    listed = [reference for row in REPORTED for reference in row[0].split(", ")]
    assert sorted(listed) == sorted(REFERENCES)


def test_every_class_has_one_row() -> None:
    """No class of FreeFlow's own faults is listed twice."""
    classes = [row[0] for row in FOUND]
    assert sorted(classes) == sorted(set(classes))


@pytest.mark.parametrize("row", [*REPORTED, *FOUND], ids=lambda row: row[0])
def test_row(row: list[str]) -> None:
    """A row names the problem, and existing tests or a reason."""
    _, problem, here = row
    assert problem
    named = NAMED.findall(here)
    assert named or re.search(r"\*\w[^*]+\*", here)
    for file, name in named:
        assert (TOP / file).is_file(), file
        assert name in _tests(TOP / file), f"{file}::{name}"


def test_every_named_test_is_understood() -> None:
    """Everything in the document that looks like a test is checked above."""
    assert len(re.findall(r"`tests/[^`]*::", DOCUMENT)) == len(NAMED.findall(DOCUMENT))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", DOCUMENT))))
def test_links_lead_somewhere(target: str) -> None:
    """The documents to which it links exist."""
    assert (TOP / "docs" / target).is_file()
