"""What can go wrong in the data plane, as one tree; `dataplane/client.py` hands its users nothing else.

DataplaneError
 ├── WrongMessage      a client or peer sent what the protocol doesn't have; its connection ends
 ├── KernelRefused     the kernel refused or lacks something
 ├── RouterAway        the router doesn't answer: it is starting, or has died
 └── NoIdentity        there is no certificate for sessions with other hosts, or a peer's isn't right
"""

from __future__ import annotations


class DataplaneError(Exception):
    """Root of the tree; never raised itself."""


class WrongMessage(DataplaneError):
    """Bytes that are no message of the protocol."""


class KernelRefused(DataplaneError):
    """The kernel refused an operation or lacks a feature."""


class RouterAway(DataplaneError):
    """The router doesn't answer."""


class NoIdentity(DataplaneError):
    """No certificate to speak with other hosts, or a peer's isn't what it must be."""
