"""Tables and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from plugin.cli.terminal import shown


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
