"""Looks every second at what may have changed under the overlay: see `LinuxKernel.keep`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import structlog

log = structlog.get_logger()

EVERY: Final = 1.0
"""Seconds."""


class Keeper:
    """The thread that does."""

    def __init__(self, keep: Callable[[], None], every: float = EVERY) -> None:
        self._keep = keep
        self._every = every
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        failing = False
        while not self._stopped.wait(self._every):
            try:
                self._keep()
                failing = False
            except Exception:
                # Whatever one look meets, the next starts from facts again; it is said once.
                if not failing:
                    log.exception("keeping the overlay failed")
                failing = True
