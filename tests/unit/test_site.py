"""The documentation as a site: its pages, its words and their links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.router.reasons import PASSING, Reason
from tools import site

TROUBLESHOOTING = (site.TOP / "docs/troubleshooting.md").read_text()
README = (site.TOP / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "is_root", "moved"),
    [
        ("[a](docs/install.md#metrics)", True, "[a](install.md#metrics)"),
        ("[a](README.md)", True, "[a](index.md)"),
        ("![a](docs/pictures/parts.svg)", True, "![a](pictures/parts.svg)"),
        ("[a](../SECURITY.md#verbs)", False, "[a](SECURITY.md#verbs)"),
        ("[a](../README.md#limits)", False, "[a](index.md#limits)"),
        ("[a](#limits)", False, "[a](#limits)"),
        ("[a](https://example.org/README.md)", True, "[a](https://example.org/README.md)"),
    ],
)
def test_links_fit_the_site(text: str, is_root: bool, moved: str) -> None:
    """All pages are in one folder, and README is the first one."""
    assert site.moved_links(text, is_root) == moved


def test_every_word_has_a_page() -> None:
    """Each reason and each path has a page, with its meaning and what to do."""
    pages = site.word_pages(README, TROUBLESHOOTING)
    words = {reason.word for reason in Reason}
    assert words | {"shm", "rdma", "relay", "overlay", "overlay+ebpf", "waiting"} <= pages.keys()
    for word in words:
        assert "**It means:** " in pages[word]
        assert "**What to do:** " in pages[word]
    passing = {reason.word for reason in PASSING}
    assert {word for word in words if "This can pass." in pages[word]} == passing
    assert "## A connection" in pages["remote-off"]
    assert "## A queue pair" in pages["remote-off"]


def test_a_word_without_explanation_is_noticed() -> None:
    """A reason that the table lacks is an error that names it."""
    text = TROUBLESHOOTING.replace("| `sandbox` |", "| `sand` |")
    with pytest.raises(ValueError, match="does not explain sandbox"):
        site.word_pages(README, text)


def test_the_site_is_built(tmp_path: Path) -> None:
    """The site is built without a warning, needs no other server, and a link or heading that is
    missing is an error.
    """
    built = [sys.executable, "-m", "mkdocs", "build", "-f", str(site.CONFIGURATION), "-d"]
    site.stage()
    done = subprocess.run([*built, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=\"([^\"]+)\"", text)
        assert not [address for address in fetched if "//" in address]
    assert (tmp_path / "words/no-library.html").exists()
    with (site.PAGES / "top.md").open("a") as page_source:
        page_source.write("\n[gone](gone.md), [no heading](install.md#gone)\n")
    done = subprocess.run([*built, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "'gone.md'" in done.stderr
    assert "'install.md#gone'" in done.stderr
