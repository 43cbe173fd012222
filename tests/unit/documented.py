"""The findings of `freeflow` that docs/troubleshooting.md explains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

DOCUMENT: Final = Path(__file__).parents[2] / "docs/troubleshooting.md"
PLACEHOLDERS: Final = r"\\?(NAME|CONTAINER|COUNT|FEATURE|PORT|DEVICE|HOST|VERSION|…)"


def sayings() -> list[str]:
    """The first cells of the tables about `status` and `doctor`."""
    text = DOCUMENT.read_text().split("## Why a connection", maxsplit=1)[0]
    cells = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", text, re.MULTILINE)
    return [saying for cell in cells for saying in re.findall(r"`([^`]+)`", cell)]


def is_documented(what: str) -> bool:
    """Whether a finding has a row."""
    return any(
        re.fullmatch(re.sub(PLACEHOLDERS, ".+", re.escape(saying)), what) for saying in sayings()
    )
