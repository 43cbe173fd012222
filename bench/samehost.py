"""The suite `same-host`: connections between containers of one host.

Subjects are `freeflow` (with the library), `freeflow_plain` (the same network without it), Docker's
`overlay`, the host's network, and as limits AF_UNIX and a bare ring in shared memory. If a program
fails on a subject, its row has the reason in place of the figure.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench import idle, load
from bench.errors import ProgramError
from bench.idle import Idle
from bench.load import Load
from bench.measures import Measure, measures
from bench.namespaces import RING, TCP, SubjectPair
from bench.rounds import Say
from bench.sampling import Sample, sample
from bench.servers import Servers
from bench.stats import Case, LocalRow, Measured, local_row

OLD_CASES: Final = (load.STREAM_1, load.STREAM_4, load.TCP_RR, load.UDP_RR, load.CPU)
OLD_LOADS: Final = ("stream_1", "stream_4", "tcp_rr", "udp_rr")
"""Loads of `cross-host` that measure them, in every second round."""
CPU_OF: Final = ("redis_p1_c1", "redis_p1_c50", "redis_p16_c50", "memcached_c50")
"""Cases whose CPU time has a row of its own."""
CALIBRATION: Final = 0.15
LAST: Final = 30.0
"""Seconds reserved for the idle connections, which are measured once, at the end."""


@dataclass(slots=True)
class Figures:
    """One case: its runs, and the share of upgraded connections of each."""

    measured: Measured
    upgraded: list[float] = field(default_factory=list)

    def keep(self, subject: str, one: Sample) -> None:
        self.measured.keep(subject, one.figure, one.cpu_us, one.latency)
        if one.upgraded is not None:
            self.upgraded.append(one.upgraded)

    def row(self) -> LocalRow:
        upgraded = statistics.median(self.upgraded) if self.upgraded else None
        return local_row(self.measured, upgraded)

    def cpu_row(self) -> LocalRow:
        """The row of the case's CPU time."""
        one = self.measured
        about = f"CPU time of both ends in {one.case.name}"
        case = Case(f"{one.case.name}_cpu", f"us/{one.cpu_of}", False, about)
        mine = Measured(case, figures=one.cpu_us, failed=one.failed)
        return Figures(mine, self.upgraded).row()


def case_names() -> list[str]:
    """Names of all cases."""
    measured = (one.case for one in measures() if one.in_suite)
    return [case.name for case in (*measured, *idle.CASES, *OLD_CASES)]


@dataclass(slots=True)
class SameHost:
    """One run of the suite: up to `rounds` rounds, as many as fit in `budget` seconds."""

    pairs: Sequence[SubjectPair]
    names: Sequence[str]
    rounds: int
    seconds: float
    budget: float
    order: random.Random
    say: Say
    measures: Sequence[Measure] = field(
        default_factory=lambda: [m for m in measures() if m.in_suite]
    )
    olds: Sequence[Load] = field(
        default_factory=lambda: [one for one in load.loads() if one.name in OLD_LOADS]
    )
    take: Callable[[Measure, SubjectPair, Servers, float], Sample] = sample
    leave_idle: Callable[[SubjectPair, Servers], Idle] = idle.idle
    clock: Callable[[], float] = time.monotonic
    found: dict[str, Figures] = field(default_factory=dict)

    def measure(self) -> dict[str, LocalRow]:
        chosen = [one for one in self.measures if one.case.name in self.names]
        olds = [case for case in OLD_CASES if case.name in self.names]
        idling = [case for case in idle.CASES if case.name in self.names]
        for one in chosen:
            self.found[one.case.name] = Figures(Measured(one.case, one.cpu_of))
        for case in (*idling, *olds):
            self.found[case.name] = Figures(Measured(case))
        start = self.clock()
        with Servers() as servers:
            for one in chosen:
                if one.calibrate:
                    self._each(one, servers, CALIBRATION, None)
            longest = 0.0
            for number in range(self.rounds):
                begun = self.clock()
                if number and begun + longest + LAST > start + self.budget:
                    self.say(f"the time is used up after {number} of {self.rounds} rounds")
                    break
                for one in chosen:
                    self._each(one, servers, self.seconds, f"round {number + 1}/{self.rounds}")
                if number % 2 == 0 and olds:
                    self._old(f"round {number + 1}/{self.rounds}")
                longest = max(longest, self.clock() - begun)
            if idling:
                self._idle(servers)
        return self._rows()

    def _rows(self) -> dict[str, LocalRow]:
        rows = {}
        for name, figures in self.found.items():
            rows[name] = figures.row()
            if name in CPU_OF:
                rows[f"{name}_cpu"] = figures.cpu_row()
        return rows

    def _in_turn(self, transports: Iterable[str]) -> list[SubjectPair]:
        able = [pair for pair in self.pairs if pair.transport in transports]
        return self.order.sample(able, len(able))

    def _try(self, names: Sequence[str], pair: SubjectPair, work: Callable[[], None]) -> None:
        """Do the work, unless it has failed before on this subject."""
        mine = [self.found[name].measured for name in names if name in self.found]
        if any(pair.subject in figures.failed for figures in mine):
            return
        try:
            work()
        except ProgramError as error:
            self.say(f"FAILED: {names[0]} on {pair.subject}: {error}")
            for figures in mine:
                figures.failed[pair.subject] = str(error)

    def _each(self, one: Measure, servers: Servers, seconds: float, label: str | None) -> None:
        name = one.case.name
        for pair in self._in_turn(one.transports):

            def work(pair: SubjectPair = pair) -> None:
                got = self.take(one, pair, servers, seconds)
                if label is None:
                    return
                self.found[name].keep(pair.subject, got)
                share = "" if got.upgraded is None else f", upgraded {got.upgraded:.0%}"
                cost = "" if got.cpu_us is None else f", {got.cpu_us:.4g} us/{one.cpu_of}"
                self.say(f"{label}  {pair.subject:<14} {name} {got.figure:.5g}{cost}{share}")
                if one.upgraded and pair.client.library and (got.upgraded or 0) < 0.5:
                    why = got.counters or "the library has counted nothing"
                    self.say(f"NOT UPGRADED: {name}: its figure is not of shared memory: {why}")

            self._try([name], pair, work)

    def _old(self, label: str) -> None:
        for one in self.olds:
            names = [case.name for case in OLD_CASES if case.name.startswith(one.name)]
            if one.name == "stream_1":
                names.append(load.CPU.name)
            if not any(name in self.found for name in names):
                continue
            for pair in self._in_turn({TCP}):

                def work(pair: SubjectPair = pair, one: Load = one) -> None:
                    figures = one.run(pair, self.seconds)
                    for case, figure in figures.items():
                        if case in self.found:
                            self.found[case].keep(pair.subject, Sample(figure, None, None))
                    told = ", ".join(f"{case} {figure:.5g}" for case, figure in figures.items())
                    self.say(f"{label}  {pair.subject:<14} {told}")

                self._try(names, pair, work)

    def _idle(self, servers: Servers) -> None:
        names = [case.name for case in idle.CASES]
        for pair in self._in_turn({pair.transport for pair in self.pairs} - {RING}):

            def work(pair: SubjectPair = pair) -> None:
                got = self.leave_idle(pair, servers)
                for name in names:
                    if name in self.found:
                        one = Sample(got.figures[name], None, got.upgraded)
                        self.found[name].keep(pair.subject, one)
                told = ", ".join(f"{name} {figure:.4g}" for name, figure in got.figures.items())
                self.say(f"{pair.subject:<14} {told}")

            self._try(names, pair, work)
