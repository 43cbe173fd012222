"""Measures the demo's stacks: loads from the client to each service, on both networks in turn.

An extra run of each load, which does not count, finds the path of its connections by
`freeflow connections`.
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
from bench.bars import Bar
from bench.errors import BenchError, ProgramError
from bench.namespaces import CONGESTION_CONTROL, TOOLS, ProcessNamespaces, run
from bench.report import columns, number, times
from bench.stats import FREEFLOW, OVERLAY
from testbed import Host

ROUNDS: Final = 3
LONG: Final = 3.0
"""Seconds of the run in which connections are listed."""
PAUSE: Final = 0.5
"""Seconds of that run until they are listed."""
SECONDS: Final = 1.0
"""Seconds of a run that counts."""
PATIENCE: Final = 120.0
LIBRARY: Final = "/run/freeflow/libfreeflow.so"
COMMAND: Final = "/usr/local/bin/freeflow"


@dataclass(frozen=True, slots=True)
class DemoTask:
    """A task: its address, and the PID of its first process in its host's namespace."""

    host: Host
    address: str
    pid: int

    def cpu_us(self) -> float:
        return cost.cpu_us(self.pid, self.host.root / "proc")


@dataclass(frozen=True, slots=True)
class DemoRun:
    """One run of a load: pieces of work per second, and in all."""

    rate: float
    work: float


@dataclass(frozen=True, slots=True)
class DemoLoad:
    """A load program. `ask` runs it for about some seconds, given its last rate on this network."""

    what: str
    service: str
    unit: str
    piece: str
    """Unit of work that CPU time is divided by."""
    ask: Callable[[ProcessNamespaces, str, float, float], DemoRun]
    aside: int = 0
    """Connections of the program that carry no load."""


def _redis(client: ProcessNamespaces, where: str, seconds: float, rate: float) -> DemoRun:
    """redis-benchmark stops after a number of requests, not of seconds."""
    count = max(20_000, round(rate * seconds))
    command = ("redis-benchmark", "-h", where, "-t", "get", "-c", "50", "-n", str(count), "--csv")
    return DemoRun(parse.redis_benchmark(run(client.enter(*command), PATIENCE)), count)


def _web(client: ProcessNamespaces, where: str, seconds: float, _rate: float) -> DemoRun:
    command = ("wrk", "-t", "2", "-c", "50", "-d", f"{max(1, round(seconds))}s", f"http://{where}/")
    text = run(client.enter(*command), PATIENCE)
    return DemoRun(parse.wrk(text), parse.wrk_requests(text))


def _database(client: ProcessNamespaces, where: str, seconds: float, rate: float) -> DemoRun:
    program = ("pgbench", "-h", where, "-U", "postgres")
    if not rate:
        # Its first start takes longer than the other servers'.
        answers = f"until pg_isready -q -h {where}; do sleep 0.2; done"
        run(client.enter("sh", "-c", answers), PATIENCE)
        run(client.enter(*program, "-i", "-q", "postgres"), PATIENCE)
    duration = str(max(1, round(seconds)))
    command = (*program, "-S", "-n", "-c", "8", "-j", "2", "-T", duration, "postgres")
    done = parse.pgbench(run(client.enter(*command), PATIENCE))
    return DemoRun(done.rate, done.count)


def _stream(client: ProcessNamespaces, where: str, seconds: float, _rate: float) -> DemoRun:
    command = ("iperf3", "--client", where, "--json", "--time", str(max(1, round(seconds))))
    text = run(client.enter(*command, "--congestion", CONGESTION_CONTROL), PATIENCE)
    found = parse.iperf3(text)
    return DemoRun(found.bits_per_second / 1e9, found.bytes / 1e6)


def _echo(client: ProcessNamespaces, where: str, seconds: float, _rate: float) -> DemoRun:
    command = (f"{TOOLS}/pingpong", "stream", "call", "-1", where, "7001", "64", str(seconds))
    found = parse.pingpong(run(client.enter(*command), PATIENCE))
    return DemoRun(1e6 / found.p50_us, found.count)


REDIS: Final = DemoLoad("redis, 50 clients", "cache", "GET/s", "GET", _redis)
WEB: Final = DemoLoad("nginx, 50 clients", "web", "requests/s", "request", _web)
DATABASE: Final = DemoLoad(
    "PostgreSQL, 8 clients", "db", "transactions/s", "transaction", _database
)
STREAM: Final = DemoLoad("one stream", "sink", "Gbit/s", "MB", _stream, aside=1)
ECHO: Final = DemoLoad("64 bytes there and back", "echo", "round trips/s", "round trip", _echo)


@dataclass(slots=True)
class Side:
    """The measurements of a row on one network."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """CPU time per piece of work in microseconds, of both programs."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def cost(self) -> float | None:
        return statistics.median(self.cpu) if self.cpu else None


@dataclass(slots=True)
class DemoRow:
    """A load from the client to some tasks: its path, and its speed on both networks."""

    load: DemoLoad
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


def table(rows: Sequence[DemoRow]) -> str:
    return columns(HEADER, [row.cells() for row in rows], left=4)


def best_first(rows: Sequence[DemoRow]) -> list[DemoRow]:
    """Sorted by ratio; rows that work on FreeFlow alone come last."""
    return sorted(rows, key=lambda row: -(row.ratio or 0.0))


