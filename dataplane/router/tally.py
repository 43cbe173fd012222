"""Counters without zeros."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

Key = TypeVar("Key")


def add(counter: Counter[Key], key: Key, more: int) -> None:
    """Change a counter, in which zeros are not kept."""
    counter[key] += more
    if not counter[key]:
        del counter[key]
