"""The live page over HTTP: who gets it, what it may do, and how many may watch."""

from __future__ import annotations

import hmac
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from flask.testing import FlaskClient

from driver.errors import EngineError
from plugin import page_app
from plugin.page_app import FOLDER, STREAMS, PageAccess, create_page, events, is_loopback
from plugin.page_feed import PageFeed, PageSource
from plugin.page_traffic import TrafficView
from plugin.page_view import MapView
from testbed.example_swarm import shop

TOKEN: Final = "t" * 32
DATA: Final = ("/snapshot", "/events")


class _Once:
    """Ends a stream after its first events."""

    def wait(self, _seconds: float) -> bool:
        return True


def client(token: str = "", *, loopback: bool = True) -> FlaskClient:
    feed = PageFeed(shop().source())
    made = create_page(feed, PageAccess(token, loopback)).test_client()
    made.environ_base["HTTP_HOST"] = "127.0.0.1:9477"
    return made


def get(made: FlaskClient, path: str, **headers: str) -> Any:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return made.get(path, headers=fields)


def test_snapshot() -> None:
    """The snapshot is one JSON value: the map, and what connections carry."""
    answer = get(client(), "/snapshot")
    assert answer.content_type == "application/json"
    found = msgspec.json.decode(answer.data, type=dict[str, msgspec.Raw])
    nodes = msgspec.json.decode(found["map"], type=MapView)
    assert nodes.host == "alpha"
    assert msgspec.json.decode(found["traffic"], type=TrafficView).edges


def test_events() -> None:
    """A stream begins with the map and the traffic, each as one line of JSON."""
    answer = get(client(), "/events")
    assert answer.content_type == "text/event-stream"
    first, second = next(answer.response), next(answer.response)
    answer.close()
    kind, data = first.decode().removesuffix("\n\n").split("\n")
    assert kind == "event: map"
    assert msgspec.json.decode(data.removeprefix("data: "), type=MapView).containers
    assert second.startswith(b"event: traffic\ndata: {")


def test_an_equal_map_is_sent_once() -> None:
    """As long as the map stays, only traffic is sent."""
    now = [0.0]
    feed = PageFeed(shop().source(), lambda: now[0])

    class Later(_Once):
        def wait(self, seconds: float) -> bool:
            now[0] += seconds
            return now[0] > 20

    sent = [each.partition(b"\n")[0] for each in events(feed, Later())]  # type: ignore[arg-type]
    assert sent[0] == b"event: map"
    assert sent[1:] == [b"event: traffic"] * (len(sent) - 1)
    assert len(sent) > 5


def test_a_plugin_without_status() -> None:
    """A stream says why there is no status, and goes on."""

    def fail() -> Any:
        raise EngineError("no status", cause="x", remedy="freeflow doctor")

    feed = PageFeed(PageSource(fail, fail, fail))
    (only,) = events(feed, _Once())  # type: ignore[arg-type]
    assert only.startswith(b'event: trouble\ndata: {"error":"no status: x; freeflow doctor"')
    app = create_page(feed, PageAccess("", loopback=True)).test_client()
    assert get(app, "/snapshot", Host="localhost").status_code == 500


# --- who gets it


