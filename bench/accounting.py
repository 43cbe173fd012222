"""CPU time of the hosts of a measurement, and how much of the machine others used meanwhile.

Each host has a control group with all its processes: engine, containers, router and relay, and the
load programs that are started in its containers. The kernel works on a packet, softirq included, in
the context of the process that runs on that core, mostly that of the sender, and charges it to that
process. So the group's time contains the network's work, but not sorted by host: only the sum over
both hosts means something. What the kernel defers runs in the threads `ksoftirqd`, which are in no
host's group and are added. They also work for others' packets, so `foreign` has to be small.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import parse
from bench.errors import BenchError

GROUPS: Final = Path("/sys/fs/cgroup")
PROC: Final = Path("/proc")
ENGINE: Final = "engine"
"""Group of the processes that a host had when `charge` was called, and of what they start."""
LOAD: Final = "load"
"""Group of the load programs."""


def hierarchy(root: Path = GROUPS) -> Path:
    """The folder of the groups that count CPU time: one controller's, or that of version 2."""
    return root / "cpuacct" if (root / "cpuacct").exists() else root


def usage_us(group: Path) -> float:
    """CPU time of a group and the groups in it, in microseconds.

    Raises:
        BenchError: it does not exist, or counts no CPU time.
    """
    try:
        if (group / "cpuacct.usage").exists():
            return int((group / "cpuacct.usage").read_text()) / 1000
        found = re.search(r"^usage_usec (\d+)", (group / "cpu.stat").read_text(), re.MULTILINE)
    except OSError as error:
        raise BenchError(f"{group}: no CPU time of a host: {error}") from error
    if not found:
        raise BenchError(f"{group}/cpu.stat has no usage_usec")
    return float(found[1])


def _processes_of(pid: int, proc: Path) -> Iterator[int]:
    """All processes in the PID namespace of a process."""
    own = os.readlink(proc / str(pid) / "ns/pid")
    for entry in proc.iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns/pid") == own:
                yield int(entry.name)
        except OSError:
            continue


def charge(name: str, pid: int) -> Path:
    """Move all processes in the PID namespace of `pid` into a group of this name; its path.

    Processes that they start later are in it, too. Docker puts a host's containers there itself,
    but not its plugins, so this is for a host on which the plugin runs already.

    Raises:
        BenchError: a process is not in the group afterwards.
    """
    group = hierarchy() / name
    for part in (ENGINE, LOAD):
        (group / part).mkdir(parents=True, exist_ok=True)
    for process in _processes_of(pid, PROC):
        try:
            (group / ENGINE / "cgroup.procs").write_text(str(process))
        except ProcessLookupError:
            continue
    missing = uncharged(group, pid)
    if missing:
        raise BenchError(
            f"CPU time of {', '.join(sorted(set(missing)))} would not be counted: not in {group}"
        )
    return group


def uncharged(group: Path, pid: int) -> list[str]:
    """Names of processes in the PID namespace of `pid` that are not in the group."""
    missing = []
    for process in _processes_of(pid, PROC):
        try:
            groups = (PROC / str(process) / "cgroup").read_text()
            name = (PROC / str(process) / "comm").read_text().strip()
        except OSError:
            continue
        if not re.search(rf":/{re.escape(group.name)}(/|$)", groups, re.MULTILINE):
            missing.append(name)
    return missing


def _ksoftirqd(proc: Path) -> list[Path]:
    """The kernel's threads that do deferred softirq work, by their folders in /proc."""
    found = []
    for entry in proc.iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().startswith("ksoftirqd/"):
                found.append(entry)
        except OSError:
            continue
    return found


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment, in microseconds: the hosts, ksoftirqd, this program, the machine."""

    at_us: float
    hosts_us: float
    deferred_us: float
    own_us: float
    busy_us: float


@dataclass(frozen=True, slots=True)
class Used:
    """CPU time of the hosts between two readings, and the share of the machine others used."""

    cpu_us: float
    foreign: float


def between(before: Reading, after: Reading, cores: int) -> Used:
    """What was used between two readings. `foreign` has the resolution of /proc/stat, 10 ms."""
    ours = after.hosts_us - before.hosts_us + after.deferred_us - before.deferred_us
    others = after.busy_us - before.busy_us - ours - (after.own_us - before.own_us)
    whole = cores * (after.at_us - before.at_us)
    return Used(ours, min(1.0, max(0.0, others / whole)) if whole > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class Accounts:
    """The accounts of all hosts of a measurement."""

    groups: Sequence[Path]
    threads: Sequence[Path]
    proc: Path = PROC

    @classmethod
    def of(cls, groups: Sequence[Path], proc: Path = PROC) -> Accounts:
        return cls(groups, _ksoftirqd(proc), proc)

    def read(self) -> Reading:
        """Raises `BenchError` if a group has gone."""
        stat = (self.proc / "stat").read_text()
        ticks = parse.busy_ticks(stat) + parse.stolen_ticks(stat)
        deferred = sum(
            int((thread / "schedstat").read_text().split()[0]) / 1000 for thread in self.threads
        )
        return Reading(
            at_us=time.monotonic() * 1e6,
            hosts_us=sum(usage_us(group) for group in self.groups),
            deferred_us=deferred,
            own_us=time.process_time() * 1e6,
            busy_us=ticks * 1e6 / os.sysconf("SC_CLK_TCK"),
        )

    def used_since(self, before: Reading) -> Used:
        return between(before, self.read(), os.cpu_count() or 1)
