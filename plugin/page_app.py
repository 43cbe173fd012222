"""The live page over HTTP: static files, one snapshot as JSON, and server-sent events.

It only reads. Static files hold nothing of this host, so everybody may have them; the data needs
the token, or is for loopback addresses alone.
"""

from __future__ import annotations

import hmac
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from driver.errors import FreeFlowError
from plugin.page_feed import INTERVAL, PageData, PageFeed
from plugin.settings import correction
from plugin.status import explanation

log = structlog.get_logger()

FOLDER: Final = Path(__file__).parent / "page"
STREAMS: Final = 16
"""Browsers at the same time: half of the server's connections, so that others find some."""
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PORT: Final = re.compile(r":[0-9]*$")
_HEADERS: Final = {
    # Names of containers are never markup; if a bug made them so, nothing could run or be loaded.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Refused(FreeFlowError):
    """Who asks may not have the data."""


class TokenWrong(Refused):
    """The token is missing or wrong."""


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class PageAccess:
    """Who may have the data: who knows `token`; without one, whoever reaches a loopback address."""

    token: str = field(repr=False)
    loopback: bool

    def check(self, host: str, authorization: str, site: str) -> None:
        """Raises Refused. The arguments are headers of the request, empty if it lacks them."""
        if site not in ("", "same-origin", "none"):
            raise Refused("the page", cause="another site asks for its data")
        if self.token:
            word, _, given = authorization.partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self.token.encode())
            if not same or word.lower() != "bearer":
                raise TokenWrong("the page", cause="the token is missing or wrong")
        elif not self.loopback:
            raise Refused(
                "the page",
                cause="the metrics' address is no loopback address, and no token is set",
                remedy=correction("UI_TOKEN", '"$(openssl rand -hex 32)"'),
            )
        elif not is_loopback(_PORT.sub("", host)):
            # A name of a site that leads to this host (DNS rebinding) gets nothing.
            raise Refused(
                "the page",
                cause="without a token it is served under this host's loopback addresses and "
                "localhost alone",
            )


def create_page(feed: PageFeed, access: PageAccess) -> Flask:
    """The app. Errors are JSON, as those of the admin API."""
    app = Flask("freeflow-page", static_folder=None)
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in _TYPES}
    streams = threading.BoundedSemaphore(STREAMS)
    get: dict[str, Any] = {"methods": ["GET"], "provide_automatic_options": False}

    def check() -> None:
        headers = request.headers
        access.check(
            headers.get("Host", ""),
            headers.get("Authorization", ""),
            headers.get("Sec-Fetch-Site", ""),
        )

    @app.route("/", **get)
    @app.route("/<name>", **get)
    def file(name: str = "index.html") -> Response:
        if name not in files:
            return _json({"error": "there is no such page"}, 404)
        return Response(files[name], content_type=_TYPES[Path(name).suffix])

    @app.route("/snapshot", **get)
    def snapshot() -> Response:
        check()
        data = feed.latest()
        text = b'{"map":%s,"traffic":%s}\n' % (data.map, data.traffic)
        return Response(text, content_type="application/json")

    @app.route("/events", **get)
    def stream() -> Response:
        check()
        if not streams.acquire(blocking=False):
            answer = _json({"error": f"{STREAMS} browsers watch already; close one"}, 503)
            answer.headers["Retry-After"] = "10"
            return answer
        answer = Response(events(feed), content_type="text/event-stream")
        # Not at the end of `events`: that isn't reached if the client is gone before its begin.
        # Once, however often the answer is closed.
        held = [streams]
        answer.call_on_close(lambda: held.pop().release() if held else None)
        return answer

    @app.after_request
    def add_headers(answer: Response) -> Response:
        answer.headers.update(_HEADERS)
        return answer

    app.register_error_handler(Exception, _failure)
    return app


def events(feed: PageFeed, wait: threading.Event | None = None) -> Iterator[bytes]:
    """Server-sent events: `map` when it has changed, `traffic` each time, and `trouble`."""
    wait = wait or threading.Event()
    number = -1
    while True:
        try:
            data: PageData | None = feed.latest()
        except FreeFlowError as error:
            data = None
            yield _event("trouble", msgspec.json.encode(explanation(error)))
        if data is not None:
            if data.map_number != number:
                number = data.map_number
                yield _event("map", data.map)
            yield _event("traffic", data.traffic)
        if wait.wait(INTERVAL):
            return


def _event(name: str, text: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), text)


def _json(value: Any, status: int) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", status, content_type="application/json")


def _failure(error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _json({"error": str(error.description)}, error.code or 500)
    if isinstance(error, Refused):
        return _json(explanation(error), 401 if isinstance(error, TokenWrong) else 403)
    if not isinstance(error, FreeFlowError):
        log.exception("a bug in FreeFlow", path=request.path, exc_info=error)
        error = FreeFlowError(type(error).__name__, remedy="run: freeflow bugreport")
    return _json(explanation(error), 500)
