"""Statistics of Docker's calls."""

from __future__ import annotations

import pytest

from plugin.calls import KEPT, CallStatistics


@pytest.mark.parametrize(
    ("count", "p50", "p99"), [(1, 1, 1), (2, 1, 2), (99, 50, 99), (100, 50, 99), (1000, 500, 990)]
)
def test_percentiles_are_nearest_ranks(count: int, p50: int, p99: int) -> None:
    """p99 is a duration that really occurred, and that at most one call in a hundred exceeded."""
    statistics = CallStatistics()
    for seconds in range(count, 0, -1):
        statistics.record("Join", float(seconds), failed=False)
    (summary,) = statistics.summaries()
    assert (summary.p50_ms, summary.p99_ms) == (1000 * p50, 1000 * p99)


def test_percentiles_are_of_the_last_calls() -> None:
    """Old durations count in the totals only."""
    statistics = CallStatistics()
    statistics.record("Join", 1000.0, failed=True)
    for _ in range(KEPT):
        statistics.record("Join", 1.0, failed=False)
    (summary,) = statistics.summaries()
    assert (summary.count, summary.errors, summary.p99_ms) == (KEPT + 1, 1, 1000.0)
