"""Durations and failures of Docker's calls, for `freeflow status` and the metrics."""

from __future__ import annotations

import threading
from collections import deque
from typing import Final

from plugin.status import CallStatus

KEPT: Final = 1024
"""Durations kept per call, for percentiles."""


def _percentile(values: list[float], percent: int) -> float:
    """The percentile of sorted durations in milliseconds, by the nearest-rank method."""
    return round(values[(len(values) * percent + 99) // 100 - 1] * 1000, 2)


class CallStatistics:
    """Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations: dict[str, deque[float]] = {}
        self._counts: dict[str, tuple[int, int]] = {}

    def record(self, name: str, seconds: float, failed: bool) -> None:
        with self._lock:
            self._durations.setdefault(name, deque(maxlen=KEPT)).append(seconds)
            count, errors = self._counts.get(name, (0, 0))
            self._counts[name] = (count + 1, errors + failed)

    def summaries(self) -> list[CallStatus]:
        with self._lock:
            kept = {name: sorted(values) for name, values in self._durations.items()}
            counts = dict(self._counts)
        return [
            CallStatus(name, *counts[name], _percentile(values, 50), _percentile(values, 99))
            for name, values in sorted(kept.items())
        ]
