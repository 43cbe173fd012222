"""A process of the probe that preloads FreeFlow's library, so that its connections may move.

The probe itself does not: what it says must arrive also if a faster path is broken. Whether a
connection has moved is seen without the library: its bytes are no longer in the kernel's TCP_INFO.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from plugin.network_test.probe.data_server import (
    ECHO,
    HEADER,
    TRANSFER,
    DataServer,
    receive_all,
    receive_hashed,
    send_hashed,
)
from plugin.network_test.probe.measurements import connect
from plugin.network_test.probe.probe_wire import LIBRARY_DATA, tag

LIBRARY = "/run/freeflow/libfreeflow.so"
VERBS = ("/run/freeflow/verbs/libibverbs.so.1", "/run/freeflow/verbs/libibverbs.so")
ROLE = "FREEFLOW_TEST_ROLE"
CODE = "FREEFLOW_TEST_CODE"
BOOT = "FREEFLOW_TEST_BOOT"
_MESSAGE = 512
_HOLD = 3.0
"""Seconds for which moved connections go on, so that the plugin's list shows them."""
_MOVED = 64 << 10
"""Bytes that the program has sent while TCP has sent nothing."""


def start(role: str, question: Any, *, verbs: bool = False) -> subprocess.Popen[bytes]:
    """A process with the library that does what `main` says. Raises OSError."""
    libraries = (LIBRARY, *VERBS) if verbs else (LIBRARY,)
    environment = {**os.environ, ROLE: role, "LD_PRELOAD": ":".join(libraries)}
    environment.pop("FREEFLOW", None)
    if verbs:
        environment["LD_LIBRARY_PATH"] = str(Path(VERBS[0]).parent)
    started = subprocess.Popen(
        [sys.executable, "-c", os.environ[BOOT]],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert started.stdin is not None
    try:
        started.stdin.write(json.dumps(question).encode() + b"\n")
        started.stdin.flush()
    except BrokenPipeError:
        # It has ended already: whoever waits for its answer gets the reason.
        pass
    return started


def run(role: str, question: Any, seconds: float) -> Any:
    """The answer of such a process. Raises OSError if it has none."""
    started = start(role, question)
    try:
        out, err = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        started.kill()
        started.communicate()
        raise OSError(f"the process with the library was not done in {seconds:g} s") from None
    if started.returncode or not out:
        reason = err.decode(errors="replace").strip()[-300:]
        raise OSError(f"the process with the library failed ({started.returncode}): {reason}")
    return json.loads(out)


def main(role: str) -> None:
    """What the process does; the question is a line of standard input."""
    question = json.loads(sys.stdin.readline())
    key = bytes.fromhex(os.environ["FREEFLOW_TEST_KEY"])
    if role == "server":
        DataServer(LIBRARY_DATA, key).start(datagrams=False)
        # Until the probe ends.
        sys.stdin.read()
        return
    if role == "verbs":
        # Not every image has ctypes.
        from plugin.network_test.probe.queue_pair import serve

        serve(VERBS[0], question)
        return
    print(json.dumps(Mover(key, **question).run()), flush=True)


def _acknowledged(connection: socket.socket) -> int:
    """Bytes that the peer's TCP has acknowledged (struct tcp_info, linux/tcp.h)."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("Q", info, 120)[0])


class Mover:
    """Connections that exchange messages until enough of them have moved."""

    def __init__(self, key: bytes, to: str, connections: int, seconds: float, count: int) -> None:
        self._key = key
        self._to = to
        self._wanted = connections
        self._end = time.monotonic() + seconds
        self._count = count
        self._sent: dict[socket.socket, int] = {}
        self._marks: dict[socket.socket, tuple[int, int]] = {}
        self._expected: dict[socket.socket, bytes] = {}
        self._moved: set[socket.socket] = set()
        self._wrong = 0

    def run(self) -> dict[str, Any]:
        made = [connect(self._to, LIBRARY_DATA, 10) for _ in range(self._wanted)]
        for connection in made:
            connection.sendall(HEADER.pack(tag(self._key, "data"), ECHO, 0))
        selector = selectors.DefaultSelector()
        for connection in made:
            selector.register(connection, selectors.EVENT_READ)
            self._sent[connection] = 0
            self._marks[connection] = (0, 0)
            self._send(connection)
        looked = time.monotonic()
        hold = 0.0
        while time.monotonic() < (hold or self._end):
            for key, _ in selector.select(1):
                assert isinstance(key.fileobj, socket.socket)
                self._echo(key.fileobj)
            if time.monotonic() > looked + 0.25:
                looked = time.monotonic()
                self._look()
                if not hold and len(self._moved) * 4 >= self._wanted * 3:
                    hold = time.monotonic() + _HOLD
        right = not self._wrong and self._transfer()
        return {"connections": self._wanted, "moved": len(self._moved), "right": right}

    def _send(self, connection: socket.socket) -> None:
        message = os.urandom(_MESSAGE)
        self._expected[connection] = message
        connection.sendall(message)
        self._sent[connection] += _MESSAGE

    def _echo(self, connection: socket.socket) -> None:
        if receive_all(connection, _MESSAGE) != self._expected[connection]:
            self._wrong += 1
        self._send(connection)

    def _look(self) -> None:
        """Which connections have carried much, and TCP has not."""
        for connection, (sent, acknowledged) in self._marks.items():
            now = _acknowledged(connection)
            if now != acknowledged:
                self._marks[connection] = (self._sent[connection], now)
                self._moved.discard(connection)
            elif self._sent[connection] - sent >= min(_MOVED, 16 * _MESSAGE):
                self._moved.add(connection)

    def _transfer(self) -> bool:
        """A transfer with its hash, over a connection that moves meanwhile."""
        with connect(self._to, LIBRARY_DATA, 30) as connection:
            connection.sendall(HEADER.pack(tag(self._key, "data"), TRANSFER, self._count))
            sent = send_hashed(connection, self._count)
            there = receive_all(connection, 32) == sent
            got = receive_hashed(connection, self._count)
            back = receive_all(connection, 32) == got
            connection.sendall(b".")
        return there and back
