"""Sums of counters that only grow, though endpoints come and go.

The kernel counts per link, and a link's counters disappear with it. Prometheus would take a falling
sum for a restart, and the whole sum for new traffic. So each update adds the growth of each
endpoint's counters to its network's sum. Traffic between the last update and an endpoint's end is
lost.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

Counts = tuple[int, ...]


def _growth(now: Counts, before: Counts) -> Counts:
    # Counters that fell belong to a new link, which began at zero.
    return tuple(n - b if n >= b else n for n, b in zip(now, before, strict=True))


class Totals:
    """Sums by network, of `width` counters. Safe from any thread."""

    def __init__(self, width: int) -> None:
        self._zero: Counts = (0,) * width
        self._lock = threading.Lock()
        self._sums: dict[str, Counts] = {}
        self._last: dict[str, Counts] = {}

    def update(self, counts: Mapping[str, Mapping[str, Counts | None]]) -> dict[str, Counts]:
        """Add the growth since the last update; returns the sums by network.

        `counts`: network → endpoint → its counters, None if they can't be read now.
        """
        with self._lock:
            sums = {}
            last = {}
            for network, endpoints in counts.items():
                total = self._sums.get(network, self._zero)
                for endpoint, now in endpoints.items():
                    before = self._last.get(endpoint, self._zero)
                    last[endpoint] = before if now is None else now
                    if now is not None:
                        growth = _growth(now, before)
                        total = tuple(t + g for t, g in zip(total, growth, strict=True))
                sums[network] = total
            self._sums, self._last = sums, last
            return dict(sums)
