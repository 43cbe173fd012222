"""What `cross-host` has to reach, case by case, and which of it a run has met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from bench.stats import CostRow, CrossRow, Row

Measure = Literal[
    "ratio_to_overlay",
    "ratio_to_off",
    "cpu_ratio_to_overlay",
    "cpu_ratio_to_off",
    "cpu_ratio_to_host",
]
AS_GOOD: Final = 1.05
"""Not worse: within 5 %, which is less than the spread of most cases."""


NEARLY_ALL: Final = 0.9
"""Share of a case's connections in the relay from which on its ratio is the relay's."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio of a case that has to be at least this, or with `at_most` at most.

    With `by_relay` it is missed, whatever the ratio is, unless the connections were in the relay.
    """

    case: str
    measure: Measure
    limit: float
    at_most: bool = False
    by_relay: bool = False

    def verdict(self, found: float, row: Mapping[str, Any]) -> str:
        """The line about a figure of this row."""
        met = found <= self.limit if self.at_most else found >= self.limit
        sign = "<=" if self.at_most else ">="
        words = f"{self.case} {self.measure} {found:.2f} ({sign} {self.limit:.3g})"
        if self.by_relay:
            some, whole = row.get("connections_in_relay"), row.get("connections")
            words += (
                f", {some if some is None else f'{some:g}'} of {whole} connections in the relay"
            )
            met = met and bool(some and whole and some >= NEARLY_ALL * whole)
        return f"{'met' if met else 'MISSED'}: {words}"


def _gain(case: str, rate: float, cpu: float) -> list[Goal]:
    return [
        Goal(case, "ratio_to_overlay", rate, by_relay=True),
        Goal(case, "cpu_ratio_to_overlay", cpu, at_most=True, by_relay=True),
    ]


def _as_good(case: str) -> list[Goal]:
    return [
        Goal(case, "ratio_to_off", 1 / AS_GOOD),
        Goal(case, "cpu_ratio_to_off", AS_GOOD, at_most=True),
    ]


def goals() -> list[Goal]:
    """All goals; `same_host_` cases are on one host, without the library."""
    at_most = {
        "tcp_rr_one_core": 0.78,
        "udp_rr_one_core": 0.78,
        "same_host_tcp_rr_one_core": 0.88,
        "same_host_udp_rr_one_core": 0.88,
        "redis_c8_beside_stream_p99": 1.0,
    }
    at_least = {
        "stream_1": 1.35,
        "stream_4": 1.4,
        "connect_request_close": 1.0,
        "same_host_stream_1": 1.15,
    }
    lone = ("redis_p1_c1", "redis_p1_c4", "redis_slow_c50", "pairs_8", "pairs_24")
    return [
        *(
            goal
            for case in ("redis_p1_c50", "memcached_c50", "nginx_keepalive")
            for goal in _gain(case, 2.5, 0.35)
        ),
        *_gain("redis_p16_c50", 2, 0.5),
        *_gain("redis_p1_c16", 2, 0.45),
        # So few connections stay on TCP: the fast path serves them faster than the relays.
        Goal("redis_p1_c8", "ratio_to_overlay", 1.3),
        Goal("redis_p1_c8", "cpu_ratio_to_overlay", 0.6, at_most=True),
        Goal("redis_p1_c8", "cpu_ratio_to_host", 0.9, at_most=True),
        Goal("redis_p1_c50", "cpu_ratio_to_host", 0.6, at_most=True, by_relay=True),
        *_gain("stream_1_no_offload", 2, 0.4),
        *(goal for case in (*lone, "stream_1", "stream_4") for goal in _as_good(case)),
        *(Goal(case, "ratio_to_overlay", limit) for case, limit in at_least.items()),
        *(Goal(case, "ratio_to_overlay", limit, True) for case, limit in at_most.items()),
    ]


def verdicts(found: Mapping[str, Row | CostRow | CrossRow]) -> list[str]:
    """One line per goal: met or missed. Goals without a figure are left out."""
    lines = []
    for goal in goals():
        value = found[goal.case].get(goal.measure) if goal.case in found else None
        if isinstance(value, float):
            lines.append(goal.verdict(value, cast("Mapping[str, Any]", found[goal.case])))
    return lines
