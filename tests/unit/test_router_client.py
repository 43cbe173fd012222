"""What the driver and the plugin are told when the router doesn't answer usably."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dataplane.control import Done, Failed, PathCounts
from dataplane.errors import DataplaneError
from dataplane.router_client import RouterClient


@contextlib.contextmanager
def router(path: Path, reply: bytes) -> Iterator[RouterClient]:
    """A router that gives this reply to one request."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(reply)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield RouterClient(path)
        thread.join()


def test_a_reply(tmp_path: Path) -> None:
    """The reply to a request is its value."""
    with router(tmp_path / "s", msgspec.json.encode(PathCounts(paths=())) + b"\n") as client:
        assert client.paths() == PathCounts(paths=())


@pytest.mark.parametrize(
    "reply",
    [
        b"no JSON\n",
        msgspec.json.encode(Failed(message="full")) + b"\n",
        msgspec.json.encode(Done()) + b"\n",
        b"",
    ],
)
def test_a_reply_that_is_none(tmp_path: Path, reply: bytes) -> None:
    """Any other reply, and none, is an error with the next step."""
    with router(tmp_path / "s", reply) as client, pytest.raises(DataplaneError) as caught:
        client.paths()
    assert caught.value.cause
    assert caught.value.remedy


def test_nobody_there(tmp_path: Path) -> None:
    """A router that isn't there doesn't answer, and the next step is said."""
    client = RouterClient(tmp_path / "s")
    assert not client.answers()
    with pytest.raises(DataplaneError) as caught:
        client.statistics()
    assert caught.value.remedy
