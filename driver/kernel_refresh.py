"""Looks, second by second, at what may have changed under the overlay, and now and then into containers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

import structlog

log = structlog.get_logger()

EVERY: Final = 1.0
"""Seconds."""
INSIDE_EVERY: Final = 10.0


class RefreshedKernel(Protocol):
    """See `driver.kernel.linux.LinuxKernel`."""

    def keep(self) -> None: ...

    def check_forwarding(self, endpoint_id: str, sandbox: Path) -> None: ...


class KernelRefresh:
    """The thread that does. `sandboxes`: endpoints' IDs, and where their namespaces are. `clock` in seconds."""

    def __init__(
        self,
        kernel: RefreshedKernel,
        sandboxes: Callable[[], Iterable[tuple[str, Path]]],
        clock: Callable[[], float] = time.monotonic,
        every: float = EVERY,
    ) -> None:
        self._kernel = kernel
        self._sandboxes = sandboxes
        self._clock = clock
        self._every = every
        self._looked = float("-inf")
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="kernel-refresh", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def once(self) -> None:
        """One look."""
        self._kernel.keep()
        now = self._clock()
        if now - self._looked >= INSIDE_EVERY:
            self._looked = now
            for endpoint_id, sandbox in self._sandboxes():
                self._kernel.check_forwarding(endpoint_id, sandbox)

    def _run(self) -> None:
        failing = False
        while not self._stopped.wait(self._every):
            try:
                self.once()
                failing = False
            except Exception:
                # Whatever one look meets, the next starts from facts again; it is said once.
                if not failing:
                    log.exception("keeping the overlay failed")
                failing = True
