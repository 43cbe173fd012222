"""Everything that can fail in driver and plugin, as one tree; adapters translate foreign
exceptions.

FreeFlowError          dataplane/errors.py, with `what`, `cause` and `remedy`
 ├── InvalidRequest    the caller's input is wrong: an option, an address, an ID
 ├── NotFound          the named network or endpoint is not known here
 ├── Conflict          the request contradicts an earlier promise to Docker
 ├── SettingError      a plugin setting is wrong; the remedy is the command that corrects it
 ├── StateError        the state stored on this host can't be read or written
 ├── KernelError       the kernel refused an operation or lacks a feature
 └── EngineError       Docker's API did not answer, or its answer was not usable
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final

from dataplane.errors import FreeFlowError as FreeFlowError

DOCTOR: Final = "run: freeflow doctor"
"""The remedy where the kernel refuses without saying what it lacks."""
TRY_AGAIN: Final = "try again"


class InvalidRequest(FreeFlowError):
    """The caller's input is wrong."""


class NotFound(FreeFlowError):
    """The named network or endpoint is not known on this host."""


class Conflict(FreeFlowError):
    """The request contradicts an earlier promise to Docker."""


class SettingError(FreeFlowError):
    """A plugin setting is wrong; the remedy is the `docker plugin set` line that corrects it."""


class StateError(FreeFlowError):
    """The state stored on this host can't be read or written."""


class KernelError(FreeFlowError):
    """The kernel refused an operation or lacks a feature."""


class EngineError(FreeFlowError):
    """Docker's API did not answer, or its answer was not usable."""


@contextmanager
def reporting(what: str, *, ignore: Collection[int] = (), remedy: str = DOCTOR) -> Iterator[None]:
    """Report an OSError as a KernelError; one of the numbers in `ignore` only ends the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in ignore:
            raise KernelError(what, cause=error.strerror or str(error), remedy=remedy) from error
