"""Bar charts: of two subjects, in a terminal and as SVG; of ratios with their spread, as SVG.

A chart of two subjects scales each row by itself: the longer bar has the full width. A chart of
ratios has one logarithmic axis for all rows, since ratios of 0.9 and of 100 are in one picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from bench.report import number, times

WIDTH: Final = 48
"""Characters of a full bar in a terminal."""
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_FULL: Final = 460
"""Pixels of a full bar in the SVG."""
_LEFT: Final = 300
_ROW: Final = 62
_BAR: Final = 18
_TOP: Final = 96
_FONT: Final = "font-family='Helvetica, Arial, sans-serif'"
_BETTER: Final = "#0b7a75"
_WORSE: Final = "#b8bfc6"
_RATIO_ROW: Final = 44
_RATIO_LEFT: Final = 440
_RATIO_FULL: Final = 500
_NOTE: Final = 76
"""Characters of a note that fit beside the bars."""
_TICKS: Final = (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


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


def bar(share: float, width: int = WIDTH) -> str:
    """A bar in eighths of a character; never empty if `share` is more than 0."""
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


def _picture(width: int, height: int, title: str, about: str, body: Sequence[str]) -> str:
    """A picture by itself: no script, no font, no other file."""
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' {_FONT}>",
        f"<rect width='{width}' height='{height}' fill='white'/>",
        _text(24, 36, 20, title, "font-weight='bold' fill='#111'"),
        _text(24, 58, 12, about, "fill='#666'"),
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def as_svg(
    bars: Sequence[Bar], title: str, about: str, ours: str, theirs: str, width: int = 1010
) -> str:
    """Both subjects of each row, with the ratio at the right."""
    colours = (_BETTER, _WORSE)
    height = _TOP + len(bars) * _ROW + 14
    lines = []
    for place, (name, colour) in enumerate(zip((ours, theirs), colours, strict=True)):
        x = _LEFT + place * 130
        lines.append(
            f"<rect x='{x}' y='{_TOP - 26}' width='12' height='12' rx='2' fill='{colour}'/>"
        )
        lines.append(_text(x + 18, _TOP - 15, 13, name, "fill='#333'"))
    for place, one in enumerate(bars):
        lines += _row(one, _TOP + place * _ROW, colours)
    return _picture(width, height, title, about, lines)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A row of a chart of ratios. More than 1 is better; `low` and `high` bound the whisker."""

    what: str
    note: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Axis:
    """A logarithmic axis from `low` to `high`, both more than 0, that has 1 on it."""

    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[Ratio]) -> _Axis:
        values = [value for ratio in ratios for value in (ratio.value, ratio.low, ratio.high)]
        low = min([0.5, *(value for value in values if value > 0)])
        return cls(low / 1.1, max([2.0, *values]) * 1.1)

    def x(self, value: float) -> float:
        """Pixels from the left edge of the picture."""
        share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return _RATIO_LEFT + share * _RATIO_FULL

    def ticks(self) -> list[float]:
        return [tick for tick in _TICKS if self.low <= tick <= self.high]


def _ratio_row(ratio: Ratio, axis: _Axis, top: int) -> list[str]:
    one, end = axis.x(1), axis.x(ratio.value)
    middle = top + _BAR / 2
    low, high = axis.x(ratio.low), axis.x(ratio.high)
    right = "text-anchor='end'"
    label = _RATIO_LEFT - 14
    note = ratio.note if len(ratio.note) <= _NOTE else ratio.note[: _NOTE - 1] + "…"
    lines = [
        _text(label, top + 11, 13, ratio.what, f"{right} font-weight='bold' fill='#222'"),
        _text(label, top + 26, 10, note, f"{right} fill='#666'"),
        f"<rect x='{min(one, end):.1f}' y='{top}' width='{max(abs(end - one), 1):.1f}' height='{_BAR}' "
        f"fill='{_BETTER if ratio.value >= 1 else _WORSE}'/>",
        f"<line x1='{low:.1f}' y1='{middle:g}' x2='{high:.1f}' y2='{middle:g}' stroke='#222'/>",
    ]
    lines += [
        f"<line x1='{x:.1f}' y1='{middle - 5:g}' x2='{x:.1f}' y2='{middle + 5:g}' stroke='#222'/>"
        for x in (low, high)
    ]
    x = _RATIO_LEFT + _RATIO_FULL + 80
    return [*lines, _text(x, top + 14, 15, times(ratio.value), f"{right} font-weight='bold'")]


def ratios_as_svg(ratios: Sequence[Ratio], title: str, about: str) -> str:
    """A bar from 1 to each ratio, with its spread as a whisker and its value at the right."""
    axis = _Axis.of(ratios)
    bottom = _TOP + len(ratios) * _RATIO_ROW
    lines = []
    for tick in axis.ticks():
        x = axis.x(tick)
        colour = "#222" if tick == 1 else "#ddd"
        lines.append(
            f"<line x1='{x:.1f}' y1='{_TOP - 12}' x2='{x:.1f}' y2='{bottom}' stroke='{colour}'/>"
        )
        lines.append(_text(x, _TOP - 17, 11, f"{tick:g}", "text-anchor='middle' fill='#666'"))
    for place, ratio in enumerate(ratios):
        lines += _ratio_row(ratio, axis, _TOP + place * _RATIO_ROW)
    return _picture(_RATIO_LEFT + _RATIO_FULL + 110, bottom + 14, title, about, lines)
