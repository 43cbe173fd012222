"""The transport of a link: RDMA where the devices of both hosts reach each other, else TCP.

Whether they reach each other shows only when a link is made. RDMA that has failed several times in
a row rests for a while, and the link uses TCP. It is tried again when the link has no connections.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from dataplane.router.remote_events import Transport

FAILURES: Final = 3
"""Failures in a row after which RDMA rests."""
LEAST_REST: Final = 60.0
MOST_REST: Final = 3600.0
"""Seconds for which RDMA rests, doubled each time."""
LASTS: Final = 30.0
"""Seconds after which a link over RDMA counts as good: its loss is no failure."""


@dataclass(slots=True)
class RdmaTrials:
    """What is known about RDMA between this host and a peer."""

    failures: int = 0
    rest: float = LEAST_REST
    until: float = float("-inf")
    """When it may be tried again."""
    reason: str = ""
    """Of the last failure."""

    def choose(self, possible: Set[Transport], now: float) -> Transport | None:
        """The transport of the next attempt, of those that both hosts have; None: they share none.

        A host pair without TCP goes on trying RDMA.
        """
        if Transport.RELAY not in possible:
            return Transport.RDMA if Transport.RDMA in possible else None
        return (
            Transport.RDMA if Transport.RDMA in possible and now >= self.until else Transport.RELAY
        )

    def failed(self, reason: str, now: float) -> None:
        """A link over RDMA could not be made, or did not last."""
        self.reason = reason
        self.failures += 1
        if self.failures >= FAILURES:
            # After the rest one more failure is enough.
            self.failures = FAILURES - 1
            self.until = now + self.rest
            self.rest = min(self.rest * 2, MOST_REST)

    def worked(self) -> None:
        """A link over RDMA has lasted, or one of the hosts has another device."""
        self.failures, self.rest, self.until = 0, LEAST_REST, float("-inf")
