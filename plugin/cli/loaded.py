"""Which of our libraries a process preloads and has loaded, as /proc shows it.

/proc shows the environment of each process and the files that it has mapped. A library that was
replaced since is another file with the same name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from plugin.cli.preload import LIBRARY, VERBS, VERBS_FOLDER

_MOST_BYTES: Final = 8 << 20
"""Limit of a file in /proc; the kernel allows 65,530 mappings."""
_MAPPED: Final = re.compile(
    r"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +"
    rf"(\S*/(?:{re.escape(LIBRARY)}|libibverbs\.so[0-9.]*|ld-musl-[^/\s]*))(?: \(deleted\))?$",
    re.MULTILINE,
)
_LINKED, _COMPANION = VERBS
_IN_OURS: Final = "/freeflow/verbs/"
"""In paths: an image's /run may be a link."""

File = tuple[int, int]
"""A file's device and inode."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One process. Files are None where it has not mapped them.

    `asks_verbs`: its LD_PRELOAD names our libibverbs. `other_verbs` is the path of another
    libibverbs that it has mapped, or empty. `lacks_path`: its loader is musl's, without our folder
    in LD_LIBRARY_PATH.
    """

    pid: int
    name: str
    preloads: bool
    library: File | None
    asks_verbs: bool = False
    verbs: File | None = None
    companion: bool = False
    other_verbs: str = ""
    lacks_path: bool = False


def read_some(path: Path) -> str:
    """The beginning of a file whose content a container's process controls. Raises OSError."""
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode(errors="backslashreplace")


def _mapped(maps: str) -> Iterator[tuple[str, File]]:
    for found in _MAPPED.finditer(maps):
        yield found[4], (os.makedev(int(found[1], 16), int(found[2], 16)), int(found[3]))


def inspect_process(pid: int, proc: Path = Path("/proc")) -> Loaded | None:
    """A process, as the kernel shows it; None if it has ended."""
    folder = proc / str(pid)
    try:
        lines = read_some(folder / "environ").split("\0")
        # A process may give itself any name.
        name = read_some(folder / "comm").strip()
        mapped = dict(_mapped(read_some(folder / "maps")))
    except OSError:
        return None
    environment = {line.partition("=")[0]: line.partition("=")[2] for line in reversed(lines)}
    preload = environment.get("LD_PRELOAD", "")
    ours = {path.rpartition("/")[2]: file for path, file in mapped.items() if _IN_OURS in path}
    libraries = [file for path, file in mapped.items() if path.endswith(f"/{LIBRARY}")]
    others = [path for path in mapped if "/libibverbs." in path and _IN_OURS not in path]
    musl = any("/ld-musl-" in path for path in mapped)
    return Loaded(
        pid=pid,
        name=name,
        preloads=LIBRARY in preload,
        library=libraries[0] if libraries else None,
        asks_verbs=_LINKED in preload.replace(":", " ").split(),
        verbs=ours.get(Path(_LINKED).name),
        companion=Path(_COMPANION).name in ours,
        other_verbs=others[0] if others else "",
        lacks_path=musl and VERBS_FOLDER not in environment.get("LD_LIBRARY_PATH", "").split(":"),
    )


def host_file(run: Path, path: str) -> File | None:
    """The host's file of a path in /run: device and inode; None if there is none."""
    try:
        found = (run / Path(path).relative_to("/run")).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def some_names(processes: list[Loaded]) -> str:
    """The names of processes, for people."""
    found = sorted({process.name for process in processes})
    return ", ".join(found[:5]) + (" …" if len(found) > 5 else "")
