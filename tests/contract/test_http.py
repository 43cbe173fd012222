"""The transport: methods, status codes, content types, bodies, connections."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from plugin.app import CONTENT_TYPE, MAX_BODY
from tests.contract.golden import IDS
from tests.contract.places import DOCKERS_HEADERS, REAL, FakePlace, Place, Places, call

NET, EP = IDS["<net>"], IDS["<ep>"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/Plugin.Activate", "/NetworkDriver.GetCapabilities"])
def test_questions_by_either_method(place: Place, method: str, path: str) -> None:
    """Requests that other suites send by GET get the same answer by GET and POST, in one line."""
    reply = place.send(method, path)
    assert reply.status == 200
    assert reply.body == place.send("POST", path).body
    assert reply.body.count(b"\n") == 1


def test_activation_byte_for_byte(place: Place) -> None:
    """go-plugins-helpers TestActivate: one object with one list of one name, and a newline."""
    assert place.send("GET", "/Plugin.Activate").body == b'{"Implements":["NetworkDriver"]}\n'


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_calls_are_posts(place: Place, method: str) -> None:
    """The plugin refuses other methods than POST, in JSON."""
    reply = place.send(method, "/NetworkDriver.Join")
    assert (reply.status, reply.content_type) == (405, CONTENT_TYPE)
    assert "/NetworkDriver.Join" in reply.json["Err"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/NetworkDriver",
        "/NetworkDriver.",
        "/NetworkDriver.join",
        "/networkdriver.Join",
        "/NetworkDriver.Join/",
        "/NetworkDriver.Join/x",
        "/NetworkDriver.__class__",
        "/static/app.py",
        "/admin/status",
        "/admin/metrics",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/" + "x" * 2000,
    ],
)
def test_unknown_paths(place: Place, path: str) -> None:
    """Docker reads 404 as "not implemented": all paths except those of calls get it, the command's
    API too.
    """
    reply = place.send("POST", path)
    assert (reply.status, reply.content_type) == (404, CONTENT_TYPE)
    assert reply.json["Err"].endswith("is not a call that FreeFlow knows")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": ""},
        {"Host": "plugin.moby.localhost"},
        {"Host": "/run/docker/plugins/freeflow.sock"},
        {"Host": "a", "Content-Type": "application/json"},
        {"Host": "a", "Content-Type": "text/plain; charset=latin-1"},
        {"Host": "a", "Content-Type": "application/x-www-form-urlencoded"},
        {"Host": "a", "Content-Type": "multipart/form-data; boundary=x"},
        {"Host": "a", "Content-Type": "nonsense"},
        {"Host": "a", "Accept": "text/html"},
    ],
    ids=lambda headers: ", ".join(f"{name} {value}" for name, value in headers.items()),
)
def test_headers_do_not_matter(place: Place, headers: dict[str, str]) -> None:
    """Only the body is the request: engines send odd hosts and no content type, curl sends
    others.
    """
    body = msgspec.json.encode({"NetworkID": NET})
    reply = place.send("POST", "/NetworkDriver.CreateNetwork", body, headers)
    assert (reply.status, reply.json, reply.content_type) == (200, {}, CONTENT_TYPE)


@pytest.mark.parametrize("body", [b"", b" ", b"\n", b"\r\n\t "])
def test_lost_bodies(place: Place, body: bytes) -> None:
    """A repetition without its body is refused as such, and does nothing."""
    for name in ("CreateNetwork", "CreateEndpoint", "Join", "DeleteNetwork", "AllocateNetwork"):
        reply = place.send("POST", f"/NetworkDriver.{name}", body)
        assert reply.status == 400
        assert "has no body" in reply.json["Err"]


def test_large_body(place: Place) -> None:
    """A body over the limit is refused unread; one below it is only invalid."""
    reply = place.send("POST", "/NetworkDriver.Join", b" " * (MAX_BODY + 1))
    assert (reply.status, reply.content_type) == (413, CONTENT_TYPE)
    assert reply.json["Err"]
    big = msgspec.json.encode({"NetworkID": "n" * (MAX_BODY - 100)})
    reply = place.send("POST", "/NetworkDriver.DeleteNetwork", big)
    assert reply.status == 400
    assert len(reply.body) < 1000


def test_errors_quote_little(place: Place) -> None:
    """An error that quotes the caller's input is no longer than a screen, however long the input
    is.
    """
    options = {"x" * 300_000: "y", "z" * 300_000: "y"}
    reply = call(place, "AllocateNetwork", {"NetworkID": NET, "Options": options})
    assert reply.status == 400
    assert reply.json["Err"].startswith("unknown option xxx")
    assert len(reply.body) < 5000


def _endpoint(number: int) -> dict[str, Any]:
    return {
        "NetworkID": NET,
        "EndpointID": f"{number:012x}{'e' * 52}",
        "Interface": {"Address": f"10.0.4.{number}/24", "AddressIPv6": "", "MacAddress": ""},
    }


def test_calls_side_by_side(place: Place) -> None:
    """Twenty containers that start and end at once get their own answers, and leave nothing
    behind.
    """
    assert call(place, "CreateNetwork", {"NetworkID": NET}).status == 200

    def live(number: int) -> None:
        endpoint = _endpoint(number)
        both = {key: endpoint[key] for key in ("NetworkID", "EndpointID")}
        made = call(place, "CreateEndpoint", endpoint)
        assert made.json == {"Interface": {"MacAddress": f"02:42:0a:00:04:{number:02x}"}}
        joined = call(place, "Join", {**both, "SandboxKey": f"/var/run/docker/netns/{number}"})
        assert joined.json["InterfaceName"]["SrcName"] == f"ffc{number:012x}"
        for name in ("Leave", "DeleteEndpoint"):
            assert call(place, name, both).json == {}

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(live, range(10, 30)))
    assert place.links() == frozenset()


def test_kernel_that_refuses(places: Places, kind: str) -> None:
    """go-plugins-helpers TestCreateNetworkError: a failure of the plugin is a 500 with its cause,
    and is undone.
    """
    own = {"freeflow.format": "1", "freeflow.vni": "7", "freeflow.port": "4799"}
    own |= {"freeflow.mtu": "1400", "freeflow.prefix6": "fd00:1:2:3::/64"}
    network = {"NetworkID": NET, "Options": {"com.docker.network.generic": own}}
    with places.get(kind, {"UNDERLAY": "nosuch0"}) as place:
        assert call(place, "CreateNetwork", network).status == 200
        if isinstance(place, FakePlace):
            place.kernel.failing.add(EP[:12])
        reply = call(place, "CreateEndpoint", {"NetworkID": NET, "EndpointID": EP})
        assert (reply.status, reply.content_type) == (500, CONTENT_TYPE)
        cause = "no memory" if isinstance(place, FakePlace) else "UNDERLAY=nosuch0"
        assert cause in reply.json["Err"]
        assert place.links() == frozenset()
        assert call(place, "Join", {"NetworkID": NET, "EndpointID": EP}).status == 400
        assert call(place, "DeleteNetwork", {"NetworkID": NET}).status == 200


# --- the real socket


@pytest.mark.parametrize("kind", [REAL], indirect=True)
@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 4096, b"GET\r\n\r\n", b"POST /NetworkDriver.Join HTTP/9.9\r\n\r\n", b"x" * 70000, b""],
    ids=["zeros", "half a line", "another version", "an endless line", "nothing"],
)
def test_garbage_on_the_socket(places: Places, kind: str, garbage: bytes) -> None:
    """Whatever arrives on the socket, the next request is answered."""
    place = places.real({})
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(place.socket))
        raw.sendall(garbage)
    assert call(place, "GetCapabilities").status == 200


@pytest.mark.parametrize("kind", [REAL], indirect=True)
def test_callers_that_vanish(places: Places, kind: str) -> None:
    """Callers that disconnect during a request, or after it, do not exhaust the plugin."""
    place = places.real({})
    head = "".join(f"{name}: {value}\r\n" for name, value in DOCKERS_HEADERS.items())
    whole = f"POST /NetworkDriver.GetCapabilities HTTP/1.1\r\n{head}Content-Length: 0\r\n\r\n"
    half = f"POST /NetworkDriver.Join HTTP/1.1\r\n{head}Content-Length: 500\r\n\r\n{{"
    for request in (whole, half) * 30:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(place.socket))
            raw.sendall(request.encode())
    assert call(place, "GetCapabilities").status == 200


@pytest.mark.parametrize("kind", [REAL], indirect=True)
def test_admin_api_answers_on_its_own_socket_only(places: Places, kind: str) -> None:
    """Root's socket answers the command's requests, and not Docker's calls."""
    place = places.real({})
    admin = place.admin()
    status = admin.send("GET", "/admin/status")
    assert (status.status, status.content_type) == (200, "application/json")
    assert status.json["host"]["underlay"] == "under0"
    assert admin.send("POST", "/NetworkDriver.GetCapabilities").status == 404
    assert place.send("GET", "/admin/status").status == 404
