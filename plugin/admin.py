"""The admin API of the `freeflow` command, on a socket that only root can open.

GET  /admin/status    `status.Status` as JSON
POST /admin/ping      {"address": …, "count": …} → `ping.PingResult`
GET  /admin/connections  `dataplane.control.Connections`
GET  /admin/verbs     `dataplane.control.VerbsObjects`
GET  /admin/traffic   `traffic_names.TrafficReport`
GET  /admin/addresses  `traffic_names.AddressBook`
GET  /admin/metrics   Prometheus text
POST /admin/runtime   `runtime_networks.RuntimeQuestion` → `runtime_networks.RuntimeAnswer`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import structlog
from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException

from dataplane.control import Connections, VerbsObjects
from driver.errors import FreeFlowError, InvalidRequest, NotFound
from plugin.ping import PingRequest
from plugin.runtime_networks import RuntimeAnswer, RuntimeQuestion
from plugin.status import Status, explanation
from plugin.traffic_names import AddressBook, TrafficReport

T = TypeVar("T")

log = structlog.get_logger()


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value) + b"\n", status, content_type="application/json")


def _body(kind: type[T], what: str, remedy: str) -> T:
    """The request's body. Raises InvalidRequest."""
    try:
        return msgspec.json.decode(request.get_data(), type=kind)
    except msgspec.DecodeError as error:
        raise InvalidRequest(what, cause=str(error), remedy=remedy) from error


@dataclass(frozen=True, kw_only=True)
class AdminAnswers:
    """What answers the requests; each may raise FreeFlowError."""

    status: Callable[[], Status]
    ping: Callable[[PingRequest], Any]
    connections: Callable[[], Connections]
    verbs: Callable[[], VerbsObjects]
    traffic: Callable[[], TrafficReport]
    addresses: Callable[[], AddressBook]
    runtime: Callable[[RuntimeQuestion], RuntimeAnswer]


def create_admin(answers: AdminAnswers) -> Flask:
    """The app. Errors are `{"error": text}`; FreeFlow's own also have what, cause and remedy."""
    app = Flask("freeflow-admin", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 4096

    @app.get("/admin/status")
    def status() -> Response:
        return _json(answers.status())

    @app.post("/admin/ping")
    def run_ping() -> Response:
        remedy = "freeflow ping --help shows the arguments"
        return _json(answers.ping(_body(PingRequest, "ping", remedy)))

    @app.get("/admin/connections")
    def list_connections() -> Response:
        return _json(answers.connections())

    @app.get("/admin/verbs")
    def list_verbs() -> Response:
        return _json(answers.verbs())

    @app.get("/admin/traffic")
    def list_traffic() -> Response:
        return _json(answers.traffic())

    @app.get("/admin/addresses")
    def list_addresses() -> Response:
        return _json(answers.addresses())

    @app.post("/admin/runtime")
    def runtime_question() -> Response:
        remedy = "freeflow-runc is of another version: freeflow runtime install"
        return _json(answers.runtime(_body(RuntimeQuestion, "networks", remedy)))

    @app.get("/admin/metrics")
    def metrics() -> Response:
        # Not imported at the top: no call of Docker needs it, and its imports are large.
        from plugin.metrics import render

        return Response(render(answers.status()), content_type="text/plain; version=0.0.4")

    def failure(error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return _json({"error": str(error.description)}, error.code or 500)
        if not isinstance(error, FreeFlowError):
            log.exception("a bug in FreeFlow", path=request.path, exc_info=error)
            what = f"{type(error).__name__}: {error}"
            error = FreeFlowError(what, remedy="run: freeflow bugreport")
        return _json(explanation(error), {InvalidRequest: 400, NotFound: 404}.get(type(error), 500))

    app.register_error_handler(Exception, failure)
    return app
