"""The root of all errors of the project, and the errors of the data plane.

    FreeFlowError          driver/errors.py has the other branches
     └── DataplaneError
          ├── WrongMessage      a client or peer sent a message that the protocol doesn't have
          ├── KernelRefused     the kernel refused an operation or lacks a feature
          ├── RouterAway        the router doesn't answer: it is starting, or it has died
          └── NoIdentity        a certificate for sessions between hosts is missing or invalid

An error says what failed, why, and what the user can do about it, as three attributes. They are
joined to one sentence only here, in `str()`.
"""

from __future__ import annotations


class FreeFlowError(Exception):
    """Something that failed; the root of the tree, never raised itself.

    `what` names the object and what happened to it, `cause` says why, `remedy` is the next step:
    a command to type, where there is one. `cause` and `remedy` may be empty. `str()` is what
    Docker's users see: "what: cause; remedy".
    """

    def __init__(self, what: str, *, cause: str = "", remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.remedy = remedy

    @property
    def reason(self) -> str:
        """What failed and why, without the remedy."""
        return f"{self.what}: {self.cause}" if self.cause else self.what

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


class DataplaneError(FreeFlowError):
    """The data plane failed; never raised itself outside `router_client.py`."""


class WrongMessage(DataplaneError):
    """Bytes that are no message of the protocol. The connection they came from is closed."""


class KernelRefused(DataplaneError):
    """The kernel refused an operation or lacks a feature."""


class RouterAway(DataplaneError):
    """The router doesn't answer."""


class NoIdentity(DataplaneError):
    """There is no certificate for sessions between hosts, or a peer's certificate is invalid."""
