"""The seam between the router's loop and what has descriptors or times of its own in it.

One thread: a callback must not wait. Its descriptor may have been closed, and its number given to another, by a callback before
it in the same round; so events are hints, and who is called looks at the descriptor itself.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Protocol


class Timer:
    """Something to be done later, once."""

    __slots__ = ("_do", "due")

    def __init__(self, due: float, do: Callable[[], None]) -> None:
        self.due = due
        self._do: Callable[[], None] | None = do

    @property
    def pending(self) -> bool:
        """Whether it is still to be done."""
        return self._do is not None

    def cancel(self) -> None:
        """Don't; also after it was done."""
        self._do = None

    def fire(self) -> None:
        """Do it now, unless it was done or cancelled."""
        do, self._do = self._do, None
        if do is not None:
            do()


class Loop(Protocol):
    """What the parts of the router see of its loop."""

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """Call with the events (`select.EPOLLIN`, …) of a descriptor, until it is forgotten. Level-triggered."""

    def modify(self, descriptor: int, events: int) -> None:
        """Other events; 0 leaves EPOLLHUP and EPOLLERR."""

    def forget(self, descriptor: int) -> None:
        """To be called before it is closed."""

    def now(self) -> float:
        """Monotonic seconds."""

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, not before that time."""


class EpollLoop:
    """`Loop` on an epoll instance that its owner waits on."""

    def __init__(self, epoll: select.epoll, clock: Callable[[], float] = time.monotonic) -> None:
        self._epoll = epoll
        self._clock = clock
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """See `Loop`."""
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def modify(self, descriptor: int, events: int) -> None:
        """See `Loop`."""
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """See `Loop`."""
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def now(self) -> float:
        """See `Loop`."""
        return self._clock()

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """See `Loop`."""
        timer = Timer(self._clock() + seconds, callback)
        heapq.heappush(self._timers, (timer.due, next(self._numbers), timer))
        return timer

    # --- for the owner of the epoll instance

    def serve(self, descriptor: int, events: int) -> bool:
        """Hand over an event; false if nobody watches the descriptor."""
        callback = self._callbacks.get(descriptor)
        if callback is None:
            return False
        callback(events)
        return True

    def fire(self) -> None:
        """Do what is due. What becomes due by that waits for the next round, so that a round ends."""
        now = self._clock()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            timer.fire()

    def timeout(self, most: float) -> float:
        """Seconds until something is due, `most` at most."""
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        if not self._timers:
            return most
        return min(most, max(0.0, self._timers[0][0] - self._clock()))
