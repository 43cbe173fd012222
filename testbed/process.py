"""Runs commands and waits for conditions, with errors that name the command or the condition."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from testbed.patience import patience, within

T = TypeVar("T")

LEAST: Final = 60.0
"""`wait_until` waits at least so many seconds: only a failing test waits so long, and a machine may
stand still for some seconds whatever its load."""


class CommandError(Exception):
    """A command failed; the message has its exit code and the end of its output."""

    def __init__(self, command: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{' '.join(command)}: exit code {code}\n{output[-4000:]}")
        self.code = code
        self.output = output


class BedInUseError(Exception):
    """Another process uses the hosts of the same bed."""


def run(
    command: Sequence[str],
    *,
    timeout: float | None = 120,
    check: bool = True,
    stdin: str | None = None,
) -> str:
    """Run a command and return its standard output.

    Raises:
        CommandError: it failed (with `check`), or took longer than `timeout` seconds, which are
            those of a quiet machine.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=None if timeout is None else patience(timeout),
            input=stdin if stdin is not None else "",
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(command, -1, f"not done in {error.timeout:g} s") from error
    if check and done.returncode != 0:
        raise CommandError(command, done.returncode, done.stdout + done.stderr)
    return done.stdout


def wait_until(what: str, condition: Callable[[], T], timeout: float = 30, pause: float = 0.1) -> T:
    """Call `condition` until it returns something true, and return that.

    Raises:
        TimeoutError: after `timeout` seconds of a quiet machine, and never before `LEAST`; it names
        `what` and the last failure.
    """
    begin = time.monotonic()
    last: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            last = value
        except (CommandError, OSError) as error:
            last = error
        waited = time.monotonic() - begin
        # The machine may have become busy since the beginning.
        if waited > LEAST and waited > patience(timeout):
            raise TimeoutError(f"{what}: not within {waited:.0f} s; last: {last}")
        time.sleep(pause)


def promised(what: str, condition: Callable[[], T], seconds: float, pause: float = 0.1) -> T:
    """As `wait_until`, for what is promised within `seconds` of a quiet machine: whatever is asked
    later than that must be true.

    Raises:
        TimeoutError: it was not; it names `what` and the last answer.
    """
    begin = time.monotonic()
    while True:
        asked = time.monotonic() - begin
        value = condition()
        if value:
            return value
        if asked > within(seconds):
            raise TimeoutError(f"{what}: not after {asked:.1f} s; last: {value}")
        time.sleep(pause)
