"""Draws the pictures and charts of the documentation: `python -m tools.pictures`.

`docs/pictures/NAME.dot` becomes `docs/pictures/NAME.svg`, by Graphviz. Each SVG carries the hash of
its source, so a test can tell without Graphviz whether it is up to date. Colours are not in the
sources: a node has a class, and one style sheet gives each class a colour for light and for dark
pages. The background is part of the picture, so text is readable on any page.

`docs/data/NAME.json`, which a suite of `bench` wrote, becomes a chart in `docs/pictures` and a
table in `docs/benchmarks.md`. Both depend on nothing but the JSON, so a test compares them.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench import plot
from bench.report import Report

DOCS: Final = Path(__file__).parents[1] / "docs"
FOLDER: Final = DOCS / "pictures"
BENCHMARKS: Final = DOCS / "benchmarks.md"
PROGRAMS: Final = ("redis", "memcached", "nginx", "pgbench")
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


def results() -> list[Path]:
    """All stored results of measurements, in the order of their names."""
    return sorted((DOCS / "data").glob("*.json"))


def draw_chart(result: Path) -> str:
    """The chart of a stored result, as SVG."""
    report = plot.load(result)
    cases = [
        name
        for name in report["results"]
        if name.startswith(PROGRAMS) and not name.endswith("_cpu")
    ]
    return plot.chart(report, tuple(cases), "overlay", TITLE)


def _ratio(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "–"


def make_table(report: Report) -> str:
    """The table of a stored result, in Markdown, below a line about the machine."""
    machine = report["machine"]
    head = (
        f"Ratios to Docker's `overlay`. Medians of {machine['rounds']} rounds on {machine['when'][:10]}: "
        f"{machine['cores']} cores, {machine['cpu']},\nLinux {machine['kernel']}, engine "
        f"{', '.join(machine['engines'])}, load before {machine['load']:.1f}.\n"
    )
    rows = [
        f"| {name} | {row['about']} | {_ratio(row.get('ratio_to_overlay'))} | "
        f"{_ratio(row.get('cpu_ratio_to_overlay'))} | {row['spread']:.0%} |"
        for name, row in report["results"].items()
    ]
    titles = "| case | what | to `overlay` | CPU per unit of work | spread |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, titles, *rows, ""])


def with_table(text: str, name: str, table: str) -> str:
    """A document with this table between the markers of a result."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}{table}{end}{rest.split(end, maxsplit=1)[1]}"


def main() -> None:
    """Draw every picture whose source or style has changed; with an argument, all."""
    for source in sources():
        picture = source.with_suffix(".svg")
        if sys.argv[1:] or not picture.exists() or stored_hash(picture) != source_hash(source):
            picture.write_text(draw(source))
            print(picture)
    for result in results():
        (FOLDER / f"{result.stem}.svg").write_text(draw_chart(result))
        table = make_table(plot.load(result))
        BENCHMARKS.write_text(with_table(BENCHMARKS.read_text(), result.stem, table))


if __name__ == "__main__":
    main()
