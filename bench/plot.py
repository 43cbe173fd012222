"""`python -m bench plot RESULT.json CHART.svg`: draws a chart of the ratios in a stored result.

The result is what a suite writes with `--out`; `--plot` draws the same chart at once. Each bar is a
ratio of medians; its whisker is an interquartile range, from the spreads of both subjects.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import click

from bench.chart import Ratio, ratios_as_svg
from bench.choice import pick
from bench.errors import BenchError
from bench.report import BenchReport
from bench.stats import FREEFLOW, FREEFLOW_PLAIN, HOST, OVERLAY, Row

BASES: Final = (OVERLAY, HOST, FREEFLOW_PLAIN)
"""Subjects that `freeflow` can be compared with."""


def load(path: Path) -> BenchReport:
    """The stored result of a suite.

    Raises:
        BenchError: the file cannot be read, or is not a result.
    """
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path} is no result of a suite: {error}") from error
    if not isinstance(stored, dict) or not stored.keys() >= {"machine", "results"}:
        raise BenchError(
            f"{path} has no machine and results; write it with `python -m bench SUITE --out FILE`"
        )
    return cast("BenchReport", stored)


def speedup(name: str, row: Row, base: str) -> Ratio | None:
    """How many times better than `base` freeflow is; None if one of them has no figure.

    Where less is better the ratio is inverted, so more than 1 is an improvement in every row. The
    relative spread of a ratio of independent medians is the root of the sum of their squares.
    """
    figures = cast("Mapping[str, Any]", row)
    ours, theirs = figures[FREEFLOW], figures.get(base)
    if not ours or not theirs:
        return None
    value = ours / theirs if row["better"] == "more" else theirs / ours
    spreads = row["spread_of"]
    spread = math.hypot(spreads.get(FREEFLOW) or 0.0, spreads.get(base) or 0.0)
    return Ratio(
        name, row["about"], value, value * max(1 - spread / 2, 0.0), value * (1 + spread / 2)
    )


def ratios(report: BenchReport, cases: Sequence[str], base: str, more: str = "") -> list[Ratio]:
    """A bar for each of these cases that both subjects have a figure of; `more` is added to names.

    Raises:
        BenchError: there is none.
    """
    results = report["results"]
    made = [
        replace(ratio, what=ratio.what + more)
        for name in cases
        if (ratio := speedup(name, results[name], base)) is not None
    ]
    if not made:
        raise BenchError(f"no case has figures of both freeflow and {base}; measure both subjects")
    return made


def about(report: BenchReport) -> str:
    """The line below a chart's title: the machine and the day."""
    machine = report["machine"]
    return (
        f"{machine['cores']} cores, {machine['cpu']}, Linux {machine['kernel']}, "
        f"Docker {', '.join(machine['engines']) or '-'}, {machine['when'][:10]}"
    )


WHISKERS: Final = "\nmedians; whiskers: interquartile range"


def chart(report: BenchReport, patterns: tuple[str, ...], base: str, title: str) -> str:
    """The chart, as SVG, of the cases that match a pattern.

    Raises:
        BenchError: none of them was measured on both subjects.
    """
    made = ratios(report, pick(patterns, list(report["results"])), base)
    named = title or f"FreeFlow compared with {base} (1 = equal)"
    return ratios_as_svg(made, named, about(report) + WHISKERS)


def whole(report: BenchReport) -> str:
    """The chart of all cases, compared with Docker's `overlay`. Raises BenchError as `chart`."""
    return chart(report, ("*",), OVERLAY, "")


@click.command(help=__doc__)
@click.argument("result", type=click.Path(path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--cases", default="*", show_default=True, help="Patterns, separated by commas.")
@click.option("--to", "base", type=click.Choice(BASES), default=OVERLAY, show_default=True)
@click.option("--title", default="", help="Title of the chart.")
def main(result: Path, picture: Path, cases: str, base: str, title: str) -> None:
    try:
        text = chart(load(result), tuple(cases.split(",")), base, title)
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(text)
