"""Programs of new links, attached after the answer to Docker.

Attaching waits for all processors (synchronize_rcu) under the kernel's lock of all links, about
10 ms each time, and starting containers need that lock too. So links are collected here, and a
thread attaches their programs once no more containers start.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from driver.worker import OnDemandWorker

QUIET: Final = 0.25
"""Seconds without a change after which programs are attached."""
PATIENCE: Final = 5.0
"""Seconds after which they are attached in any case."""


class Attachments:
    """Links that wait for a program, and links that wait to lose theirs, by interface index.

    `apply` is called by the thread of this object; it is expected to `take` what waits. Methods are
    safe from any thread.
    """

    def __init__(self, apply: Callable[[], None]) -> None:
        self._apply = apply
        self._changed = threading.Condition()
        """Guards the fields below."""
        self._attach: dict[int, str] = {}
        self._detach: set[int] = set()
        self._last_change = 0.0
        self._worker = OnDemandWorker("fast-path", self._changed, self._has_work, self._wait)

    def attach(self, index: int, program: str) -> None:
        """Attach this program to a link soon."""
        with self._changed:
            self._detach.discard(index)
            self._attach[index] = program
            self._start()

    def detach(self, index: int) -> None:
        """Detach our program from a link soon. A link that is deleted takes its program along."""
        with self._changed:
            self._attach.pop(index, None)
            self._detach.add(index)
            self._start()

    def take(self) -> tuple[dict[int, str], set[int]]:
        """The programs to attach, and the links to detach from; the caller does so now."""
        with self._changed:
            attach, self._attach = self._attach, {}
            detach, self._detach = self._detach, set()
            return attach, detach

    def clear(self) -> None:
        """Forget all of them: the overlay namespace is closed."""
        with self._changed:
            self._attach.clear()
            self._detach.clear()
            self._changed.notify_all()

    def _has_work(self) -> bool:
        return bool(self._attach or self._detach)

    def _start(self) -> None:
        self._last_change = time.monotonic()
        self._worker.start()

    def _wait(self) -> None:
        with self._changed:
            first = time.monotonic()
            while self._has_work():
                now = time.monotonic()
                if now >= min(self._last_change + QUIET, first + PATIENCE):
                    break
                self._changed.wait(self._last_change + QUIET - now)
            if not self._has_work():
                return
        self._apply()
