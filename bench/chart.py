"""Charts as SVG, by matplotlib: of two subjects, and of ratios with their spread.

A chart of two subjects scales each row by itself: the longer bar has the full width. A chart of
ratios has one logarithmic axis for all rows, since ratios of 0.9 and of 100 are in one picture.

The same figures make the same bytes: nothing depends on the time, the machine or its fonts. Text
stays text, so that it can be searched and read aloud.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.bars import Bar
from bench.report import times

_STYLE: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "freeflow",
    "font.family": ["sans-serif"],
    # The first one comes with matplotlib; the others are for readers that lack it.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
}
_POINTS: Final = 72
"""One inch; a picture's lengths here are points, which SVG shows as pixels."""
_BETTER: Final = "#0b7a75"
_WORSE: Final = "#b8bfc6"
_DARK: Final = "#222222"
_GREY: Final = "#666666"
_WIDTH: Final = 1050
_LEFT: Final = 430
_RIGHT: Final = 110
"""Beside the axes: the names of rows, and their ratios."""
_TOP: Final = 118
_BOTTOM: Final = 20
_ROW: Final = 44
_THICK: Final = 0.42
"""A bar's part of its row."""
_NOTE: Final = 74
"""Characters of a note that fit beside the bars."""
_TICKS: Final = (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A row of a chart of ratios. More than 1 is better; `low` and `high` bound the whisker."""

    what: str
    note: str
    value: float
    low: float
    high: float


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults, not a user's, and ours."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def _paper(rows: int, title: str, about: str) -> tuple[Figure, Axes]:
    """A picture with a title, and axes with a place for so many rows, the first one at the top."""
    height = _TOP + rows * _ROW + _BOTTOM
    figure = Figure(figsize=(_WIDTH / _POINTS, height / _POINTS), dpi=_POINTS)
    figure.text(20 / _WIDTH, 1 - 30 / height, title, fontsize=17, weight="bold", color=_DARK)
    for number, line in enumerate(about.split("\n")):
        y = 1 - (50 + 15 * number) / height
        figure.text(20 / _WIDTH, y, line, fontsize=11, color=_GREY)
    wide = (_WIDTH - _LEFT - _RIGHT) / _WIDTH
    axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / height, wide, rows * _ROW / height))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.yaxis.set_major_locator(NullLocator())
    axes.xaxis.tick_top()
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _label(axes: Axes, row: int, what: str, note: str, ratio: str) -> None:
    """The texts at both sides of a row."""
    short = note if len(note) <= _NOTE else f"{note[: _NOTE - 1]}…"
    side = axes.get_yaxis_transform()
    wide = _WIDTH - _LEFT - _RIGHT
    left, right = -12 / wide, 1 + (_RIGHT - 20) / wide
    for x, y, text, style in (
        (left, row - 0.05, what, {"fontsize": 12, "weight": "bold", "color": _DARK}),
        (left, row + 0.27, short, {"fontsize": 9, "color": _GREY}),
        (right, row + 0.1, ratio, {"fontsize": 14, "weight": "bold", "color": _DARK}),
    ):
        axes.text(x, y, text, transform=side, ha="right", **style)  # type: ignore[arg-type]


def _svg(figure: Figure, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


def as_svg(bars: Sequence[Bar], title: str, about: str, ours: str, theirs: str) -> str:
    """Both subjects of each row, with the ratio at the right."""
    with _style():
        figure, axes = _paper(len(bars), title, about)
        # Figures stand behind the bars, inside the axes.
        axes.set_xlim(0, 1.4)
        axes.xaxis.set_major_locator(NullLocator())
        for place, (name, colour) in enumerate(((ours, _BETTER), (theirs, _WORSE))):
            lengths = [one.shares()[place] for one in bars]
            at = [row + (place - 0.5) * 0.4 for row in range(len(bars))]
            axes.barh(at, lengths, height=0.36, color=colour, label=name)
            for y, length, one in zip(at, lengths, bars, strict=True):
                axes.text(length + 0.015, y + 0.09, one.figures()[place], fontsize=10, color=_DARK)
        for row, one in enumerate(bars):
            _label(axes, row, one.what, one.note, "" if one.ratio is None else times(one.ratio))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=11)
        return _svg(figure, title)


def _limits(ratios: Sequence[Ratio]) -> tuple[float, float]:
    """The ends of a logarithmic axis that has 1, and all values, on it."""
    values = [value for ratio in ratios for value in (ratio.value, ratio.low, ratio.high)]
    return min([0.5, *(value for value in values if value > 0)]) / 1.1, max([2.0, *values]) * 1.1


def ratios_as_svg(ratios: Sequence[Ratio], title: str, about: str) -> str:
    """A bar from 1 to each ratio, with its spread as a whisker and its value at the right."""
    low, high = _limits(ratios)
    with _style():
        figure, axes = _paper(len(ratios), title, about)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", length=0, labelsize=10, labelcolor=_GREY)
        axes.grid(axis="x", color="#dddddd", zorder=0)
        axes.axvline(1, color=_DARK, linewidth=1, zorder=1)
        rows = range(len(ratios))
        axes.barh(
            rows,
            [ratio.value - 1 for ratio in ratios],
            left=1,
            height=_THICK,
            color=[_BETTER if ratio.value >= 1 else _WORSE for ratio in ratios],
            zorder=2,
        )
        axes.errorbar(
            [ratio.value for ratio in ratios],
            rows,
            xerr=[
                [ratio.value - max(ratio.low, low) for ratio in ratios],
                [ratio.high - ratio.value for ratio in ratios],
            ],
            fmt="none",
            ecolor=_DARK,
            elinewidth=1,
            capsize=4,
            zorder=3,
        )
        for row, ratio in enumerate(ratios):
            _label(axes, row, ratio.what, ratio.note, times(ratio.value))
        return _svg(figure, title)
