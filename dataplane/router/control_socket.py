"""The control socket: connections of the driver, and of the command through the plugin.

A request and its reply are a line of JSON each, see `dataplane/control.py`. Long lists are made in
steps between the rounds of the loop, so that clients don't wait for them. They have a share of the
loop's time: a round in which clients keep the router busy may be long.
"""

from __future__ import annotations

import functools
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from dataplane import control
from dataplane.errors import DataplaneError
from dataplane.router.loop import Loop
from dataplane.router.unix_listener import BoundSocket

Steps = Iterator[control.ControlReply | None]
"""A reply that is made in steps: None after each step but the last."""

_LONGEST_LINE: Final = 64 << 20
_CHUNK: Final = 1 << 18
_BACKLOG: Final = 16
SHARE: Final = 0.25
"""Time for lists, as a part of that since the last steps,"""
MOST: Final = 0.02
"""and seconds of it at most. One step of each list is always made."""
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_PEERCRED: Final = struct.Struct("=3i")


@dataclass(slots=True, eq=False)
class ControlConnection:
    """One connection of the driver."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    steps: Steps | None = None
    """The reply that is being made."""


class ControlSocket:
    """The listening socket and its connections."""

    def __init__(
        self,
        loop: Loop,
        path: Path,
        answer: Callable[[control.ControlRequest], control.ControlReply | Steps],
    ) -> None:
        """`answer` raises DataplaneError for a request that can't be fulfilled."""
        self._loop = loop
        self._answer = answer
        self._connections: dict[int, ControlConnection] = {}
        self._worked = loop.now()
        self._listener = BoundSocket(path, socket.SOCK_STREAM, 0o600, _BACKLOG)
        loop.watch(self._listener.socket.fileno(), select.EPOLLIN, lambda _: self._accept())

    def close(self) -> None:
        """Close everything; the path is removed if it is still ours."""
        for connection in list(self._connections.values()):
            self._close(connection)
        self._loop.forget(self._listener.socket.fileno())
        self._listener.close()

    @property
    def is_busy(self) -> bool:
        """Whether `work` has something to do."""
        return any(connection.steps is not None for connection in self._connections.values())

    def work(self) -> None:
        """Make steps of each list."""
        began = self._loop.now()
        until = began + min(MOST, SHARE * (began - self._worked))
        while self.is_busy:
            self._step_all()
            if self._loop.now() >= until:
                break
        self._worked = self._loop.now()

    def _step_all(self) -> None:
        for connection in list(self._connections.values()):
            if connection.steps is None:
                continue
            try:
                reply = next(connection.steps)
            except Exception:
                # A list that has failed once would fail in each round.
                connection.steps = None
                self._reply(connection, control.Failed(message="a bug; the router's log has it"))
                raise
            if reply is not None:
                connection.steps = None
                self._reply(connection, reply)
                self._answer_lines(connection)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.socket.accept()
        except OSError:
            return
        accepted.setblocking(False)
        credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        if _PEERCRED.unpack(credentials)[1] != os.geteuid():
            accepted.close()
            return
        connection = self._connections[accepted.fileno()] = ControlConnection(accepted)
        self._loop.watch(
            accepted.fileno(), select.EPOLLIN, functools.partial(self._serve, connection)
        )

    def _serve(self, connection: ControlConnection, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(connection)
        if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            data = connection.socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(connection.received) > _LONGEST_LINE:
            self._close(connection)
            return
        connection.received += data
        self._answer_lines(connection)

    def _answer_lines(self, connection: ControlConnection) -> None:
        while connection.steps is None:
            line, newline, rest = connection.received.partition(b"\n")
            if not newline:
                return
            connection.received = rest
            try:
                answer = self._answer(msgspec.json.decode(line, type=control.ControlRequest))
            except (msgspec.MsgspecError, DataplaneError) as error:
                answer = control.Failed(message=str(error))
            if isinstance(answer, Iterator):
                connection.steps = answer
            else:
                self._reply(connection, answer)

    def _reply(self, connection: ControlConnection, reply: control.ControlReply) -> None:
        connection.unsent += msgspec.json.encode(reply) + b"\n"
        self._flush(connection)

    def _flush(self, connection: ControlConnection) -> None:
        try:
            sent = connection.socket.send(connection.unsent, _SEND)
            del connection.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            # The next read finds that the connection has ended.
            connection.unsent.clear()
        more = select.EPOLLOUT if connection.unsent else 0
        self._loop.modify(connection.socket.fileno(), select.EPOLLIN | more)

    def _close(self, connection: ControlConnection) -> None:
        descriptor = connection.socket.fileno()
        del self._connections[descriptor]
        self._loop.forget(descriptor)
        connection.socket.close()
