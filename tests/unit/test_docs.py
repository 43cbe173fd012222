"""The documentation: its paths, links, pictures, numbers and lists agree with the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final, cast

import pytest

from bench.errors import BenchError
from bench.latency import Latency
from bench.machine import Machine
from bench.report import BenchReport
from bench.stats import Case, Measured, cross_row, verbs_row
from dataplane.verbs import symbols
from tools import commit_subjects, files, pictures, prose, screenshots

TOP: Final = Path(__file__).parents[2]
TEXTS: Final = {path: path.read_text() for path in prose.documents()}
README: Final = TEXTS[TOP / "README.md"]
SUFFIXES: Final = r"py|c|h|sh|md|svg|dot|json|toml|yml|txt"
RETIRED: Final = (
    r"short(?:er)? ?(?:cut|way)|ordinary way|nonsense|\bstrangers?|\bnaps?\b|\bdeaf|retreat|"
    r"(?:hold|held|give|given) back|passed by|past the library|look(?:s|ed|ing)? at|\bbeats?\b"
)
"""Words that the glossary in ARCHITECTURE.md has replaced by those of the trade."""
WRITTEN: Final = ("build/", "tests/x/")
"""Files that only exist once something has made them."""


def _paths(text: str) -> set[str]:
    """What stands in backticks and is a file or a folder of the repository."""
    words = re.findall(rf"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:{SUFFIXES})))`", text)
    return {word for word in words if not word.startswith(WRITTEN)}


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _anchors(text: str) -> set[str]:
    return {_slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_every_named_path_exists(name: str) -> None:
    """A file or folder that these documents name is in the repository, by its path or by its
    name.
    """
    tracked = [path for path in TOP.rglob("*") if ".venv" not in path.parts]
    names = {path.name for path in tracked}
    missing = {
        path
        for path in _paths(TEXTS[TOP / name])
        if not (TOP / path).exists() and path.rstrip("/") not in names
    }
    assert not missing


@pytest.mark.parametrize("document", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Every link to another document finds the file and, where it names one, the heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[document]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file.read_text()), target


def test_every_document_is_in_the_readme() -> None:
    """A reader of README finds each page in docs/, directly or from Architecture."""
    linked = README + TEXTS[TOP / "ARCHITECTURE.md"]
    for path in (TOP / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in linked


@pytest.mark.parametrize("source", pictures.sources(), ids=lambda path: path.stem)
def test_pictures_are_drawn_from_their_sources(source: Path) -> None:
    """Each picture was drawn from the source beside it, in the present style."""
    assert pictures.stored_hash(source.with_suffix(".svg")) == pictures.source_hash(source)


def test_screenshots_are_of_the_present_page() -> None:
    """Each picture of the page was taken of its present files: `make screenshots`."""
    for each in screenshots.SCREENSHOTS:
        path = screenshots.PICTURES / f"{each.name}.png"
        assert screenshots.stored_hash(path) == screenshots.source_hash()
        assert path.stat().st_size < 64 << 10


def test_the_chart_shows_the_stored_results() -> None:
    """The chart and the tables are what `make pictures` makes of the stored results."""
    stored = pictures.results()
    assert "same-host" in stored
    assert pictures.CHART.read_text() == pictures.draw_chart(stored)
    text = pictures.BENCHMARKS.read_text()
    assert pictures.with_tables(text, stored) == text


def _stored(case: str, runs: int) -> BenchReport:
    measured = Measured(Case(case, "requests/s", True, "what it is"), "request")
    for _ in range(runs):
        measured.keep("freeflow", 30.0, 4.0, Latency(10, 20))
        measured.keep("overlay", 10.0, 8.0, Latency(30, 50))
    rows = {case: cross_row(measured, 50, [50] * runs, {}, {})}
    machine = {**pictures.results()["same-host"]["machine"], "rounds": runs}
    return BenchReport(machine=cast("Machine", machine), results=rows)


def test_results_of_two_hosts_join_the_chart() -> None:
    """A stored result of two hosts has rows in the chart and a table; without one there are none,
    and the page says so.
    """
    two = _stored("redis_p1_c50", 3)
    text = "<!-- begin same-host -->\n<!-- end same-host -->\n<!-- begin cross-host -->\n<!-- end cross-host -->\n<!-- begin verbs -->\n<!-- end verbs -->\n"
    one = pictures.results()["same-host"]
    both = {"same-host": one, "cross-host": two}
    assert "redis_p1_c50, two hosts" in pictures.draw_chart(both)
    assert "two hosts" not in pictures.draw_chart({"same-host": one})
    line = "| redis_p1_c50 | what it is | 3 | – | – | 0.5 | – | – | 50 of 50 | 0% | 10 / 30 | 20 / 50 |"
    assert line in pictures.with_tables(text, both)
    assert pictures.ABSENT in pictures.with_tables(text, {"same-host": one})


def test_results_of_verbs_join_the_chart() -> None:
    """A stored result of verbs has its figures and aims in a table, without empty columns, and a
    few of its cases in the chart.
    """
    measured = Measured(Case("send_lat_2b", "us", False, "what it is"), "round trip")
    for _ in range(3):
        measured.keep("freeflow", 0.5, 2.0, None)
        measured.keep("overlay", 20.0, 80.0, None)
    row = verbs_row(measured, "figure <= 0.5 or to_overlay <= 0.05", {})
    row["met"] = False
    machine = {**pictures.results()["same-host"]["machine"], "rounds": 3}
    rows = {"send_lat_2b": row, "read_lat_2b": row}
    made = BenchReport(machine=cast("Machine", machine), results=rows)
    head, _, line = pictures.make_table(made).splitlines()[-4:-1]
    assert "direct" not in head
    assert line == (
        "| send_lat_2b | what it is | µs | 0.5 | 20 | 0.025 | 2 per round trip | 0.025 | 0% | "
        "figure ≤ 0.5 or to overlay ≤ 0.05 | **no** |"
    )
    chart = pictures.draw_chart({"same-host": pictures.results()["same-host"], "verbs": made})
    assert "send_lat_2b, RDMA verbs" in chart
    assert "read_lat_2b" not in chart


def test_too_few_rounds_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stored result of fewer than three rounds is refused."""
    (tmp_path / "data").mkdir()
    stored = _stored("redis_p1_c50", 2)
    (tmp_path / "data/cross-host.json").write_text(json.dumps(stored))
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    with pytest.raises(BenchError, match="too few rounds of redis_p1_c50"):
        pictures.results()


