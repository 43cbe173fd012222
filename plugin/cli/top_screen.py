"""The screen of `freeflow top`: draws the newest report, and obeys keys at once.

A thread fetches the reports, so that keys work while the plugin is slow. Everything that is drawn
went through `terminal.shown_all`.
"""

from __future__ import annotations

import contextlib
import curses
import locale
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from driver.errors import FreeFlowError
from plugin.cli.table import draws
from plugin.cli.terminal import shown
from plugin.cli.top import BY, SORTS, Top, TopReport, head, show
from plugin.traffic_names import TrafficReport

SHORTEST: Final = 0.2
LONGEST: Final = 60.0
"""Seconds between two reports."""
_LOOK: Final = 100
"""Milliseconds for which a key is awaited."""
_ESCAPE: Final = 27
_REDRAW: Final = 12
"""Ctrl-L."""
_PLAIN: Final = "vt100"
"""A terminal that the plugin's image describes, whatever the host's is called."""
HELP: Final = (
    "q quit  p pause  b group  s sort  r reverse  / filter  + - interval  arrows, page keys: scroll"
)


@dataclass(slots=True)
class Fetcher:
    """Fetches a report each interval. The thread ends with the program."""

    fetch: Callable[[], TrafficReport]
    interval: float
    paused: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _newest: TrafficReport | FreeFlowError | None = None

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name="fetcher", daemon=True).start()

    def take(self) -> TrafficReport | FreeFlowError | None:
        """What has come since the last call."""
        with self._lock:
            newest, self._newest = self._newest, None
        return newest

    def _run(self) -> None:
        while True:
            began = time.monotonic()
            if not self.paused:
                found: TrafficReport | FreeFlowError
                try:
                    found = self.fetch()
                except FreeFlowError as error:
                    found = error
                except Exception as error:
                    # Without this thread the screen would stand still and say nothing.
                    found = FreeFlowError(f"{type(error).__name__}: {error}")
                with self._lock:
                    self._newest = found
            # In short steps: the interval may change meanwhile.
            while (left := began + self.interval - time.monotonic()) > 0:
                time.sleep(min(left, SHORTEST))


@dataclass(slots=True)
class TopScreen:
    """What the user sees and has chosen."""

    top: Top
    fetcher: Fetcher
    error: str = ""
    offset: int = 0
    typing: str | None = None
    """The filter, while it is typed."""
    before: str = ""
    """The filter before that."""

    def run(self) -> None:
        """Until the user quits. Raises FreeFlowError if the terminal can't be used."""
        for name in ("", "C.UTF-8"):
            # The plugin's image lacks most of the locales that a user may have.
            with contextlib.suppress(locale.Error):
                locale.setlocale(locale.LC_CTYPE, name)
                break
        os.environ.setdefault("ESCDELAY", "25")
        try:
            curses.setupterm()
        except curses.error:
            os.environ["TERM"] = _PLAIN
        self.fetcher.start()
        try:
            curses.wrapper(self._loop)
        except KeyboardInterrupt:
            return
        except curses.error as error:
            raise FreeFlowError(
                "the terminal can't be used", cause=str(error), remedy="freeflow top --once"
            ) from error

    def _loop(self, window: curses.window) -> None:
        # Some terminals can't hide it.
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
        window.timeout(_LOOK)
        self.draw(window)
        while True:
            newest = self.fetcher.take()
            if isinstance(newest, FreeFlowError):
                self.error = shown(newest.reason)
            elif newest is not None:
                self.error = ""
                self.top.add(newest)
            key = window.getch()
            if key >= 0:
                if not self.press(key, window.getmaxyx()[0]):
                    return
                if key == _REDRAW:
                    window.clearok(True)
            if key >= 0 or newest is not None:
                self.draw(window)

    def press(self, key: int, height: int) -> bool:
        """A key was pressed. False: the user quits."""
        if self.typing is not None:
            self._type(key)
        elif key in (ord("q"), ord("Q")):
            return False
        else:
            self._command(key, max(1, height - 4))
        return True

    def _type(self, key: int) -> None:
        assert self.typing is not None
        if key in (curses.KEY_ENTER, ord("\n"), ord("\r")):
            self.typing = None
            return
        if key == _ESCAPE:
            self.top.view.filter, self.typing = self.before, None
            return
        if key in (curses.KEY_BACKSPACE, 127, 8):
            self.typing = self.typing[:-1]
        elif 32 <= key < 127:
            self.typing += chr(key)
        self.top.view.filter = self.typing

    def _command(self, key: int, page: int) -> None:
        view = self.top.view
        moves = {
            curses.KEY_DOWN: 1,
            curses.KEY_UP: -1,
            curses.KEY_NPAGE: page,
            curses.KEY_PPAGE: -page,
            curses.KEY_HOME: -self.offset,
        }
        match key:
            case _ if key in moves:
                self.offset = max(0, self.offset + moves[key])
            case 0x70 | 0x20:  # p, blank
                self.fetcher.paused = not self.fetcher.paused
            case 0x62:  # b
                view.by, self.offset = _next(BY, view.by), 0
            case 0x73:  # s
                view.sort = _next(SORTS, view.sort)
            case 0x72:  # r
                view.reverse = not view.reverse
            case 0x2F:  # /
                self.before = self.typing = view.filter
            case 0x2B:  # +
                self.fetcher.interval = min(LONGEST, self.fetcher.interval * 2)
            case 0x2D:  # -
                self.fetcher.interval = max(SHORTEST, self.fetcher.interval / 2)

    def draw(self, window: curses.window) -> None:
        """Draw everything; what does not fit is cut off."""
        height, width = window.getmaxyx()
        report = self.top.report()
        window.erase()
        _put(window, 0, self._title(report), width, curses.A_BOLD)
        _put(window, 1, self._state(), width)
        page = max(0, height - 4)
        plain = not draws(locale.nl_langinfo(locale.CODESET))
        text = [] if report is None else show(report, plain=plain).splitlines()
        body = text[1:]
        self.offset = max(0, min(self.offset, len(body) - page))
        if text:
            _put(window, 2, text[0], width, curses.A_REVERSE)
        for at, line in enumerate(body[self.offset : self.offset + page], 3):
            _put(window, at, line, width)
        _put(window, height - 1, self._foot(), width)
        window.refresh()

    def _title(self, report: TopReport | None) -> str:
        if self.error:
            return f"freeflow: {self.error}"
        return "freeflow: waiting for the router" if report is None else head(report)

    def _state(self) -> str:
        view = self.top.view
        order = f"{view.sort}, reversed" if view.reverse else view.sort
        parts = [f"by {view.by}", f"sorted by {order}", f"every {self.fetcher.interval:g} s"]
        if view.filter and self.typing is None:
            parts.append(f"filter {view.filter}")
        return ", ".join([*parts, "PAUSED"] if self.fetcher.paused else parts)

    def _foot(self) -> str:
        return HELP if self.typing is None else f"filter: {self.typing}_"


def _next(among: tuple[str, ...], present: str) -> str:
    return among[(among.index(present) + 1) % len(among)]


def _put(window: curses.window, row: int, text: str, width: int, style: int = 0) -> None:
    """A line of the screen, if it has one so far down."""
    # What the terminal lacks becomes `?`; curses would write bytes of another encoding.
    encoding = locale.nl_langinfo(locale.CODESET)
    # The last column stays empty: a character in the last corner would scroll.
    fits = text[: max(0, width - 1)].encode(encoding, "replace").decode(encoding)
    # The window may be smaller by now.
    with contextlib.suppress(curses.error):
        window.addstr(row, 0, fits, style)
