"""`python -m bench SUITE`: sets two hosts up, measures, takes them down. Progress on stderr, figures on stdout."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

import click

from bench import bed, control, image, load, machine, quick, report, rounds, stats, subjects
from bench.errors import BenchError
from bench.place import CONGESTION_CONTROL, congestion_control_allowed
from bench.stats import Row
from tests.testbed.process import BedInUseError, CommandError

SUITES: Final = ("same-host", "cross-host", "control")
BUDGET: Final = 420.0
"""Seconds of a suite in which rounds may begin: with setting up and cleaning up, less than ten minutes."""


def progress(start: float) -> Callable[[str], None]:
    def say(text: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {text}", file=sys.stderr, flush=True)

    return say


def data_path(
    client: bed.Host,
    server: bed.Host,
    manager: bed.Host,
    chosen: tuple[str, ...],
    rounds_: int,
    seconds: float,
    order: random.Random,
    say: Callable[[str], None],
    enough: Callable[[], bool],
) -> dict[str, Row]:
    with (
        congestion_control_allowed(),
        subjects.networks(manager, chosen),
        subjects.pairs(client, server, chosen, image.IMAGE) as pairs,
    ):
        samples = rounds.interleaved(load.loads(), pairs, rounds_, seconds, order, say, enough)
        return rounds.rows(samples)


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
    help="Runs per subject and case, if they fit in the time.",
)
@click.option("--seconds", default=1.0, show_default=True, help="Length of a run.")
@click.option("--subjects", "chosen", default=",".join(stats.SUBJECTS), show_default=True)
@click.option("--engine", default="26.1", show_default=True, help="Engine of both hosts.")
@click.option(
    "--plugin", type=click.Path(path_type=Path), default=bed.PLUGIN_DIR, help="Built plugin."
)
@click.option("--seed", default=1, show_default=True, help="Of the order of subjects.")
def main(
    suite: str,
    as_json: bool,
    out: Path | None,
    table: Path | None,
    rounds_: int,
    seconds: float,
    chosen: str,
    engine: str,
    plugin: Path,
    seed: int,
) -> None:
    signal.signal(signal.SIGTERM, _stop)
    say = progress(time.monotonic())
    order = random.Random(seed)
    wanted = tuple(chosen.split(","))
    unknown = set(wanted) - set(stats.SUBJECTS)
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(stats.SUBJECTS)}")
    needs_plugin = stats.FREEFLOW in wanted
    if needs_plugin and not (plugin / "config.json").exists():
        raise click.ClickException(f"no plugin in {plugin}: run make plugin first")
    before = machine.describe([], CONGESTION_CONTROL, rounds_, seconds)
    results: dict[str, Row] = {}
    try:
        with bed.two_hosts(engine, plugin if needs_plugin else None, say) as (manager, worker):
            engines = [host.engine.version() for host in (manager, worker)]
            for name in SUITES if suite == "all" else (suite,):
                say(name)
                end = time.monotonic() + BUDGET
                enough = partial(_past, end)
                if name == "control":
                    found = control.Control(
                        manager, wanted, image.IMAGE, rounds_, order, say, enough
                    ).measure()
                else:
                    server = manager if name == "same-host" else worker
                    found = data_path(
                        manager, server, manager, wanted, rounds_, seconds, order, say, enough
                    )
                prefix = f"{name}/" if suite == "all" else ""
                results |= {prefix + case: row for case, row in found.items()}
    except (BenchError, BedInUseError, CommandError, TimeoutError) as error:
        raise click.ClickException(str(error)) from error
    before["engines"] = sorted(set(engines))
    made = report.Report(machine=before, results=results)
    for path, text in ((out, report.as_json(made)), (table, report.as_table(made))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    click.echo(report.as_json(made) if as_json else report.as_table(made), nl=False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["quick"]:
        quick.main(sys.argv[2:], prog_name="python -m bench quick")
    else:
        main()
