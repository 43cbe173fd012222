"""`python -m bench runtime`: what freeflow-runc adds to the start of a container.

On a host with the plugin and the runtime a container runs that was started by the engine's own
runc. Its bundle, as the engine wrote it, is created again and again: by runc alone, and by
freeflow-runc in front of it, which adds the library. The two take turns, in another order each
round, and what is added is the difference within a round. `alone` has a program that ends at once
in place of runc, so that what is added is not lost in runc's own spread.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypedDict

import click

import testbed
from bench import bench_image, machine, swarm_hosts
from bench.errors import BenchError
from bench.report import columns, number
from bench.rounds import Say
from bench.stats import percentile
from bench.subjects import container, network_name, remove_network
from testbed.prepare import prepare
from testbed.process import BedInUseError, CommandError

DIRECT: Final = "direct"
FREEFLOW: Final = "freeflow"
PRELOAD: Final = b"LD_PRELOAD=/run/freeflow/libfreeflow.so"
RUNTIME_SETTINGS: Final = "etc/freeflow/runtime"
NETWORK: Final = network_name("runtime")
BUNDLES: Final = "run/**/io.containerd.runtime.v2.task/moby"
STATE: Final = "/run/freeflow-bench-runc"
NOTHING: Final = "/bin/true"
"""Ends at once, whatever its arguments are."""
HEADER: Final = (
    *("case", "unit", DIRECT, FREEFLOW, "added", "first quartile", "third quartile", "p99", "runs"),
)


class AddedRow(TypedDict):
    """A case: medians in milliseconds, and the differences within a round, with their spread."""

    unit: str
    about: str
    direct: float
    freeflow: float
    added: float
    added_low: float
    added_high: float
    added_p99: float
    runs: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call took, in milliseconds; `cpu` is that of the program and its children."""

    wall: float
    cpu: float


@dataclass(slots=True)
class RuntimeCalls:
    """Calls of a runtime on one bundle.

    `enter` are words in front of a command that lead to the host, whose files are below `root`.
    `bundle`, `program` and `runc` are paths of the host. `remove` undoes a call.
    """

    enter: Sequence[str]
    root: Path
    bundle: Path
    identifier: str
    program: str
    runc: str
    remove: Callable[[], object] = lambda: None
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def config(self) -> Path:
        return self.root / str(self.bundle).lstrip("/") / "config.json"

    def create(self, subject: str, before: bytes) -> Cost:
        """Create the container of a bundle that has this configuration.

        Raises:
            BenchError: it failed, or freeflow-runc has not added the library.
        """
        self.config.write_bytes(before)
        program = self.program if subject == FREEFLOW else self.runc
        words = [
            *(*self.enter, program, "--root", STATE, "--log", str(self.bundle / "log.json")),
            *("--log-format", "json", "create", "--bundle", str(self.bundle)),
            *("--pid-file", str(self.bundle / "init.pid"), self.identifier),
        ]
        nothing = os.open(os.devnull, os.O_RDWR)
        files = [(os.POSIX_SPAWN_DUP2, nothing, number) for number in range(3)]
        try:
            begin = time.perf_counter()
            pid = os.posix_spawnp(words[0], words, self.environment, file_actions=files)
            _, status, used = os.wait4(pid, 0)
            took = time.perf_counter() - begin
        finally:
            os.close(nothing)
        try:
            if status:
                raise BenchError(f"{subject}: {' '.join(words)} failed: {self._log()}")
            if (PRELOAD in self.config.read_bytes()) != (subject == FREEFLOW):
                raise BenchError(f"{subject}: the library is not where it should be: {self.config}")
        finally:
            self.remove()
        return Cost(took * 1000, (used.ru_utime + used.ru_stime) * 1000)

    def _log(self) -> str:
        log = self.config.with_name("log.json")
        return log.read_text()[-500:] if log.exists() else "no log"


def added_row(about: str, direct: Sequence[float], with_us: Sequence[float]) -> AddedRow:
    """The row of a case, of one figure a round for each of the two."""
    added = [ours - own for own, ours in zip(direct, with_us, strict=True)]
    low, middle, high = statistics.quantiles(added, n=4, method="inclusive")
    return AddedRow(
        unit="ms",
        about=about,
        direct=statistics.median(direct),
        freeflow=statistics.median(with_us),
        added=middle,
        added_low=low,
        added_high=high,
        added_p99=percentile(added, 99),
        runs=len(added),
    )


def measure(
    name: str, about: str, calls: RuntimeCalls, before: bytes, rounds: int, order: random.Random
) -> dict[str, AddedRow]:
    """The rows of a case: elapsed time, and CPU time."""
    costs: dict[str, list[Cost]] = {DIRECT: [], FREEFLOW: []}
    for subject in (DIRECT, FREEFLOW):
        # The first calls read the programs from disk.
        calls.create(subject, before)
    for _ in range(rounds):
        for subject in order.sample(list(costs), len(costs)):
            costs[subject].append(calls.create(subject, before))
    rows = {}
    for suffix, what in (("", "elapsed time"), ("_cpu", "CPU time")):
        figures = [[one.cpu if suffix else one.wall for one in costs[subject]] for subject in costs]
        rows[name + suffix] = added_row(f"{about}, {what}", figures[0], figures[1])
    return rows