def test_tables_in_the_readme_are_short() -> None:
    """No table of README has more than ten rows; longer ones are in docs/."""
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        assert table.count("\n") - 2 <= 10


def test_the_list_of_files_is_complete() -> None:
    """docs/files.md lists every source file with its first sentence; `make pictures` writes it."""
    assert files.LIST.read_text() == files.make_list()
    assert not re.findall(r"^\| (\S+) \|  \|$", files.make_list(), re.MULTILINE)


def test_what_verbs_lack() -> None:
    """docs/verbs.md lists each public function of libibverbs that ours has not: the stubs of
    dataplane/verbs/symbols.txt.
    """
    _, found = symbols.read_table(symbols.TABLE.read_text())
    public = [each for each in found if each.is_default]
    real = {each.name for each in public if each.kind == symbols.REAL}
    _, _, text = TEXTS[TOP / "docs/verbs.md"].partition("## What is not supported")
    table = text.partition("\n## ")[0]
    lacking = {each.name for each in public} - real
    assert sorted(re.findall(r"`(_?ibv_\w+)`", table)) == sorted(lacking)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ('"""' + "x " * 60 + '"""', [1]),
        ("# " + "x " * 60, [1]),
        ('"""x\n\n    ' + "x " * 60 + '\n"""', []),
        ("x = '" + "x " * 60 + "'", []),
    ],
)
def test_only_prose_of_python_is_wrapped(text: str, numbers: list[int]) -> None:
    """The check finds long docstrings and comments, and leaves strings and blocks alone."""
    assert [number for number, _ in prose.long_python_lines(text)] == numbers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("/* " + "x " * 60 + "*/", [1]),
        ("/* x\n * " + "x " * 60 + "\n */\n" + "x " * 60, [2]),
        ("int x; /* " + "x " * 60 + "*/\n" + "x " * 60, []),
        ("int x; /* x\n        * x " + "x " * 60 + "*/", [2]),
        ("/* x\n *      " + "x " * 60 + "\n */", []),
        ('x = "' + "x " * 60 + '";', []),
    ],
)
def test_only_prose_of_c_is_wrapped(text: str, numbers: list[int]) -> None:
    """The check finds long comments, and leaves code, what stands behind code, and tables alone."""
    assert [number for number, _ in prose.long_c_lines(text)] == numbers


def test_prose_is_wrapped() -> None:
    """Prose in Markdown has at most 100 columns; tables, links and code may have more."""
    long = [
        f"{path.name}:{number}" for path in TEXTS for number, _ in prose.long_lines(TEXTS[path])
    ]
    assert not long


@pytest.mark.parametrize("document", TEXTS, ids=lambda path: path.name)
def test_one_word_for_one_thing(document: Path) -> None:
    """No document uses a word again that the glossary has replaced, except as code."""
    prose_alone = re.sub(r"`[^`]*`|```.*?```", "", TEXTS[document], flags=re.DOTALL)
    assert re.findall(RETIRED, prose_alone, re.IGNORECASE) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("x " * 60, [1]),
        ("| " + "x " * 60, []),
        ("```\n" + "x " * 60 + "\n```\n" + "y " * 60, [4]),
        ("[x](y) " + "x " * 60, []),
    ],
)
def test_only_prose_is_wrapped(text: str, numbers: list[int]) -> None:
    """The check finds long prose, and leaves tables, code and links alone."""
    assert [number for number, _ in prose.long_lines(text)] == numbers


@pytest.mark.parametrize(
    "subject",
    ["library: move the sleep into one file", "Embed the style sheet", "ci: need no network"],
)
def test_good_subjects(subject: str) -> None:
    """An imperative of at most 72 characters passes, with an area or without."""
    assert commit_subjects.complaint(subject) is None


@pytest.mark.parametrize(
    "subject",
    ["library: moved the sleep", "Adding a test", "relay: close the link.", "relay: " + "x" * 66],
)
def test_bad_subjects(subject: str) -> None:
    """A past tense, a gerund, a full stop at the end, and more than 72 characters are refused."""
    assert commit_subjects.complaint(subject) is not None


def test_subjects_without_a_history(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the history is missing, as in a shallow clone, the check says so and passes."""
    if commit_subjects.subjects() is None:
        assert commit_subjects.main() == 0
        assert "not checked" in capsys.readouterr().out
