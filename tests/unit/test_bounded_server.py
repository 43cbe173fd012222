"""The server of metrics and page: no client takes more than its part."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from plugin import bounded_server
from plugin.bounded_server import BoundedServer
from testbed.patience import patience


def hello(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode()]


@contextlib.contextmanager
def serving(app: Any = hello, limit: int = 4) -> Iterator[BoundedServer]:
    server = BoundedServer(("127.0.0.1", 0), app, limit)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def connect(server: BoundedServer, text: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", server.server_port), timeout=patience(10))
    made.sendall(text)
    return made


def everything(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    connection.close()
    return found


def answered(server: BoundedServer) -> bool:
    """Whether a new client gets an answer, at some time."""
    deadline = time.monotonic() + patience(15)
    while time.monotonic() < deadline:
        if everything(connect(server, b"GET /x HTTP/1.0\r\n\r\n")).endswith(b"/x"):
            return True
        time.sleep(0.05)
    return False


def test_answers() -> None:
    """A request is answered, without the server's versions."""
    with serving() as server:
        url = f"http://127.0.0.1:{server.server_port}/a"
        with urllib.request.urlopen(url, timeout=patience(10)) as answer:
            assert answer.read() == b"/a"
            assert "Server" not in answer.headers


def test_a_long_head_is_refused() -> None:
    """Headers that are longer than a head may be are refused as soon as they are, with all that was
    read of them, and other clients are served. Shorter ones are taken, in one line or many.
    """
    line = b"X: " + b"x" * 1000 + b"\r\n"
    with serving() as server:
        begin = b"GET /x HTTP/1.0\r\n"
        assert everything(connect(server, begin + line * 15 + b"\r\n")).endswith(b"/x")
        long = connect(server, begin + line * 17)
        refused = everything(long)
        assert refused.startswith(b"HTTP/1.0 431 ")
        assert b"Python" not in refused
        assert everything(connect(server, b"GET /" + b"x" * bounded_server.HEAD)) == b""
        assert answered(server)


def test_connections_over_the_limit_are_refused() -> None:
    """A client over the limit is told so at once, and served when another one leaves."""
    with serving() as server:
        silent = [connect(server) for _ in range(4)]
        refused = everything(connect(server))
        assert refused.startswith(b"HTTP/1.0 503 ")
        silent.pop().close()
        assert answered(server)
        for each in silent:
            each.close()


@pytest.mark.parametrize("drip", [False, True])
def test_slow_requests_end(monkeypatch: pytest.MonkeyPatch, drip: bool) -> None:
    """Clients that never finish their request lose their connections, even if they go on sending
    byte by byte.
    """
    monkeypatch.setattr(bounded_server, "PATIENCE", 0.3)
    with serving() as server:
        slow = [connect(server, b"GET / HTTP/1.0\r\nX-A: ") for _ in range(4)]
        done = threading.Event()

        def send() -> None:
            while not done.wait(0.05):
                for each in slow:
                    with contextlib.suppress(OSError):
                        each.send(b"a")

        sender = threading.Thread(target=send)
        if drip:
            sender.start()
        try:
            assert answered(server)
        finally:
            done.set()
            if drip:
                sender.join()
        for each in slow:
            each.close()


def test_a_stuck_reader_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that doesn't read its answer loses its connection, and the app hears of it."""
    closed = threading.Event()

    def stream(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/x":
            return hello(environ, start_response)
        start_response("200 OK", [])

        def parts() -> Iterator[bytes]:
            try:
                while True:
                    yield bytes(1 << 20)
            finally:
                closed.set()

        return parts()

    monkeypatch.setattr(bounded_server._Request, "timeout", 0.3)
    with serving(stream, limit=1) as server:
        stuck = connect(server, b"GET /stream HTTP/1.0\r\n\r\n")
        assert closed.wait(patience(10))
        assert answered(server)
        stuck.close()


def test_a_client_that_resets_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A reset by a client frees its place, and nothing is logged or printed."""
    with serving(limit=1) as server:
        rude = connect(server, b"GET ")
        rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        rude.close()
        assert answered(server)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_invalid_requests_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """What is no HTTP gets an error, and nothing of it is logged."""
    with serving() as server:
        for text in (b"\0\1\2\r\n\r\n", b"GET\r\n\r\n", b"G" * 70000 + b"\r\n\r\n", b"\r\n"):
            assert b"200 OK" not in everything(connect(server, text))
        assert answered(server)
    shown = capsys.readouterr()
    assert shown.out + shown.err == ""


def test_a_bug_of_the_app_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception of the app ends its request, is logged, and frees the place."""

    def broken(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/x":
            return hello(environ, start_response)
        raise ValueError("a bug")

    with serving(broken, limit=1) as server:
        assert b"500" in everything(connect(server, b"GET / HTTP/1.0\r\n\r\n"))
        assert answered(server)
    assert "a bug in FreeFlow" in capsys.readouterr().out
