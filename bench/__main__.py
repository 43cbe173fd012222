"""`python -m bench SUITE`: measures on two hosts, which it makes and removes.

Progress is printed on stderr, results on stdout."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

import click

from bench import (
    bed,
    control,
    crosshost,
    image,
    machine,
    plot,
    quick,
    relay,
    report,
    samehost,
    stats,
    subjects,
)
from bench.choice import pick
from bench.errors import BenchError
from bench.namespaces import CONGESTION_CONTROL, congestion_control_allowed
from bench.stats import FREEFLOW, FREEFLOW_PLAIN, HOST, LOCAL_SUBJECTS, Row
from testbed.process import BedInUseError, CommandError

SUITES: Final = ("same-host", "cross-host", "control")
RELAY: Final = "relay"
"""Name of the relay's rows in `cross-host`."""
BUDGET: Final = 420.0
"""Seconds of a suite in which rounds may begin, so that it takes less than ten minutes in all."""
LOCAL_BUDGET: Final = 500.0
"""Seconds in which all runs of `same-host` end."""
LOCAL_SECONDS: Final = 0.4


def progress(start: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    return say


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of a suite."""

    manager: bed.Host
    worker: bed.Host
    subjects: tuple[str, ...]
    patterns: tuple[str, ...]
    rounds: int
    seconds: float | None
    order: random.Random
    say: Callable[[str], None]
    absent: dict[str, str]

    def enough(self) -> Callable[[], bool]:
        return partial(_past, time.monotonic() + BUDGET)


def same_host(plan: Plan) -> Mapping[str, Row]:
    """Run the suite `same-host`; with the library only if the plugin has installed it."""
    library = plan.manager.root / str(subjects.LIBRARY).lstrip("/")
    some = [one for one in plan.subjects if one in (*subjects.DRIVERS, FREEFLOW_PLAIN, HOST)]
    if FREEFLOW in some and not library.exists():
        why = f"the plugin has not installed the library at {subjects.LIBRARY}"
        plan.absent[FREEFLOW] = why
        plan.say(f"no {FREEFLOW}: {why}")
        some.remove(FREEFLOW)
    with (
        congestion_control_allowed(),
        subjects.networks(plan.manager, some),
        subjects.pairs(plan.manager, plan.manager, some, image.IMAGE, accelerated=True) as pairs,
    ):
        return samehost.SameHost(
            (*pairs, *subjects.limits(pairs, plan.subjects)),
            pick(plan.patterns, samehost.case_names()),
            plan.rounds,
            plan.seconds or LOCAL_SECONDS,
            LOCAL_BUDGET,
            plan.order,
            plan.say,
        ).measure()


def cross_host(plan: Plan) -> Mapping[str, Row]:
    some = tuple(one for one in plan.subjects if one in stats.SUBJECTS)
    names = pick(plan.patterns, [*crosshost.names(), RELAY])
    more = (partial(relay.suite, min(plan.rounds, 5), 0.5, plan.say),) if RELAY in names else ()
    # The host network only once: its servers use the host's ports.
    wanted = any(name.startswith(crosshost.LOCAL) for name in names)
    local = [one for one in some if wanted and one != HOST]
    with (
        congestion_control_allowed(),
        subjects.networks(plan.manager, some),
        # Pairs on one host last: leaving `pairs` removes all of our containers on its hosts.
        subjects.pairs(plan.manager, plan.worker, some, image.IMAGE) as between,
        subjects.pairs(plan.worker, plan.worker, local, image.IMAGE) as within,
    ):
        return crosshost.CrossHost(
            between,
            within,
            names,
            plan.rounds,
            plan.seconds or 1.0,
            plan.order,
            plan.say,
            plan.enough(),
            more=more,
        ).measure()


def control_plane(plan: Plan) -> Mapping[str, Row]:
    some = tuple(one for one in plan.subjects if one in stats.SUBJECTS)
    return control.Control(
        plan.manager, some, image.IMAGE, plan.rounds, plan.order, plan.say, plan.enough()
    ).measure()


MEASURE: Final[dict[str, Callable[[Plan], Mapping[str, Row]]]] = {
    "same-host": same_host,
    "cross-host": cross_host,
    "control": control_plane,
}


def _past(moment: float) -> bool:
    return time.monotonic() > moment


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@click.command(help=__doc__)
@click.argument("suite", type=click.Choice([*SUITES, "all"]))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON here too.")
@click.option("--table", type=click.Path(path_type=Path), help="Write the table here too.")
@click.option(
    "--rounds",
    "rounds_",
    default=12,
    show_default=True,
    help="Runs per subject and case, as far as time allows.",
)
@click.option(
    "--seconds",
    type=float,
    help=f"Length of a run; default 1, or {LOCAL_SECONDS:g} in same-host. Some programs need more.",
)
@click.option("--cases", default="*", show_default=True, help="Patterns, separated by commas.")
@click.option("--subjects", "chosen", default=",".join(LOCAL_SUBJECTS), show_default=True)
@click.option("--engine", default="26.1", show_default=True, help="Version of both engines.")
@click.option(
    "--plugin",
    type=click.Path(path_type=Path),
    default=bed.PLUGIN_DIR,
    help="Folder of the built plugin.",
)
@click.option("--seed", default=1, show_default=True, help="Seed of the order of subjects.")
def main(
    suite: str,
    as_json: bool,
    out: Path | None,
    table: Path | None,
    rounds_: int,
    seconds: float | None,
    cases: str,
    chosen: str,
    engine: str,
    plugin: Path,
    seed: int,
) -> None:
    signal.signal(signal.SIGTERM, _stop)
    say = progress(time.monotonic())
    order = random.Random(seed)
    wanted = tuple(chosen.split(","))
    unknown = set(wanted) - set(LOCAL_SUBJECTS)
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(LOCAL_SUBJECTS)}")
    suites = SUITES if suite == "all" else (suite,)
    if suite == "all" and cases != "*":
        raise click.BadParameter("--cases is for one suite")
    if suite == "same-host":
        pick(cases.split(","), samehost.case_names())
    needs_plugin = FREEFLOW in wanted or FREEFLOW_PLAIN in wanted
    if needs_plugin and not (plugin / "config.json").exists():
        raise click.ClickException(f"no plugin in {plugin}: run make plugin first")
    before = machine.describe([], CONGESTION_CONTROL, rounds_, seconds)
    results: dict[str, Row] = {}
    try:
        with bed.two_hosts(engine, plugin if needs_plugin else None, say) as (manager, worker):
            engines = [host.engine.version() for host in (manager, worker)]
            plan = Plan(
                *(manager, worker, wanted, tuple(cases.split(",")), rounds_, seconds),
                *(order, say, before["absent"]),
            )
            for name in suites:
                say(name)
                prefix = f"{name}/" if suite == "all" else ""
                results |= {prefix + case: row for case, row in MEASURE[name](plan).items()}
    except (BenchError, BedInUseError, CommandError, TimeoutError) as error:
        raise click.ClickException(str(error)) from error
    before["engines"] = sorted(set(engines))
    made = report.Report(machine=before, results=results)
    for path, text in ((out, report.as_json(made)), (table, report.as_table(made))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    click.echo(report.as_json(made) if as_json else report.as_table(made), nl=False)


COMMANDS: Final[dict[str, click.Command]] = {
    "quick": quick.main,
    "relay": relay.main,
    "plot": plot.main,
}
"""Commands that need no two hosts; every other first word is a suite of `main`."""


if __name__ == "__main__":
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in COMMANDS:
        COMMANDS[first](sys.argv[2:], prog_name=f"python -m bench {first}")
    else:
        main()
