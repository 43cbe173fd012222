"""Bars of two subjects in a terminal: the longer one of a row has the full width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.report import number, times
from plugin.cli.table import bar

WIDTH: Final = 48
"""Characters of a full bar."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A row: the figures of both subjects; `theirs` is None if the load does not work there."""

    what: str
    note: str
    unit: str
    ours: float
    theirs: float | None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    def shares(self) -> tuple[float, float]:
        """Lengths of both bars; the longer one is 1."""
        longest = max(self.ours, self.theirs or 0.0)
        return (self.ours / longest, (self.theirs or 0.0) / longest) if longest else (0.0, 0.0)

    def figures(self) -> tuple[str, str]:
        """Both figures with their unit."""
        theirs = "no answer" if self.theirs is None else f"{number(self.theirs)} {self.unit}"
        return f"{number(self.ours)} {self.unit}", theirs


def in_terminal(bars: Sequence[Bar], ours: str, theirs: str) -> str:
    label = max(len(ours), len(theirs))
    lines = []
    for one in bars:
        mine, other = one.shares()
        figures = one.figures()
        ratio = "" if one.ratio is None else f", {times(one.ratio)}"
        lines += [
            f"{one.what}, {one.note}",
            f"  {ours:<{label}} {bar(mine, WIDTH)} {figures[0]}{ratio}",
            f"  {theirs:<{label}} {bar(other, WIDTH)}{' ' if other else ''}{figures[1]}",
        ]
    return "\n".join(lines) + "\n"
