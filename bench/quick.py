"""`python -m bench quick`: the same-host cases without Docker, in seconds; for work on the library.

It makes two network namespaces on a bridge, and with `--library` a router for them. Each case runs
on each variant in turn, in another order each round: plain TCP, TCP with the library, and as limits
AF_UNIX and a bare ring in shared memory.

    python -m bench quick --cases 'pingpong_64b*' --library build/libfreeflow.so
    FREEFLOW_ROUTER=/elsewhere/router.sock python -m bench quick --no-router --setup 'my-router' --library ...

Variables FREEFLOW_… of the environment are passed to the programs. `--setup` is a shell command
that runs during the measurement, which begins when the command has printed a line. Its environment
has the paths of the namespaces (BENCH_CLIENT, BENCH_SERVER), their addresses
(BENCH_CLIENT_ADDRESS, BENCH_SERVER_ADDRESS), and the folder that programs see as /run/freeflow
(BENCH_SHARED).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from itertools import chain
from pathlib import Path
from typing import Final

import click

from bench import compiled, idle
from bench.choice import pick
from bench.errors import BenchError, ProgramError
from bench.measures import Measure, measures
from bench.namespaces import RING, UNIX, ProcessNamespaces, SubjectPair, congestion_control_allowed
from bench.report import columns, number, percent, times
from bench.sampling import Sample, sample
from bench.servers import Servers
from bench.stats import Case, spread
from dataplane.control import RouterSettings, Rule
from testbed.namespace_bed import LIBRARY, BedContainer, bed

PLAIN: Final = "tcp"
FREEFLOW: Final = "freeflow"
VARIANTS: Final = (PLAIN, FREEFLOW, UNIX, RING)
HEADER: Final = (
    *("case", "unit", *VARIANTS),
    *("freeflow/tcp", "cpu", "cpu/tcp", "upgraded", "spread"),
)
WIDTHS: Final = (28, 14, 9, 9, 9, 9, 12, 24, 7, 8, 6)
"""Fixed widths, since each row is printed when it is done."""
Samples = dict[str, list[Sample]]


def _cost(microseconds: float | None, unit: str) -> str:
    if microseconds is None:
        return "-"
    if microseconds > 1e4:
        return f"{number(microseconds / 1e6)} s/{unit}"
    return f"{number(microseconds)} us/{unit}"


@dataclass(slots=True)
class CaseResult:
    """The results of a case: variant to one sample per round."""

    case: Case
    cpu_of: str
    samples: Samples = field(default_factory=dict)

    def median(self, variant: str) -> float | None:
        values = [one.figure for one in self.samples.get(variant, [])]
        return statistics.median(values) if values else None

    def cpu(self, variant: str) -> float | None:
        values = [one.cpu_us for one in self.samples.get(variant, []) if one.cpu_us is not None]
        return statistics.median(values) if values else None

    def latencies(self, variant: str) -> dict[str, float]:
        """Medians of the runs' p50 and p99 in microseconds; empty if the program has none."""
        known = [one.latency for one in self.samples.get(variant, []) if one.latency is not None]
        if not known:
            return {}
        return {
            "p50_us": statistics.median(one.p50_us for one in known),
            "p99_us": statistics.median(one.p99_us for one in known),
        }

    def upgraded(self) -> float | None:
        known = [one.upgraded for one in self.samples.get(FREEFLOW, []) if one.upgraded is not None]
        return statistics.median(known) if known else None

    def spread(self) -> float | None:
        spreads = [spread([one.figure for one in some]) for some in self.samples.values()]
        return max((one for one in spreads if one is not None), default=None)

    def line(self) -> tuple[str, ...]:
        plain, fast = self.median(PLAIN), self.median(FREEFLOW)
        cpu_plain, cpu_fast = self.cpu(PLAIN), self.cpu(FREEFLOW)
        return (
            self.case.name,
            self.case.unit,
            *(number(self.median(variant)) for variant in VARIANTS),
            times(fast / plain if fast is not None and plain else None),
            _cost(cpu_plain if cpu_fast is None else cpu_fast, self.cpu_of),
            times(cpu_fast / cpu_plain if cpu_fast is not None and cpu_plain else None),
            percent(self.upgraded()),
            percent(self.spread()),
        )

    def json(self) -> dict[str, object]:
        return {
            "unit": self.case.unit,
            "better": "more" if self.case.more_is_better else "less",
            "cpu_of": self.cpu_of,
            "upgraded": self.upgraded(),
            **{
                variant: {
                    "median": self.median(variant),
                    "cpu_us": self.cpu(variant),
                    "runs": [one.figure for one in some],
                    **self.latencies(variant),
                }
                for variant, some in self.samples.items()
            },
        }


