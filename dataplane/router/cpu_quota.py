"""How many processors a process's container may use: `docker run --cpus`.

See cpu.max in the kernel's cgroup-v2.rst, and cpu.cfs_quota_us in sched-bwc.rst for version 1. The
path of a process's control group is the kernel's word; a container can't change it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")


def of(pid: int, proc: Path = PROC, cgroups: Path = CGROUPS) -> float | None:
    """The limit, in processors; None: there is none, or it isn't known.

    The least limit of the process's group and of those that it is in. A group may be invisible,
    where the plugin's view of the hierarchy begins below it.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    limits = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            limits += _limits(cgroups, path, _limit2)
        elif "cpu" in controllers.split(","):
            for name in ("cpu", controllers):
                limits += _limits(cgroups / name, path, _limit1)
    return min(limits, default=None)


def _limits(root: Path, path: str, limit: Callable[[Path], float | None]) -> list[float]:
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        return []
    folders = [root.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1)]
    return [found for folder in folders if (found := limit(folder)) is not None]


def _limit2(folder: Path) -> float | None:
    words = _words(folder / "cpu.max")
    return _quotient(words[0], words[1]) if len(words) == 2 else None


def _limit1(folder: Path) -> float | None:
    quota = _words(folder / "cpu.cfs_quota_us")
    period = _words(folder / "cpu.cfs_period_us")
    return _quotient(quota[0], period[0]) if quota and period else None


def _quotient(quota: str, period: str) -> float | None:
    """`quota` is "max" or "-1" without a limit."""
    if not quota.isdigit() or not period.isdigit() or not int(period):
        return None
    return int(quota) / int(period)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []
