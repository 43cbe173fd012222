"""Bars of two subjects, row by row: in a terminal, and as an SVG file. The longer bar of a row has the full width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from bench.report import number, times

WIDTH: Final = 48
"""Of a terminal's full bar, in characters."""
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_FULL: Final = 460
"""Of the file's full bar, in pixels."""
_LEFT: Final = 300
_ROW: Final = 62
_BAR: Final = 18
_TOP: Final = 96
_FONT: Final = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True, slots=True)
class Bar:
    """A row: how fast it is with us and with the other one, which may not work at all."""

    what: str
    note: str
    unit: str
    ours: float
    theirs: float | None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    def shares(self) -> tuple[float, float]:
        """Lengths of both bars, the longer one is 1."""
        longest = max(self.ours, self.theirs or 0.0)
        return (self.ours / longest, (self.theirs or 0.0) / longest) if longest else (0.0, 0.0)


def bar(share: float, width: int = WIDTH) -> str:
    """A bar of eighths of characters; what is more than nothing is seen."""
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def in_terminal(bars: Sequence[Bar], ours: str, theirs: str) -> str:
    label = max(len(ours), len(theirs))
    lines = []
    for one in bars:
        mine, other = one.shares()
        figure = "no answer" if one.theirs is None else f"{number(one.theirs)} {one.unit}"
        ratio = "" if one.ratio is None else f", {times(one.ratio)}"
        lines += [
            f"{one.what}, {one.note}",
            f"  {ours:<{label}} {bar(mine)} {number(one.ours)} {one.unit}{ratio}",
            f"  {theirs:<{label}} {bar(other)}{' ' if other else ''}{figure}",
        ]
    return "\n".join(lines) + "\n"


def _text(x: float, y: float, size: int, words: str, more: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' {more}>{escape(words)}</text>"


def _row(one: Bar, top: int, colours: tuple[str, str]) -> list[str]:
    mine, other = one.shares()
    figure = "no answer" if one.theirs is None else f"{number(one.theirs)} {one.unit}"
    said = (f"{number(one.ours)} {one.unit}", figure)
    lines = [
        _text(
            _LEFT - 14, top + 17, 14, one.what, "text-anchor='end' font-weight='bold' fill='#222'"
        ),
        _text(_LEFT - 14, top + 36, 12, one.note, "text-anchor='end' fill='#666'"),
    ]
    for place, (share, words, colour) in enumerate(zip((mine, other), said, colours, strict=True)):
        y = top + place * (_BAR + 3)
        length = max(share * _FULL, 1)
        lines.append(
            f"<rect x='{_LEFT}' y='{y}' width='{length:.1f}' height='{_BAR}' rx='2' fill='{colour}'/>"
        )
        lines.append(_text(_LEFT + length + 7, y + 14, 12, words, "fill='#333'"))
    if one.ratio is not None:
        x = _LEFT + _FULL + 220
        lines.append(
            _text(x, top + 27, 20, times(one.ratio), "text-anchor='end' font-weight='bold'")
        )
    return lines


def as_svg(
    bars: Sequence[Bar], title: str, about: str, ours: str, theirs: str, width: int = 1010
) -> str:
    """A picture by itself: no script, no font, no other file."""
    colours = ("#0b7a75", "#b8bfc6")
    height = _TOP + len(bars) * _ROW + 14
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' {_FONT}>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        _text(24, 36, 20, title, "font-weight='bold' fill='#111'"),
        _text(24, 58, 12, about, "fill='#666'"),
    ]
    for place, (name, colour) in enumerate(zip((ours, theirs), colours, strict=True)):
        x = _LEFT + place * 130
        lines.append(
            f"<rect x='{x}' y='{_TOP - 26}' width='12' height='12' rx='2' fill='{colour}'/>"
        )
        lines.append(_text(x + 18, _TOP - 15, 13, name, "fill='#333'"))
    for place, one in enumerate(bars):
        lines += _row(one, _TOP + place * _ROW, colours)
    return "\n".join([*lines, "</svg>"]) + "\n"
