"""Selection of cases by names and patterns of the command line."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import click


def pick(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that match a pattern. Raises `click.BadParameter` if a pattern matches none."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise click.BadParameter(f"no case is called {pattern}; known are {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatchcase(name, one) for one in patterns)]
