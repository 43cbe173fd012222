"""Everything that can go wrong, as one tree; adapters translate foreign exceptions into it.

    FreeFlowError
     ├── InvalidRequest    the caller's input is wrong: an option, an address, an ID
     ├── NotFound          the named network or endpoint is not known here
     ├── Conflict          the request contradicts what is already promised
     ├── SettingError      a plugin setting is wrong; the message ends with the line that mends it
     ├── StateError        what is stored on this host can't be read or written
     ├── KernelError       the kernel refused or lacks something
     ├── EngineError       Docker's API did not answer, or not usefully
     └── RouterError       the router of accelerated connections did not answer, or not usefully

A message names the object, the cause and the next step.
"""

from __future__ import annotations


class FreeFlowError(Exception):
    """Root of the tree; never raised itself."""


class InvalidRequest(FreeFlowError):
    """The caller's input is wrong."""


class NotFound(FreeFlowError):
    """The named network or endpoint is not known on this host."""


class Conflict(FreeFlowError):
    """The request contradicts what is already promised to Docker."""


class SettingError(FreeFlowError):
    """A plugin setting is wrong; the message ends with the `docker plugin set` line that mends it."""


class StateError(FreeFlowError):
    """What is stored on this host can't be read or written."""


class KernelError(FreeFlowError):
    """The kernel refused an operation or lacks a feature."""


class EngineError(FreeFlowError):
    """Docker's API did not answer, or not usefully."""


class RouterError(FreeFlowError):
    """The router of accelerated connections did not answer, or not usefully."""
