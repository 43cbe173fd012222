"""What is to be looked at again: soon at first, then ever more rarely.

Thousands of connections that wait or run for hours cost next to nothing; those that ended without a word go soon.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """Items with times. `first` and `most`: seconds between two looks, doubled from one to the next."""

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._heap: list[tuple[float, int, float, T]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, item: T, now: float) -> None:
        """Look at it after the shortest time."""
        self._push(item, now, self._first)

    def look(self, now: float, most: int, keep: Callable[[T], bool]) -> None:
        """Look at what is due, at so many items at most; what isn't to be kept goes."""
        for _ in range(most):
            if not self._heap or self._heap[0][0] > now:
                return
            _, _, pause, item = heapq.heappop(self._heap)
            if keep(item):
                self._push(item, now, min(pause * 2, self._most))

    def _push(self, item: T, now: float, pause: float) -> None:
        heapq.heappush(self._heap, (now + pause, next(self._numbers), pause, item))
