"""A request that the router doesn't answer for a long time costs next to nothing, and its late
answer is still heard. One that is refused for now is sent again.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from dataplane.router import layout
from dataplane.router import library_wire as wire
from dataplane.router.reasons import Reason
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, counts_of

PROGRAM = """
import socket, sys, time
with socket.create_server(("127.0.0.1", 0)) as listener:
    one = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()

def turns(count):
    for _ in range(count):
        one.send(b"x" * 64)
        other.send(other.recv(64))
        assert len(one.recv(64)) == 64

turns(100)
time.sleep(0.05)
turns(100)
time.sleep(1)
turns(20000)
print("turned", flush=True)
sys.stdin.readline()
for _ in range(40):
    time.sleep(0.05)
    turns(1)
print("done", flush=True)
"""
PAUSE = 0.02
SOON = 1.0


def serve(
    listener: socket.socket,
    requests: list[wire.Request],
    answer: threading.Event,
    *,
    passing: int = 0,
) -> None:
    """A router that refuses requests only when it is told to. So many refusals are for now."""
    connection, _ = listener.accept()
    with connection:
        while data := connection.recv(1000):
            message = wire.unpack(data)
            if isinstance(message, wire.Hello):
                rule = {"operations": 4, "age": 0, "bytes": 0, "bulk": 1 << 20, "spin": 50}
                welcome = wire.Welcome(
                    version=wire.PROTOCOL_VERSION,
                    layout_version=layout.VERSION,
                    enabled=True,
                    ring_limit=layout.RING_SIZE,
                    **rule,
                )
                connection.send(wire.pack(welcome))
            elif isinstance(message, wire.Request):
                requests.append(message)
                if len(requests) == 2:
                    break
        answer.wait(patience(60))

        def refuse(request: wire.Request, number: int) -> None:
            reason, passes = Reason.FOREIGN, number < passing
            reply = wire.Refuse(request.connection, request.cookie, reason, passes)
            connection.send(wire.pack(reply))

        for number, request in enumerate(requests):
            refuse(request, number)
        while data := connection.recv(1000):
            message = wire.unpack(data)
            if isinstance(message, wire.Request):
                refuse(message, len(requests))
                requests.append(message)


def play(folder: Path, passing: int = 0, **more: str) -> tuple[list[wire.Request], float]:
    """Run the program. The requests that the router has got, and the seconds of its life."""
    requests: list[wire.Request] = []
    answer = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "router.sock"))
        listener.listen()
        thread = threading.Thread(
            target=serve,
            args=(listener, requests, answer),
            kwargs={"passing": passing},
            daemon=True,
        )
        thread.start()
        environment = {
            **os.environ,
            "LD_PRELOAD": str(LIBRARY),
            "FREEFLOW_LOOPBACK": "1",
            "FREEFLOW_ROUTER": str(folder / "router.sock"),
            "FREEFLOW_STATS": str(folder / "statistics"),
            **more,
        }
        began = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as program:
            assert program.stdout is not None
            assert program.stdout.readline() == "turned\n"
            answer.set()
            said, _ = program.communicate("\n", timeout=patience(30))
        seconds = time.monotonic() - began
        assert said == "done\n"
        thread.join(patience(10))
    return requests, seconds


def test_a_request_that_waits(tmp_path: Path) -> None:
    """Both ends wait through forty thousand reads and as many writes, and look for an answer fifty
    times a second; then they hear it.
    """
    requests, seconds = play(tmp_path)
    counts = counts_of(tmp_path / "statistics")
    assert counts["asked"] == len(requests) == 2
    assert counts["refused"] == 2
    # Of the first hundreds of operations each eighth looks, and one in each millisecond of the
    # first second, if they take so long on a busy machine.
    assert counts["polls"] <= 100 + SOON * 1000 + seconds / PAUSE


def test_a_request_that_is_refused_for_now(tmp_path: Path) -> None:
    """An end whose request was refused for now requests again, until it is refused for good."""
    # FREEFLOW_RESTLESS: after a millisecond instead of seconds.
    requests, _ = play(tmp_path, passing=4, FREEFLOW_RESTLESS="1")
    assert len(requests) == 6
    assert len({request.cookie for request in requests}) == 2
    counts = counts_of(tmp_path / "statistics")
    assert counts["asked"] == counts["refused"] == 6


def test_no_request_before_the_pause(tmp_path: Path) -> None:
    """An end whose request was refused for now doesn't request again within seconds."""
    requests, _ = play(tmp_path, passing=2)
    assert len(requests) == 2
