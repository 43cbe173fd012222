"""The admin API: what the command asks."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient

from dataplane.control import Connections, VerbsObjects
from driver.errors import InvalidRequest, KernelError, NotFound
from plugin.admin import create_admin
from plugin.ping import PingRequest
from plugin.status import Status
from plugin.traffic_names import AddressBook, TrafficReport
from tests.unit.statuses import ADDRESSES, LISTED, LISTED_VERBS, TRAFFIC, admin_answers, status


def client(ping: Any = None) -> FlaskClient:
    answers = admin_answers() if ping is None else admin_answers(ping=ping)
    return create_admin(answers).test_client()


def test_status() -> None:
    """The status is the whole value, as JSON."""
    answer = client().get("/admin/status")
    assert answer.content_type == "application/json"
    assert msgspec.json.decode(answer.data, type=Status) == status()


def test_connections() -> None:
    """The list of connections comes from the router."""
    answer = client().get("/admin/connections")
    assert msgspec.json.decode(answer.data, type=Connections) == LISTED


def test_verbs() -> None:
    """The list of devices and queue pairs comes from the router."""
    answer = client().get("/admin/verbs")
    assert msgspec.json.decode(answer.data, type=VerbsObjects) == LISTED_VERBS


def test_traffic() -> None:
    """What connections have carried comes from the router, with names."""
    answer = client().get("/admin/traffic")
    assert msgspec.json.decode(answer.data, type=TrafficReport) == TRAFFIC


def test_addresses() -> None:
    """Who has which address comes with the names of services and hosts."""
    answer = client().get("/admin/addresses")
    assert msgspec.json.decode(answer.data, type=AddressBook) == ADDRESSES


def test_metrics() -> None:
    """Metrics are available without any setting, in Prometheus's format."""
    answer = client().get("/admin/metrics")
    assert answer.content_type == "text/plain; version=0.0.4"
    assert b"# HELP freeflow_networks " in answer.data


def test_ping_request() -> None:
    """A ping has an address, and sends three echoes by default."""
    answer = client().post("/admin/ping", data=b'{"address":"10.0.4.2"}')
    assert msgspec.json.decode(answer.data, type=PingRequest) == PingRequest("10.0.4.2", 3)


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[", b'{"address":7}', b'{"address":"a","count":"b"}']
)
def test_bad_ping_request(body: bytes) -> None:
    """An invalid ping is refused in JSON."""
    answer = client().post("/admin/ping", data=body)
    assert answer.status_code == 400
    assert answer.get_json()["error"].startswith("ping: ")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("no address"), 400),
        (NotFound("no container"), 404),
        (KernelError("no socket"), 500),
        (ValueError("a bug"), 500),
    ],
)
def test_errors(error: Exception, code: int) -> None:
    """Every error is JSON with its text, with the status of a client's or a server's error."""

    def fail(wanted: PingRequest) -> None:
        raise error

    answer = client(fail).post("/admin/ping", data=b'{"address":"10.0.4.2"}')
    assert answer.status_code == code
    assert str(error) in answer.get_json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/admin/other", 404),
        ("POST", "/admin/status", 405),
        ("GET", "/admin/ping", 405),
        ("POST", "/NetworkDriver.Join", 404),
    ],
)
def test_unknown(method: str, path: str, code: int) -> None:
    """Unknown paths and methods are refused in JSON, too."""
    answer = client().open(path, method=method)
    assert answer.status_code == code
    assert answer.get_json()["error"]


def test_large_body() -> None:
    """A body over the limit is refused."""
    assert client().post("/admin/ping", data=b" " * 5000).status_code == 413


def test_runtime_question() -> None:
    """freeflow-runc gets a short answer; a malformed question is refused."""
    answer = client().post("/admin/runtime", data=b'{"networks":[{"name":"n","id":""}]}')
    assert answer.data == b'{"accelerated":true}\n'
    assert client().post("/admin/runtime", data=b'{"networks":7}').status_code == 400
