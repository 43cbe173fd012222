"""How fast the demo's stacks are: each service asked from the client in turn on each network, with the path that was taken.

A figure is of one path: `freeflow connections` is asked while the load runs, in a run of its own that doesn't count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from bench import cost, parse
from bench.chart import Bar
from bench.errors import BenchError, ProgramError
from bench.place import CONGESTION_CONTROL, TOOLS, Place, run
from bench.report import columns, number, times
from bench.stats import FREEFLOW, OVERLAY
from testbed import Host

ROUNDS: Final = 3
LONG: Final = 3.0
"""Seconds of a run in which we look at the connections."""
SECONDS: Final = 1.0
"""Seconds of a run that counts."""
PATIENCE: Final = 120.0
LIBRARY: Final = "/run/freeflow/libfreeflow.so"
COMMAND: Final = "/usr/local/bin/freeflow"


@dataclass(frozen=True, slots=True)
class Task:
    """A service's container: where it is reached, and its first process as its host numbers it."""

    host: Host
    address: str
    pid: int

    def cpu_us(self) -> float:
        return cost.cpu_us(self.pid, self.host.root / "proc")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a load did: so many pieces of work, so many a second."""

    rate: float
    work: float


@dataclass(frozen=True, slots=True)
class Load:
    """A program that asks a service for about some seconds; `rate` is what it had at its last run on this network."""

    what: str
    service: str
    unit: str
    piece: str
    """What CPU time is counted for."""
    ask: Callable[[Place, str, float, float], Run]
    aside: int = 0
    """Connections of the program that carry no load."""


def _redis(client: Place, where: str, seconds: float, rate: float) -> Run:
    """It stops after a number of requests, not of seconds."""
    count = max(20_000, round(rate * seconds))
    command = ("redis-benchmark", "-h", where, "-t", "get", "-c", "50", "-n", str(count), "--csv")
    return Run(parse.redis_benchmark(run(client.enter(*command), PATIENCE)), count)


def _web(client: Place, where: str, seconds: float, _rate: float) -> Run:
    command = ("wrk", "-t", "2", "-c", "50", "-d", f"{max(1, round(seconds))}s", f"http://{where}/")
    text = run(client.enter(*command), PATIENCE)
    return Run(parse.wrk(text), parse.wrk_requests(text))


def _stream(client: Place, where: str, seconds: float, _rate: float) -> Run:
    command = ("iperf3", "--client", where, "--json", "--time", str(max(1, round(seconds))))
    text = run(client.enter(*command, "--congestion", CONGESTION_CONTROL), PATIENCE)
    found = parse.iperf3(text)
    return Run(found.bits_per_second / 1e9, found.bytes / 1e6)


def _echo(client: Place, where: str, seconds: float, _rate: float) -> Run:
    command = (f"{TOOLS}/pingpong", "stream", "call", "-1", where, "7001", "64", str(seconds))
    found = parse.pingpong(run(client.enter(*command), PATIENCE))
    return Run(1e6 / found.p50_us, found.count)


REDIS: Final = Load("redis, 50 clients", "cache", "GET/s", "GET", _redis)
WEB: Final = Load("nginx, 50 clients", "web", "requests/s", "request", _web)
STREAM: Final = Load("one stream", "sink", "Gbit/s", "MB", _stream, aside=1)
ECHO: Final = Load("64 bytes there and back", "echo", "round trips/s", "round trip", _echo)


@dataclass(slots=True)
class Side:
    """What was measured of a row on one network."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Microseconds for each piece of work, of both programs."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cost(self) -> float | None:
        return statistics.median(self.cpu) if self.cpu else None


@dataclass(slots=True)
class Row:
    """A load from the client to some tasks: over which path, how fast, beside the other network."""

    load: Load
    where: str
    path: str
    ours: Side
    theirs: Side | None

    @property
    def ratio(self) -> float | None:
        return self.ours.rate / self.theirs.rate if self.theirs else None

    def bar(self) -> Bar:
        theirs = self.theirs.rate if self.theirs else None
        return Bar(
            self.load.what, f"{self.where}: {self.path}", self.load.unit, self.ours.rate, theirs
        )

    def cells(self) -> tuple[str, ...]:
        mine, other = self.ours.cost, self.theirs.cost if self.theirs else None
        return (
            *(self.where, self.load.what, self.path, self.load.unit),
            *(number(self.ours.rate), number(self.theirs.rate) if self.theirs else "no answer"),
            times(self.ratio),
            *(f"us/{self.load.piece}", number(mine), number(other)),
        )


HEADER: Final = (
    *("where", "what", "path", "how fast", "freeflow", "overlay", "ratio"),
    *("CPU time of both", "freeflow", "overlay"),
)


def table(rows: Sequence[Row]) -> str:
    return columns(HEADER, [row.cells() for row in rows], left=4)


