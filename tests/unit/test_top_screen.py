"""`freeflow top` on a terminal: the real command in a pseudo-terminal, on the real admin API."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dataplane.errors import RouterAway
from plugin.admin import create_admin
from plugin.traffic_names import TrafficReport
from tests.unit.sockets import served
from tests.unit.statuses import TRAFFIC, admin_answers

TOP = Path(__file__).parents[2]
LONG = 30.0
"""Seconds until a test fails; the command needs one or two."""
_PART = re.compile(
    r"\x1b\[([?\d;]*)([A-Za-z@`])|\x1b[()].|\x1b[=>78HM]|\x1bc|[\x00-\x1f]|[^\x00-\x1f\x1b]+"
)


class Plugin:
    """A plugin whose connections carry 1 MiB and 100 messages between two reports, 1 s apart."""

    def __init__(self) -> None:
        self.asked = 0
        self.away = False
        self.service = "web"

    def traffic(self) -> TrafficReport:
        if self.away:
            raise RouterAway("the router doesn't answer", cause="no such file", remedy="wait")
        self.asked += 1
        read = 1000.0 + self.asked
        return msgspec.structs.replace(
            TRAFFIC,
            read=read,
            router_cpu=self.asked / 10,
            relay_cpu=None,
            connections=tuple(self._grown(each, read) for each in TRAFFIC.connections),
        )

    def _grown(self, each: Any, read: float) -> Any:
        ring = each.ring and msgspec.structs.replace(
            each.ring, bytes_in=self.asked << 20, messages_in=self.asked * 100
        )
        return msgspec.structs.replace(each, read=read, ring=ring, service=self.service)


class Screen:
    """A terminal of 24 lines and 140 columns with a program on it. It understands what curses
    writes for TERM=vt100 and more, and fails on what it doesn't know.
    """

    def __init__(self, *command: str, term: str, locale: str) -> None:
        self.rows, self.columns = 24, 140
        self.master, slave = pty.openpty()
        self.resize(self.rows, self.columns)
        environment = {**os.environ, "TERM": term, "LC_ALL": locale}
        # Whoever starts tests in the background would leave it deaf to Ctrl-C.
        self.program = subprocess.Popen(
            ("setsid", "--ctty", "env", "--default-signal=INT", *command),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=TOP,
        )
        os.close(slave)
        self.cells = [[" "] * self.columns for _ in range(self.rows)]
        self.row = self.column = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._left = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def text(self) -> str:
        return "\n".join("".join(line).rstrip() for line in self.cells)

    def see(self, *wanted: str) -> str:
        """Wait until all of these are on the screen."""
        end = time.monotonic() + LONG
        while not all(each in self.text() for each in wanted):
            assert time.monotonic() < end, f"{wanted} in\n{self.text()}"
            self._read(0.1)
        return self._whole()

    def unsee(self, unwanted: str) -> str:
        """Wait until this is not on the screen any more."""
        end = time.monotonic() + LONG
        while unwanted in self.text():
            assert time.monotonic() < end, self.text()
            self._read(0.1)
        return self._whole()

    def _whole(self) -> str:
        """The screen, once all has come that was written together."""
        while self._read(0.05):
            pass
        return self.text()

    def ended(self) -> int:
        """The exit code, once the program has ended."""
        end = time.monotonic() + LONG
        while self.program.poll() is None:
            assert time.monotonic() < end, self.text()
            self._read(0.05)
        return self.program.returncode

    def _read(self, seconds: float) -> bool:
        """Draw what comes in so many seconds; false if nothing does."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:
            # EIO: nobody has the other end any more.
            time.sleep(0.01)
            return False
        self._draw(self._left + self._decoder.decode(data))
        return True

    def _draw(self, text: str) -> None:
        at = 0
        while found := _PART.match(text, at):
            at = found.end()
            if found[2]:
                self._control(found[1], found[2])
            elif found[0] == "\r":
                self.column = 0
            elif found[0] == "\n":
                self.row = min(self.row + 1, self.rows - 1)
            elif found[0] == "\b":
                self.column = max(0, self.column - 1)
            elif found[0] == "\x1bM":
                self.row = max(0, self.row - 1)
            elif found[0] >= " ":
                for character in found[0]:
                    self.cells[self.row][min(self.column, self.columns - 1)] = character
                    self.column += 1
        self._left = text[at:]
        assert len(self._left) < 16, repr(self._left)

    def _control(self, text: str, kind: str) -> None:
        numbers = [int(each) if each.isdigit() else 0 for each in text.split(";")]
        count = max(1, numbers[0])
        line = self.cells[self.row]
        match kind:
            case "H":
                self.row = min(count, self.rows) - 1
                self.column = max(1, numbers[1] if len(numbers) > 1 else 1) - 1
            case "A" | "B":
                self.row = min(max(0, self.row + (count if kind == "B" else -count)), self.rows - 1)
            case "C" | "D":
                self.column = max(0, self.column + (count if kind == "C" else -count))
            case "K":
                first, last = (0, self.column + 1) if numbers[0] == 1 else (self.column, len(line))
                line[first:last] = [" "] * (last - first)
            case "J":
                line[self.column :] = [" "] * (self.columns - self.column)
                for below in range(self.row + 1, self.rows):
                    self.cells[below] = [" "] * self.columns
            case "d":
                self.row = min(count, self.rows) - 1
            case "G":
                self.column = count - 1
            case "X":
                line[self.column : self.column + count] = [" "] * count
            case "b":
                line[self.column : self.column + count] = line[self.column - 1] * count
                self.column += count
            case "m" | "h" | "l" | "r" | "t":
                pass
            case _:
                raise AssertionError(f"ESC [ {text} {kind}")


