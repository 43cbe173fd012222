"""The cost of idle connections: CPU time, shared and private memory, page tables of both ends.

Each connection first carries some messages, so that it is upgraded if possible, and one more at
the end.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import cost, parse
from bench.errors import ProgramError
from bench.namespaces import SubjectPair, doing_now, next_line, start
from bench.sampling import COUNTERS, counters_in
from bench.servers import PINGPONG_EPOLL, Servers
from bench.stats import Case

COUNT: Final = 1000
SECONDS: Final = 2.0
SETTLE: Final = 1.0
PATIENCE: Final = 30.0
_BLOCK: Final = 512

CPU: Final = Case(
    "idle_cpu", "ms", False, f"CPU time of both ends of {COUNT} idle connections in {SECONDS:g} s"
)
SHARED: Final = Case(
    "idle_shared_memory", "KiB", False, "shared memory of an idle connection, both ends together"
)
PRIVATE: Final = Case(
    "idle_private_memory", "KiB", False, "memory of the two programs for an idle connection"
)
TABLES: Final = Case(
    "idle_page_tables", "KiB", False, "page tables of the two programs for an idle connection"
)
CASES: Final = (CPU, SHARED, PRIVATE, TABLES)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of some processes in KiB. Shared memory counts once."""

    shared: float
    private: float
    tables: float


@dataclass(frozen=True, slots=True)
class Idle:
    """Case to figure, and the share of upgraded connections."""

    figures: dict[str, float]
    upgraded: float | None


def _field(text: str, name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def memory(pids: Iterable[int], proc: Path = cost.PROC) -> Memory:
    """The memory that the processes use now. A memfd counts by its allocated blocks."""
    shared: dict[tuple[int, int], int] = {}
    private = tables = 0.0
    for pid in pids:
        process = proc / str(pid)
        private += _field((process / "smaps_rollup").read_text(), "Pss_Anon")
        tables += _field((process / "status").read_text(), "VmPTE")
        for line in (process / "maps").read_text().splitlines():
            if "/memfd:" in line:
                mapped = (process / "map_files" / line.split()[0]).stat()
                shared[mapped.st_dev, mapped.st_ino] = mapped.st_blocks * _BLOCK
    return Memory(sum(shared.values()) / 1024, private, tables)


def idle(pair: SubjectPair, servers: Servers) -> Idle:
    """Make the connections, measure them while they are idle, and end them."""
    server = servers.fresh(pair, PINGPONG_EPOLL)
    path, counters = counters_in(pair.client)
    environment = {COUNTERS: path} if pair.client.library else {}
    program = (f"{pair.client.tools}/pingpong", "epoll", "hold", "-1")
    address = (server.address, "0" if server.unix else str(server.port))
    before = memory([server.pid])
    client = start(
        pair.client.enter(*program, *address, "64", str(COUNT), environment=environment),
        stdin=subprocess.PIPE,
    )
    try:
        if next_line(client, PATIENCE) != "ready\n":
            doing = doing_now(client.pid)
            client.kill()
            _, why = client.communicate()
            raise ProgramError(
                f"{pair.subject}: {COUNT} connections cannot be made: {why[-500:].strip() or doing}"
            )
        time.sleep(SETTLE)
        pids = (server.pid, client.pid)
        used = sum(cost.cpu_us(pid) for pid in pids)
        time.sleep(SECONDS)
        used = sum(cost.cpu_us(pid) for pid in pids) - used
        after = memory(pids)
        try:
            said, why = client.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise ProgramError(
                f"{pair.subject}: after being idle: still running after {PATIENCE:g} s"
            ) from error
        if client.returncode != 0 or f'"count": {COUNT}' not in said:
            raise ProgramError(f"{pair.subject}: after being idle: {why[-500:].strip() or said}")
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
    upgraded = parse.paths(counters.read_text() if counters.exists() else "").share()
    counters.unlink(missing_ok=True)
    figures = {
        CPU.name: used / 1e3,
        SHARED.name: (after.shared - before.shared) / COUNT,
        PRIVATE.name: (after.private - before.private) / COUNT,
        TABLES.name: (after.tables - before.tables) / COUNT,
    }
    return Idle(figures, upgraded)
