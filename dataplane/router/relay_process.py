"""The relay's process: started when a transport is wanted, and again when it ends. The router never
waits for it.

The relay is a child process that trusts the router. The router survives its crashes, and kills it
if it sends an invalid message or doesn't answer. `RelayOwner.relay_died` is called only after the
kernel has reported its end: from then on nothing writes to the rings that it had.
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
"""Seconds between two starts, doubled after each relay that doesn't last."""
LASTS: Final = 30.0
PATIENCE: Final = 20
"""Requests without an answer, after which the relay counts as stuck. There is about one a
second.
"""
_AT_ONCE: Final = 64
_BUFFER: Final = 1 << 20
_ABOVE: Final = 10
"""Lowest number for a descriptor that a child is to get, above those that it has itself."""
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_RECEIVE: Final = int(socket.MSG_DONTWAIT)

SHIPPED: Final = Path("/usr/lib/freeflow/freeflow-relay")
"""Where `plugin/image` puts it."""


class RelayOwner(Protocol):
    """Is told what the relay's process does."""

    def relay_message(self, message: wire.Message) -> None:
        """The relay has sent a message."""

    def relay_started(self) -> None:
        """The relay runs, and was told what to open."""

    def relay_opened(self, transport: int, message: wire.RelayOpened) -> None:
        """The relay has opened a transport, or can't."""

    def relay_died(self) -> None:
        """The relay has ended, with all of its links and connections."""


