"""Refreshes the kernel's part of the driver each second, and checks containers now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Protocol

from driver.worker import Worker

EVERY: Final = 1.0
"""Seconds."""
FORWARDING_EVERY: Final = 10.0


class RefreshedKernel(Protocol):
    """Implemented by `driver.kernel.linux.LinuxKernel`."""

    def refresh(self) -> None: ...

    def check_forwarding(self, endpoint_id: str, sandbox: Path) -> None: ...


class KernelRefresh:
    """The thread. `sandboxes`: endpoint IDs with the paths of their namespaces; `clock` in
    seconds."""

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
        self._checked = float("-inf")
        self._worker = Worker("kernel-refresh", self.once, retry=every)

    def start(self) -> None:
        self._worker.start(after=self._every)

    def stop(self) -> None:
        self._worker.stop()

    def once(self) -> float:
        """Refresh once; returns the seconds until the next refresh."""
        self._kernel.refresh()
        now = self._clock()
        if now - self._checked >= FORWARDING_EVERY:
            self._checked = now
            for endpoint_id, sandbox in self._sandboxes():
                self._kernel.check_forwarding(endpoint_id, sandbox)
        return self._every