@dataclass(frozen=True, slots=True)
class Subject:
    """A stack to measure: its client, and its tasks by service."""

    name: str
    client: ProcessNamespaces
    manager: Host
    tasks: dict[str, list[DemoTask]]

    def near(self, service: str) -> DemoTask:
        """A task on the client's host."""
        return next(task for task in self.tasks[service] if task.host is self.manager)

    def far(self, service: str) -> DemoTask:
        return next(task for task in self.tasks[service] if task.host is not self.manager)


def _without_control(seen: Counter[str], aside: int) -> Counter[str]:
    """The same without control connections, which stay on TCP: they are short, or carry little."""
    on_tcp = (path for path in seen if path.startswith("overlay"))
    return seen - Counter(dict.fromkeys(on_tcp, aside))


def _mostly_on(seen: Counter[str], wanted: str, aside: int) -> bool:
    counted = _without_control(seen, aside)
    return counted[wanted] >= 0.9 * counted.total()


class WrongPathError(BenchError):
    """Connections did not take the expected path."""


@dataclass(slots=True)
class Meter:
    """Measures rows, and reports each one by `say`."""

    subjects: Sequence[Subject]
    say: Callable[[str], None]
    rates: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def row(
        self,
        load: DemoLoad,
        where: str,
        target: Callable[[Subject], str],
        busy: Callable[[Subject], list[DemoTask]],
        wanted: str = "",
    ) -> DemoRow:
        """Measure a row. `busy`: the tasks whose CPU time counts; `wanted`: the expected path."""
        found: dict[str, Side] = {}
        path = ""
        for subject in self.subjects:
            try:
                self._ask(load, subject, where, target(subject), SECONDS)
            except ProgramError:
                if subject.name == FREEFLOW:
                    raise
                # Docker's overlay needs IPVS for VIPs, which this kernel may lack.
                continue
            found[subject.name] = Side()
            if subject.name == FREEFLOW:
                path = self._path(load, subject, where, target(subject), wanted)
        for _ in range(ROUNDS):
            for subject in self.subjects:
                if subject.name in found:
                    side = found[subject.name]
                    self._count(load, subject, where, target(subject), busy(subject), side)
        made = DemoRow(load, where, path, found[FREEFLOW], found.get(OVERLAY))
        other = number(made.theirs.rate) if made.theirs else "does not answer"
        self.say(
            f"{load.what}, {where}: {number(made.ours.rate)} {load.unit}, overlay {other}, {times(made.ratio)}"
        )
        return made

    def _ask(
        self, load: DemoLoad, subject: Subject, where: str, address: str, seconds: float
    ) -> DemoRun:
        key = (load.what, where, subject.name)
        done = load.ask(subject.client, address, seconds, self.rates.get(key, 0.0))
        self.rates[key] = done.rate
        return done

    def _count(
        self,
        load: DemoLoad,
        subject: Subject,
        where: str,
        address: str,
        busy: list[DemoTask],
        side: Side,
    ) -> None:
        begin = cost.children_us() + sum(task.cpu_us() for task in busy)
        done = self._ask(load, subject, where, address, SECONDS)
        spent = cost.children_us() + sum(task.cpu_us() for task in busy) - begin
        side.rates.append(done.rate)
        if busy and done.work:
            side.cpu.append(spent / done.work)

    def _path(self, load: DemoLoad, subject: Subject, where: str, address: str, wanted: str) -> str:
        """The paths of the client's connections to an address while the load runs."""
        seen: Counter[str] = Counter()
        for times_as_long in (1, 2, 4):
            # On a busy machine the connections may have ended before they were listed, or not have
            # moved yet.
            seen = self._look(load, subject, where, address, times_as_long)
            if seen and (not wanted or _mostly_on(seen, wanted, load.aside)):
                break
        if not seen:
            raise WrongPathError(f"{load.what}, {where}: no connection to {address} was seen")
        total = seen.total()
        told = ", ".join(f"{count} of {total} on {path}" for path, count in seen.most_common())
        self.say(f"{load.what}, {where}: connections {told}")
        if wanted and not _mostly_on(seen, wanted, load.aside):
            raise WrongPathError(f"{load.what}, {where}: {told}, not on {wanted}")
        counted = _without_control(seen, load.aside)
        return " and ".join(path for path, count in counted.most_common() if count)

    def _look(
        self, load: DemoLoad, subject: Subject, where: str, address: str, times_as_long: int
    ) -> Counter[str]:
        begin = time.monotonic()
        pause, seconds = PAUSE * times_as_long, LONG * times_as_long
        command = ("sh", "-c", f"sleep {pause}; {COMMAND} connections --json")
        with subject.manager.spawn(*command, stdout=subprocess.PIPE) as asking:
            while True:
                self._ask(load, subject, where, address, seconds)
                # The load may end early if it has become faster than in its last run.
                if asking.poll() is not None or time.monotonic() - begin > PATIENCE:
                    break
            said, _ = asking.communicate(timeout=PATIENCE)
        try:
            listed = json.loads(said)["connections"]
        except (ValueError, KeyError) as error:
            raise ProgramError(f"freeflow connections said {said[:200]!r}") from error
        ends = [one for one in listed if one["remote"].startswith(f"{address}:")]
        return Counter(one["path"] for one in ends)
