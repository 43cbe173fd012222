"""Latencies of requests: from the histogram of a load program, and from other programs' reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latency:
    """Half and 99 % of the requests of a run were answered within these microseconds."""

    p50_us: float
    p99_us: float


def merged(parts: Sequence[Mapping[float, int]]) -> dict[float, int]:
    """The sum of histograms: nanoseconds to count."""
    whole: dict[float, int] = {}
    for part in parts:
        for value, count in part.items():
            whole[value] = whole.get(value, 0) + count
    return whole


def percentile_us(histogram: Mapping[float, int], percent: float) -> float:
    """The nearest-rank percentile of a histogram in nanoseconds, in microseconds.

    Raises:
        ValueError: the histogram is empty.
    """
    total = sum(histogram.values())
    seen = 0
    for value in sorted(histogram):
        seen += histogram[value]
        if seen * 100 >= total * percent:
            return value / 1000
    raise ValueError("no samples")


def latency(histogram: Mapping[float, int]) -> Latency | None:
    """None for an empty histogram: the load has no requests."""
    if not histogram:
        return None
    return Latency(percentile_us(histogram, 50), percentile_us(histogram, 99))
