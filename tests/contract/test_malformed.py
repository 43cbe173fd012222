"""Bodies that Docker never sends: the answer is always Docker's JSON, and the plugin continues.

Most inputs are golden requests with one error, because pure noise never gets past the decoder. They
are sent one after the other to the same place, so they also meet whatever earlier ones have made.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugin.app import CALLS, CONTENT_TYPE
from tests.contract.golden import IDS, cases, forget_all
from tests.contract.places import DOCKERS_HEADERS, Place, Places, RealPlace, Reply, call

EXAMPLES: Final = {"fake": 400, "real": 100}
NAMES: Final = tuple(sorted(CALLS))
SEEDS: Final = tuple(
    (step.call, step.request)
    for case in cases()
    for step in case.steps
    if step.call in CALLS and step.request is not None
)

text = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        [
            *IDS.values(),
            "",
            "0.0.0.0/0",
            "10.0.4.7/24",
            "10.0.4.0/24",
            "::/0",
            "fe80::1%eth0/64",
            "ff02::1/128",
            "02:42:0a:00:04:07",
            "ff:ff:ff:ff:ff:ff",
            "1400",
            "-1",
            "1e9",
            "../../../etc/passwd",
            "a\0b",
            "/var/run/docker/netns/\0",
            "com.docker.network.generic",
            "freeflow.vni",
            "x" * 5000,
            "\ud7ff\U0010ffff",
        ]
    ),
)
scalar = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**400]).map(
        lambda number: number if abs(number) < 2**64 else msgspec.Raw(str(number).encode())
    ),
    st.floats(allow_nan=False, allow_infinity=False),
    text,
)
anything = st.recursive(
    scalar,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A body with one error: a part replaced, removed, added or repeated."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(anything)
    kind = draw(st.sampled_from(["inside", "inside", "inside", "remove", "add", "repeat"]))
    if isinstance(value, list):
        where = draw(st.integers(0, len(value) - 1))
        if kind == "inside":
            return [*value[:where], draw(mutated(value[where])), *value[where + 1 :]]
        if kind == "remove":
            return value[:where] + value[where + 1 :]
        return [*value, draw(anything) if kind == "add" else value[where]]
    key = draw(st.sampled_from(sorted(value)))
    if kind == "inside":
        return {**value, key: draw(mutated(value[key]))}
    if kind == "remove":
        return {name: item for name, item in value.items() if name != key}
    return {**value, draw(text): draw(anything) if kind == "add" else value[key]}


@st.composite
def wrong_calls(draw: st.DrawFn) -> tuple[str, bytes]:
    """A call and a body: a golden one, unchanged or damaged, another call's, or any JSON."""
    name, request = draw(st.sampled_from(SEEDS))
    if draw(st.integers(0, 9)) == 0:
        name = draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(["as it is", "spoilt", "spoilt", "spoilt", "anything"]))
    if kind == "spoilt":
        request = draw(mutated(request))
    elif kind == "anything":
        request = draw(anything)
    return name, msgspec.json.encode(request)


@st.composite
def broken_bytes(draw: st.DrawFn) -> tuple[str, bytes]:
    """A call and bytes that are hardly JSON: noise, or a golden body truncated, flipped or
    doubled.
    """
    name, request = draw(st.sampled_from(SEEDS))
    body = msgspec.json.encode(request)
    where = draw(st.integers(0, len(body)))
    kind = draw(st.sampled_from(["noise", "cut", "noise inside", "doubled"]))
    if kind == "noise":
        return name, draw(st.binary(max_size=200))
    if kind == "cut":
        return name, body[:where]
    if kind == "doubled":
        return name, body + body
    return name, body[:where] + draw(st.binary(min_size=1, max_size=4)) + body[where:]


def check(reply: Reply) -> None:
    """Assert the promise: a JSON object; an error has its text, and is neither a bug nor the
    kernel's.
    """
    assert reply.content_type == CONTENT_TYPE
    answer = reply.json
    assert isinstance(answer, dict)
    if reply.status == 200:
        assert "Err" not in answer
    else:
        assert reply.status in (400, 404, 413)
        assert isinstance(answer["Err"], str)
        assert answer["Err"]
        assert "bugreport" not in answer["Err"]
        assert len(answer["Err"]) < 5000


def send_all(place: Place, inputs: st.SearchStrategy[tuple[str, bytes]], examples: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def send(wrong: tuple[str, bytes]) -> None:
        name, body = wrong
        check(place.send("POST", f"/NetworkDriver.{name}", body))

    send()
    assert call(place, "GetCapabilities").status == 200
    forget_all(place)
    assert place.links() == frozenset()


def test_wrong_shapes(places: Places, kind: str) -> None:
    """JSON of any shape is answered or refused in Docker's format, and its results can be
    removed.
    """
    with places.get(kind, {}) as place:
        send_all(place, wrong_calls(), EXAMPLES[kind])
        if isinstance(place, RealPlace):
            assert "Traceback" not in place.log.read_text()


def test_broken_bytes(places: Places, kind: str) -> None:
    """Bytes that are not JSON are refused in Docker's format."""
    with places.get(kind, {}) as place:
        send_all(place, broken_bytes(), EXAMPLES[kind] // 2)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"NetworkID":' * 50_000,
        b'{"NetworkID":"'
        + IDS["<net>"].encode()
        + b'","Options":'
        + b"[" * 20_000
        + b"]" * 20_000
        + b"}",
        b'{"Options":' * 3_000 + b"1" + b"}" * 3_000,
        b"1" * 100_000,
        b'"\\ud800"',
        b'{"NetworkID":"\xff\xfe"}',
        b"\xef\xbb\xbf{}",
        b"NaN",
        b"{}{}",
        b"null",
        b"\0",
    ],
    ids=[
        "deep lists",
        "deep objects",
        "deep options",
        "deep and closed",
        "a long number",
        "half a surrogate",
        "not UTF-8",
        "byte order mark",
        "NaN",
        "two objects",
        "null",
        "a zero",
    ],
)
def test_hostile_bodies(place: Place, body: bytes) -> None:
    """Every call refuses bodies that break parsers, or ignores them."""
    for name in NAMES:
        reply = place.send("POST", f"/NetworkDriver.{name}", body)
        check(reply)
        if name not in ("GetCapabilities", "GwAllocCheck"):
            assert reply.status == 400


@pytest.mark.parametrize(
    "content_type", ["application/json", "multipart/form-data", "text/html", "\x7f"]
)
def test_broken_bytes_under_any_content_type(place: Place, content_type: str) -> None:
    """The content type that a caller states changes nothing."""
    headers = {**DOCKERS_HEADERS, "Content-Type": content_type}
    check(place.send("POST", "/NetworkDriver.Join", b"--x\r\n\r\n{", headers))


def test_sandbox_that_cannot_be_a_path(places: Places, kind: str) -> None:
    """A sandbox name that no file can have is refused, and not kept for the sync loop."""
    both = {"NetworkID": IDS["<net>"], "EndpointID": IDS["<ep>"]}
    with places.get(kind, {}) as place:
        assert call(place, "CreateNetwork", {"NetworkID": IDS["<net>"]}).status == 200
        assert call(place, "CreateEndpoint", both).status == 200
        for key in ("/var/run/docker/netns/\0", "/var/run/docker/netns/" + "x" * 300, "..", "/"):
            reply = call(place, "Join", {**both, "SandboxKey": key})
            assert reply.status == 400
            assert "SandboxKey" in reply.json["Err"]
        forget_all(place)
