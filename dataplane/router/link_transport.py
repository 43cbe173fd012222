"""The transport of a link: RDMA where the devices of both hosts reach each other, else TCP.

Whether they reach each other shows only when a link is made. RDMA that has failed several times in
a row rests for a while, and the link uses TCP. It is tried again when the link has no connections.
TCP rests too, if links over it come up and then don't let bytes through: each would stall the
connections on it until that is noticed. While all transports rest, connections stay on the overlay.
"""

from __future__ import annotations

import errno
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Final

from dataplane.router.relay_wire import RelayOutcome
from dataplane.router.remote_events import Transport

FAILURES: Final = 3
"""Failures in a row after which a transport rests."""
LEAST_REST: Final = 60.0
MOST_REST: Final = 3600.0
"""Seconds for which a transport rests, doubled each time."""
LASTS: Final = 30.0
"""Seconds after which a link counts as good: its loss is no failure."""
WORKS: Final = 100
"""Messages of the peer's relay, after which a link over TCP works: that it is killed soon is no
failure."""


def has_worked(message: RelayOutcome) -> bool:
    """Whether bytes got through on a link over TCP that is down. A link whose bytes the peer's host
    doesn't acknowledge any more may let only small packets through.
    """
    return message.received >= WORKS and message.error != errno.ETIMEDOUT


@dataclass(slots=True)
class Trials:
    """What is known about one transport between this host and a peer."""

    failures: int = 0
    rest: float = LEAST_REST
    until: float = float("-inf")
    """When it may be tried again."""
    reason: str = ""
    """Of the last failure."""

    def failed(self, reason: str, now: float) -> None:
        """A link could not be made, or did not last."""
        self.reason = reason
        self.failures += 1
        if self.failures >= FAILURES:
            # After the rest one more failure is enough.
            self.failures = FAILURES - 1
            self.until = now + self.rest
            self.rest = min(self.rest * 2, MOST_REST)

    def worked(self) -> None:
        """A link has lasted, or one of the hosts has another device."""
        self.failures, self.rest, self.until = 0, LEAST_REST, float("-inf")


@dataclass(slots=True)
class HostTrials:
    """What is known about the transports between this host and a peer."""

    rdma: Trials = field(default_factory=Trials)
    tcp: Trials = field(default_factory=Trials)

    def choose(self, possible: Set[Transport], now: float) -> Transport | None:
        """The transport of the next attempt, of those that both hosts have; None: there is none, or
        all rest.

        A host pair without TCP goes on trying RDMA.
        """
        without_tcp = Transport.RELAY not in possible
        if Transport.RDMA in possible and (without_tcp or now >= self.rdma.until):
            return Transport.RDMA
        return None if without_tcp or now < self.tcp.until else Transport.RELAY