@pytest.fixture
def plugin() -> Plugin:
    return Plugin()


@contextlib.contextmanager
def top(
    plugin: Plugin, directory: Path, *options: str, term: str = "vt100", locale: str = "C.UTF-8"
) -> Iterator[Screen]:
    """The command on a terminal."""
    app = create_admin(admin_answers(traffic=plugin.traffic))
    with served(app, directory / "admin.sock") as path:
        command = (sys.executable, "-m", "plugin.cli", "--socket", str(path), "top", *options)
        screen = Screen(*command, term=term, locale=locale)
        try:
            yield screen
        finally:
            screen.program.kill()
            screen.program.wait()
            os.close(screen.master)


def test_live(plugin: Plugin, tmp_path: Path) -> None:
    """Rates appear with the second report, keys work, and `q` leaves the terminal as it was."""
    with top(plugin, tmp_path, "-i", "0.2") as screen:
        before = termios.tcgetattr(screen.master)
        text = screen.see("1.0 MiB", "db.1.def on host1", "router 10.0 %", "by connection")
        lines = text.splitlines()
        assert lines[3].startswith("web.1.abc  10.0.4.7:4000")
        assert "  100  " in lines[3]
        assert lines[4].split()[-1] == "remote"
        assert lines[23].startswith("q quit")
        screen.press("b")
        screen.see("by container", "ENDS", "1 overlay, 1 shm")
        screen.press("s")
        screen.see("sorted by in")
        screen.press("r")
        screen.see("reversed")
        screen.press("bbb")
        assert screen.see("by path", "PATH").splitlines()[3].split()[0] == "overlay"
        screen.press("r")
        assert screen.unsee("reversed").splitlines()[3].split()[0] == "shm"
        screen.press("+")
        screen.see("every 0.4 s")
        screen.press("q")
        assert screen.ended() == 0
        assert termios.tcgetattr(screen.master)[3] & termios.ECHO == before[3] & termios.ECHO


def test_filter(plugin: Plugin, tmp_path: Path) -> None:
    """A filter works while it is typed; Enter keeps it, Escape brings back the one before."""
    with top(plugin, tmp_path, "-i", "0.2") as screen:
        screen.see("10.0.4.8:80", "10.0.9.9:80")
        screen.press("/shmq")
        screen.see("filter: shmq_")
        screen.unsee("10.0.4.8:80")
        screen.press("\x7f")
        screen.see("10.0.4.8:80")
        assert "10.0.9.9:80" not in screen.text()
        screen.press("\r")
        screen.see("filter shm", "q quit")
        screen.press("/\x7f\x7f\x7foverlay")
        screen.see("10.0.9.9:80")
        screen.press("\x1b")
        screen.see("filter shm", "10.0.4.8:80", "q quit")
        assert screen.program.poll() is None


def test_pause(plugin: Plugin, tmp_path: Path) -> None:
    """While it is paused nothing is asked; keys work; it goes on afterwards."""
    with top(plugin, tmp_path, "-i", "0.2") as screen:
        screen.see("1.0 MiB")
        screen.press("p")
        screen.see("PAUSED")
        time.sleep(0.5)
        asked = plugin.asked
        screen.press("b")
        screen.see("by container", "1.0 MiB")
        time.sleep(0.5)
        assert plugin.asked == asked
        screen.press("p")
        screen.unsee("PAUSED")
        end = time.monotonic() + LONG
        while plugin.asked < asked + 2:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_a_router_that_is_away(plugin: Plugin, tmp_path: Path) -> None:
    """An error is shown in place of the first line; the rest stays, and it goes on by itself."""
    with top(plugin, tmp_path, "-i", "0.2") as screen:
        screen.see("1.0 MiB")
        plugin.away = True
        assert "1.0 MiB" in screen.see("freeflow: the router doesn't answer")
        plugin.away = False
        screen.see("2 ends of connections")


def test_a_small_window(plugin: Plugin, tmp_path: Path) -> None:
    """What does not fit is cut off, also when the window shrinks to almost nothing; scrolling stops
    at the ends.
    """
    with top(plugin, tmp_path, "-i", "0.2") as screen:
        screen.see("1.0 MiB")
        for rows, columns in ((5, 40), (2, 3), (1, 1), (24, 140)):
            screen.resize(rows, columns)
            os.kill(screen.program.pid, signal.SIGWINCH)
            screen.press("\x1b[B\x1b[B\x1b[6~jk")
            time.sleep(0.3)
            assert screen.program.poll() is None, screen.text()
        screen.press("\x0c")
        screen.see("1.0 MiB", "q quit")


@pytest.mark.parametrize("term", ["vt100", "xterm-256color", "nobody-knows-this"])
def test_terminals(plugin: Plugin, tmp_path: Path, term: str) -> None:
    """Any terminal shows it, also one that the plugin's image has no description of; Ctrl-C ends
    it.
    """
    with top(plugin, tmp_path, "-i", "0.2", "--by", "service", term=term) as screen:
        screen.see("by service", "1 overlay, 1 shm")
        screen.press("\x03")
        assert screen.ended() == 0


@pytest.mark.parametrize("locale", ["C", "xx_YY.UTF-8"])
def test_locales(plugin: Plugin, tmp_path: Path, locale: str) -> None:
    """A locale that the plugin's image lacks is no error, and one without Unicode shows `?`."""
    plugin.service = "wéb"
    with top(plugin, tmp_path, "-i", "0.2", "--by", "service", locale=locale) as screen:
        screen.see("w?b" if locale == "C" else "wéb", "1 overlay, 1 shm")
