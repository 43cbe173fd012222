"""Rate limits: a bucket of events, and a share of the processor. Time fills both."""

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


@dataclass(slots=True)
class Share:
    """A share of the processor: `rate` seconds of work per second, and at most `most` seconds of work at once.

    Work is known only after it was done, so `left` may be negative: then the next work waits until that is paid off.
    """

    rate: float
    most: float
    left: float
    at: float

    @classmethod
    def full(cls, rate: float, most: float, now: float) -> Share:
        """A share of which nothing was used."""
        return cls(rate, most, most, now)

    def spend(self, seconds: float, now: float) -> None:
        """Work was done."""
        self.left = min(self.most, self.left + max(0.0, now - self.at) * self.rate) - seconds
        self.at = now

    def pause(self, least: float) -> float:
        """Seconds to wait until there is as much as `least`; 0 if there is."""
        return max(0.0, (least - self.left) / self.rate)
