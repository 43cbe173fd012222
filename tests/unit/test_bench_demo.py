"""Output of `make demo`: bars, table and picture; nothing is measured here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest

from bench import demo_speed
from bench.bars import WIDTH, Bar, in_terminal
from bench.chart import as_svg
from bench.demo_speed import (
    REDIS,
    STREAM,
    WEB,
    DemoRow,
    DemoRun,
    Meter,
    Side,
    Subject,
    WrongPathError,
)
from bench.errors import ProgramError
from bench.stats import FREEFLOW, OVERLAY

BARS = [Bar("redis", "one host: shm", "GET/s", 400.0, 100.0), Bar("vip", "all", "r/s", 7.0, None)]


def test_bars_are_as_long_as_figures() -> None:
    """The longer bar of a row is full, the other in proportion; without an answer there is none."""
    lines = in_terminal(BARS, FREEFLOW, OVERLAY).splitlines()
    assert lines[1] == f"  freeflow {'█' * WIDTH} 400 GET/s, 4.00x"
    assert lines[2] == f"  overlay  {'█' * (WIDTH // 4)} 100 GET/s"
    assert lines[4] == f"  freeflow {'█' * WIDTH} 7 r/s"
    assert lines[5] == "  overlay  no answer"


def lengths(svg: str, colour: str) -> list[float]:
    """How long the bars of a colour are."""
    found = []
    for path, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg):
        if f"fill: {colour}" in style:
            across = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
            found.append(max(across) - min(across))
    return found


def test_picture_is_whole() -> None:
    """The picture is well-formed, has each figure, and bars as long as the terminal's."""
    svg = as_svg(BARS, "a < b", "then & there", FREEFLOW, OVERLAY)
    tree = ElementTree.fromstring(svg)  # noqa: S314
    words = {str(each.text) for each in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {"a < b", "then & there", "redis", "400 GET/s", "100 GET/s", "4.00x"} < words
    assert {"vip", "7 r/s", "no answer", FREEFLOW, OVERLAY} < words
    # The last bar of a colour is the legend's.
    ours, theirs = lengths(svg, "#0b7a75"), lengths(svg, "#b8bfc6")
    assert ours[:2] == pytest.approx([4 * theirs[0]] * 2)
    assert theirs[1] == pytest.approx(0)


def _row(ratio: float | None, where: str = "one host") -> DemoRow:
    theirs = None if ratio is None else Side([100.0], [20.0])
    return DemoRow(REDIS, where, "shm", Side([100.0 * (ratio or 1)], [5.0]), theirs)


def test_best_first() -> None:
    """The table is sorted by ratio; rows without a ratio come last."""
    rows = demo_speed.best_first([_row(None), _row(1.2), _row(17.0), _row(4.0)])
    assert [row.ratio for row in rows] == [17.0, 4.0, 1.2, None]
    lines = demo_speed.table(rows).splitlines()
    assert lines[2].split()[-7:] == ["GET/s", "1,700", "100", "17.00x", "us/GET", "5", "20"]
    assert "no answer" in lines[-1]


class FakeHost:
    """A host whose `freeflow connections` prints given paths."""

    def __init__(self, paths: list[str], port: str = "10.0.1.7:80") -> None:
        self.port = port
        self.paths = self.later = paths
        self.asked = 0

    def spawn(self, *_command: str, **_options: Any) -> Any:
        paths = self.later if self.asked else self.paths
        self.asked += 1
        listed = [{"remote": self.port, "path": path} for path in paths]
        said = json.dumps({"connections": listed, "reasons": {}})

        class Asking:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                return None

            def poll(self) -> int:
                return 0

            def communicate(self, timeout: float) -> tuple[str, None]:
                return said, None

        return Asking()


def _meter(host: FakeHost, load: Any, silent: str = "") -> tuple[Meter, Any, list[str]]:
    """A meter of two subjects, its load, and what it reports."""
    rates = {FREEFLOW: 400.0, OVERLAY: 100.0}

    def ask(client: Any, _where: str, _seconds: float, _rate: float) -> DemoRun:
        if client == silent:
            raise ProgramError("no answer")
        return DemoRun(rates[client], 1000)

    subjects = [Subject(name, cast("Any", name), cast("Any", host), {}) for name in rates]
    told: list[str] = []
    return Meter(subjects, told.append), dataclasses.replace(load, ask=ask), told


def test_path_is_looked_at() -> None:
    """A row has the path of most connections during the load, and their number is reported."""
    meter, load, told = _meter(FakeHost(["shm"] * 50), WEB)
    row = meter.row(load, "one host", lambda _: "10.0.1.7", lambda _: [], "shm")
    assert (row.path, row.ratio) == ("shm", 4.0)
    assert any("50 of 50 on shm" in line for line in told)


def test_wrong_path_is_no_row() -> None:
    """Connections that stayed on TCP are never shown as shared memory."""
    meter, load, _ = _meter(FakeHost(["shm"] * 10 + ["overlay+ebpf"] * 40), WEB)
    with pytest.raises(WrongPathError, match="40 of 50 on overlay"):
        meter.row(load, "one host", lambda _: "10.0.1.7", lambda _: [], "shm")


def test_connections_that_move_late() -> None:
    """On a busy machine connections may move later than they are listed first."""
    host = FakeHost(["overlay+ebpf"] * 29 + ["shm"] * 21)
    host.later = ["shm"] * 50
    meter, load, told = _meter(host, WEB)
    assert meter.row(load, "one host", lambda _: "10.0.1.7", lambda _: [], "shm").path == "shm"
    assert host.asked == 2
    assert any("50 of 50 on shm" in line for line in told)


def test_connections_that_only_steer_are_left_aside() -> None:
    """iperf3's second connection carries no load: it may stay TCP."""
    meter, load, _ = _meter(FakeHost(["shm", "overlay+ebpf"]), STREAM)
    assert meter.row(load, "one host", lambda _: "10.0.1.7", lambda _: [], "shm").path == "shm"


def test_no_connection_is_no_path() -> None:
    """If several lists show no connection, the measurement fails."""
    host = FakeHost(["shm"], "10.0.1.99:80")
    meter, load, _ = _meter(host, WEB)
    with pytest.raises(WrongPathError, match="no connection"):
        meter.row(load, "one host", lambda _: "10.0.1.7", lambda _: [], "shm")
    assert host.asked > 1


def test_who_does_not_answer() -> None:
    """Docker's network may give no answer, which is shown; FreeFlow must answer."""
    meter, load, _ = _meter(FakeHost(["overlay+ebpf"]), WEB, silent=OVERLAY)
    row = meter.row(load, "all tasks", lambda _: "10.0.1.7", lambda _: [])
    assert (row.theirs, row.ratio) == (None, None)
    meter, load, _ = _meter(FakeHost(["overlay+ebpf"]), WEB, silent=FREEFLOW)
    with pytest.raises(ProgramError):
        meter.row(load, "all tasks", lambda _: "10.0.1.7", lambda _: [])


def test_nothing_in_the_stack_is_ours() -> None:
    """The stack's file does not mention the library: the runtime adds it to all services."""
    text = (Path(demo_speed.__file__).with_name("demo-stack.yml")).read_text()
    assert "LD_PRELOAD" not in text
    assert text.count("freeflow:latest") == 1
