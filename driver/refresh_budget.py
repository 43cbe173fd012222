"""When the engine is asked to list a network's services again.

Listing is expensive: engines up to 28 log two error lines each time (about the ingress network,
which has an endpoint that they don't know), and walk all networks. So services are listed when a
hint says that they may have changed, and rarely otherwise. Gossip may arrive after the hint, so
each hint causes several listings.

Containers can forge hints, so all hints share a budget. A hint is never lost, only deferred.
"""

from __future__ import annotations

from typing import Final

FOLLOW_UPS: Final = (0.0, 0.5, 2.0)
"""Seconds after a hint at which the services are listed."""
INTERVAL: Final = 60.0
"""Seconds after which the services are listed without a hint."""
LARGE_INTERVAL: Final = 2.0
"""The same for a network whose tasks only the list tells."""
BUDGET: Final = 20.0
"""Listings in a row, however many hints there are; after them, one a second."""


class RefreshBudget:
    """The budget of one network. Times are seconds of one clock. Not thread-safe."""

    def __init__(self, now: float) -> None:
        self._due: list[float] = [now]
        self._budget = BUDGET
        self._counted = now

    def hint(self, now: float) -> None:
        """The services may have changed."""
        # The earliest due time stays: a stream of hints must not defer it for ever.
        earliest = self._due[:1]
        self._due = sorted({*earliest, *(now + after for after in FOLLOW_UPS)})

    def within(self, seconds: float) -> None:
        """List at the latest so many seconds after the last listing."""
        if self._due[0] > self._counted + seconds:
            self._due.insert(0, self._counted + seconds)

    def next(self) -> float:
        """When `take` will allow a listing."""
        return max(self._due[0], self._counted + 1.0 - self._budget)

    def take(self, now: float) -> bool:
        """Whether to list the services now; true counts as a listing."""
        if now < self.next():
            return False
        self._budget = min(BUDGET, self._budget + now - self._counted) - 1.0
        self._counted = now
        self._due = [due for due in self._due if due > now]
        self._due.append(now + INTERVAL)
        self._due.sort()
        self._due = self._due[: len(FOLLOW_UPS) + 1]
        return True

    def take_early(self, now: float) -> bool:
        """Like `take`, with a hint that needs no follow-up."""
        self._due = sorted({now, *self._due})
        return self.take(now)
