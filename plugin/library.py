"""Puts the library that containers preload into the folder that they mount, from the plugin's own root file system.

It always has the same name there, and is replaced by renaming: a program that starts meanwhile gets a whole file, old or
new, and one that runs keeps the file that it has mapped. The same bytes are left as they are, so that a restart of the
plugin makes no running program look outdated.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger()

NAME: Final = "libfreeflow.so"
SHIPPED: Final = Path("/usr/lib/freeflow") / NAME
"""Where `plugin/image` puts it."""


def place(folder: Path, shipped: Path = SHIPPED) -> bool:
    """Put it into `folder`; false if it can't be, which is only logged: connections then stay on the overlay."""
    target = folder / NAME
    temporary = folder / f".{NAME}.new"
    try:
        wanted = shipped.read_bytes()
        if _same(target, wanted):
            return True
        # Anew each time: what a plugin that was killed has left may be half a file.
        temporary.unlink(missing_ok=True)
        temporary.write_bytes(wanted)
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        log.error(
            "the library can't be put where containers find it",
            library=str(target),
            reason=str(error),
        )
        return False
    log.info("the library was put where containers find it", bytes=len(wanted))
    return True


def _same(target: Path, wanted: bytes) -> bool:
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        return os.fstat(descriptor).st_mode & 0o777 == 0o644 and file.read() == wanted
