"""Checks that the prose of Markdown files wraps at 100 columns: `python -m tools.prose`.

Tables, code blocks, HTML, and lines with a link or a URL may be longer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).parents[1]
COLUMNS: Final = 100
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


def main() -> int:
    """Print every such line; 1 if there is one."""
    wrong = [
        f"{path.relative_to(TOP)}:{number}: {len(line)} columns, at most {COLUMNS}"
        for path in documents()
        for number, line in long_lines(path.read_text())
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