def idle_cases(
    pairs: Sequence[SubjectPair], rounds: int, order: random.Random, wanted: Sequence[Case]
) -> Generator[CaseResult, None, None]:
    """All idle cases, which one run measures together."""
    if not wanted:
        return
    result = {case.name: CaseResult(case, "connection") for case in wanted}
    with Servers() as servers:
        able = [pair for pair in pairs if pair.transport != RING]
        for _ in range(rounds):
            for pair in order.sample(able, len(able)):
                try:
                    seen = idle.idle(pair, servers)
                except ProgramError as error:
                    print(f"idle, {pair.subject}: {error}", file=sys.stderr)
                    continue
                for name, one in result.items():
                    some = one.samples.setdefault(pair.subject, [])
                    some.append(Sample(seen.figures[name], None, seen.upgraded))
    yield from result.values()


def absent_programs(chosen: Sequence[Measure], path: str | None = None) -> list[str]:
    """Packages of programs that the cases need and this machine lacks."""
    needed = {("gcc", "gcc"), *(each for one in chosen for each in one.kind.programs)}
    return sorted(
        {package for program, package in needed if shutil.which(program, path=path) is None}
    )


@contextlib.contextmanager
def _enter_container(container: BedContainer, tools: Path) -> Iterator[ProcessNamespaces]:
    """The namespaces of a container, held by a process so that entering them is cheap."""
    holder = container.popen(["sleep", "infinity"], accelerated=False)
    process = Path("/proc", str(holder.pid))
    try:
        end = time.monotonic() + 10
        while (process / "comm").read_text().strip() != "sleep":
            if time.monotonic() > end or holder.poll() is not None:
                raise BenchError(f"{container.name}: its mounts cannot be made; see above")
            time.sleep(0.01)
        namespaces = ProcessNamespaces(process, IPv4Address(container.ipv4), tools=str(tools))
        namespaces.set_congestion_control()
        yield namespaces
    finally:
        holder.kill()
        holder.wait()


