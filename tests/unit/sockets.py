"""WSGI apps on unix sockets, as the plugin's admin API and the engine's are."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import msgspec

WSGI = Callable[[dict[str, Any], Any], Iterable[bytes]]


class _Server(WSGIServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "unix", 0
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = self.socket.accept()
        return connection, ("unix", 0)


class _Handler(WSGIRequestHandler):
    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Nothing."""


@contextlib.contextmanager
def served(app: WSGI, path: Path) -> Iterator[Path]:
    """The app on a unix socket at `path`."""
    server = _Server(str(path), _Handler)  # type: ignore[arg-type]
    server.set_app(app)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield path
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def engine(answers: Mapping[str, Any]) -> WSGI:
    """An engine that knows these answers; anything else isn't found. A number is a status without
    more.
    """

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        found = answers.get(environ["PATH_INFO"], 404)
        status, body = (found, b"") if isinstance(found, int) else (200, msgspec.json.encode(found))
        start_response(f"{status} -", [("Content-Type", "application/json")])
        return [body]

    return app
