"""What wants a path to another host, and where it waits until both of its ends want one.

These are requests for TCP connections (`remote_requests.py`) and queue pairs of verbs
(`verbs_remote.py`). The follower offers its own to the leader. The leader matches them with its own
ones: what belongs together becomes a connection (`remote_connections.py`).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple, Protocol

from dataplane.router.arenas import Arena
from dataplane.router.reasons import Reason
from dataplane.router.remote_hosts import RemoteHost

OFFERS: Final = 65536
"""Of one host, that wait for a request of this one."""
_REASONS: Final = frozenset(reason.value for reason in Reason)


def reason_of(number: int) -> Reason:
    """A peer's reason. A later version may have more of them."""
    return Reason(number) if number in _REASONS else Reason.REMOTE


class LocalUser(Protocol):
    """What a process of this host wants a path for: a `PairRequest` or a `QueuePairRecord`."""

    process: int
    namespace: int


class RemoteUser(Protocol):
    """The same, as it waits for its match."""

    local: Any
    connection: int
    """That was begun for it; 0: none."""

    @property
    def peer_process(self) -> int:
        """Leader: the follower's number of the process at the other end; 0: unknown."""


class RemoteUsers(Protocol):
    """All that wait, of one kind, and what is different for each kind."""

    kind: int
    """Of the relay's: `relay_wire.CONNECTION` or `QUEUE_PAIR`."""

    def offered(self, host: RemoteHost, offer: int) -> RemoteUser | None:
        """Follower: what was offered under a number."""

    def refuse(self, request: Any, reason: Reason) -> None:
        """There is no path for it."""

    def why_not(self, user: Any) -> Reason | None:
        """Why it gets no path: its process has ended it, for instance; None: it may."""

    def reserve(self, user: Any, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot, with rings of so many bytes. Its process is not told yet.

        Raises:
            KernelRefused: there is no memory for it.
        """

    def grant(self, user: Any, arena: Arena, slot: int) -> None:
        """Tell its process that it may use the slot."""

    def fail(self, user: Any, reason: Reason) -> None:
        """A connection comes to nothing. What it was begun for may be gone."""

    def retry(self, user: Any) -> None:
        """A connection comes to nothing, and what it was begun for goes on waiting."""

    def is_held(self, end: Any) -> bool:
        """Whether processes still have the end of one that has hung up."""


class Match(NamedTuple):
    """Both ends of what is to become a connection. `offer` is the follower's number of its
    request.
    """

    users: RemoteUsers
    host: RemoteHost
    request: Any
    offer: int
