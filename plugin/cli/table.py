"""Tables and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from plugin.cli.terminal import shown

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], indent: str = "  ") -> str:
    """Aligned columns, two blanks between; empty without rows."""
    lines = [[shown(cell) for cell in row] for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[i]) for line in [list(header), *lines]) for i in range(len(header))]
    return "".join(
        indent
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in [list(header), *lines]
    )


def amount(number: float) -> str:
    """Bytes, with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def draws(encoding: str | None) -> bool:
    """Whether a terminal with this encoding has the characters of bars."""
    try:
        _EIGHTHS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def bar(part: float, width: int, *, plain: bool = False) -> str:
    """A bar of this part of `width` characters; never empty if `part` is more than 0.

    It ends with an eighth of a character, or with `plain` consists of whole ones in ASCII.
    """
    steps = 1 if plain else len(_EIGHTHS) - 1
    length = round(min(max(part, 0.0), 1.0) * width * steps)
    if part > 0:
        length = max(length, 1)
    if plain:
        return "#" * length
    return "█" * (length // steps) + (_EIGHTHS[length % steps] if length % steps else "")
