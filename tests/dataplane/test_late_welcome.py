"""A process that was told that acceleration is off hears it when it is on."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dataplane.router import layout
from dataplane.router import library_wire as wire
from dataplane.router.reasons import Reason
from testbed.patience import patience
from tests.dataplane.places import LIBRARY

PROGRAM = """
import socket, sys, time
with socket.create_server(("127.0.0.1", 0)) as listener:
    one = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
while True:
    one.send(b"x" * 64)
    other.send(other.recv(64))
    assert len(one.recv(64)) == 64
    time.sleep(0.005)
"""
RULE = {"operations": 4, "age": 0, "bytes": 0, "bulk": 1 << 20, "spin": 50}


def welcome(connection: socket.socket, *, enabled: bool) -> None:
    message = wire.Welcome(
        version=wire.PROTOCOL_VERSION,
        layout_version=layout.VERSION,
        enabled=enabled,
        ring_limit=layout.RING_SIZE,
        **RULE,
    )
    connection.send(wire.pack(message))


def greeted(listener: socket.socket, *, enabled: bool) -> socket.socket:
    """The connection of a process that has said HELLO and been answered."""
    connection, _ = listener.accept()
    connection.settimeout(patience(60))
    assert isinstance(wire.unpack(connection.recv(1000)), wire.Hello)
    welcome(connection, enabled=enabled)
    return connection


def refuse_until_silent(connection: socket.socket) -> None:
    """Refuse requests for now, until the process sends nothing while it works for a moment."""
    connection.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while data := connection.recv(1000):
            request = wire.unpack(data)
            assert isinstance(request, wire.Request)
            refusal = wire.Refuse(request.connection, request.cookie, Reason.REMOTE, True)
            connection.send(wire.pack(refusal))
    connection.settimeout(patience(60))


@pytest.mark.parametrize("restarted", [False, True])
def test_acceleration_that_is_on_late(tmp_path: Path, restarted: bool) -> None:
    """Its connections, which it had before, request their slots then, though no answer was awaited.
    So they do if a router that has started since says so.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "router.sock"))
        listener.listen()
        listener.settimeout(patience(60))
        environment = {
            **os.environ,
            "LD_PRELOAD": str(LIBRARY),
            "FREEFLOW_LOOPBACK": "1",
            "FREEFLOW_ROUTER": str(tmp_path / "router.sock"),
            # A refused request is sent again after a millisecond instead of seconds.
            "FREEFLOW_RESTLESS": "1",
        }
        with subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment) as program:
            try:
                connection = greeted(listener, enabled=False)
                refuse_until_silent(connection)
                if restarted:
                    connection.close()
                    connection = greeted(listener, enabled=True)
                else:
                    welcome(connection, enabled=True)
                with connection:
                    assert isinstance(wire.unpack(connection.recv(1000)), wire.Request)
            finally:
                program.kill()
