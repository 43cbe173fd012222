"""A small HTTP server for addresses that anybody may reach: it bounds what its clients can take.

gunicorn's threads read requests without a limit of time, so a few silent clients would hold all of
them. Here each connection has one request, a deadline to send it, a limit of its head's length, and
a limit of time for what is sent to it. Connections over the limit are refused at once.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import LineTooLong
from socketserver import ThreadingMixIn
from typing import IO, Any, Final, cast
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

import structlog

log = structlog.get_logger()

WSGI = Callable[[dict[str, Any], Any], Iterable[bytes]]

CONNECTIONS: Final = 32
"""At the same time, each with a thread."""
PATIENCE: Final = 10.0
"""Seconds for a whole request, and for each piece of an answer."""
HEAD: Final = 16 << 10
"""Bytes of a request's line and headers. Python's own limit is 6 MiB, for each connection."""
_BUSY: Final = (
    b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Type: text/plain\r\n\r\n"
    b"too many connections\n"
)


class _Head:
    """The lines of a request's head. Raises LineTooLong beyond `HEAD`."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = HEAD

    def readline(self, _size: int = -1) -> bytes:
        line = self._stream.readline(self._left + 1)
        if len(line) > self._left:
            raise LineTooLong("request")
        self._left -= len(line)
        return line


class _Answer(ServerHandler):
    """Sends no version of Python, and prints no traceback."""

    server_software = None  # type: ignore[assignment]

    def log_exception(self, exc_info: Any) -> None:
        error = exc_info[1]
        if not isinstance(error, OSError):
            log.error("a bug in FreeFlow", server="metrics", exc_info=exc_info)


class _Request(WSGIRequestHandler):
    """One request. Nothing of it is logged: it may hold a token."""

    timeout = PATIENCE

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, BoundedServer)
        reader, writer = cast("IO[bytes]", self.rfile), cast("IO[bytes]", self.wfile)
        head = _Head(reader)
        try:
            self.raw_requestline = head.readline()
        except LineTooLong:
            return
        self.rfile = cast("Any", head)
        # It answers by itself if the request is wrong, or longer than a head may be.
        complete = bool(self.raw_requestline) and self.parse_request()
        self.rfile = cast("Any", reader)
        if not complete:
            return
        server.request_read(self.connection)
        answer = _Answer(reader, writer, sys.stderr, self.get_environ(), multithread=True)
        answer.request_handler = self  # type: ignore[attr-defined]
        answer.run(server.app)

    def version_string(self) -> str:
        """Not Python's version, in answers to wrong requests."""
        return "FreeFlow"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


class BoundedServer(ThreadingMixIn, WSGIServer):
    """Serves `app` on `address` by threads of its own, from `start` to `stop`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], app: WSGI, limit: int = CONNECTIONS) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self._free = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._deadlines: dict[socket.socket, float] = {}
        """Of connections whose request hasn't come yet."""
        self.app = app
        super().__init__(address, _Request)

    def start(self) -> None:
        """Serve in the background."""
        threading.Thread(target=self.serve_forever, name="metrics server", daemon=True).start()

    def stop(self) -> None:
        """Accept no more; threads of open connections end with the process."""
        self.shutdown()
        self.server_close()

    def server_bind(self) -> None:
        # Not the base class's, which asks the DNS for this host's name.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def request_read(self, connection: socket.socket) -> None:
        """A request is complete: its connection has no deadline any more."""
        with self._lock:
            self._deadlines.pop(connection, None)

    def service_actions(self) -> None:
        """Called about twice a second: end connections that don't send their request."""
        now = time.monotonic()
        with self._lock:
            late = [each for each, deadline in self._deadlines.items() if deadline < now]
            for each in late:
                del self._deadlines[each]
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            with suppress(OSError):
                request.setblocking(False)
                request.send(_BUSY)
            self.shutdown_request(request)
            return
        with self._lock:
            self._deadlines[request] = time.monotonic() + PATIENCE
        try:
            super().process_request(request, client_address)
        except RuntimeError:
            # No thread can be started now.
            self._end(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: socket.socket) -> None:
        self.request_read(request)
        self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is slow or gone is no error of ours."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log.error("a bug in FreeFlow", server="metrics", exc_info=True)
