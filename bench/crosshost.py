"""The suite `cross-host`: connections and packets between containers on two hosts.

Subjects are `freeflow`, with the library, so that busy connections may move to the relay;
`freeflow_off`, the same on a network without the relay; Docker's `overlay`; and the hosts' own
network as the limit. Cases with the prefix `same_host_` are packets on one host, without the
library. `more` are suites of other paths between hosts, which add rows of their own, such as that
of the RDMA relay (docs/rdma-model.md).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Final

from bench import load, rounds
from bench.errors import BenchError
from bench.goals import verdicts
from bench.load import Load
from bench.namespaces import SubjectPair
from bench.rounds import Say
from bench.stats import FREEFLOW, CrossRow, Measured, Row, cross_row, row
from bench.swarm_hosts import BenchHost
from bench.traffic import LoadCase, Traffic, TrafficSample, packets, traffic

LOCAL: Final = "same_host_"
"""Prefix of the names of cases on one host."""
LOCAL_LOADS: Final = ("stream_1", "stream_4", "tcp_rr", "udp_rr")
FOREIGN: Final = 0.2
"""Share of the machine from which on others' load makes rates doubtful."""

Suite = Callable[[], Mapping[str, Row]]
One = Traffic | LoadCase
Take = Callable[[One, SubjectPair, float], TrafficSample]


def local_names() -> list[str]:
    """Names of the loads on one host."""
    return [LOCAL + name for name in LOCAL_LOADS]


@dataclass(slots=True)
class CaseRuns:
    """One case: its runs, and what the routers and the machine said about them."""

    measured: Measured
    connections: int
    in_relay: list[int] = field(default_factory=list)
    paths: dict[str, int] = field(default_factory=dict)
    foreign: dict[str, list[float]] = field(default_factory=dict)

    def keep(self, subject: str, one: TrafficSample) -> None:
        self.measured.keep(subject, one.figure, one.cpu_us, one.latency)
        if one.foreign is not None:
            self.foreign.setdefault(subject, []).append(one.foreign)
        if one.listed is not None and subject == FREEFLOW:
            self.in_relay.append(one.listed.in_relay)
            self.paths = one.listed.words

    def row(self) -> CrossRow:
        return cross_row(self.measured, self.connections, self.in_relay, self.paths, self.foreign)


def _found(one: One) -> CaseRuns:
    if isinstance(one, LoadCase):
        return CaseRuns(Measured(one.case), 0)
    return CaseRuns(Measured(one.case, one.cpu_of), one.clients.total)


@dataclass(slots=True)
class CrossHost:
    """One run of the suite: up to `rounds` rounds, as many as fit in `budget` seconds.

    The pairs in `between` are on `hosts`, those in `within` on one.
    """

    hosts: Sequence[BenchHost]
    between: Sequence[SubjectPair]
    within: Sequence[SubjectPair]
    names: Sequence[str]
    rounds: int
    seconds: float
    budget: float
    order: random.Random
    say: Say
    take: Take
    cases: Sequence[One] = field(default_factory=lambda: [*traffic(), *packets()])
    local_loads: Sequence[Load] = field(default_factory=load.loads)
    more: Sequence[Suite] = ()
    clock: Callable[[], float] = time.monotonic
    found: dict[str, CaseRuns] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    """Seconds that each case took."""

    def measure(self) -> dict[str, Row]:
        """The rows of all chosen cases."""
        chosen = [one for one in self.cases if one.case.name in self.names]
        self.found = {one.case.name: _found(one) for one in chosen}
        start, longest = self.clock(), 0.0
        for number in range(self.rounds):
            begun = self.clock()
            if number and begun + longest > start + self.budget:
                self.say(f"the time is used up after {number} of {self.rounds} rounds")
                break
            # Cases under the same condition stand together: a change of devices takes its time.
            for condition, some in groupby(chosen, lambda one: one.condition):
                with condition(self.hosts):
                    for one in some:
                        self._each(one, f"round {number + 1}/{self.rounds}")
            longest = max(longest, self.clock() - begun)
        rows: dict[str, Row] = {name: one.row() for name, one in self.found.items()}
        rows |= self._local_rows()
        for suite in self.more:
            rows |= suite()
        self._conclude(rows)
        return rows

    def _each(self, one: One, label: str) -> None:
        """The case on all subjects, in another order each time."""
        found = self.found[one.case.name]
        begun = self.clock()
        for pair in self.order.sample(list(self.between), len(self.between)):
            try:
                sample = self.take(one, pair, self.seconds)
            except BenchError as error:
                # The next round tries again; the row has the reason in any case.
                found.measured.failed[pair.subject] = str(error)
                self.say(f"FAILED: {one.case.name} on {pair.subject}: {error}")
                continue
            found.keep(pair.subject, sample)
            self.say(f"{label}  {pair.subject:<12} {one.case.name} {_told(one, sample)}")
        self.used[one.case.name] = self.used.get(one.case.name, 0.0) + self.clock() - begun

    def _local_rows(self) -> dict[str, Row]:
        chosen = [one for one in self.local_loads if LOCAL + one.name in self.names]
        if not chosen or not self.within:
            return {}
        samples = rounds.interleaved(
            chosen, self.within, self.rounds, self.seconds, self.order, self.say
        )
        rows = {}
        for case in load.CASES:
            if case.name in samples:
                named = replace(case, name=LOCAL + case.name, about=f"{case.about}; on one host")
                rows[named.name] = row(named, samples[case.name])
        return rows

    def _conclude(self, rows: Mapping[str, Row]) -> None:
        """Say what the figures are worth: goals, foreign load, and where the time went."""
        for line in verdicts(rows):
            self.say(line)
        for name, one in self.found.items():
            made = one.row()
            worst = max(made["foreign"].values(), default=0.0)
            if worst > FOREIGN:
                self.say(f"FOREIGN LOAD: others used {worst:.0%} of the machine in {name}")
        for name, seconds in self.used.items():
            self.say(f"{name} took {seconds:.0f} s")


def _told(one: One, sample: TrafficSample) -> str:
    """A run in one line."""
    words = [f"{sample.figure:.5g} {one.case.unit}"]
    if sample.cpu_us is not None and isinstance(one, Traffic):
        words.append(f"{sample.cpu_us:.4g} us/{one.cpu_of}")
    if sample.latency is not None:
        words.append(f"p50 {sample.latency.p50_us:.4g} p99 {sample.latency.p99_us:.4g} us")
    if sample.listed is not None and isinstance(one, Traffic):
        words.append(f"connections_in_relay {sample.listed.in_relay}/{one.clients.total}")
        words.append(", ".join(f"{path}: {n}" for path, n in sample.listed.words.items()))
    if sample.foreign is not None:
        words.append(f"foreign {sample.foreign:.0%}")
    return "; ".join(words)
