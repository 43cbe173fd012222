"""A schedule of checks: soon at first, then less and less often.

Thousands of connections that wait or run for hours cost next to nothing, and those that ended
unnoticed are found soon. The entry of a forgotten item is removed when it is due, or by the next
clean-up, so there are never many more entries than items.
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
"""Entries of forgotten items that may stay in the heap, besides as many as there are items."""


class Agenda(Generic[T]):
    """Items to check, with times.

    The pause between two checks of an item is `first` seconds, doubled each time, up to `most`.
    """

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._heap: list[tuple[float, int, float, T]] = []
        self._numbers = itertools.count()
        self._current: dict[T, int] = {}
        """Item to the number of its entry; entries with other numbers are obsolete."""

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, item: T, now: float) -> None:
        """Check an item, `first` seconds from now for the first time."""
        self._push(item, now, self._first)

    def forget(self, item: T) -> None:
        """Don't check an item any more."""
        self._current.pop(item, None)
        self._clean_up()

    def check(self, now: float, most: int, keep: Callable[[T], bool]) -> None:
        """Check the items that are due, `most` at most. An item for which `keep` is false goes."""
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
        """Remove obsolete entries; rarely, so that the cost per item stays constant."""
        if len(self._heap) <= 2 * len(self._current) + SLACK:
            return
        self._heap = [entry for entry in self._heap if self._current.get(entry[3]) == entry[1]]
        heapq.heapify(self._heap)