@contextlib.contextmanager
def _setup(command: str | None, client: BedContainer, server: BedContainer) -> Iterator[None]:
    if command is None:
        yield
        return
    environment = {
        "BENCH_CLIENT": client.path,
        "BENCH_SERVER": server.path,
        "BENCH_CLIENT_ADDRESS": str(client.ipv4),
        "BENCH_SERVER_ADDRESS": str(server.ipv4),
        "BENCH_SHARED": str(client.shared),
    }
    process = subprocess.Popen(
        ["sh", "-c", command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        if process.stdout is None or not process.stdout.readline():
            raise BenchError(f"--setup {command}: it ended without printing a line")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def run_cases(
    chosen: Sequence[Measure],
    pairs: Sequence[SubjectPair],
    rounds: int,
    seconds: float,
    order: random.Random,
    verbose: bool,
) -> Generator[CaseResult, None, None]:
    """Each case when it is done. Failures are reported on stderr, and leave out the figure."""
    with Servers() as servers:
        for measure in chosen:
            result = CaseResult(measure.case, measure.cpu_of)
            able = [pair for pair in pairs if pair.transport in measure.transports]
            broken: set[str] = set()
            for turn in range(-1 if measure.calibrate else 0, rounds):
                for pair in order.sample(able, len(able)):
                    if pair.subject in broken:
                        continue
                    try:
                        one = sample(measure, pair, servers, seconds if turn >= 0 else 0.2)
                    except ProgramError as error:
                        broken.add(pair.subject)
                        print(f"{measure.case.name}, {pair.subject}: {error}", file=sys.stderr)
                        continue
                    if turn >= 0:
                        result.samples.setdefault(pair.subject, []).append(one)
                    doubtful = pair.client.library and turn >= 0 and (one.upgraded or 0) < 0.5
                    if doubtful and measure.upgraded:
                        why = one.counters or "the library has counted nothing"
                        print(f"{measure.case.name}: NOT UPGRADED: {why}", file=sys.stderr)
                    if verbose:
                        print(f"  {measure.case.name} {pair.subject}: {one}", file=sys.stderr)
            yield result


def _rule(text: str | None) -> RouterSettings:
    given = json.loads(text) if text else {}
    return RouterSettings(rule=Rule(**given))


def _pairs(
    client: ProcessNamespaces, server: ProcessNamespaces, with_library: bool, wanted: Sequence[str]
) -> list[SubjectPair]:
    """The wanted variants, as far as they can be measured."""
    pairs = {
        PLAIN: SubjectPair(PLAIN, client, server),
        UNIX: SubjectPair(UNIX, server, server, UNIX),
        RING: SubjectPair(RING, server, server, RING),
    }
    if with_library:
        inside = f"/run/freeflow/{LIBRARY}"
        pairs[FREEFLOW] = SubjectPair(
            FREEFLOW, replace(client, library=inside), replace(server, library=inside)
        )
    return [pairs[name] for name in VARIANTS if name in pairs and name in wanted]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which cases to run, and how."""

    chosen: Sequence[Measure]
    idling: Sequence[Case]
    variants: Sequence[str]
    rounds: int
    seconds: float
    seed: int
    table: bool
    verbose: bool

    def run(self, pairs: Sequence[SubjectPair]) -> dict[str, dict[str, object]]:
        """Case to its JSON; prints each row of the table when its case is done."""
        if self.table:
            click.echo("\n".join(columns(HEADER, [HEADER], 2, WIDTHS).splitlines()[:2]))
        order = random.Random(self.seed)
        results = {}
        # Closed here even on an error: they stop their servers in namespaces that still exist.
        with (
            contextlib.closing(
                run_cases(self.chosen, pairs, self.rounds, self.seconds, order, self.verbose)
            ) as running,
            contextlib.closing(
                idle_cases(pairs, min(self.rounds, 2), order, self.idling)
            ) as resting,
        ):
            for result in chain(running, resting):
                results[result.case.name] = result.json()
                if self.table:
                    click.echo(columns(HEADER, [result.line()], 2, WIDTHS).splitlines()[2])
        return results


def _measure(
    plan: Plan, library: Path | None, settings: RouterSettings, router: bool, setup: str | None
) -> dict[str, dict[str, object]]:
    """Make the namespaces, run the plan in them, and take them down."""
    with (
        tempfile.TemporaryDirectory(prefix="freeflow-bench-") as tools,
        congestion_control_allowed(),
        bed(
            "client",
            "server",
            library=library,
            settings=settings,
            router=router and library is not None,
        ) as made,
        _setup(setup, made.containers["client"], made.containers["server"]),
        _enter_container(made.containers["client"], Path(tools)) as client,
        _enter_container(made.containers["server"], Path(tools)) as server,
    ):
        Path(tools).chmod(0o755)
        compiled.compile_into(Path(tools))
        results = plan.run(_pairs(client, server, library is not None, plan.variants))
        if plan.verbose and made.process is not None:
            print(f"{made.router.statistics()}\n{made.log()}", file=sys.stderr)
    return results


@click.command(help=__doc__)
@click.option("--cases", default="*", show_default=True, help="Patterns, separated by commas.")
@click.option("--library", type=click.Path(path_type=Path, exists=True), help="libfreeflow.so")
@click.option("--rounds", default=5, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="Length of a run.")
@click.option("--variants", default=",".join(VARIANTS), show_default=True)
@click.option("--router/--no-router", default=True, help="Start a router, if there is a library.")
@click.option("--rule", help='The router\'s upgrade rule, JSON: \'{"operations": 4, "spin": 20}\'.')
@click.option("--setup", help="A shell command that runs during the measurement.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--seed", default=1, show_default=True, help="Seed of the order of variants.")
@click.option("--list", "listing", is_flag=True, help="List the cases.")
@click.option(
    "--verbose",
    is_flag=True,
    help="Print each run, and at the end the router's statistics and log, on stderr.",
)
def main(
    cases: str,
    library: Path | None,
    rounds: int,
    seconds: float,
    variants: str,
    router: bool,
    rule: str | None,
    setup: str | None,
    as_json: bool,
    seed: int,
    listing: bool,
    verbose: bool,
) -> None:
    known = measures()
    patterns = cases.split(",")
    names = pick(patterns, [*(one.case.name for one in known), *(case.name for case in idle.CASES)])
    chosen = [one for one in known if one.case.name in names]
    idling = [case for case in idle.CASES if case.name in names]
    if listing:
        for case in (*(one.case for one in chosen), *idling):
            click.echo(f"{case.name:<32} {case.about}")
        return
    missing = absent_programs(chosen)
    if missing:
        raise click.ClickException(
            f"these cases need programs that are missing; apt-get install {' '.join(missing)}"
        )
    plan = Plan(
        *(chosen, idling, variants.split(","), rounds, seconds, seed),
        table=not as_json,
        verbose=verbose,
    )
    results = _measure(plan, library, _rule(rule), router, setup)
    if as_json:
        click.echo(json.dumps(results, indent=2))
