"""Checks the subjects of commits: `python -m tools.commit_subjects`.

A subject has at most 72 characters, no full stop at its end, and is in the imperative mood after
its area ("library: move the sleep into one file"). The check recognises only the common mistakes:
a first word in -ed or -ing. Commits up to `SINCE` are older than the rule.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

TOP: Final = Path(__file__).parents[1]
SINCE: Final = "43067d7807c40d193606149f3ad7594881425e07"
LONGEST: Final = 72
ENDINGS: Final = ("ed", "ing")
IMPERATIVES: Final = frozenset(
    {"bring", "embed", "exceed", "feed", "need", "ping", "proceed", "ring", "seed", "spring"}
)
"""Imperatives that end like a past tense or a gerund."""


def complaint(subject: str) -> str | None:
    """What is wrong with a subject; None if nothing is."""
    if len(subject) > LONGEST:
        return f"{len(subject)} characters, at most {LONGEST}"
    if subject.endswith("."):
        return "a full stop at its end"
    match = re.match(r"(?:[\w/., -]+: )?(\w+)", subject)
    word = match[1].lower() if match else ""
    if word.endswith(ENDINGS) and word not in IMPERATIVES:
        return f"not in the imperative mood: {word}"
    return None


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", TOP, *words], capture_output=True, text=True)


def subjects() -> list[tuple[str, str]] | None:
    """Name and subject of each commit since the rule; None if the history lacks the rule."""
    try:
        known = _git("merge-base", "--is-ancestor", SINCE, "HEAD").returncode == 0
    except FileNotFoundError:
        return None
    if not known:
        return None
    listed = _git("log", "--no-merges", "--format=%h %s", f"{SINCE}..HEAD").stdout
    return [(name, subject) for name, _, subject in (x.partition(" ") for x in listed.splitlines())]


def main() -> int:
    """Print what is wrong with each subject; 1 if anything is."""
    found = subjects()
    if found is None:
        print(f"commit subjects: not checked, this checkout has no history back to {SINCE[:7]}")
        return 0
    wrong = [
        f"{name} {problem}: {subject}"
        for name, subject in found
        if (problem := complaint(subject)) is not None
    ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
