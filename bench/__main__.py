"""`python -m bench SUITE`: measures on two hosts, which it makes and removes.

Progress is printed on stderr, results on stdout."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

import click

from bench import (
    accounting,
    bench_image,
    controlplane,
    crosshost,
    machine,
    plot,
    quick,
    relay,
    report,
    runtime_start,
    samehost,
    stats,
    subjects,
    swarm_hosts,
    traffic,
    verbs,
)
from bench.choice import pick
from bench.errors import BenchError
from bench.namespaces import CONGESTION_CONTROL, congestion_control_allowed
from bench.servers import Servers
from bench.stats import (
    CROSS_SUBJECTS,
    FREEFLOW,
    FREEFLOW_DIRECT,
    FREEFLOW_PLAIN,
    HOST,
    LOCAL_SUBJECTS,
    OVERLAY,
    VERBS_SUBJECTS,
    Row,
)
from driver.options import USER_KEYS
from plugin.cli import preload
from testbed.process import BedInUseError, CommandError

SUITES: Final = ("same-host", "cross-host", "control", "verbs")
RELAY: Final = "relay"
"""Name of the relay's rows in `cross-host`."""
BUDGET: Final = 420.0
"""Seconds of `control` in which rounds may begin, so that it takes less than ten minutes in all."""
CROSS_BUDGET: Final = 1300.0
"""Seconds in which all rounds of `cross-host` end, so that it takes 25 minutes in all."""
CROSS_SECONDS: Final = 2.0
VERBS_SECONDS: Final = 0.5
VERBS_BUDGET: Final = 450.0
"""Seconds in which all rounds of `verbs` end."""
ROUNDS: Final = {"same-host": 12, "cross-host": 3, "control": 12, "verbs": 7}
KNOWN: Final = tuple(dict.fromkeys((*LOCAL_SUBJECTS, *CROSS_SUBJECTS, *VERBS_SUBJECTS)))
QUICK_SECONDS: Final = 1.0
QUICK_SETTLE: Final = 8.0
LOCAL_BUDGET: Final = 500.0
"""Seconds in which all runs of `same-host` end."""
LOCAL_SECONDS: Final = 0.4


