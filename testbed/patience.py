"""How long tests wait: a test knows the time on a quiet machine, this module how busy this one is.

`patience` is for events that must happen at some time. It is generous, because only a failing test
waits so long. `within` is for promises that name a time: on a quiet machine it is that time, and it
is longer only as far as other programs use the processor.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Final

GENEROUS: Final = 4.0
"""`patience` waits at least this many times as long as on a quiet machine."""
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


def _runnable() -> int:
    """Number of threads that want a processor now, without this one (proc_loadavg(5))."""
    return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1


def slowness() -> float:
    """How many times as long as on a quiet machine things take now; at least 1.

    The load counts all processes that want a processor, on average over a minute; after a change it
    lags, so those of this moment count as well. The piece of work detects a machine that is slow
    for another reason.
    """
    global _measured
    with _lock:
        if time.monotonic() - _measured[0] > _FRESH:
            load = max(os.getloadavg()[0], _runnable()) / (os.cpu_count() or 1)
            # Waiting is delayed twice: the waiter and the process that it waits for are both late.
            worst = max(1.0, 2 * load - 1, _work() / _REFERENCE)
            _measured = (time.monotonic(), min(worst, MOST))
        return _measured[1]


def patience(seconds: float) -> float:
    """A time-out for something that takes up to `seconds` on a quiet machine."""
    return seconds * max(GENEROUS, slowness())


def within(seconds: float) -> float:
    """What a promise of `seconds` on a quiet machine means on this machine now."""
    return seconds * slowness()
