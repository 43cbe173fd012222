"""Requests to probes, through a container on their network whose streams this command holds.

What arrives was written by programs in containers, so each line has a limit and a type.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from typing import Any, Final

import msgspec

from driver.errors import FreeFlowError

_HEADER: Final = struct.Struct("!BxxxI")
_STDOUT: Final = 1
_LONGEST: Final = 2 << 20
_TAKING: Final = 30
"""Seconds in which the gateway takes a request."""
_LATE: Final = 10.0
"""Seconds that an answer may take longer than the probe has."""


class Unreachable(FreeFlowError):
    """No answer came from a probe."""


class ProbeError(FreeFlowError):
    """A probe has answered that it could not do it."""


class GatewayLost(FreeFlowError):
    """The gateway's container has ended, or its engine has."""


class _Line(msgspec.Struct):
    """What the gateway says."""

    id: int = -1
    ready: bool = False
    value: Any = None
    error: str = ""
    unreachable: str = ""


class Gateway:
    """Requests over the streams of the gateway's container. Safe from any thread."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        stream.settimeout(None)
        # Of sending alone: the other thread waits for answers as long as there may be some.
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _TAKING, 0))
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[_Line]] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._lost = ""
        self._errors = b""
        threading.Thread(target=self._read, daemon=True).start()

    def wait_ready(self, seconds: float) -> None:
        """Raises GatewayLost."""
        if not self._ready.wait(seconds) or self._lost:
            said = self._errors.decode(errors="replace").strip()[-300:]
            raise GatewayLost(
                "the test's container on this host does not start",
                cause=said or self._lost or f"it said nothing for {seconds:g} s",
                remedy="use an image with python3 (3.9 or later): freeflow test --image IMAGE",
            )

    def close(self) -> None:
        """The container ends by that."""
        try:
            self._stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._stream.close()

    def start(self, to: str, call: str, seconds: float, /, **arguments: Any) -> PendingAnswer:
        """Send a request. Raises GatewayLost."""
        with self._lock:
            if self._lost:
                raise self._loss()
            number = next(self._numbers)
            future: Future[_Line] = Future()
            self._waiting[number] = future
            request = {
                "id": number,
                "to": to,
                "call": call,
                "seconds": seconds,
                "arguments": arguments,
            }
            try:
                self._stream.sendall(msgspec.json.encode(request) + b"\n")
            except OSError as error:
                self._lost = str(error)
                raise self._loss() from error
        return PendingAnswer(self, future, f"{call} of {to}", seconds + _LATE)

    def ask(self, to: str, call: str, seconds: float, /, **arguments: Any) -> Any:
        """Send a request and wait. Raises Unreachable, ProbeError, GatewayLost."""
        return self.start(to, call, seconds, **arguments).result()

    def _loss(self) -> GatewayLost:
        return GatewayLost(
            "the test's container on this host has ended",
            cause=self._lost,
            remedy="systemctl status docker",
        )

    # --- the reading thread

    def _read(self) -> None:
        reason = "its streams have ended"
        pending = b""
        try:
            while True:
                head = self._receive(_HEADER.size)
                if head is None:
                    break
                kind, length = _HEADER.unpack(head)
                content = self._receive(length) if length <= _LONGEST else None
                if content is None:
                    break
                if kind != _STDOUT:
                    self._errors = (self._errors + content)[-4096:]
                    continue
                *lines, pending = (pending + content).split(b"\n")
                if len(pending) > _LONGEST:
                    break
                for line in lines:
                    self._take(line)
        except (OSError, msgspec.DecodeError) as error:
            reason = str(error)
        self._end(reason)

    def _receive(self, count: int) -> bytes | None:
        parts = b""
        while len(parts) < count:
            part = self._stream.recv(count - len(parts))
            if not part:
                return None
            parts += part
        return parts

    def _take(self, line: bytes) -> None:
        said = msgspec.json.decode(line, type=_Line)
        if said.ready:
            self._ready.set()
            return
        with self._lock:
            future = self._waiting.pop(said.id, None)
        if future is not None:
            future.set_result(said)

    def _end(self, reason: str) -> None:
        with self._lock:
            self._lost = reason
            waiting, self._waiting = list(self._waiting.values()), {}
        self._ready.set()
        for future in waiting:
            future.set_exception(self._loss())


class PendingAnswer:
    """An answer that may not have come yet."""

    def __init__(self, gateway: Gateway, future: Future[_Line], what: str, seconds: float) -> None:
        self._gateway = gateway
        self._future = future
        self._what = what
        self._seconds = seconds

    @property
    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Any:
        """Raises Unreachable, ProbeError, GatewayLost."""
        try:
            said = self._future.result(self._seconds)
        except NotYet:
            raise Unreachable(f"no answer within {self._seconds:g} s") from None
        if said.unreachable:
            raise Unreachable(said.unreachable)
        if said.error:
            raise ProbeError(said.error)
        return said.value
