"""The router knows what real programs have moved, over TCP and over rings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import ConnectionTraffic
from testbed import versions, wait_until
from testbed.images import NotPreparedError
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, PATIENCE, Places, places

MESSAGES: Final = 500
ASKED: Final = 100
ANSWERED: Final = 70
"""Bytes of each request and of each answer."""
PORT: Final = 6600

SERVER: Final = """
import socket, sys
with socket.create_server(("0.0.0.0", int(sys.argv[1]))) as listener:
    print("listens", flush=True)
    one, _ = listener.accept()
    while one.recv(int(sys.argv[3]), socket.MSG_WAITALL):
        one.sendall(b"y" * int(sys.argv[4]))
"""
CLIENT: Final = """
import socket, sys
one = socket.create_connection((sys.argv[5], int(sys.argv[1])))
for _ in range(int(sys.argv[2])):
    one.sendall(b"x" * int(sys.argv[3]))
    assert len(one.recv(int(sys.argv[4]), socket.MSG_WAITALL)) == int(sys.argv[4])
print("done", flush=True)
sys.stdin.readline()
"""


def carried(both: Places) -> list[ConnectionTraffic]:
    """Both ends of the connection, the client's first."""
    found = both.made.router.traffic().connections
    return sorted(found, key=lambda each: each.local.endswith(f":{PORT}"))


def total(end: ConnectionTraffic) -> tuple[int, int]:
    """Bytes in and out, over TCP and in the ring."""
    assert end.tcp is not None
    assert end.ring is not None
    return end.tcp.bytes_in + end.ring.bytes_in, end.tcp.bytes_out + end.ring.bytes_out


def check(both: Places, *counting: bool) -> None:
    """What the router says of the connection is what the programs have done.

    `counting`: whether the client's and the server's library count messages.
    """
    one, other = carried(both)
    asked, answered = MESSAGES * ASKED, MESSAGES * ANSWERED
    assert total(one) == (answered, asked)
    assert total(other) == (asked, answered)
    for end in (one, other):
        assert end.path == "shm"
        assert end.ring is not None
        sizes = (ANSWERED, ASKED) if end is one else (ASKED, ANSWERED)
        put, came = counting if end is one else counting[::-1]
        assert end.ring.bytes_in > 0
        assert end.ring.messages_in == (end.ring.bytes_in / sizes[0] if came else None)
        assert end.ring.messages_out == (end.ring.bytes_out / sizes[1] if put else None)


def exchange(both: Places, libraries: tuple[Path, Path], *counting: bool) -> None:
    """Run server and client with their libraries, and check what the router says."""
    numbers = [str(each) for each in (PORT, MESSAGES, ASKED, ANSWERED)]
    ends = []
    try:
        for container, program, said, library in zip(
            (both.server, both.client),
            (SERVER, CLIENT),
            (b"listens\n", b"done\n"),
            libraries,
            strict=True,
        ):
            both.made.place_library(library)
            end = container.popen(
                [sys.executable, "-c", program, *numbers, both.address],
                env=both.environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            ends.append(end)
            assert end.stdout is not None
            assert end.stdout.readline() == said
        wait_until("both ends", lambda: len(carried(both)) == 2)
        check(both, *counting)
        facts = both.made.router.traffic()
        assert 0 < facts.router_cpu < patience(PATIENCE) * 10
        assert facts.relay_cpu is None
    finally:
        for end in reversed(ends):
            end.communicate(timeout=patience(PATIENCE))
    assert [end.returncode for end in ends] == [0, 0]
    both.upgraded(1)


@pytest.mark.skipif(not LIBRARY.exists(), reason=f"missing: {LIBRARY} (make library)")
def test_carried(tmp_path: Path) -> None:
    """Bytes over TCP and in the ring are all that the programs have sent, at both ends; each send
    is one message in the ring.
    """
    with places(True, tmp_path, tmp_path) as both:
        exchange(both, (LIBRARY, LIBRARY), True, True)


@pytest.mark.skipif(not LIBRARY.exists(), reason=f"missing: {LIBRARY} (make library)")
def test_older_library(tmp_path: Path) -> None:
    """A program that has loaded the last version's library moves the same bytes; of its messages
    the router says nothing, and of its peer's the right number.
    """
    try:
        last = versions.last()
    except NotPreparedError as error:
        pytest.skip(str(error))
    with places(True, tmp_path, tmp_path) as both:
        exchange(both, (last.library, LIBRARY), True, False)
