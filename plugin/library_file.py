"""Installs the libraries that containers preload into the folder that they mount.

A library always has the same name there, and is replaced by renaming: a program that starts
meanwhile gets a complete file, old or new, and a running one keeps the file that it has mapped. An
identical file is kept, so that no running program appears outdated after a restart of the plugin.

A program that starts while several are replaced may load old and new ones. They ask each other for
their version (`dataplane/library/services.h`): such a program has no device of verbs.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any, Final

NAME: Final = "libfreeflow.so"
VERBS: Final = "verbs/libibverbs.so.1"
COMPANION: Final = "verbs/libibverbs.so"
SHIPPED: Final = Path("/usr/lib/freeflow")
"""Where `plugin/image` puts them, below the same names."""
OWNER: Final = 0x7FFFFFFE
"""An unused user ID. A file's owner may take a lease, which delays all who open it (fcntl(2))."""

_held: dict[Path, int] = {}
"""Open descriptors: while a file is open for reading, nobody gets a lease that delays readers."""


def place(folder: Path, shipped: Path = SHIPPED, *, quietly: bool = False) -> bool:
    """Install all of them in `folder`, each with the name that it has in `shipped`.

    If one can't be installed, log it, leave the one that is there, and return False. Programs that
    would have loaded it use the kernel's TCP, or have no device of verbs.
    """
    placed = [_place(folder / name, shipped / name, quietly) for name in (NAME, VERBS, COMPANION)]
    return all(placed)


def _place(target: Path, shipped: Path, quietly: bool) -> bool:
    try:
        wanted = shipped.read_bytes()
        if _same(target, wanted):
            return True
        target.parent.mkdir(exist_ok=True)
        target.parent.chmod(0o755)
        _replace(target, wanted)
    except OSError as error:
        if not quietly:
            _log().error(
                "a library can't be installed for containers",
                library=str(target),
                reason=str(error),
            )
        return False
    if not quietly:
        _log().info(
            "a library was installed for containers", library=str(target), bytes=len(wanted)
        )
    return True


def _log() -> Any:
    # Not imported at the top: this module is loaded before the plugin listens.
    import structlog

    return structlog.get_logger()


def _replace(target: Path, wanted: bytes) -> None:
    temporary = target.with_name(f".{target.name}.new")
    # A plugin that was killed may have left a part of a file.
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    writing = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(os.dup(writing), "wb") as file:
            file.write(wanted)
        # Opened before the other descriptor is closed, so that the file is always open.
        reading = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # Some file systems don't allow it.
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
    """Whether the file is there with the wanted content; if so, it is held open."""
    try:
        # With a lease on the file this fails instead of waiting; the file is replaced then.
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
    """Whether a file has the right owner; without root any owner is right."""
    return uid == OWNER or os.geteuid() != 0