def progress(start: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    return say


@dataclass(frozen=True, slots=True)
class SuitePlan:
    """The arguments of a suite."""

    manager: swarm_hosts.BenchHost
    worker: swarm_hosts.BenchHost
    chosen: tuple[str, ...]
    """Subjects; empty: those of the suite."""
    patterns: tuple[str, ...]
    rounds: int
    seconds: float | None
    quick: bool
    order: random.Random
    say: Callable[[str], None]
    absent: dict[str, str]

    def subjects(self, of_suite: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one for one in of_suite if not self.chosen or one in self.chosen)

    def enough(self) -> Callable[[], bool]:
        return partial(_past, time.monotonic() + BUDGET)


def same_host(plan: SuitePlan) -> Mapping[str, Row]:
    """Run the suite `same-host`; with the library only if the plugin has installed it."""
    wanted = plan.subjects(LOCAL_SUBJECTS)
    some = [one for one in wanted if one in (*subjects.DRIVERS, FREEFLOW_PLAIN, HOST)]
    if FREEFLOW in some and _without_library(plan):
        some.remove(FREEFLOW)
    with (
        congestion_control_allowed(),
        subjects.networks(plan.manager, some),
        subjects.pairs(
            plan.manager, plan.manager, some, bench_image.IMAGE, str(subjects.LIBRARY)
        ) as pairs,
    ):
        return samehost.SameHost(
            (*pairs, *subjects.limits(pairs, wanted)),
            pick(plan.patterns, samehost.case_names()),
            plan.rounds,
            plan.seconds or LOCAL_SECONDS,
            LOCAL_BUDGET,
            plan.order,
            plan.say,
        ).measure()


def _without_library(plan: SuitePlan) -> bool:
    """Whether the plugin has not installed the library; then freeflow can't be measured."""
    missing = not (plan.manager.root / str(subjects.LIBRARY).lstrip("/")).exists()
    if missing:
        why = f"the plugin has not installed the library at {subjects.LIBRARY}"
        plan.absent[FREEFLOW] = why
        plan.say(f"no {FREEFLOW}: {why}")
    return missing


def cross_host(plan: SuitePlan) -> Mapping[str, Row]:
    """Run the suite `cross-host`."""
    some = plan.subjects(CROSS_SUBJECTS)
    if FREEFLOW in some and _without_library(plan):
        some = tuple(one for one in some if one not in subjects.ACCELERATED)
    names = pick(plan.patterns, [*traffic.names(), *crosshost.local_names(), RELAY])
    more = (partial(relay.suite, min(plan.rounds, 5), 0.5, plan.say),) if RELAY in names else ()
    # The host network only once: its servers use the host's ports.
    wanted = any(name in crosshost.local_names() for name in names)
    local = [one for one in some if wanted and one in (FREEFLOW, OVERLAY)]
    manager, worker = hosts = (plan.manager.charged(), plan.worker.charged())
    with ExitStack() as stack:
        stack.enter_context(congestion_control_allowed())
        for host in hosts:
            # The relays' own connections are the hosts'.
            host.namespaces.set_congestion_control()
        stack.enter_context(subjects.networks(manager, some))
        # Pairs on one host last: leaving `pairs` removes all of our containers on its hosts.
        between = stack.enter_context(
            subjects.pairs(manager, worker, some, bench_image.IMAGE, str(subjects.LIBRARY))
        )
        within = stack.enter_context(subjects.pairs(worker, worker, local, bench_image.IMAGE))
        accounts = accounting.Accounts.of([host.group for host in hosts if host.group])
        servers = stack.enter_context(Servers())
        runner = traffic.Runner(manager, worker, servers, accounts)
        if plan.quick:
            runner.most = QUICK_SETTLE
        return crosshost.CrossHost(
            hosts=hosts,
            between=between,
            within=within,
            names=names,
            rounds=plan.rounds,
            seconds=plan.seconds or (QUICK_SECONDS if plan.quick else CROSS_SECONDS),
            budget=CROSS_BUDGET,
            order=plan.order,
            say=plan.say,
            take=runner.run,
            more=more,
        ).measure()


def control_plane(plan: SuitePlan) -> Mapping[str, Row]:
    some = plan.subjects(stats.SUBJECTS)
    return controlplane.Control(
        plan.manager, some, bench_image.IMAGE, plan.rounds, plan.order, plan.say, plan.enough()
    ).measure()


def verbs_suite(plan: SuitePlan) -> Mapping[str, Row]:
    """Run the suite `verbs`. Programs load the libraries as `freeflow inject --verbs` says."""
    some = [one for one in plan.subjects(VERBS_SUBJECTS) if not _without_option(plan, one)]
    names = pick(plan.patterns, verbs.case_names())
    across = any(name.startswith(verbs.ACROSS) for name in names)
    manager, worker = hosts = (plan.manager.charged(), plan.worker.charged())
    libraries = ":".join((preload.PRELOAD, *preload.VERBS))
    with ExitStack() as stack:
        stack.enter_context(congestion_control_allowed())
        for host in hosts:
            # The relays' own connections are the hosts'.
            host.namespaces.set_congestion_control()
        stack.enter_context(subjects.networks(manager, some))

        def place(
            client: swarm_hosts.BenchHost, some: Sequence[str], groups: list[Path]
        ) -> verbs.Place:
            pairs = stack.enter_context(
                subjects.pairs(client, worker, some, bench_image.IMAGE, libraries)
            )
            servers = stack.enter_context(Servers())
            accounts = accounting.Accounts.of(groups)
            return verbs.Place({pair.subject: pair for pair in pairs}, servers, accounts)

        # Pairs on one host last: leaving `pairs` removes all of our containers on its hosts.
        # Between hosts nobody maps memory.
        far = [one for one in some if one != FREEFLOW_DIRECT]
        groups = [host.group for host in hosts if host.group]
        between = place(manager, far, groups) if across else None
        return verbs.VerbsSuite(
            within=place(worker, some, [groups[1] / accounting.LOAD]),
            between=between,
            names=names,
            rounds=plan.rounds,
            seconds=plan.seconds or VERBS_SECONDS,
            budget=VERBS_BUDGET,
            order=plan.order,
            say=plan.say,
            take=verbs.VerbsRunner().take,
        ).measure()


def _without_option(plan: SuitePlan, subject: str) -> bool:
    """Whether the driver has no such option as the subject's network needs."""
    missing = set(subjects.OPTIONS.get(subject, ())) - set(USER_KEYS)
    if missing:
        plan.absent[subject] = f"the driver has no option {', '.join(missing)}"
    return bool(missing)


MEASURE: Final[dict[str, Callable[[SuitePlan], Mapping[str, Row]]]] = {
    "same-host": same_host,
    "cross-host": cross_host,
    "control": control_plane,
    "verbs": verbs_suite,
}


def _past(moment: float) -> bool:
    return time.monotonic() > moment


def publish(
    made: report.BenchReport,
    files: Sequence[tuple[Path | None, Callable[[report.BenchReport], str]]],
    say: Callable[[str], None],
) -> None:
    """Write a result into files, each in its form; what can't be drawn is said, and costs no other
    file.
    """
    for path, form in files:
        if path is None:
            continue
        try:
            text = form(made)
        except BenchError as error:
            say(f"no {path}: {error}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@click.command(help=__doc__)
@click.argument("suite", type=click.Choice([*SUITES, "all"]))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON here too.")
@click.option("--table", type=click.Path(path_type=Path), help="Write the table here too.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(path_type=Path),
    help=f"Draw the ratios to {OVERLAY}, with their spread, here as SVG.",
)
@click.option(
    "--rounds",
    type=int,
    help="Runs per subject and case, as far as time allows; default "
    + ", ".join(f"{count} in {name}" for name, count in ROUNDS.items())
    + ".",
)
@click.option(
    "--seconds",
    type=float,
    help=f"Length of a run; default {CROSS_SECONDS:g}, {LOCAL_SECONDS:g} in same-host, {VERBS_SECONDS:g} in verbs. Some programs need more.",
)
@click.option(
    "--quick",
    "is_quick",
    is_flag=True,
    help="One short round, which only shows that everything works.",
)
@click.option("--cases", default="*", show_default=True, help="Patterns, separated by commas.")
@click.option(
    "--subjects", "chosen", default="", help=f"Default: the suite's; of {', '.join(KNOWN)}."
)
@click.option("--engine", default="26.1", show_default=True, help="Version of both engines.")
@click.option(
    "--plugin",
    type=click.Path(path_type=Path),
    default=swarm_hosts.PLUGIN_DIR,
    help="Folder of the built plugin.",
)
@click.option("--seed", default=1, show_default=True, help="Seed of the order of subjects.")
def main(
    suite: str,
    as_json: bool,
    out: Path | None,
    table: Path | None,
    picture: Path | None,
    rounds: int | None,
    seconds: float | None,
    is_quick: bool,
    cases: str,
    chosen: str,
    engine: str,
    plugin: Path,
    seed: int,
) -> None:
    signal.signal(signal.SIGTERM, _stop)
    say = progress(time.monotonic())
    order = random.Random(seed)
    wanted = tuple(name for name in chosen.split(",") if name)
    unknown = set(wanted) - set(KNOWN)
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(KNOWN)}")
    suites = SUITES if suite == "all" else (suite,)
    if suite == "all" and cases != "*":
        raise click.BadParameter("--cases is for one suite")
    if suite == "same-host":
        pick(cases.split(","), samehost.case_names())
    needs_plugin = not wanted or not {*subjects.ACCELERATED, FREEFLOW_PLAIN}.isdisjoint(wanted)
    numbers = {name: 1 if is_quick else rounds or count for name, count in ROUNDS.items()}
    if needs_plugin and not (plugin / "config.json").exists():
        raise click.ClickException(f"no plugin in {plugin}: run make plugin first")
    before = machine.describe([], CONGESTION_CONTROL, numbers[suites[0]], seconds)
    results: dict[str, Row] = {}
    try:
        with swarm_hosts.two_hosts(engine, plugin if needs_plugin else None, say) as (
            manager,
            worker,
        ):
            engines = [host.engine.version() for host in (manager, worker)]
            for name in suites:
                say(name)
                plan = SuitePlan(
                    *(manager, worker, wanted, tuple(cases.split(",")), numbers[name], seconds),
                    *(is_quick, order, say, before["absent"]),
                )
                prefix = f"{name}/" if suite == "all" else ""
                results |= {prefix + case: row for case, row in MEASURE[name](plan).items()}
    except (BenchError, BedInUseError, CommandError, TimeoutError) as error:
        raise click.ClickException(str(error)) from error
    before["engines"] = sorted(set(engines))
    made = report.BenchReport(machine=before, results=results)
    publish(made, ((out, report.as_json), (table, report.as_table), (picture, plot.whole)), say)
    click.echo(report.as_json(made) if as_json else report.as_table(made), nl=False)


COMMANDS: Final[dict[str, click.Command]] = {
    "quick": quick.main,
    "relay": relay.main,
    "runtime": runtime_start.main,
    "plot": plot.main,
}
"""Commands that need no two hosts; every other first word is a suite of `main`."""


if __name__ == "__main__":
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in COMMANDS:
        COMMANDS[first](sys.argv[2:], prog_name=f"python -m bench {first}")
    else:
        main()
