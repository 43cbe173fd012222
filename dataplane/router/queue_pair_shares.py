"""How much of the time the relay works for the queue pairs of a container that uses it too much.

Connections of such a container go back to TCP. Queue pairs can't, so the relay serves them for only
a part of the time, which is made so small that the container stays within its limit. There is no
I/O and no clock here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dataplane.router.limits import Share

WHOLE: Final = 1000
"""Thousandths of the time."""
LEAST: Final = 20
BURST: Final = 3.0
"""Seconds of its limit that a container may use at once."""
EASE: Final = 0.8
"""A container that uses less than this part of its limit gets more of the time again."""


class QueuePairUse(NamedTuple):
    """What a container's queue pairs use of the relay."""

    limit: float
    """Processors that the relay may use for them."""
    used: float
    """Seconds of the processor, since the last time."""
    arenas: frozenset[int]


@dataclass(slots=True)
class _Held:
    share: Share
    part: int = WHOLE


@dataclass(slots=True, eq=False)
class QueuePairShares:
    """The containers, by their namespaces."""

    _held: dict[int, _Held] = field(default_factory=dict)
    _told: dict[int, int] = field(default_factory=dict)
    """What the relay knows, by arena."""

    def divide(
        self, uses: Mapping[int, QueuePairUse], seconds: float, now: float
    ) -> dict[int, int]:
        """The arenas for which the relay is to work in another part of the time than it knows.

        Args:
            uses: of all containers with queue pairs over the relays' TCP.
            seconds: since the last time.
            now: seconds.
        """
        self._held = {who: held for who, held in self._held.items() if who in uses}
        wanted: dict[int, int] = {}
        for who, use in uses.items():
            held = self._held.get(who)
            if held is None:
                full = Share.full(use.limit, use.limit * BURST, now)
                held = self._held[who] = _Held(full)
            self._adapt(held, use, seconds, now)
            wanted.update(dict.fromkeys(use.arenas, held.part))
        before = {**dict.fromkeys(wanted, WHOLE), **self._told}
        self._told = wanted
        return {
            arena: wanted.get(arena, WHOLE)
            for arena, part in before.items()
            if wanted.get(arena, WHOLE) != part
        }

    def forget(self) -> None:
        """There is another relay, which knows nothing."""
        self._told.clear()

    @staticmethod
    def _adapt(held: _Held, use: QueuePairUse, seconds: float, now: float) -> None:
        held.share.rate, held.share.most = use.limit, use.limit * BURST
        held.share.spend(use.used, now)
        rate = use.used / seconds
        if held.share.left < 0 and rate > use.limit:
            held.part = max(LEAST, int(held.part * use.limit / rate))
        elif rate < use.limit * EASE:
            held.part = min(WHOLE, held.part * 5 // 4 + 1)
