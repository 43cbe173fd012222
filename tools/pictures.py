"""Draws the pictures and charts of the documentation: `python -m tools.pictures`.

`docs/pictures/NAME.dot` becomes `docs/pictures/NAME.svg`, by Graphviz. Each SVG carries the hash of
its source, so a test can tell without Graphviz whether it is up to date. Colours are not in the
sources: a node has a class, and one style sheet gives each class a colour for light and for dark
pages. The background is part of the picture, so text is readable on any page.

Each `docs/data/NAME.json`, which a suite of `bench` wrote, becomes a table in `docs/benchmarks.md`
and rows of one chart. Both depend on nothing but the JSON, so a test compares them. A suite whose
result is not stored has no rows.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from bench import plot
from bench.chart import ratios_as_svg
from bench.errors import BenchError
from bench.report import FEW, BenchReport, is_cross, is_verbs, number
from bench.stats import (
    FREEFLOW,
    FREEFLOW_DIRECT,
    MEMCPY,
    OVERLAY,
    CrossRow,
    LocalRow,
    Row,
    VerbsRow,
)

DOCS: Final = Path(__file__).parents[1] / "docs"
FOLDER: Final = DOCS / "pictures"
BENCHMARKS: Final = DOCS / "benchmarks.md"
CHART: Final = FOLDER / "ratios.svg"
CROSS_HOST: Final = "cross-host"
VERBS: Final = "verbs"
NAMES: Final = ("same-host", CROSS_HOST, VERBS)
"""Suites whose results are published, in the order of the chart."""
MARKS: Final = {CROSS_HOST: ", two hosts", VERBS: ", RDMA verbs"}
"""What the chart adds to the names of a suite's cases."""
ABSENT: Final = "No measurement is stored yet."
PROGRAMS: Final = (
    *("redis", "memcached", "nginx", "pgbench"),
    *("send_lat_2b", "write_bw", "ucx", "mpi"),
)
"""Cases of the chart begin with one of these; the table has all cases."""
TITLE: Final = (
    "FreeFlow with the library, compared with Docker's overlay (1 = equal, longer = better)"
)
STYLE: Final = """
text { font-family: Helvetica, Arial, 'DejaVu Sans', sans-serif; fill: #1f2328; }
.graph > polygon { fill: #ffffff; stroke: none; }
.node path, .node polygon { fill: #ffffff; stroke: #818b98; }
.node.area path, .node.area polygon { fill: #f6f8fa; stroke: #c5ccd3; }
.node.ours path, .node.ours polygon { fill: #d7efe9; stroke: #0b7a75; }
.node.memory path, .node.memory polygon { fill: #fdf0cf; stroke: #a9790b; }
.edge path { stroke: #59636e; }
.edge polygon { stroke: #59636e; fill: #59636e; }
.edge.fast path { stroke: #0b7a75; stroke-width: 2.5; }
.edge.fast polygon { stroke: #0b7a75; fill: #0b7a75; }
.fast text { fill: #0b7a75; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; }
.graph > polygon { fill: #0d1117; }
.node path, .node polygon { fill: #21262d; stroke: #8b949e; }
.node.area path, .node.area polygon { fill: #161b22; stroke: #3d444d; }
.node.ours path, .node.ours polygon { fill: #0e3b38; stroke: #3fb8af; }
.node.memory path, .node.memory polygon { fill: #3d2f08; stroke: #d9a520; }
.edge path { stroke: #9198a1; }
.edge polygon { stroke: #9198a1; fill: #9198a1; }
.edge.fast path { stroke: #3fb8af; }
.edge.fast polygon { stroke: #3fb8af; fill: #3fb8af; }
.fast text { fill: #3fb8af; }
}
"""


def sources() -> list[Path]:
    """All drawings, in the order of their names."""
    return sorted(FOLDER.glob("*.dot"))


def source_hash(source: Path) -> str:
    """The SHA-256 of a drawing and of the style sheet, in hexadecimal."""
    return hashlib.sha256(source.read_bytes() + STYLE.encode()).hexdigest()


