"""The probe's code: authenticated messages, data servers, frames; and its start from its text."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import Any

import pytest

from plugin.network_test import boot, gateway
from plugin.network_test.probe import measurements, spoof
from plugin.network_test.probe.data_server import DataServer, accept_all
from plugin.network_test.probe.probe_wire import ProbeConnection, ProofError
from testbed.patience import patience
from testbed.process import wait_until

KEY = bytes(range(32))
OTHER = bytes(32)


def both(client_key: bytes = KEY, server_key: bytes = KEY) -> tuple[Any, Any, Any]:
    """The two sides of a control connection, and the socket of the first."""
    one, two = socket.socketpair()
    made: list[ProbeConnection] = []
    thread = threading.Thread(
        target=lambda: made.append(ProbeConnection(two, server_key, asks=False))
    )
    thread.start()
    asking = ProbeConnection(one, client_key, asks=True)
    thread.join()
    return asking, made[0], one


def test_messages_arrive_in_both_directions() -> None:
    """What one side sends the other receives, in order."""
    asking, asked, _ = both()
    for number in range(3):
        asking.send({"number": number})
        assert asked.receive() == {"number": number}
        asked.send([number])
        assert asking.receive() == [number]


def test_who_lacks_the_key_is_not_heard() -> None:
    """A message with another key's proof is refused, whichever side lacks the key."""
    asking, asked, _ = both(client_key=OTHER)
    asking.send("hello")
    with pytest.raises(ProofError):
        asked.receive()
    asked.send("hello")
    with pytest.raises(ProofError):
        asking.receive()


def intercepted() -> tuple[ProbeConnection, ProbeConnection, socket.socket, socket.socket]:
    """Two sides, and the sockets of somebody between them who has let their beginning pass."""
    one, near = socket.socketpair()
    far, two = socket.socketpair()
    made: dict[bool, ProbeConnection] = {}

    def begin(asks: bool) -> None:
        made[asks] = ProbeConnection(one if asks else two, KEY, asks=asks)

    threads = [threading.Thread(target=begin, args=(asks,)) for asks in (True, False)]
    for thread in threads:
        thread.start()
    far.sendall(near.recv(16))
    near.sendall(far.recv(16))
    for thread in threads:
        thread.join()
    return made[True], made[False], near, far


def test_a_message_is_taken_once_and_unchanged() -> None:
    """A line that is repeated, changed, sent back, or of another connection is refused."""
    asking, asked, near, far = intercepted()
    asked.send("one")
    line = far.recv(1000)
    near.sendall(line + line)
    assert asking.receive() == "one"
    with pytest.raises(ProofError):
        asking.receive()
    for change in (lambda sent: sent.replace(b"one", b"two"), lambda _sent: line):
        asking, asked, near, far = intercepted()
        asked.send("one")
        near.sendall(change(far.recv(1000)))
        with pytest.raises(ProofError):
            asking.receive()
    asking, _, near, _ = intercepted()
    asking.send("one")
    near.sendall(near.recv(1000))
    with pytest.raises(ProofError):
        asking.receive()


def test_a_line_without_end_is_refused() -> None:
    """A peer can't make a side read without limit, or wait for the rest of a line after the end."""
    one, two = socket.socketpair()
    two.sendall(bytes(16) + b"x" * 100)
    two.shutdown(socket.SHUT_WR)
    with pytest.raises(ProofError):
        ProbeConnection(one, KEY, asks=True).receive()


@pytest.fixture
def port() -> int:
    """The port of a data server that serves on all addresses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    DataServer(number, KEY).start()
    return number


def test_transfers_and_datagrams(port: int) -> None:
    """Hashes are right in both directions, datagrams come back, and both are measured."""
    to = "127.0.0.1"
    assert measurements.transfer(KEY, to, port, 1 << 20, 10) == {"there": True, "back": True}
    assert measurements.datagrams(KEY, to, port, (64, 1500, 60000)) == {"lost": []}
    trips = measurements.round_trips(KEY, to, port, 20, 10)
    assert 0 < trips["least"] <= trips["median"] <= trips["p99"]
    assert measurements.throughput(KEY, to, port, 0.1)["bits_per_second"] > 0


def test_a_stranger_gets_nothing_from_the_data_server(port: int) -> None:
    """Without the key a connection ends without an answer, and a datagram has none."""
    to = "127.0.0.1"
    with pytest.raises(OSError):
        measurements.transfer(OTHER, to, port, 1 << 20, 10)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.connect((to, port))
        stranger.settimeout(0.2)
        stranger.send(bytes(100))
        with pytest.raises(TimeoutError):
            stranger.recv(1000)


def test_strangers_get_no_more_threads() -> None:
    """Connections over the limit are closed at once; those that end make room."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        # What it serves ends with the connection.
        threading.Thread(
            target=accept_all, args=(server, lambda each: each.recv(1), 2), daemon=True
        ).start()

        def connect() -> socket.socket:
            return socket.create_connection(server.getsockname(), timeout=patience(10))

        silent = [connect(), connect()]
        with connect() as refused:
            assert refused.recv(1) == b""
        for each in silent:
            each.close()
        wait_until("a stranger to be served again", lambda: _is_served(connect()))


def _is_served(connection: socket.socket) -> bool:
    """Whether nobody closes it."""
    with connection:
        connection.settimeout(0.2)
        try:
            return connection.recv(1) != b""
        except TimeoutError:
            return True


def test_a_gateway_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that the gateway's container does not read ends the run, not waits for ever."""
    monkeypatch.setattr(gateway, "_TAKING", 1)
    own, theirs = socket.socketpair()
    made = gateway.Gateway(own)

    def fill() -> None:
        for _ in range(1000):
            made.start("10.0.1.2", "hello", 1.0, text="x" * 100_000)

    with theirs, pytest.raises(gateway.GatewayLost):
        fill()
    made.close()


def test_a_frame_has_the_source_that_was_asked_for() -> None:
    """The frame's addresses and checksum are what a kernel expects of IPv4 and UDP."""
    made = spoof.frame(
        ("02:00:00:00:00:01", "02:00:00:00:00:02"), ("10.0.0.1", "10.0.0.2"), 7611, b"content"
    )
    assert made[:14].hex() == "020000000002" + "020000000001" + "0800"
    head = made[14:34]
    assert sum(struct.unpack("!10H", head)) % 0xFFFF == 0
    assert head[12:] == bytes((10, 0, 0, 1, 10, 0, 0, 2))
    assert struct.unpack("!HHH", made[34:40]) == (7611, 7611, 15)
    assert made[42:] == b"content"


def test_the_gateway_starts_from_its_text_and_ends_with_its_input() -> None:
    """All modules of the probe load without FreeFlow's files; the gateway says that a probe does
    not answer, and ends when nobody asks any more.
    """
    variables = boot.environment(boot.GATEWAY, KEY)
    # The kernel's limit of one variable (execve(2)).
    assert all(len(value) < 1 << 17 for value in variables.values())
    request = {"id": 1, "to": "127.0.0.1", "call": "hello", "seconds": 2, "arguments": {}}
    done = subprocess.run(
        [sys.executable, "-I", *boot.COMMAND[1:]],
        env={"PATH": os.environ["PATH"], **variables},
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        timeout=patience(20),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[0]) == {"ready": True}


def test_no_text_is_a_template_of_docker() -> None:
    """Docker expands {{…}} in a service's variables; only the name may have that."""
    variables = boot.environment(boot.PROBE, KEY, "{{.Node.ID}}/one")
    assert [name for name, value in variables.items() if "{{" in value] == ["FREEFLOW_TEST_NAME"]
