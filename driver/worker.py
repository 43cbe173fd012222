"""Threads of the driver: one that runs until it is stopped, and one that lives only while there is
work.

Both survive whatever a step raises: the next step starts from the facts again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

import structlog

log = structlog.get_logger()

STOP_PATIENCE: Final = 5.0
"""Seconds for which `stop` waits for the running step."""
_RETRY: Final = 1.0
"""Seconds before a step is tried again that has raised."""


class Worker:
    """A daemon thread that calls `step` until `stop`.

    `step` returns the seconds until its next call. After an exception, which is logged once for a
    row of equal ones, it is called again after `retry` seconds. `sleep` replaces the wait between
    two calls; it has to return early when `wake` is called, which is why `wake` is replaced with
    it.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], float],
        *,
        retry: float = _RETRY,
        sleep: Callable[[float], object] | None = None,
        wake: Callable[[], object] | None = None,
    ) -> None:
        self._name = name
        self._step = step
        self._retry = retry
        self._woken = threading.Event()
        self._sleep = sleep or self._woken.wait
        self.wake = wake or self._woken.set
        self.stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, after: float = 0.0) -> None:
        """Start the thread; its first step begins `after` seconds later."""
        self._thread = threading.Thread(
            target=self._run, args=(after,), name=self._name, daemon=True
        )
        self._thread.start()

    def stop(self, *, wait: bool = True) -> None:
        """End the thread after the step that it is in; `wait` for that, up to `STOP_PATIENCE`."""
        self.stopped.set()
        self.wake()
        if wait and self._thread is not None:
            self._thread.join(timeout=STOP_PATIENCE)

    def _run(self, pause: float) -> None:
        failure = ""
        if pause > 0:
            self._sleep(pause)
        while not self.stopped.is_set():
            self._woken.clear()
            try:
                pause = self._step()
                failure = ""
            except Exception as error:
                if failure != repr(error):
                    failure = repr(error)
                    log.exception("a background task failed", task=self._name)
                pause = self._retry
            if not self.stopped.is_set():
                self._sleep(pause)


class OnDemandWorker:
    """A daemon thread that calls `step` as long as `has_work` says so, and then ends.

    `lock` guards what `has_work` reads. So work that is added under the lock, before `start`, is
    never missed by a thread that is just ending.
    """

    def __init__(
        self,
        name: str,
        lock: AbstractContextManager[object],
        has_work: Callable[[], bool],
        step: Callable[[], None],
    ) -> None:
        self._name = name
        self._lock = lock
        self._has_work = has_work
        self._step = step
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread unless it runs. The caller holds the lock."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended; false if it runs on."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return self._thread is None

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._has_work():
                    self._thread = None
                    return
            try:
                self._step()
            except Exception:
                log.exception("a background task failed", task=self._name)
                time.sleep(_RETRY)
