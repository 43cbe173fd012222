"""The relay's process: started when there is a device, spoken to without waiting, started again when it dies.

It is a child that believes us and whom we don't follow into its grave: what it says wrong, or its silence at the end, ends
it, and `died` says so once nothing of it runs any more: only then nothing writes into the rings that it had.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import select
import signal
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import structlog

from dataplane.errors import WrongMessage
from dataplane.router import relay_wire as wire
from dataplane.router.loop import Loop, Timer

log = structlog.get_logger()

LEAST_PAUSE: Final = 0.5
MOST_PAUSE: Final = 30.0
"""Seconds between two starts, doubled each time as long as none lasts."""
LASTS: Final = 30.0
PATIENCE: Final = 20
"""Questions without an answer, after which it is taken for stuck. The router asks about once a second."""
_AT_ONCE: Final = 64
_BUFFER: Final = 1 << 20
_ABOVE: Final = 10
"""Descriptors of ours that a child's are made from, clear of its own."""
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE: Final = int(socket.MSG_DONTWAIT)

SHIPPED: Final = Path("/usr/lib/freeflow/freeflow-relay")
"""Where `plugin/image` puts it."""


class Owner(Protocol):
    """Who hears of it."""

    def relay_said(self, message: wire.Message) -> None:
        """A message has come."""

    def relay_started(self) -> None:
        """It runs, and has been told which device to open."""

    def relay_died(self) -> None:
        """It has ended, with all that it had."""


class RelayProcess:
    """Keeps one running while one is wanted."""

    def __init__(
        self, loop: Loop, program: Path, owner: Owner, environment: Mapping[str, str] | None = None
    ) -> None:
        self._loop = loop
        self._program = program
        self._owner = owner
        self._environment = dict(os.environ if environment is None else environment)
        self._wanted: wire.Open | None = None
        self._opened: wire.Open | None = None
        self._socket: socket.socket | None = None
        self._pid = 0
        self._pidfd = -1
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._pause = LEAST_PAUSE
        self._began = 0.0
        self._unanswered = 0
        self._timer: Timer | None = None
        self.starts = 0
        self.why = ""
        """Why none runs, if one should."""

    @property
    def pid(self) -> int | None:
        """Of the one that runs."""
        return self._pid or None

    @property
    def opened(self) -> wire.Open | None:
        """What the one that runs was told to open."""
        return self._opened

    def want(self, device: wire.Open) -> None:
        """Run, and have this device open. One that runs is to have no links: it closes what it had open."""
        self._wanted = device
        if self._pid:
            self._opened = device
            self.say(device)
        elif self._timer is None:
            self._start()

    def say(self, message: wire.Message, descriptors: Sequence[int] = ()) -> None:
        """Send now or as soon as it takes it; to nobody if none runs. Descriptors stay the caller's."""
        if self._socket is None:
            return
        data = wire.pack(message)
        if not self._unsent and self._send(data, descriptors):
            return
        if self._socket is None:
            return
        kept = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for each in descriptors]
        self._unsent.append((data, kept))
        self._loop.modify(self._socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def ask(self) -> None:
        """Ask what it has counted. One that is stopped or stuck is ended: its connections hang, and then are reset.

        Questions are counted, not seconds: a host that slept has not asked.
        """
        if not self._pid:
            return
        if self._unanswered < PATIENCE:
            self._unanswered += 1
            self.say(wire.Number(wire.RelayKind.COUNT))
        elif self._socket is not None:
            log.error("the relay doesn't answer; it is ended", pid=self._pid, questions=PATIENCE)
            self._end()

    def close(self) -> None:
        """The router ends: the relay sees the end of its socket, and finishes by itself what can be finished."""
        self._wanted = None
        self._cancel()
        self._hang_up()
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._pid = 0

    # --- its life

    def _start(self) -> None:
        self._cancel()
        wanted = self._wanted
        if wanted is None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (ours, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                each.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        moved = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
        theirs.close()
        try:
            pid = os.posix_spawn(
                self._program,
                [self._program.name],
                self._environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, moved, wire.RELAY_SOCKET),
                ],
                # Who kills us and all of our group is not to take it along: it has connections to bring back to TCP.
                setsid=True,
            )
        except OSError as error:
            ours.close()
            self.why = f"{self._program} can't be started: {error.strerror}"
            log.error("the relay can't be started", reason=self.why)
            self._later()
            return
        finally:
            os.close(moved)
        self._pid, self._socket, self._opened = pid, ours, wanted
        self._pidfd = os.pidfd_open(pid)
        self._began = self._loop.now()
        self._unanswered = 0
        self.starts += 1
        self.why = ""
        self._loop.watch(ours.fileno(), select.EPOLLIN, self._serve)
        self._loop.watch(self._pidfd, select.EPOLLIN, lambda _: self._buried())
        self.say(wanted)
        self._owner.relay_started()

    def _end(self) -> None:
        """End it, and hear of its death from the kernel."""
        self._hang_up()
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _hang_up(self) -> None:
        ended, self._socket = self._socket, None
        if ended is not None:
            self._loop.forget(ended.fileno())
            ended.close()
        for _, descriptors in self._unsent:
            _close(descriptors)
        self._unsent.clear()

    def _buried(self) -> None:
        """It has ended. Its last words may not have been read."""
        while self._socket is not None and self._receive():
            pass
        self._hang_up()
        _, status = os.waitpid(self._pid, 0)
        self._loop.forget(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._pid = 0
        self._opened = None
        code = os.waitstatus_to_exitcode(status)
        if self._wanted is not None:
            self.why = f"the relay ended with code {code}; it is started again"
            log.error("the relay ended; it is started again", code=code, seconds=self._pause)
            self._later()
        self._owner.relay_died()

    def _later(self) -> None:
        lasted = self._loop.now() - self._began > LASTS and self._began > 0
        self._pause = LEAST_PAUSE if lasted else self._pause
        self._timer = self._loop.after(self._pause, self._start)
        self._pause = min(self._pause * 2, MOST_PAUSE)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- messages

    def _serve(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush()
        for _ in range(_AT_ONCE):
            if self._socket is None or not self._receive():
                return

    def _receive(self) -> bool:
        """Take one message; false if there is none."""
        assert self._socket is not None
        try:
            data = self._socket.recv(wire.MAX_MESSAGE + 1, _RECEIVE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            # It has ended or is about to; without its socket it is of no use.
            self._end()
            return False
        try:
            message = wire.unpack(data)
        except WrongMessage as error:
            log.error("the relay said what is no message", reason=str(error))
            self._end()
            return False
        self._unanswered = 0
        try:
            self._owner.relay_said(message)
        except Exception:
            # A bug of ours; the loop goes on.
            log.exception("a bug in the router", message=type(message).__name__)
        return True

    def _send(self, data: bytes, descriptors: Sequence[int]) -> bool:
        assert self._socket is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._socket.sendmsg([data], rights if descriptors else [], _SEND)
        except BlockingIOError:
            return False
        except OSError:
            # Its end is seen by the next read.
            return True
        return True

    def _flush(self) -> None:
        while self._unsent and self._socket is not None:
            data, descriptors = self._unsent[0]
            if not self._send(data, descriptors):
                return
            self._unsent.popleft()
            _close(descriptors)
        if self._socket is not None:
            self._loop.modify(self._socket.fileno(), select.EPOLLIN)


def _close(descriptors: Sequence[int]) -> None:
    for each in descriptors:
        os.close(each)