def stored_hash(picture: Path) -> str | None:
    """The hash of the source from which an SVG file was drawn."""
    match = re.search(r"<!-- source sha256: (\w+) -->", picture.read_text())
    return match[1] if match else None


def styled(drawn: str, digest: str) -> str:
    """Graphviz's SVG with the style sheet in place of its own colours, and with the hash."""
    body = re.sub(r"<!--.*?-->\n?", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r' (?:fill|stroke|font-family)="(?!none)[^"]*"', "", body)
    head, rest = body.split(">", 1)
    return f"{head}>\n<!-- source sha256: {digest} -->\n<style>{STYLE}</style>{rest}"


def draw(source: Path) -> str:
    """The SVG of one drawing. Raises CalledProcessError if Graphviz refuses it."""
    done = subprocess.run(["dot", "-Tsvg", source], check=True, capture_output=True, text=True)
    return styled(done.stdout, source_hash(source))


def results() -> dict[str, BenchReport]:
    """The stored results of measurements, by name; those that nobody has stored are absent.

    Raises:
        BenchError: one was measured in too few rounds to be published.
    """
    found = {}
    for name in NAMES:
        path = DOCS / "data" / f"{name}.json"
        if not path.exists():
            continue
        found[name] = plot.load(path)
        few = [case for case, row in found[name]["results"].items() if 0 < row["runs"] < FEW]
        # Idle connections and the relay's own counters are measured once.
        few = [case for case in few if not case.startswith(("idle_", "relay_"))]
        if few:
            raise BenchError(f"{path}: too few rounds of {', '.join(few)}; measure {FEW} or more")
    return found


def draw_chart(reports: Mapping[str, BenchReport]) -> str:
    """The chart of the stored results, as SVG: one host's cases, those of two hosts, and verbs."""
    bars, machines = [], []
    for name, report in reports.items():
        cases = [
            case
            for case in report["results"]
            if case.startswith(PROGRAMS) and not case.endswith(("_cpu", "_asleep"))
        ]
        mark = MARKS.get(name, "")
        bars += plot.ratios(report, cases, OVERLAY, mark)
        machines.append(f"{mark[2:]}: {plot.about(report)}" if mark else plot.about(report))
    return ratios_as_svg(bars, TITLE, "\n".join(machines) + plot.WHISKERS)


