"""Checks that prose wraps at 100 columns: `python -m tools.prose`.

Prose is that of Markdown files, the docstrings and comments of Python, and the comments of C.
Tables, code blocks, HTML, lines with a link or a URL, and comments behind code may be longer.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).parents[1]
COLUMNS: Final = 100
FOLDERS: Final = ("bench", "dataplane", "driver", "plugin", "testbed", "tests", "tools")
C_TABLE: Final = re.compile(r"\s*/?\*+ {4}")
"""A line of a table or drawing in a comment of C."""
GENERATED: Final = frozenset({"docs/files.md"})


def documents() -> list[Path]:
    """The Markdown files of this repository."""
    found = [*TOP.glob("*.md"), *TOP.glob("docs/**/*.md"), *TOP.glob("plugin/**/*.md")]
    return sorted(path for path in found if str(path.relative_to(TOP)) not in GENERATED)


def long_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line of prose that is too long."""
    in_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        elif in_code or line.startswith(("|", "<", "    ")):
            continue
        elif len(line) > COLUMNS and "](" not in line and "://" not in line:
            yield number, line


def long_python_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a docstring or comment that is too long.

    Indented blocks of a docstring are code or tables.
    """
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            continue
        block = " " * (node.col_offset + 4)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            line = lines[number - 1]
            if len(line) > COLUMNS and not line.startswith(block):
                yield number, line
    for number, line in enumerate(lines, start=1):
        if len(line) > COLUMNS and line.lstrip().startswith("# ") and "://" not in line:
            yield number, line


def long_c_lines(text: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a C comment that is too long. Indented blocks are tables."""
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        prose = inside or line.lstrip().startswith("/*")
        if len(line) > COLUMNS and prose and "://" not in line and not C_TABLE.match(line):
            yield number, line
        inside = line.rfind("/*") > line.rfind("*/") or (inside and "*/" not in line)


def sources(*endings: str) -> list[Path]:
    """The source files of this repository with these endings."""
    found = (path for folder in FOLDERS for path in (TOP / folder).rglob("*"))
    return sorted(path for path in found if path.suffix in endings)


def main() -> int:
    """Print every such line; 1 if there is one."""
    wrong = [
        f"{path.relative_to(TOP)}:{number}: {len(line)} columns, at most {COLUMNS}"
        for paths, find in (
            (documents(), long_lines),
            (sources(".py"), long_python_lines),
            (sources(".c", ".h"), long_c_lines),
        )
        for path in paths
        for number, line in find(path.read_text())
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
