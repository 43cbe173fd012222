"""Ctrl-C and its like during a run: the first one ends the run, all of them are noted.

A signal raises an exception in whatever the main thread does just then. In a finalizer the
exception would be lost, and in a removal it would leave things behind. So only the first signal
raises it, the note decides the outcome, and none raises it once removal has begun.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from driver.errors import FreeFlowError

REASON: Final = "it was interrupted"
REMEDY: Final = "run it again"


class Interrupted(FreeFlowError):
    """A signal came before there was anything to report."""

    def __init__(self) -> None:
        super().__init__(REASON, remedy=REMEDY)


class Interruption:
    """A context manager: SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt in it, once.

    Leaving it by that exception raises `Interrupted` in its place.

    A shell starts what runs in the background with SIGINT ignored. Whoever sends it to this command
    means it, so it counts. SIGHUP stays ignored if it was: that is `nohup`.
    """

    def __init__(self) -> None:
        self.came = False
        self._say: Callable[[], None] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before = signal.getsignal(each)
            if each is signal.SIGHUP and before is signal.SIG_IGN:
                continue
            self._before[each] = before
            signal.signal(each, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            # None: it was not set by Python.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted from None

    def hold(self, say: Callable[[], None]) -> None:
        """From now on signals are only noted, and answered by `say`."""
        self._say = say

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came whose exception was lost."""
        if self.came:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        first, self.came = not self.came, True
        if self._say is not None:
            # The signal may have come while this thread was writing, which can't be nested.
            with contextlib.suppress(RuntimeError):
                self._say()
        elif first:
            raise KeyboardInterrupt
