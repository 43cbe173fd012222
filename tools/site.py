"""Builds the documentation as a site: `python -m tools.site`, or `make docs`.

The pages are those of the repository, with links that fit their place in the site. Each word that
`freeflow status` and `freeflow connections` say for a path or its reason gets a page of its own,
from the tables that explain it. MkDocs then checks every link, and fails on one that leads nowhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from dataplane.router.reasons import PASSING, Reason

TOP: Final = Path(__file__).parents[1]
CONFIGURATION: Final = Path(__file__).with_name("mkdocs.yml")
PAGES: Final = TOP / "build/docs/pages"
SITE: Final = TOP / "build/docs/site"
ROOT_PAGES: Final = {
    "README.md": "index.md",
    **{
        name: name
        for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
    },
}
"""Files of the top level, and what they are called in the site."""
TROUBLESHOOTING: Final = "troubleshooting.md"
CONNECTIONS: Final = "Why a connection is on `overlay`"
QUEUE_PAIRS: Final = "Why a queue pair has no path"
HEAD: Final = """\
# Words of status

`freeflow status`, `connections` and `top` say for each connection and queue pair which path it
takes, and by one word why it takes no faster one. Metrics use the same words as labels.

| word | it is |
| --- | --- |
"""
_LINK: Final = re.compile(r"\]\(([^)\s]+)\)")


def moved_links(text: str, is_root: bool) -> str:
    """A page's text with links that fit the site, where all pages are in one folder.

    `is_root`: the page is at the top level of the repository, not in docs/.
    """

    def replace(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith("#"):
            return match[0]
        path, mark, anchor = target.partition("#")
        path = path.removeprefix("docs/") if is_root else path.removeprefix("../")
        return f"]({ROOT_PAGES.get(path, path)}{mark}{anchor})"

    return _LINK.sub(replace, text)


def rows(text: str, heading: str) -> Iterator[list[str]]:
    """The cells of each row of the first table below a heading of a Markdown text."""
    _, found, rest = text.partition(f"## {heading}\n")
    if not found:
        raise ValueError(f"{TROUBLESHOOTING} has no heading {heading!r}")
    section = rest.partition("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _explained(text: str, heading: str) -> dict[str, tuple[str, str]]:
    """Meaning and remedy of each word in a table."""
    return {
        word: (meaning, remedy)
        for words, meaning, remedy in rows(text, heading)
        for word in re.findall(r"`([^`]+)`", words)
    }


def _paths(readme: str) -> dict[str, tuple[str, str]]:
    """What each path carries, and how, from README's table."""
    table = re.findall(r"^\| `([\w+]+)` \| (.*?) \| (.*?) \|$", readme, re.MULTILINE)
    return {word: (carries, how) for word, carries, how in table}


def _remedy(text: str) -> str:
    return "Nothing." if text == "nothing" else f"{text[0].upper()}{text[1:]}."


def _connection_part(word: str, meaning: str, remedy: str) -> list[str]:
    by_word = {reason.word: reason for reason in Reason}
    part = ["## A connection", f"**It means:** {meaning}.", f"**What to do:** {_remedy(remedy)}"]
    if word in by_word:
        reason = by_word[word]
        part.insert(1, f"The command prints `{word}`: {reason.sentence}.")
        if reason in PASSING:
            part.append(
                "This can pass. The connection tries again after five seconds, and then after"
                " pauses that double each time."
            )
    part.append(f"List them: `freeflow connections | grep -w -- {word}`")
    return part


def word_pages(readme: str, troubleshooting: str) -> dict[str, str]:
    """The page of each word, as Markdown.

    Raises ValueError if the tables lack a word that the router can say.
    """
    paths = _paths(readme)
    connections = _explained(troubleshooting, CONNECTIONS)
    queue_pairs = _explained(troubleshooting, QUEUE_PAIRS)
    if lacking := {reason.word for reason in Reason} - connections.keys():
        raise ValueError(f"{TROUBLESHOOTING} does not explain {', '.join(sorted(lacking))}")
    found = {}
    for word in [*paths, *connections, *(queue_pairs.keys() - connections.keys())]:
        page = [f"# `{word}`"]
        if word in paths:
            carries, how = paths[word]
            page += ["A path.", f"**It carries** {carries}.", f"**How:** {how}."]
        if word in connections:
            page += _connection_part(word, *connections[word])
        if word in queue_pairs:
            meaning, remedy = queue_pairs[word]
            page += [
                "## A queue pair",
                f"**It means:** {meaning}.",
                f"**What to do:** {_remedy(remedy)}",
                "List them: `freeflow connections --verbs`",
            ]
        page.append(
            f"All words: [Words of status](index.md). More: [Troubleshooting]({TROUBLESHOOTING})."
        )
        found[word] = "\n\n".join(page) + "\n"
    return found


def _kind(word: str, page: str) -> str:
    if "\nA path.\n" in page:
        return "a path"
    where = [name for name in ("connection", "queue pair") if f"## A {name}\n" in page]
    return "a reason of a " + " and of a ".join(where)


def word_index(pages: Mapping[str, str]) -> str:
    """The list of all words, with links to their pages."""
    lines = [f"| [`{word}`]({word}.md) | {_kind(word, page)} |" for word, page in pages.items()]
    return HEAD + "\n".join(lines) + "\n"


def stage() -> None:
    """Put all pages of the site into PAGES."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(TOP / "docs", PAGES)
    for path in PAGES.glob("*.md"):
        path.write_text(moved_links(path.read_text(), is_root=False))
    for name, placed in ROOT_PAGES.items():
        (PAGES / placed).write_text(moved_links((TOP / name).read_text(), is_root=True))
    words = PAGES / "words"
    words.mkdir()
    pages = word_pages((PAGES / "index.md").read_text(), (PAGES / TROUBLESHOOTING).read_text())
    for word, page in pages.items():
        deeper = _LINK.sub(lambda match: _from_words(match[1]), page)
        (words / f"{word}.md").write_text(deeper)
    (words / "index.md").write_text(word_index(pages))


def _from_words(target: str) -> str:
    """A link of a word's page, which is one folder deeper than the table it comes from."""
    if "://" in target or target == "index.md":
        return f"]({target})"
    if target.startswith("#"):
        target = TROUBLESHOOTING + target
    return f"](../{target})"


def main() -> int:
    """Stage the pages and build the site; returns MkDocs' exit code."""
    stage()
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(CONFIGURATION)]
    # The theme prints an advertisement of its successor otherwise.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code == 0:
        sys.stdout.write(f"{SITE / 'index.html'}\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
