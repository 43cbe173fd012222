"""The sync loop's wake-up: by another thread, or by a change of the mount table.

A container's namespace becomes usable when Docker mounts it, just before the container's first
program runs. Mounts cause no inotify event, but /proc/self/mountinfo can be polled for changes of
the mount table (proc(5)).
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Final

_MOUNTS: Final = Path("/proc/self/mountinfo")


class Wakeup:
    """`wake` may be called from any thread, `wait` from one thread only."""

    def __init__(self, mounts: Path = _MOUNTS) -> None:
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._mounts = os.open(mounts, os.O_RDONLY | os.O_CLOEXEC)

    def wake(self) -> None:
        """Wake the waiting thread, now or at its next `wait`."""
        os.eventfd_write(self._event, 1)

    def wait(self, seconds: float, *, mounts: bool = False) -> None:
        """Sleep until woken, or for some seconds; with `mounts` also until the mount table
        changes."""
        poll = select.poll()
        poll.register(self._event, select.POLLIN)
        if mounts:
            poll.register(self._mounts, select.POLLPRI)
        for descriptor, _ in poll.poll(max(0.0, seconds) * 1000):
            if descriptor == self._event:
                os.eventfd_read(self._event)