def _ratio(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "–"


def _latency(row: Row | LocalRow | CrossRow | VerbsRow, key: str) -> str:
    """freeflow's latency, and that of overlay behind a stroke, in microseconds."""
    found = cast("dict[str, dict[str, float]]", row).get(key) or {}
    if FREEFLOW not in found or OVERLAY not in found:
        return "–"
    return f"{number(found[FREEFLOW])} / {number(found[OVERLAY])}"


Cell = Callable[[str, Any], str]
COLUMNS: Final[dict[str, Cell]] = {
    "case": lambda name, row: name,
    "what": lambda name, row: row["about"],
    "to `overlay`": lambda name, row: _ratio(row.get("ratio_to_overlay")),
    "CPU per unit of work": lambda name, row: _ratio(row.get("cpu_ratio_to_overlay")),
    "spread": lambda name, row: "–" if row["spread"] is None else f"{row['spread']:.0%}",
}
CROSS_COLUMNS: Final[dict[str, Cell]] = {
    "case": COLUMNS["case"],
    "what": COLUMNS["what"],
    "to `overlay`": COLUMNS["to `overlay`"],
    "to relay off": lambda name, row: _ratio(row.get("ratio_to_off")),
    "to the host's network": lambda name, row: _ratio(row.get("ratio_to_host")),
    "CPU to `overlay`": COLUMNS["CPU per unit of work"],
    "CPU to relay off": lambda name, row: _ratio(row.get("cpu_ratio_to_off")),
    "CPU to the host's": lambda name, row: _ratio(row.get("cpu_ratio_to_host")),
    "in the relay": lambda name, row: (
        "–"
        if row.get("connections_in_relay") is None
        else f"{row['connections_in_relay']:g} of {row['connections']}"
    ),
    "spread": COLUMNS["spread"],
}


def _figure(subject: str) -> Cell:
    return lambda name, row: number(row[subject]).replace("-", "–")


def _aim(key: str) -> Cell:
    """A case's goal, and whether the row reaches it."""
    return lambda name, row: "–" if row[key] is None else "yes" if row[key] else "**no**"


VERBS_COLUMNS: Final[dict[str, Cell]] = {
    "case": COLUMNS["case"],
    "what": COLUMNS["what"],
    "unit": lambda name, row: row["unit"].replace("us", "µs"),
    "FreeFlow": _figure(FREEFLOW),
    "direct": _figure(FREEFLOW_DIRECT),
    "`overlay`": _figure(OVERLAY),
    "memcpy": _figure(MEMCPY),
    "to `overlay`": COLUMNS["to `overlay`"],
    "direct to `overlay`": lambda name, row: _ratio(row["direct_to_overlay"]),
    "to memcpy": lambda name, row: _ratio(row["ratio_to_memcpy"]),
    "direct to memcpy": lambda name, row: _ratio(row["direct_to_memcpy"]),
    "CPU, µs": lambda name, row: (
        number(row["cpu"].get(FREEFLOW)) + row["cpu_unit"].replace("us/", " per ")
    ),
    "CPU to `overlay`": COLUMNS["CPU per unit of work"],
    "direct CPU to `overlay`": lambda name, row: _ratio(row["cpu_direct_to_overlay"]),
    "spread": COLUMNS["spread"],
    "aim": lambda name, row: row["goal"].replace("_", " ").replace("<=", "≤").replace(">=", "≥"),
    "met": _aim("met"),
    "direct met": _aim("direct_met"),
}
LATENCIES: Final[dict[str, Cell]] = {
    "p50, µs": lambda name, row: _latency(row, "p50_us"),
    "p99, µs": lambda name, row: _latency(row, "p99_us"),
}


def make_table(report: BenchReport) -> str:
    """The table of a stored result, in Markdown, below a line about the machine.

    Cases that `overlay` doesn't have have no row.
    """
    machine = report["machine"]
    rows = {
        name: row
        for name, row in report["results"].items()
        if row.get("ratio_to_overlay") is not None
    }
    head = (
        f"Ratios to Docker's `overlay`. Medians of {machine['rounds']} rounds on {machine['when'][:10]}: "
        f"{machine['cores']} cores, {machine['cpu']},\nLinux {machine['kernel']}, engine "
        f"{', '.join(machine['engines'])}, load before {machine['load']:.1f}.\n"
    )
    columns = COLUMNS
    if any(is_cross(row) for row in rows.values()):
        columns = CROSS_COLUMNS
    elif any(is_verbs(row) for row in rows.values()):
        columns = {
            name: cell
            for name, cell in VERBS_COLUMNS.items()
            if any(cell(case, row) != "–" for case, row in rows.items())
        }
    if any(_latency(row, "p50_us") != "–" for row in rows.values()):
        columns = {**columns, **LATENCIES}
        head += "Latencies are those of FreeFlow / `overlay`.\n"
    lines = [
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
        *(
            "| " + " | ".join(cell(name, row) for cell in columns.values()) + " |"
            for name, row in rows.items()
        ),
    ]
    return "\n".join([head, *lines, ""])


def with_table(text: str, name: str, table: str) -> str:
    """A document with this table between the markers of a result."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}{table}{end}{rest.split(end, maxsplit=1)[1]}"


def with_tables(text: str, reports: Mapping[str, BenchReport]) -> str:
    """A document with the tables of all results; one that is not stored is said to be absent."""
    for name in NAMES:
        table = make_table(reports[name]) if name in reports else f"{ABSENT}\n"
        text = with_table(text, name, table)
    return text


def main() -> None:
    """Draw every picture whose source or style has changed; with an argument, all."""
    for source in sources():
        picture = source.with_suffix(".svg")
        if sys.argv[1:] or not picture.exists() or stored_hash(picture) != source_hash(source):
            picture.write_text(draw(source))
            print(picture)
    stored = results()
    CHART.write_text(draw_chart(stored))
    BENCHMARKS.write_text(with_tables(BENCHMARKS.read_text(), stored))


if __name__ == "__main__":
    main()
