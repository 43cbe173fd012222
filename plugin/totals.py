"""Sums that only grow, over endpoints that come and go.

The kernel counts per link, and a link's counters go with it; but Prometheus takes a sum that falls for a restart, and all of it
for new traffic. So what each endpoint has counted since the last look is added to its network's sum. What an endpoint counts
between the last look and its end is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

Counts = tuple[int, ...]


def _growth(now: Counts, before: Counts) -> Counts:
    # Counters that fell belong to a link that was made anew, and began at zero.
    return tuple(n - b if n >= b else n for n, b in zip(now, before, strict=True))


class Totals:
    """Sums by network, of `width` counters. Safe from any thread."""

    def __init__(self, width: int) -> None:
        self._zero: Counts = (0,) * width
        self._lock = threading.Lock()
        self._sums: dict[str, Counts] = {}
        self._last: dict[str, Counts] = {}

    def look(self, counts: Mapping[str, Mapping[str, Counts | None]]) -> dict[str, Counts]:
        """The sums after a look: network → endpoint → its counters, None where they can't be read now."""
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
