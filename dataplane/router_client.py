"""The client of the router's control socket. Calls block, with a time limit.

Each request has a connection of its own, since the router may have been restarted meanwhile.
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
_READ_LOG: Final = "read why: journalctl -u docker | grep router"
R = TypeVar(
    "R",
    control.Done,
    control.Statistics,
    control.Connections,
    control.VerbsObjects,
    control.TrafficFacts,
    control.PathCounts,
    control.EncryptionFacts,
)


class RouterClient:
    """The router at a control socket."""

    def __init__(self, path: Path = CONTROL, timeout: float = 5.0) -> None:
        self._path = path
        self._timeout = timeout

    def replace_snapshot(self, facts: control.RouterSnapshot) -> None:
        """Replace the router's snapshot. Raises DataplaneError."""
        self._ask(facts, control.Done)

    def answers(self) -> bool:
        """Whether the router answers at all."""
        try:
            self._ask(control.LivenessRequest(), control.Done)
        except DataplaneError:
            return False
        return True

    def statistics(self) -> control.Statistics:
        """The router's counters. Raises DataplaneError."""
        return self._ask(control.StatisticsRequest(), control.Statistics)

    def connections(self, namespace: int | None = None) -> control.Connections:
        """The connections of one namespace, or of all. Raises DataplaneError."""
        return self._ask(control.ConnectionsRequest(namespace=namespace), control.Connections)

    def verbs(self, namespace: int | None = None) -> control.VerbsObjects:
        """The devices and queue pairs of one namespace, or of all. Raises DataplaneError."""
        return self._ask(control.VerbsRequest(namespace=namespace), control.VerbsObjects)

    def traffic(self, namespace: int | None = None) -> control.TrafficFacts:
        """What the connections of one namespace, or of all, have carried. Raises DataplaneError."""
        return self._ask(control.TrafficRequest(namespace=namespace), control.TrafficFacts)

    def paths(self) -> control.PathCounts:
        """How many connections take which path, and why. Raises DataplaneError."""
        return self._ask(control.PathsRequest(), control.PathCounts)

    def encryption(self) -> control.EncryptionFacts:
        """The public keys that peers have announced. Raises DataplaneError."""
        return self._ask(control.EncryptionRequest(), control.EncryptionFacts)

    def _ask(self, request: control.ControlRequest, kind: type[R]) -> R:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._timeout)
                connection.connect(str(self._path))
                connection.sendall(msgspec.json.encode(request) + b"\n")
                line = _line(connection)
        except OSError as error:
            raise RouterAway(
                f"the router at {self._path} doesn't answer",
                cause=str(error),
                remedy="the plugin restarts it; the plugin's log says why it ended",
            ) from error
        try:
            reply = msgspec.json.decode(line, type=control.ControlReply)
        except msgspec.MsgspecError as error:
            raise DataplaneError(
                f"the router at {self._path} sent an invalid reply",
                cause=str(error),
                remedy=_READ_LOG,
            ) from error
        if isinstance(reply, control.Failed):
            raise DataplaneError(
                f"the router at {self._path} refused a request",
                cause=reply.message,
                remedy=_READ_LOG,
            )
        if not isinstance(reply, kind):
            raise DataplaneError(
                f"the router at {self._path} sent an invalid reply",
                cause=f"{type(reply).__name__} instead of {kind.__name__}",
                remedy=_READ_LOG,
            )
        return reply


def _line(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        data = connection.recv(_CHUNK)
        if not data:
            raise ConnectionResetError("it closed the connection before it replied")
        received += data
    return bytes(received)
