"""Speaking to the router: what the driver tells it, and what people ask it. Blocking, with a limit in time.

One request, one connection: the router may be another one next time.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from dataplane import control
from dataplane.errors import DataplaneError, RouterAway

CONTROL: Final = Path("/run/freeflow-admin/router.sock")

_CHUNK: Final = 1 << 18
R = TypeVar("R", control.Done, control.Statistics, control.Connections, control.PathCounts)


class RouterClient:
    """The router at a control socket."""

    def __init__(self, path: Path = CONTROL, timeout: float = 5.0) -> None:
        self._path = path
        self._timeout = timeout

    def replace_snapshot(self, facts: control.RouterSnapshot) -> None:
        """Tell it what is true now. Raises DataplaneError."""
        self._ask(facts, control.Done)

    def answers(self) -> bool:
        """Whether it answers at all."""
        try:
            self._ask(control.LivenessRequest(), control.Done)
        except DataplaneError:
            return False
        return True

    def statistics(self) -> control.Statistics:
        """Counts. Raises DataplaneError."""
        return self._ask(control.StatisticsRequest(), control.Statistics)

    def connections(self, namespace: int | None = None) -> control.Connections:
        """The list of connections; of one namespace, or all. Raises DataplaneError."""
        return self._ask(control.ConnectionsRequest(namespace=namespace), control.Connections)

    def paths(self) -> control.PathCounts:
        """How many connections take which path, and why. Raises DataplaneError."""
        return self._ask(control.PathsRequest(), control.PathCounts)

    def _ask(self, request: control.ControlRequest, kind: type[R]) -> R:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(str(self._path))
                connection.sendall(msgspec.json.encode(request) + b"\n")
                line = _line(connection)
        except OSError as error:
            raise RouterAway(f"the router at {self._path} doesn't answer: {error}") from error
        try:
            reply = msgspec.json.decode(line, type=control.ControlReply)
        except msgspec.MsgspecError as error:
            raise DataplaneError(
                f"the router at {self._path} said what is no answer: {error}"
            ) from error
        if isinstance(reply, control.Failed):
            raise DataplaneError(f"the router at {self._path} refused: {reply.message}")
        if not isinstance(reply, kind):
            raise DataplaneError(
                f"the router at {self._path} answered {type(reply).__name__}, not {kind.__name__}"
            )
        return reply


def _line(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        data = connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError("it closed the connection before its answer")
        received += data
    return bytes(received)
