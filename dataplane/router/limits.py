"""So much and no more: a bucket that time fills."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """Allows `rate` per second on average, and as many at once. Time comes from outside."""

    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """A bucket from which nothing was taken."""
        return cls(rate, rate, now)

    def take(self, now: float, rate: float) -> bool:
        """Take one; false if there is none. `rate` is what is set by now."""
        self._fill(now, rate)
        if self.level < 1:
            return False
        self.level -= 1
        return True

    def empty(self, now: float, rate: float) -> bool:
        """Whether there is nothing to take."""
        self._fill(now, rate)
        return self.level < 1

    def full_by(self, now: float, rate: float) -> bool:
        """Whether as much as possible is in it."""
        self._fill(now, rate)
        return self.level >= rate

    def _fill(self, now: float, rate: float) -> None:
        self.rate = rate
        self.level = min(rate, self.level + max(0.0, now - self.at) * rate)
        self.at = now
