"""How long tests wait. They know how long a thing takes on a quiet machine; this module knows how busy this machine is.

`patience` is for what must happen sooner or later: it is generous, since only a test that fails waits so long. `within` is for
promises that name a time: on a quiet machine it is that time, and longer only as far as other programs take the processor.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Final

GENEROUS: Final = 4.0
"""How much longer than on a quiet machine we wait at least."""
MOST: Final = 25.0
_REFERENCE: Final = 0.006
"""Seconds that `_work` takes on a slow machine that has nothing else to do."""
_FRESH: Final = 5.0
"""Seconds for which a measurement holds."""

_lock = threading.Lock()
_measured: tuple[float, float] = (-_FRESH, 1.0)


def _work() -> float:
    """Seconds that a fixed piece of work takes, waiting for a processor included."""
    begin = time.perf_counter()
    total = 0
    for number in range(100_000):
        total += number
    return time.perf_counter() - begin


def slowness() -> float:
    """How many times longer than on a quiet machine things take now; at least 1.

    The load counts all that wants a processor; the work tells a machine that is slow for another reason.
    """
    global _measured
    with _lock:
        if time.monotonic() - _measured[0] > _FRESH:
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            # Somebody who waits is woken late twice: he, and the one that he waits for.
            worst = max(1.0, 2 * load - 1, _work() / _REFERENCE)
            _measured = (time.monotonic(), min(worst, MOST))
        return _measured[1]


def patience(seconds: float) -> float:
    """A time-out for what takes up to `seconds` on a quiet machine."""
    return seconds * max(GENEROUS, slowness())


def within(seconds: float) -> float:
    """The promise `seconds` of a quiet machine, on this one as busy as it is."""
    return seconds * slowness()