def best_first(rows: Sequence[Row]) -> list[Row]:
    """By how many times faster than the other network; what works only here is last."""
    return sorted(rows, key=lambda row: -(row.ratio or 0.0))


@dataclass(frozen=True, slots=True)
class Subject:
    """A stack as it is measured: its client, and its tasks by service."""

    name: str
    client: Place
    manager: Host
    tasks: dict[str, list[Task]]

    def near(self, service: str) -> Task:
        """A task on the client's host."""
        return next(task for task in self.tasks[service] if task.host is self.manager)

    def far(self, service: str) -> Task:
        return next(task for task in self.tasks[service] if task.host is not self.manager)


class WrongPathError(BenchError):
    """Connections didn't take the path that they are shown for."""


@dataclass(slots=True)
class Meter:
    """Measures rows; `say` tells what was seen on the way."""

    subjects: Sequence[Subject]
    say: Callable[[str], None]
    rates: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def row(
        self,
        load: Load,
        where: str,
        target: Callable[[Subject], str],
        busy: Callable[[Subject], list[Task]],
        wanted: str = "",
    ) -> Row:
        """A row; `busy` are the tasks that work for it, `wanted` the path that its connections must take."""
        found: dict[str, Side] = {}
        path = ""
        for subject in self.subjects:
            try:
                self._ask(load, subject, where, target(subject), SECONDS)
            except ProgramError:
                if subject.name == FREEFLOW:
                    raise
                # Docker's own virtual addresses answer only where the kernel has IPVS.
                continue
            found[subject.name] = Side()
            if subject.name == FREEFLOW:
                path = self._path(load, subject, where, target(subject), wanted)
        for _ in range(ROUNDS):
            for subject in self.subjects:
                if subject.name in found:
                    side = found[subject.name]
                    self._count(load, subject, where, target(subject), busy(subject), side)
        made = Row(load, where, path, found[FREEFLOW], found.get(OVERLAY))
        other = number(made.theirs.rate) if made.theirs else "doesn't answer"
        self.say(
            f"{load.what}, {where}: {number(made.ours.rate)} {load.unit}, overlay {other}, {times(made.ratio)}"
        )
        return made

    def _ask(self, load: Load, subject: Subject, where: str, address: str, seconds: float) -> Run:
        key = (load.what, where, subject.name)
        done = load.ask(subject.client, address, seconds, self.rates.get(key, 0.0))
        self.rates[key] = done.rate
        return done

    def _count(
        self, load: Load, subject: Subject, where: str, address: str, busy: list[Task], side: Side
    ) -> None:
        begin = cost.children_us() + sum(task.cpu_us() for task in busy)
        done = self._ask(load, subject, where, address, SECONDS)
        spent = cost.children_us() + sum(task.cpu_us() for task in busy) - begin
        side.rates.append(done.rate)
        if busy and done.work:
            side.cpu.append(spent / done.work)

    def _path(self, load: Load, subject: Subject, where: str, address: str, wanted: str) -> str:
        """What the client's connections to an address run over, by `freeflow connections`, while they do."""
        seen: Counter[str] = Counter()
        seconds = LONG
        for _ in range(3):
            seen = self._look(load, subject, where, address, seconds)
            if seen:
                break
            # So busy a machine that the connections had gone before we looked.
            seconds *= 2
        if not seen:
            raise WrongPathError(f"{load.what}, {where}: no connection to {address} was seen")
        total = seen.total()
        told = ", ".join(f"{count} of {total} on {path}" for path, count in seen.most_common())
        self.say(f"{load.what}, {where}: connections {told}")
        # Those that only steer the others stay TCP: they are short, or carry next to nothing.
        for path in seen:
            if path.startswith("overlay"):
                seen[path] = max(0, seen[path] - load.aside)
        if wanted and seen[wanted] < 0.9 * seen.total():
            raise WrongPathError(f"{load.what}, {where}: {told}, not on {wanted}")
        return " and ".join(path for path, count in seen.most_common() if count)

    def _look(
        self, load: Load, subject: Subject, where: str, address: str, seconds: float
    ) -> Counter[str]:
        begin = time.monotonic()
        command = ("sh", "-c", f"sleep 0.5; {COMMAND} connections --json")
        with subject.manager.spawn(*command, stdout=subprocess.PIPE) as asking:
            while True:
                self._ask(load, subject, where, address, seconds)
                # The load may be over sooner than was meant: it has become faster.
                if asking.poll() is not None or time.monotonic() - begin > PATIENCE:
                    break
            said, _ = asking.communicate(timeout=PATIENCE)
        try:
            listed = json.loads(said)["connections"]
        except (ValueError, KeyError) as error:
            raise ProgramError(f"freeflow connections said {said[:200]!r}") from error
        ends = [one for one in listed if one["remote"].startswith(f"{address}:")]
        return Counter(one["path"] for one in ends)
