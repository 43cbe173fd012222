"""Durations and failures of Docker's calls, for `freeflow status` and the metrics."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

KEPT: Final = 1024
"""Durations kept per call, for percentiles."""


@dataclass(frozen=True, slots=True)
class CallSummary:
    """A call: totals since the start; percentiles in seconds over the last `KEPT`."""

    name: str
    count: int
    errors: int
    seconds: float
    p50: float
    p99: float


def _percentile(values: list[float], percent: int) -> float:
    """The percentile of sorted values, by the nearest-rank method."""
    return values[(len(values) * percent + 99) // 100 - 1]


class CallStatistics:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations: dict[str, deque[float]] = {}
        self._counts: dict[str, tuple[int, int, float]] = {}

    def record(self, name: str, seconds: float, failed: bool) -> None:
        with self._lock:
            self._durations.setdefault(name, deque(maxlen=KEPT)).append(seconds)
            count, errors, total = self._counts.get(name, (0, 0, 0.0))
            self._counts[name] = (count + 1, errors + failed, total + seconds)

    def summaries(self) -> list[CallSummary]:
        with self._lock:
            kept = {name: sorted(values) for name, values in self._durations.items()}
            counts = dict(self._counts)
        return [
            CallSummary(
                name,
                *counts[name],
                p50=_percentile(values, 50),
                p99=_percentile(values, 99),
            )
            for name, values in sorted(kept.items())
        ]