class RelayProcess:
    """Keeps a relay running while one is wanted."""

    def __init__(
        self,
        loop: Loop,
        program: Path,
        owner: RelayOwner,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._loop = loop
        self._program = program
        self._owner = owner
        self._environment = dict(os.environ if environment is None else environment)
        self._wanted: dict[int, wire.RelayOpen] = {}
        self._opened: dict[int, wire.RelayOpen] = {}
        """By transport."""
        self._opening: deque[int] = deque()
        """Transports, in the order in which the relay answers."""
        self._socket: socket.socket | None = None
        self._pid = 0
        self._pidfd = -1
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._pause = LEAST_PAUSE
        self._began = 0.0
        self._unanswered = 0
        self._timer: Timer | None = None
        self.why = ""
        """Why no relay runs, if one is wanted."""

    @property
    def pid(self) -> int | None:
        """Of the relay that runs."""
        return self._pid or None

    def opened(self, transport: int) -> wire.RelayOpen | None:
        """What the running relay was told to open for a transport."""
        return self._opened.get(transport)

    def want(self, device: wire.RelayOpen) -> None:
        """Have a relay run with this device. A relay that runs must have no links of its transport:
        it closes the device that it has.
        """
        self._wanted[device.transport] = device
        if self._pid:
            self._open(device)
        elif self._timer is None:
            self._start()

    def forget(self, transport: int) -> None:
        """The next relay needn't open a transport. One that runs leaves it open."""
        self._wanted.pop(transport, None)

    def _open(self, device: wire.RelayOpen) -> None:
        self._opened[device.transport] = device
        self._opening.append(device.transport)
        self.send(device)

    def send(self, message: wire.Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, now or when the socket has room. Dropped if no relay runs.

        Descriptors stay the caller's.
        """
        if self._socket is None:
            return
        data = wire.pack(message)
        if not self._unsent and self._try_send(data, descriptors):
            return
        if self._socket is None:
            return
        kept = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for one in descriptors]
        self._unsent.append((data, kept))
        self._loop.modify(self._socket.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def poll(self) -> None:
        """Request the relay's counters. A relay that is stopped or stuck is killed: its connections
        hang, and are reset by that.

        Unanswered requests are counted instead of seconds: during a suspend of the host there are
        none.
        """
        if not self._pid:
            return
        if self._unanswered < PATIENCE:
            self._unanswered += 1
            self.send(wire.Number(wire.RelayKind.COUNT))
        elif self._socket is not None:
            log.error("relay doesn't answer; it is killed", pid=self._pid, requests=PATIENCE)
            self._kill()

    def close(self) -> None:
        """The router ends. The relay sees its socket closed, brings connections back to TCP, and
        ends.
        """
        self._wanted.clear()
        self._cancel()
        self._hang_up()
        if self._pidfd >= 0:
            self._loop.forget(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._pid = 0

    # --- start and end

    def _start(self) -> None:
        self._cancel()
        if not self._wanted:
            return
        try:
            self._pid, self._pidfd, self._socket = self._spawn()
        except OSError as error:
            self.why = f"{self._program} can't be started: {error.strerror}"
            log.error("relay can't be started; connections stay on TCP", reason=self.why)
            self._later()
            return
        self._began = self._loop.now()
        self._unanswered = 0
        self.why = ""
        self._loop.watch(self._socket.fileno(), select.EPOLLIN, self._serve)
        self._loop.watch(self._pidfd, select.EPOLLIN, lambda _: self._ended())
        for wanted in self._wanted.values():
            self._open(wanted)
        self._owner.relay_started()

    def _spawn(self) -> tuple[int, int, socket.socket]:
        """A new relay's process, a descriptor of it, and our end of its socket. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                for end in (ours, theirs):
                    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                        end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
                pid = self._run(theirs)
            return pid, _descriptor_of(pid), ours
        except OSError:
            ours.close()
            raise

    def _run(self, theirs: socket.socket) -> int:
        moved = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
        try:
            return os.posix_spawn(
                self._program,
                [self._program.name],
                self._environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, moved, wire.RELAY_SOCKET),
                ],
                # A signal to our process group must not reach it: it has to bring connections back
                # to TCP.
                setsid=True,
            )
        finally:
            os.close(moved)

    def _kill(self) -> None:
        """Kill it. The kernel reports its end to `_ended`."""
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

    def _ended(self) -> None:
        """The process has ended. Its last messages may not have been read."""
        while self._socket is not None and self._receive():
            pass
        self._hang_up()
        _, status = os.waitpid(self._pid, 0)
        self._loop.forget(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self._pid = 0
        self._opened.clear()
        self._opening.clear()
        code = os.waitstatus_to_exitcode(status)
        if self._wanted:
            self.why = f"the relay ended with code {code}; it is started again"
            log.error("relay ended; it is started again", code=code, seconds=self._pause)
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
        """Read one message; false if there is none."""
        assert self._socket is not None
        try:
            data = self._socket.recv(wire.MAX_MESSAGE + 1, _RECEIVE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            # It has ended or is about to. Without its socket it is of no use.
            self._kill()
            return False
        try:
            message = wire.unpack(data)
        except WrongMessage as error:
            log.error("relay sent an invalid message; it is killed", reason=str(error))
            self._kill()
            return False
        self._unanswered = 0
        try:
            if isinstance(message, wire.RelayOpened):
                self._owner.relay_opened(self._opening.popleft(), message)
            else:
                self._owner.relay_message(message)
        except Exception:
            # A bug of ours must not end the loop.
            log.exception("a bug in the router", message=type(message).__name__)
        return True

    def _try_send(self, data: bytes, descriptors: Sequence[int]) -> bool:
        assert self._socket is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._socket.sendmsg([data], rights if descriptors else [], _SEND)
        except BlockingIOError:
            return False
        except OSError:
            # The next read reports its end.
            return True
        return True

    def _flush(self) -> None:
        while self._unsent and self._socket is not None:
            data, descriptors = self._unsent[0]
            if not self._try_send(data, descriptors):
                return
            self._unsent.popleft()
            _close(descriptors)
        if self._socket is not None:
            self._loop.modify(self._socket.fileno(), select.EPOLLIN)


def _descriptor_of(pid: int) -> int:
    """A descriptor of a child. Raises OSError, and the child is gone: nobody could wait for it."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
