"""Rate limits: a token bucket for events, and a share of the processor. Time refills both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Bucket:
    """A token bucket: `rate` events per second on average, and as many at once."""

    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """A full bucket."""
        return cls(rate, rate, now)

    def take(self, now: float, rate: float) -> bool:
        """Take one token; false if there is none. `rate` is the current setting."""
        self._fill(now, rate)
        if self.level < 1:
            return False
        self.level -= 1
        return True

    def charge(self, tokens: float) -> None:
        """Take more, for what has turned out to cost more; the level may get negative."""
        self.level -= tokens

    def empty(self, now: float, rate: float) -> bool:
        """Whether there is no token."""
        self._fill(now, rate)
        return self.level < 1

    def full_by(self, now: float, rate: float) -> bool:
        """Whether the bucket is full."""
        self._fill(now, rate)
        return self.level >= rate

    def _fill(self, now: float, rate: float) -> None:
        self.rate = rate
        self.level = min(rate, self.level + max(0.0, now - self.at) * rate)
        self.at = now


@dataclass(slots=True)
class Share:
    """A share of the processor: `rate` seconds of work per second, `most` seconds at once.

    The cost of work is known only afterwards, so `left` may be negative. The next work then waits
    until it is positive again.
    """

    rate: float
    most: float
    left: float
    at: float

    @classmethod
    def full(cls, rate: float, most: float, now: float) -> Share:
        """An unused share."""
        return cls(rate, most, most, now)

    def spend(self, seconds: float, now: float) -> None:
        """Account for work that was done."""
        self.left = min(self.most, self.left + max(0.0, now - self.at) * self.rate) - seconds
        self.at = now

    def pause(self, least: float) -> float:
        """Seconds until `least` seconds of work are left; 0 if they are."""
        return max(0.0, (least - self.left) / self.rate)
