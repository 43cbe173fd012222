"""CPU time of processes: of a running one with its descendants, and of reaped children."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


def family(pid: int, proc: Path = PROC) -> Iterator[int]:
    """The process and its descendants, zombies included."""
    yield pid
    for listing in proc.glob(f"{pid}/task/*/children"):
        try:
            children = listing.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from family(int(child), proc)


def cpu_us(pid: int, proc: Path = PROC) -> float:
    """CPU time of the process and its descendants in microseconds, reaped ones included.

    Time of running threads is exact; that of reaped children has a resolution of 10 ms.
    """
    tick = 1e6 / os.sysconf("SC_CLK_TCK")
    used = 0.0
    for one in family(pid, proc):
        try:
            # Fields 16 and 17 of proc(5), time of reaped children; the list begins with field 3.
            fields = (proc / str(one) / "stat").read_text().rpartition(")")[2].split()
            used += (int(fields[13]) + int(fields[14])) * tick
            for thread in (proc / str(one) / "task").iterdir():
                used += int((thread / "schedstat").read_text().split()[0]) / 1e3
        except (OSError, IndexError):
            # It ended while we read; from now on its time counts as its parent's.
            continue
    return used


def children_us() -> float:
    """CPU time in microseconds of all programs that this process has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e6