def bundle_of(host: testbed.Host, identifier: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a running container's bundle on its host, and its configuration."""
    for moby in host.root.glob(BUNDLES):
        config = moby / identifier / "config.json"
        if config.exists():
            folder = Path("/", config.parent.relative_to(host.root))
            return folder, json.loads(config.read_text())
    raise BenchError(f"{host.name}: no bundle of {identifier} below /{BUNDLES}")


def again(config: dict[str, Any], group: str) -> bytes:
    """The configuration for another container of the same bundle: with a control group of its own,
    and without hooks, which would tell the engine of the container.
    """
    changed = {key: value for key, value in config.items() if key != "hooks"}
    changed["linux"] = {**config["linux"], "cgroupsPath": group}
    return json.dumps(changed, separators=(",", ":"), ensure_ascii=False).encode()


@contextmanager
def instead_of_runc(host: testbed.Host, program: str) -> Iterator[None]:
    """Let freeflow-runc call another program."""
    settings = host.root / RUNTIME_SETTINGS
    before = settings.read_text()
    lines = [line for line in before.splitlines() if not line.startswith("runtime=")]
    settings.write_text("\n".join([f"runtime={program}", *lines]) + "\n")
    try:
        yield
    finally:
        settings.write_text(before)


def suite(host: testbed.Host, rounds: int, order: random.Random, say: Say) -> dict[str, Any]:
    """Measure on a host of a Swarm with the plugin and the benchmarks' image."""
    manager = swarm_hosts.host_of(host)
    engine = manager.engine
    host.freeflow("runtime", "install")
    engine.create_network(NETWORK, swarm_hosts.PLUGIN, {swarm_hosts.LABEL: "yes"})
    body = container(bench_image.IMAGE, "runtime", ["sleep", "infinity"])
    body["HostConfig"]["Runtime"] = "runc"
    identifier = engine.create_container(body)
    engine.start(identifier)
    original, config = bundle_of(host, identifier)
    bundle = Path(STATE + "-bundle") / identifier
    (host.root / str(bundle).lstrip("/")).mkdir(parents=True)
    before = again(config, f"{config['linux']['cgroupsPath']}-again")
    runc = host.run("sh", "-c", "command -v runc").strip()
    namespaces = ("--mount", "--uts", "--net", "--pid")

    def delete() -> None:
        host.run(runc, "--root", STATE, "delete", "--force", identifier)

    calls = RuntimeCalls(
        enter=("nsenter", f"--target={host.pid}", *namespaces, "--"),
        root=host.root,
        bundle=bundle,
        identifier=identifier,
        program=host.run("sh", "-c", "ls /usr/local/lib/freeflow/freeflow-runc").strip(),
        runc=runc,
        remove=delete,
    )
    rows: dict[str, Any] = {}
    try:
        say(f"{rounds} rounds of runc")
        rows |= measure("create", "runc create", calls, before, rounds, order)
        say(f"{rounds} rounds without it")
        calls.runc, calls.remove = NOTHING, lambda: None
        with instead_of_runc(host, NOTHING):
            about = "a program that ends at once in place of runc"
            rows |= measure("alone", about, calls, before, rounds, order)
    finally:
        shutil.rmtree(host.root / str(bundle.parent).lstrip("/"))
        engine.remove(identifier)
        remove_network(manager, NETWORK)
    say(f"the configuration of {original} has {len(before)} bytes")
    rows["configuration"] = {"unit": "kB", "about": "size", "kilobytes": len(before) / 1000}
    return rows


@contextmanager
def one_host(engine: str, plugin: Path, say: Say) -> Iterator[testbed.Host]:
    prepare([f"engine-{engine}", "bench"], say)
    say(f"a host with engine {engine}")
    with ExitStack() as stack:
        bed = stack.enter_context(testbed.Bed("bench", [engine]))
        bed.swarm()
        swarm_hosts.load_image([swarm_hosts.host_of(bed.hosts[0])])
        say("the plugin")
        bed.install_plugin(plugin)
        yield bed.hosts[0]


def table(rows: dict[str, Any]) -> str:
    lines = [
        (name, row["unit"], *(number(row[key]) for key in _FIGURES), str(row["runs"]))
        for name, row in rows.items()
        if "runs" in row
    ]
    return columns(HEADER, lines)


_FIGURES: Final = (DIRECT, FREEFLOW, "added", "added_low", "added_high", "added_p99")


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JSON here too.")
@click.option("--rounds", default=200, show_default=True)
@click.option("--engine", default="26.1", show_default=True, help="Version of the engine.")
@click.option(
    "--plugin",
    type=click.Path(exists=True, path_type=Path),
    default=swarm_hosts.PLUGIN_DIR,
    help="Folder of the built plugin.",
)
@click.option("--seed", default=1, show_default=True, help="Seed of the order.")
def main(
    as_json: bool, out: Path | None, rounds: int, engine: str, plugin: Path, seed: int
) -> None:
    start = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - start:6.1f} s  {text}", err=True)

    try:
        with one_host(engine, plugin, say) as host:
            version = swarm_hosts.host_of(host).engine.version()
            about = machine.describe([version], "none", rounds, None)
            rows = suite(host, rounds, random.Random(seed), say)
    except (BenchError, BedInUseError, CommandError, TimeoutError) as error:
        raise click.ClickException(str(error)) from error
    text = json.dumps({"machine": about, "results": rows}, indent=2) + "\n"
    if out is not None:
        out.write_text(text)
    click.echo(text if as_json else table(rows), nl=False)
