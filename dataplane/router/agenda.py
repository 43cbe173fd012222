"""What is to be looked at again: soon at first, then ever more rarely.

Thousands of connections that wait or run for hours cost next to nothing; those that ended without a word go soon. An item that
is forgotten leaves at once, or with the next clean-up: there are never many more entries than items.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

RARELY: Final = 300.0
"""Seconds between two checks of something that has lasted long."""
SLACK: Final = 64
"""Entries of forgotten items that are left in the heap, besides as many as there are items."""


class Agenda(Generic[T]):
    """Items with times. `first` and `most`: seconds between two looks, doubled from one to the next."""

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._heap: list[tuple[float, int, float, T]] = []
        self._numbers = itertools.count()
        self._current: dict[T, int] = {}
        """Item to the number of its entry; an entry of another number is of no use any more."""

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, item: T, now: float) -> None:
        """Look at it after the shortest time."""
        self._push(item, now, self._first)

    def forget(self, item: T) -> None:
        """Don't look at it any more."""
        self._current.pop(item, None)
        self._clean_up()

    def look(self, now: float, most: int, keep: Callable[[T], bool]) -> None:
        """Look at what is due, at so many items at most; what isn't to be kept goes."""
        for _ in range(most):
            if not self._heap or self._heap[0][0] > now:
                return
            _, number, pause, item = heapq.heappop(self._heap)
            if self._current.get(item) != number:
                continue
            if keep(item):
                self._push(item, now, min(pause * 2, self._most))
            else:
                self._current.pop(item, None)

    def _push(self, item: T, now: float, pause: float) -> None:
        number = self._current[item] = next(self._numbers)
        heapq.heappush(self._heap, (now + pause, number, pause, item))
        self._clean_up()

    def _clean_up(self) -> None:
        """Rarely, so that an item costs its share of it at most."""
        if len(self._heap) <= 2 * len(self._current) + SLACK:
            return
        self._heap = [each for each in self._heap if self._current.get(each[3]) == each[1]]
        heapq.heapify(self._heap)
