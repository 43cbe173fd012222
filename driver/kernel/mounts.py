"""Mounts in the calling thread's mount namespace: mount(2), umount2(2), mountinfo of proc(5)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from driver.kernel.namespace import check, libc

RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
REMOUNT, BIND, REC, PRIVATE = 32, 4096, 16384, 1 << 18
_MNT_DETACH: Final = 2
_TABLE: Final = Path("/proc/thread-self/mountinfo")


def mount(
    source: Path | str, target: Path | str, flags: int, *, kind: str = "", options: str = ""
) -> None:
    """Mount `source` at `target`; `flags` are MS_…, without that prefix. Raises KernelError."""
    result = libc.mount(
        str(source).encode(),
        str(target).encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    check(result, f"mounting {target}")


def detach(path: Path) -> bool:
    """Unmount what is at a path, now or once nobody uses it; false: the kernel refused."""
    return bool(libc.umount2(str(path).encode(), _MNT_DETACH) == 0)


def _mounts(table: Path) -> Iterator[tuple[str, set[str], list[str]]]:
    """Path, options and tags of each mount; a later one covers earlier ones at its path."""
    for line in table.read_text(errors="replace").splitlines():
        fields = line.split()
        tags = fields[6 : fields.index("-")]
        yield fields[4].replace("\\040", " "), set(fields[5].split(",")), tags


def options_at(path: Path, table: Path = _TABLE) -> set[str]:
    """The options of the mount at just this path; empty if there is none."""
    found: set[str] = set()
    for point, options, _ in _mounts(table):
        if point == str(path):
            found = options
    return found


def is_shared(path: Path, table: Path = _TABLE) -> bool:
    """Whether mounts below `path` propagate to the host: its mount is in a peer group."""
    best, shared = -1, False
    resolved = str(path.resolve())
    for point, _, tags in _mounts(table):
        below = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if below and len(point) >= best:
            best, shared = len(point), any(tag.startswith("shared:") for tag in tags)
    return shared
