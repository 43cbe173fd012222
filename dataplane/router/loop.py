"""The router's event loop, as its parts see it: callbacks for descriptors and timers.

There is one thread, so a callback must not wait. An earlier callback of the same round may have
closed the descriptor and its number may have been used again. So an event is a hint: the callback
checks the descriptor itself.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import structlog

log = structlog.get_logger()

MOST_BUGS: Final = 20
BUGS_WITHIN: Final = 60.0
"""So many bugs in so many seconds are survived."""


class Timer:
    """A callback that runs once, later."""

    __slots__ = ("_do", "due")

    def __init__(self, due: float, do: Callable[[], None]) -> None:
        self.due = due
        self._do: Callable[[], None] | None = do

    @property
    def pending(self) -> bool:
        """Whether it has neither run nor been cancelled."""
        return self._do is not None

    def cancel(self) -> None:
        """Don't run it. May be called at any time."""
        self._do = None

    def fire(self) -> None:
        """Run it now, unless it has run or was cancelled."""
        do, self._do = self._do, None
        if do is not None:
            do()


class Loop(Protocol):
    """What parts of the router may ask of the loop."""

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        """Call with the events (`select.EPOLLIN`, …) of a descriptor. Level-triggered."""

    def modify(self, descriptor: int, events: int) -> None:
        """Change the events; with 0 only EPOLLHUP and EPOLLERR remain."""

    def forget(self, descriptor: int) -> None:
        """Don't watch a descriptor any more; to be called before it is closed."""

    def now(self) -> float:
        """Monotonic seconds."""

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call once, after so many seconds or a little later."""


class Bugs:
    """Has a callback that ends by an exception cost what it would have done, and no more.

    The router has the connections of all containers, and a bug in one callback seldom concerns
    more than one. Each is logged and counted. Where they don't stop, the exception goes on, and the
    router ends: the next one begins with a state that is known.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=MOST_BUGS)
        self.count = 0

    def guard(self, do: Callable[[], object]) -> None:
        """Call.

        Raises:
            Exception: what the callback raises, if there were too many bugs lately.
        """
        try:
            do()
        except Exception:
            now = self._clock()
            self.count += 1
            log.exception("a bug in the router")
            if len(self._recent) == MOST_BUGS and now - self._recent[0] < BUGS_WITHIN:
                raise
            self._recent.append(now)


class EpollLoop:
    """A `Loop` on an epoll instance. Its owner waits on that."""

    def __init__(
        self,
        epoll: select.epoll,
        clock: Callable[[], float] = time.monotonic,
        guard: Callable[[Callable[[], object]], None] | None = None,
    ) -> None:
        """`guard` makes the calls (`Bugs.guard`); None: exceptions go to the owner."""
        self._epoll = epoll
        self._clock = clock
        self._call = guard or _call
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def watch(self, descriptor: int, events: int, callback: Callable[[int], None]) -> None:
        self._epoll.register(descriptor, events)
        self._callbacks[descriptor] = callback

    def modify(self, descriptor: int, events: int) -> None:
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        if self._callbacks.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def now(self) -> float:
        return self._clock()

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(self._clock() + seconds, callback)
        heapq.heappush(self._timers, (timer.due, next(self._numbers), timer))
        return timer

    # --- for the owner of the epoll instance

    def serve(self, descriptor: int, events: int) -> bool:
        """Pass on an event; false if nobody watches the descriptor."""
        callback = self._callbacks.get(descriptor)
        if callback is None:
            return False
        self._call(lambda: callback(events))
        return True

    def fire(self) -> None:
        """Run the timers that are due. Timers that become due meanwhile wait for the next round."""
        now = self._clock()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            self._call(timer.fire)

    def timeout(self, most: float) -> float:
        """Seconds until the next timer is due, `most` at most."""
        while self._timers and not self._timers[0][2].pending:
            heapq.heappop(self._timers)
        if not self._timers:
            return most
        return min(most, max(0.0, self._timers[0][0] - self._clock()))


def _call(do: Callable[[], object]) -> None:
    do()
