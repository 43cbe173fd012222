"""When a network's services are to be listed again.

Listing them is dear: engines up to 28 log two error lines each time (about the ingress network, which has an endpoint
that they don't know), and walk all networks. So it is done when something hints that the list has changed, and rarely
otherwise. Gossip may come after the hint: so a hint is followed up a few times.

Hints may come from containers, which can make them up: so they share a budget. A hint is never lost, only put off.
"""

from __future__ import annotations

from typing import Final

FOLLOW_UPS: Final = (0.0, 0.5, 2.0)
"""Seconds after a hint at which the services are listed."""
BEAT: Final = 60.0
"""Seconds after which they are listed without a hint."""
LARGE_BEAT: Final = 2.0
"""The same where the list alone says which tasks there are."""
BUDGET: Final = 20.0
"""So many times they are listed in a row, however many hints there are; then once a second."""


class RefreshBudget:
    """Of one network. All times in seconds of one clock. Not safe for several threads."""

    def __init__(self, now: float) -> None:
        self._due: list[float] = [now]
        self._budget = BUDGET
        self._counted = now

    def hint(self, now: float) -> None:
        """Something may have changed."""
        # What is due first stays: hints that keep coming must not put it off for ever.
        earliest = self._due[:1]
        self._due = sorted({*earliest, *(now + after for after in FOLLOW_UPS)})

    def within(self, seconds: float) -> None:
        """The next time is no later than so long after the last one."""
        if self._due[0] > self._counted + seconds:
            self._due.insert(0, self._counted + seconds)

    def next(self) -> float:
        """When `take` will say yes."""
        return max(self._due[0], self._counted + 1.0 - self._budget)

    def take(self, now: float) -> bool:
        """Whether the services are to be listed now; if so, that is taken as done."""
        if now < self.next():
            return False
        self._budget = min(BUDGET, self._budget + now - self._counted) - 1.0
        self._counted = now
        self._due = [due for due in self._due if due > now]
        self._due.append(now + BEAT)
        self._due.sort()
        self._due = self._due[: len(FOLLOW_UPS) + 1]
        return True

    def take_early(self, now: float) -> bool:
        """As `take` with a hint that needs no follow-up."""
        self._due = sorted({now, *self._due})
        return self.take(now)
