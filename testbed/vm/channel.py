"""The test's end of a guest's agent: sends commands and receives their output, many at once.

The other end is `agent.py`.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from testbed.patience import patience
from testbed.process import CommandError
from testbed.vm.agent import (
    END_OF_INPUT,
    ERRORS,
    EXIT,
    HEADER,
    HELLO,
    INPUT,
    KILL,
    OUTPUT,
    START,
)

_FRAME: Final = 1 << 16


class GuestGoneError(Exception):
    """The guest is switched off, or its kernel has died."""


class Process:
    """A program in a guest. It has its own session, and signals go to the whole session."""

    def __init__(self, channel: Channel, number: int, command: Sequence[str]) -> None:
        self.command = list(command)
        self._channel = channel
        self._number = number
        self._output = {OUTPUT: bytearray(), ERRORS: bytearray()}
        self._code: int | None = None

    @property
    def output(self) -> str:
        """Its standard output so far."""
        return self._output[OUTPUT].decode(errors="replace")

    @property
    def errors(self) -> str:
        """Its standard error so far."""
        return self._output[ERRORS].decode(errors="replace")

    @property
    def raw(self) -> bytes:
        """Its standard output so far, as bytes."""
        return bytes(self._output[OUTPUT])

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._code

    def wait(self, timeout: float = 60) -> int:
        """Wait for its end and return its exit code. Raises TimeoutError, or GuestGoneError."""
        self._channel.wait(self._says("end"), lambda: self._code is not None, timeout)
        assert self._code is not None
        return self._code

    def check(self, timeout: float = 60) -> str:
        """Wait for its end and return its standard output. Raises CommandError if it failed."""
        if self.wait(timeout) != 0:
            raise CommandError(self.command, self._code or -1, self.output + self.errors)
        return self.output

    def wait_for(self, pattern: str, timeout: float = 60) -> re.Match[str]:
        """Wait until its output matches. Raises TimeoutError, or CommandError if it ends before."""

        def matched() -> re.Match[str] | None:
            ended = self._code is not None
            match = re.search(pattern, self.output + self.errors)
            if match is None and ended:
                raise CommandError(self.command, self._code or 0, self.output + self.errors)
            return match

        match = self._channel.wait(self._says(f"write {pattern!r}"), matched, timeout)
        assert match is not None
        return match

    def write(self, data: bytes) -> None:
        """Send it input; it must have been started with `stdin=True`."""
        for start in range(0, len(data), _FRAME):
            self._channel.send(INPUT, self._number, data[start : start + _FRAME])

    def close_input(self) -> None:
        self._channel.send(END_OF_INPUT, self._number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to it and its children; it is no error if they have ended."""
        self._channel.send(KILL, self._number, json.dumps(int(number)).encode())

    def take(self, kind: int, content: bytes) -> None:
        """Handle a frame from the guest about this program."""
        if kind == EXIT:
            self._code = json.loads(content)
        else:
            self._output[kind] += content

    def _says(self, what: str) -> Callable[[], str]:
        return lambda: (
            f"`{' '.join(self.command)}` to {what}; so far: {(self.output + self.errors)[-2000:]!r}"
        )


class Channel:
    """One guest's programs. `why_gone` explains the end of a guest, for errors."""

    def __init__(self, end: socket.socket, why_gone: Callable[[], str]) -> None:
        self._socket = end
        self._why_gone = why_gone
        self._numbers = itertools.count(1)
        self._programs: dict[int, Process] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._release = ""
        self._gone = False
        self._reader = threading.Thread(target=self._read, name="guest", daemon=True)
        self._reader.start()

    def hello(self, timeout: float) -> str:
        """Wait until the agent answers; return the kernel's release."""
        self.wait(lambda: "the agent's first message", lambda: bool(self._release), timeout)
        return self._release

    def start(
        self, command: Sequence[str], env: Mapping[str, str] | None, cwd: str | None, stdin: bool
    ) -> Process:
        number = next(self._numbers)
        program = Process(self, number, command)
        self._programs[number] = program
        start = {"command": program.command, "env": dict(env or {}), "cwd": cwd, "stdin": stdin}
        self.send(START, number, json.dumps(start).encode())
        return program

    def send(self, kind: int, number: int, content: bytes = b"") -> None:
        try:
            with self._sending:
                self._socket.sendall(HEADER.pack(kind, number, len(content)) + content)
        except OSError as error:
            raise GuestGoneError(self._why_gone()) from error

    def wait(
        self,
        what: Callable[[], str],
        condition: Callable[[], bool | re.Match[str] | None],
        timeout: float,
    ) -> re.Match[str] | None:
        """Wait until a condition holds; check it whenever a frame arrives from the guest."""
        timeout = patience(timeout)
        until = time.monotonic() + timeout
        with self._changed:
            while not (value := condition()):
                if self._gone:
                    raise GuestGoneError(f"waited for {what()}; {self._why_gone()}")
                if not self._changed.wait(until - time.monotonic()) and not condition():
                    raise TimeoutError(f"waited {timeout:g} s for {what()}")
        return value if isinstance(value, re.Match) else None

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The guest has closed it before.
        self._reader.join()
        self._socket.close()

    def _read(self) -> None:
        received = bytearray()
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError:
                data = b""
            received += data
            with self._changed:
                while len(received) >= HEADER.size:
                    kind, number, length = HEADER.unpack_from(received)
                    if len(received) < HEADER.size + length:
                        break
                    content = bytes(received[HEADER.size : HEADER.size + length])
                    del received[: HEADER.size + length]
                    if kind == HELLO:
                        self._release = content.decode()
                    else:
                        self._programs[number].take(kind, content)
                self._gone = self._gone or not data
                self._changed.notify_all()
            if not data:
                return
