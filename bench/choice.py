"""Which cases are meant: names and patterns, as on a command line."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import click


def pick(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those of `known` that fit a pattern. Raises `click.BadParameter` if a pattern fits none."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise click.BadParameter(f"no case is called {pattern}; there are {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatchcase(name, one) for one in patterns)]
