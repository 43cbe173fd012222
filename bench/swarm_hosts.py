"""The hosts of a measurement: two in one Swarm, with the plugin and the benchmarks' image.

The rest of `bench` knows only `BenchHost`. The test bed makes the hosts (`testbed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import testbed
from bench import accounting, bench_image
from bench.engine_api import EngineApi
from bench.load import one_core
from bench.namespaces import ProcessNamespaces
from testbed.images import cache
from testbed.prepare import prepare

PLUGIN: Final = "freeflow:latest"
PLUGIN_DIR: Final = Path(__file__).resolve().parents[1] / "build/plugin"
LABEL: Final = "freeflow.bench"


@dataclass(frozen=True, slots=True)
class BenchHost:
    """A Docker host: the root of its file system, and its address on the underlay."""

    name: str
    root: Path
    address: IPv4Address
    engine: EngineApi
    pid: int
    """Its process 1, as the machine sees it."""
    cgroup: str
    """The name of its control group."""
    group: Path | None = None
    """The folder of its control group, once that has all its processes."""

    @property
    def namespaces(self) -> ProcessNamespaces:
        """The host's own namespaces."""
        return ProcessNamespaces(self.root / "proc/1", self.address)

    def charged(self) -> BenchHost:
        """This host with all its processes in its control group. Raises `BenchError`."""
        return replace(self, group=accounting.charge(self.cgroup, self.pid))


def host_of(made: testbed.Host) -> BenchHost:
    engine = EngineApi(made.root / "run/docker.sock")
    return BenchHost(made.name, made.root, made.address, engine, made.pid, made.cgroup)


def load_image(hosts: Sequence[BenchHost]) -> None:
    """Load the benchmarks' image on every host."""
    archive = bench_image.archive(cache(), one_core())
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(lambda host: host.engine.import_image(archive, bench_image.IMAGE), hosts))


@contextmanager
def two_hosts(
    engine: str, plugin: Path | None, say: Callable[[str], None]
) -> Iterator[tuple[BenchHost, BenchHost]]:
    """A manager and a worker. Without `plugin` they have only Docker's `overlay`."""
    prepare([f"engine-{engine}", "bench"], say)
    say(f"two hosts with engine {engine}")
    with testbed.Bed("bench", [engine, engine]) as bed:
        bed.swarm()
        manager, worker = (host_of(host) for host in bed.hosts)
        say("the image")
        load_image((manager, worker))
        if plugin is not None:
            say("the plugin")
            bed.install_plugin(plugin)
        yield manager, worker
