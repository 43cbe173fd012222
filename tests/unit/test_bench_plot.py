"""The chart of ratios that is drawn from a stored result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import plot
from bench.__main__ import publish
from bench.errors import BenchError
from bench.report import as_json
from bench.stats import OVERLAY, Case, Row, row

TOP = Path(__file__).parents[2]
MACHINE: dict[str, Any] = {
    "cores": 2,
    "cpu": "A <fast> CPU",
    "kernel": "6.18",
    "engines": ["26.1"],
    "when": "2026-11-29T18:10:52+00:00",
}


def _row(ours: list[float], theirs: list[float], *, more: bool = True) -> Row:
    case = Case("a", "requests/s" if more else "us", more, "what it is")
    return row(case, {"freeflow": ours, "overlay": theirs})


def _stored(tmp_path: Path, **rows: Row) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"machine": MACHINE, "results": rows}))
    return path


def test_less_is_better_is_turned_round() -> None:
    """In every row of the chart more than 1 means that FreeFlow is better."""
    faster = plot.speedup("a", _row([40.0], [10.0]), OVERLAY)
    quicker = plot.speedup("a", _row([10.0], [40.0], more=False), OVERLAY)
    assert faster is not None
    assert quicker is not None
    assert faster.value == quicker.value == 4.0


def test_a_whisker_is_the_spread_of_both_subjects() -> None:
    """Interquartile ranges of independent medians add up as squares."""
    ratio = plot.speedup("a", _row([90.0, 100.0, 110.0], [10.0, 10.0, 10.0]), OVERLAY)
    assert ratio is not None
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((9.5, 10.0, 10.5))


def test_what_was_not_measured_has_no_bar() -> None:
    """A case that one of the two subjects has no figure of is left out."""
    assert plot.speedup("a", _row([40.0], []), OVERLAY) is None


def test_a_stored_result_becomes_a_picture(tmp_path: Path) -> None:
    """The SVG is well-formed, with machine, ratios and the chosen cases only."""
    source = _stored(tmp_path, redis=_row([40.0], [10.0]), nginx=_row([9.0], [10.0]))
    picture = tmp_path / "pictures" / "chart.svg"
    done = CliRunner().invoke(plot.main, [str(source), str(picture), "--cases", "redis"])
    assert done.exit_code == 0, done.output
    root = ElementTree.fromstring(picture.read_text())  # noqa: S314  our own file
    text = "".join(root.itertext())
    for part in ("redis", "4.00x", "A <fast> CPU", "2026-11-29"):
        assert part in text
    assert "nginx" not in text


def test_a_picture_depends_on_its_figures_alone(tmp_path: Path) -> None:
    """Another process, day, language and user's style make the same bytes."""
    source = _stored(tmp_path, redis=_row([39.0, 40.0, 42.0], [10.0, 10.5]), web=_row([9.0], [10]))
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: red\nsvg.fonttype: path\n")
    picture = tmp_path / "chart.svg"
    style = {"MATPLOTLIBRC": str(tmp_path), "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run(
        [sys.executable, "-m", "bench", "plot", str(source), str(picture)],
        check=True,
        cwd=TOP,
        env={**os.environ, "PYTHONHASHSEED": "7", **style},
    )
    assert picture.read_text() == plot.whole(plot.load(source))


def test_a_suite_draws_its_result(tmp_path: Path) -> None:
    """`--plot` draws the ratios to `overlay`; a result without any keeps its other files."""
    said: list[str] = []
    made = plot.load(_stored(tmp_path, redis=_row([40.0], [10.0])))
    chart, copy = tmp_path / "new/chart.svg", tmp_path / "new/result.json"
    publish(made, ((None, as_json), (chart, plot.whole), (copy, as_json)), said.append)
    assert "4.00x" in chart.read_text()
    alone = plot.load(_stored(tmp_path, redis=_row([40.0], [])))
    other = tmp_path / "other.svg"
    publish(alone, ((other, plot.whole), (copy, as_json)), said.append)
    assert not other.exists()
    assert plot.load(copy)["results"] == alone["results"]
    (why,) = said
    assert "other.svg: no case has figures of both" in why


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    """A file that is no stored result is refused with its name."""
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"other\.json"):
        plot.load(path)
