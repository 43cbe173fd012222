"""Puts the library that containers preload into the folder that they mount, from the plugin's own root file system.

It always has the same name there, and is replaced by renaming: a program that starts meanwhile gets a whole file, old or
new, and one that runs keeps the file that it has mapped. The same bytes are left as they are, so that a restart of the
plugin makes no running program look outdated.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any, Final

NAME: Final = "libfreeflow.so"
SHIPPED: Final = Path("/usr/lib/freeflow") / NAME
"""Where `plugin/image` puts it."""
OWNER: Final = 0x7FFFFFFE
"""A user that nobody is. The owner of a file may take leases on it, which make everybody wait who opens it (fcntl(2))."""

_held: dict[Path, int] = {}
"""Descriptors: while a file is open for reading, nobody gets a lease that makes readers wait."""


def place(folder: Path, shipped: Path = SHIPPED, *, quietly: bool = False) -> bool:
    """Put it into `folder`; false if it can't be, which is only logged: connections then stay on the overlay."""
    target = folder / NAME
    try:
        wanted = shipped.read_bytes()
        if _same(target, wanted):
            return True
        _replace(target, wanted)
    except OSError as error:
        if not quietly:
            _log().error(
                "the library can't be put where containers find it",
                library=str(target),
                reason=str(error),
            )
        return False
    if not quietly:
        _log().info("the library was put where containers find it", bytes=len(wanted))
    return True


def _log() -> Any:
    # Not at import: this module is loaded before the plugin listens.
    import structlog

    return structlog.get_logger()


def _replace(target: Path, wanted: bytes) -> None:
    temporary = target.with_name(f".{NAME}.new")
    # Anew each time: what a plugin that was killed has left may be half a file.
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    writing = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(os.dup(writing), "wb") as file:
            file.write(wanted)
        # Before it is closed for writing: there is no moment in which nobody has it open.
        reading = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # Not everywhere allowed.
        with contextlib.suppress(OSError):
            os.fchown(writing, OWNER, -1)
        os.fchmod(writing, 0o644)
    finally:
        os.close(writing)
    try:
        temporary.replace(target)
    except OSError:
        os.close(reading)
        raise
    _hold(target, reading)


def _hold(target: Path, descriptor: int) -> None:
    before = _held.pop(target, None)
    _held[target] = descriptor
    if before is not None:
        os.close(before)


def _same(target: Path, wanted: bytes) -> bool:
    """Whether the file is there as it is wanted; it is held open then."""
    try:
        # Where somebody has a lease on it, this fails instead of waiting: the file is replaced then.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(target, flags)
    except OSError:
        return False
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o777 == 0o644 and _owned(status.st_uid):
        with os.fdopen(os.dup(descriptor), "rb") as file:
            if file.read() == wanted:
                _hold(target, descriptor)
                return True
    os.close(descriptor)
    return False


def _owned(uid: int) -> bool:
    """Whether a file's owner is who it is to be; where that can't be had, anybody."""
    return uid == OWNER or os.geteuid() != 0
