"""One run of a case on a subject: figure, CPU time per unit, share of upgraded connections."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import cost, parse
from bench.errors import ProgramError
from bench.latency import Latency
from bench.measures import Call, Measure
from bench.namespaces import RING, ProcessNamespaces, SubjectPair
from bench.servers import Servers

COUNTERS: Final = "FREEFLOW_STATS"
"""Names the file to which the library appends a line when a program ends."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A run's result. `cpu_us` is per unit of work; `upgraded` is None without the library."""

    figure: float
    cpu_us: float | None
    upgraded: float | None
    counters: str = ""
    latency: Latency | None = None


def cores_of(numbers: tuple[int, ...], ours: Collection[int]) -> tuple[int, ...]:
    """The cores at these positions from the end.

    Raises:
        ProgramError: there are too few.

    """
    have = sorted(ours, reverse=True)
    if numbers and max(numbers) >= len(have):
        raise ProgramError(
            f"{max(numbers) + 1} cores are needed, this machine gives us {len(have)}"
        )
    return tuple(have[number] for number in numbers)


@contextlib.contextmanager
def every_core_busy() -> Iterator[None]:
    """A busy loop on each core, for at most a minute."""
    hogs = []
    try:
        for core in sorted(os.sched_getaffinity(0)):
            spin = ["sh", "-c", "ulimit -t 60; while :; do :; done"]
            hogs.append(subprocess.Popen(["taskset", "--cpu-list", str(core), *spin]))
        yield
    finally:
        for hog in hogs:
            hog.kill()
        for hog in hogs:
            hog.wait()


def counters_in(namespaces: ProcessNamespaces) -> tuple[str, Path]:
    """Paths of a new file for the library's counters: in the container, and from outside."""
    inside = f"/tmp/bench-{os.getpid()}-counters"
    outside = namespaces.root / inside.lstrip("/")
    outside.unlink(missing_ok=True)
    return inside, outside


def sample(measure: Measure, pair: SubjectPair, servers: Servers, seconds: float) -> Sample:
    """Make one run. Raises `ProgramError` if a program failed or printed something invalid."""
    ours = os.sched_getaffinity(0)
    server_cores = cores_of(measure.server_cores, ours)
    client_cores = cores_of(measure.client_cores, ours)
    if pair.transport == RING:
        # One program, which pins each of its ends itself.
        seen = measure.call(Call(pair, None, seconds, (*client_cores, *server_cores), server_cores))
        cpu_us = (seen.client_us or 0) / seen.units
        return Sample(seen.figure, cpu_us, None, latency=seen.latency)
    server = servers.get(pair, measure.kind, frozenset(server_cores))
    path, counters = counters_in(pair.client)
    environment = {COUNTERS: path} if pair.client.library else {}
    with every_core_busy() if measure.hogs else contextlib.nullcontext():
        processes, before, others = server.processes(), server.cpu_us(), cost.children_us()
        seen = measure.call(Call(pair, server, seconds, client_cores, server_cores, environment))
        client = cost.children_us() - others if seen.client_us is None else seen.client_us
        server.settled(processes)
        used = server.cpu_us() - before + client
    said = counters.read_text() if pair.client.library and counters.exists() else ""
    counters.unlink(missing_ok=True)
    upgraded = parse.paths(said).share(measure.aside)
    return Sample(seen.figure, used / seen.units, upgraded, said.strip(), seen.latency)
