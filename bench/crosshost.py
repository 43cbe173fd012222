"""The suite `cross-host`: containers on two hosts, and on one host, without the library.

Subjects are `freeflow`, Docker's `overlay`, and the hosts' own network as the limit. It measures
paths through the kernel (docs/fast-path.md). `more` are suites of other paths between hosts, which
add rows of their own, such as the relay's (docs/rdma-model.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from bench import load, rounds
from bench.load import Load
from bench.namespaces import Pair
from bench.rounds import Say
from bench.stats import Row, row

LOCAL: Final = "same_host_"
"""Prefix of the names of cases on one host."""
LOCAL_LOADS: Final = ("stream_1", "stream_4", "tcp_rr", "udp_rr")
TARGETS: Final = {
    "stream_1": 1.35,
    "stream_4": 1.4,
    "tcp_rr_one_core": 0.78,
    "udp_rr_one_core": 0.78,
    "cpu_per_byte": 0.72,
    "connect_request_close": 1.0,
    LOCAL + "stream_1": 1.15,
    LOCAL + "tcp_rr_one_core": 0.88,
    LOCAL + "udp_rr_one_core": 0.88,
}
"""Ratio to Docker's `overlay` to reach: at least, or at most where less is better."""

Suite = Callable[[], Mapping[str, Row]]


def names() -> list[str]:
    """Names of all loads."""
    return [*(one.name for one in load.loads()), *(LOCAL + name for name in LOCAL_LOADS)]


def verdicts(found: Mapping[str, Row]) -> list[str]:
    """One line per target: met or missed. Cases without a figure are left out."""
    lines = []
    for name, target in TARGETS.items():
        ratio = found[name]["ratio_to_overlay"] if name in found else None
        if ratio is None:
            continue
        more = found[name]["better"] == "more"
        met = ratio >= target if more else ratio <= target
        sign = ">=" if more else "<="
        lines.append(f"{'met' if met else 'MISSED'}: {name} {ratio:.2f} ({sign} {target:g})")
    return lines


@dataclass(slots=True)
class CrossHost:
    """One run of the suite. The pairs in `between` are on two hosts, those in `within` on one."""

    between: Sequence[Pair]
    within: Sequence[Pair]
    names: Sequence[str]
    rounds: int
    seconds: float
    order: random.Random
    say: Say
    enough: Callable[[], bool] = lambda: False
    loads: Sequence[Load] = field(default_factory=load.loads)
    more: Sequence[Suite] = ()

    def measure(self) -> dict[str, Row]:
        """The rows of all cases; those that were not chosen have no figures."""
        found = rounds.rows(self._samples(self.between, ""))
        local = self._samples(self.within, LOCAL)
        for case in load.CASES:
            if case.name in local:
                named = replace(case, name=LOCAL + case.name, about=f"{case.about}; on one host")
                found[named.name] = row(named, local[case.name])
        for suite in self.more:
            found |= suite()
        for line in verdicts(found):
            self.say(line)
        return found

    def _samples(self, pairs: Sequence[Pair], prefix: str) -> dict[str, dict[str, list[float]]]:
        chosen = [one for one in self.loads if prefix + one.name in self.names]
        if not chosen or not pairs:
            return {}
        return rounds.interleaved(
            chosen, pairs, self.rounds, self.seconds, self.order, self.say, self.enough
        )