@pytest.mark.parametrize("path", DATA)
@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({}, 401),
        ({"Authorization": f"Bearer {'u' * 32}"}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": TOKEN}, 401),
        ({"Authorization": "Bearer ü"}, 401),
        ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ({"Authorization": f"bearer {TOKEN}"}, 200),
    ],
)
@pytest.mark.parametrize("loopback", [True, False])
def test_token(path: str, header: dict[str, str], code: int, loopback: bool) -> None:
    """With a token, only who sends it gets data, on loopback addresses too."""
    answer = get(client(TOKEN, loopback=loopback), path, **header)
    assert answer.status_code == code
    answer.close()
    if code == 401:
        assert TOKEN.encode() not in answer.data
        assert answer.get_json()["cause"] == "the token is missing or wrong"


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison takes as long whatever the token's first difference is."""
    compared = []

    def noted(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return hmac.compare_digest(one, other)

    class Hmac:
        compare_digest = staticmethod(noted)

    monkeypatch.setattr(page_app, "hmac", Hmac)
    get(client(TOKEN), "/snapshot", Authorization="Bearer wrong")
    assert compared == [(b"wrong", TOKEN.encode())]


def test_the_token_is_in_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither representations nor the log have the token, even after an error."""
    access = PageAccess(TOKEN, loopback=True)
    assert TOKEN not in repr(access)

    def fail() -> Any:
        raise ValueError("a bug")

    app = create_page(PageFeed(PageSource(fail, fail, fail)), access).test_client()
    answer = get(app, "/snapshot", Authorization=f"Bearer {TOKEN}")
    assert answer.status_code == 500
    shown = capsys.readouterr()
    assert "a bug" in shown.out + shown.err
    assert TOKEN not in shown.out + shown.err + answer.get_data(as_text=True)


@pytest.mark.parametrize("path", DATA)
def test_no_token_and_no_loopback(path: str) -> None:
    """Where other hosts may reach the address, nobody gets data without a token, and the answer
    says how to set one.
    """
    answer = get(client(loopback=False), path)
    assert answer.status_code == 403
    assert "UI_TOKEN=" in answer.get_json()["remedy"]


@pytest.mark.parametrize("path", DATA)
@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:9477", 200),
        ("127.0.0.1", 200),
        ("localhost:9999", 200),
        ("[::1]:9477", 200),
        ("evil.example:9477", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("192.0.2.1:9477", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_names_of_other_sites(path: str, host: str, code: int) -> None:
    """Without a token, a site whose name leads to this host (DNS rebinding) gets no data."""
    answer = get(client(), path, Host=host)
    answer.close()
    assert answer.status_code == code


@pytest.mark.parametrize(
    ("site", "code"),
    [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)],
)
def test_other_sites_take_no_streams(site: str, code: int) -> None:
    """A browser's request for another site's page gets no data, and takes no stream."""
    answer = get(client(), "/events", Sec_Fetch_Site=site)
    answer.close()
    assert answer.status_code == code


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("localhost.", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    """Only addresses that other hosts can't reach are loopback."""
    assert is_loopback(host) is expected


# --- what it may do


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/", "/main.js", *DATA])
def test_nothing_is_written(method: str, path: str) -> None:
    """The page only reads: no other method does anything."""
    assert client().open(path, method=method).status_code == 405


@pytest.mark.parametrize("path", ["/", "/main.js", "/page.css", "/icon.svg", "/nothing", *DATA])
def test_headers(path: str) -> None:
    """Each answer forbids foreign scripts and frames, guessing of types, and caches."""
    answer = get(client(), path)
    answer.close()
    policy = dict(
        each.strip().partition(" ")[::2]
        for each in answer.headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert "Set-Cookie" not in answer.headers


def test_files() -> None:
    """Every file of the page is served with its type, and nothing else is."""
    app = client(TOKEN, loopback=False)
    for path in FOLDER.iterdir():
        answer = get(app, f"/{path.name}")
        assert answer.data == path.read_bytes()
        assert answer.content_type == page_app._TYPES[path.suffix]
    assert get(app, "/").data == (FOLDER / "index.html").read_bytes()
    for other in ("/../page_app.py", "/%2e%2e/page_app.py", "/page_app.py", "/a/b"):
        assert get(app, other).status_code == 404


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_the_page_needs_nothing_from_elsewhere(path: Path) -> None:
    """Files name no other address, and make no markup or code of texts."""
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "://" not in text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert not re.search(r"\son\w+=|style=|javascript:|new Function|@import", text)


def test_streams_are_limited() -> None:
    """So many browsers may watch; the next one is told so until another one leaves."""
    app = client()
    streams = [get(app, "/events") for _ in range(STREAMS)]
    refused = get(app, "/events")
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "10"
    assert get(app, "/snapshot").status_code == 200
    # One that has read nothing, and one that has.
    streams[0].close()
    next(streams[1].response)
    streams[1].close()
    streams[1].close()
    again = [get(app, "/events") for _ in range(2)]
    assert [each.status_code for each in again] == [200, 200]
    assert get(app, "/events").status_code == 503
    for each in streams + again:
        each.close()
