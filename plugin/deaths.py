"""Records which parts of the plugin have died, and when.

The record is in memory that gunicorn's master shares with its workers, so that it outlives a
worker. One process writes about each part: the master about workers, the worker about its router
and threads.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from plugin.status import PartStatus

RECENT: Final = 600.0
"""Seconds for which a death counts as recent."""
OFTEN: Final = 3
"""This many recent deaths are an error, fewer a warning."""

WORKER: Final = "worker"
ROUTER: Final = "router"
THREAD: Final = "thread"
PARTS: Final = (WORKER, ROUTER, THREAD)

_KEPT: Final = 64
"""Times of deaths that are kept of each part."""
_NAME: Final = 32
_PART: Final = struct.Struct(f"=Q{_KEPT}d{_NAME}s")


class Deaths:
    """The record; made before the workers are forked.

    `clock` must be the same for all processes, as CLOCK_MONOTONIC is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._memory = mmap.mmap(-1, _PART.size * len(PARTS))

    def note(self, part: str, name: str = "") -> None:
        """Record that a part has just died."""
        offset = PARTS.index(part) * _PART.size
        with self._lock:
            count, *rest = _PART.unpack_from(self._memory, offset)
            times = rest[:-1]
            times[count % _KEPT] = self._clock()
            encoded = name.encode()[:_NAME]
            _PART.pack_into(self._memory, offset, count + 1, *times, encoded)

    def all(self) -> list[PartStatus]:
        """All parts that have died."""
        now = self._clock()
        found = []
        for number, part in enumerate(PARTS):
            count, *rest = _PART.unpack_from(self._memory, number * _PART.size)
            if not count:
                continue
            times = rest[: min(count, _KEPT)]
            recent = sum(now - each <= RECENT for each in times)
            name = rest[-1].rstrip(b"\0").decode(errors="replace")
            ago = round(max(0.0, now - max(times)), 1)
            found.append(PartStatus(part, count, recent, ago, name))
        return found

    def watch_threads(self) -> None:
        """From now on record threads of this process that end by an exception.

        The exception is still reported as before.
        """
        before = threading.excepthook

        def note(arguments: Any) -> None:
            thread = arguments.thread
            self.note(THREAD, thread.name if thread is not None else "")
            before(arguments)

        threading.excepthook = note
