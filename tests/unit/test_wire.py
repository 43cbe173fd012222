"""Docker's JSON and what becomes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_network
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.errors import InvalidRequest
from driver.model import Subnet
from plugin import wire


def test_unknown_fields_are_ignored() -> None:
    """A later engine may say more than we know."""
    call = wire.decode(b'{"NetworkID":"n","Later":{"a":[1]}}', wire.NetworkOnly)
    assert call.NetworkID == "n"


def test_null_is_empty() -> None:
    """Go sends null for an empty list or map."""
    body = b'{"NetworkID":"n","Options":null,"IPv4Data":null,"IPv6Data":null}'
    call = wire.decode(body, wire.CreateNetwork)
    assert wire.generic(call.Options) == {}
    assert wire.subnets(call.IPv4Data, call.IPv6Data) == ()
    assert wire.flag(call.Options, wire.INTERNAL) is False


@pytest.mark.parametrize("body", [b"", b"\n", b"  "])
def test_lost_body(body: bytes) -> None:
    """A lost body is told from a wrong one: Docker repeats requests without it."""
    with pytest.raises(InvalidRequest, match="has no body"):
        wire.decode(body, wire.Join)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "NetworkID"),
        (b'{"NetworkID":1}', "NetworkID"),
        (b'{"NetworkID":"n"}', "EndpointID"),
        (b'{"NetworkID":"n","EndpointID":"e","SandboxKey":[]}', "SandboxKey"),
        (b'{"NetworkID":"n","EndpointID":"e","Options":"x"}', "Options"),
    ],
)
def test_the_field_is_named(body: bytes, field: str) -> None:
    """What is wrong is named by its field."""
    with pytest.raises(InvalidRequest, match=field):
        wire.decode(body, wire.Join)


ROUND_TRIPS: list[tuple[Callable[[str, str], object], str, object]] = [
    (wire.ipv4, "10.0.4.7/24", IPv4Interface("10.0.4.7/24")),
    (wire.ipv6, "fd00::7/64", IPv6Interface("fd00::7/64")),
    (wire.mac, "02:42:AC:11:00:02", "02:42:ac:11:00:02"),
    (wire.ipv4, "", None),
    (wire.ipv6, "", None),
    (wire.mac, "", None),
]


@pytest.mark.parametrize(("parse", "text", "value"), ROUND_TRIPS)
def test_addresses(parse: Callable[[str, str], object], text: str, value: object) -> None:
    """Addresses become values; an empty text is no address."""
    assert parse("Field", text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (wire.ipv4, "10.0.4.7"),
        (wire.ipv4, "10.0.4.7/33"),
        (wire.ipv4, "fd00::7/64"),
        (wire.ipv6, "10.0.4.7/24"),
        (wire.ipv6, "nonsense/64"),
        (wire.mac, "02-42-ac-11-00-02"),
        (wire.mac, "02:42:ac:11:00"),
        (wire.mac, "03:42:ac:11:00:02"),
        (wire.mac, "02:42:ac:11:00:02\n"),
    ],
)
def test_bad_addresses(parse: Callable[[str, str], object], text: str) -> None:
    """A bad address is refused with its field and its text."""
    with pytest.raises(InvalidRequest, match="Field") as refused:
        parse("Field", text)
    assert repr(text) in str(refused.value)


def test_subnets_of_both_families() -> None:
    """Pools keep their order, IPv4 first, with or without a gateway."""
    four = [wire.IPData(Pool="10.0.4.0/24", Gateway="10.0.4.1/24"), wire.IPData(Pool="10.0.5.0/24")]
    six = [wire.IPData(Pool="fd00::/64", Gateway="")]
    assert wire.subnets(four, six) == (
        Subnet(IPv4Network("10.0.4.0/24"), IPv4Interface("10.0.4.1/24")),
        Subnet(IPv4Network("10.0.5.0/24"), None),
        Subnet(IPv6Network("fd00::/64"), None),
    )


@pytest.mark.parametrize("value", [True, "true"])
def test_flag_on(value: object) -> None:
    """A switch is on as JSON says it, or as text."""
    assert wire.flag({wire.INTERNAL: value}, wire.INTERNAL) is True


@pytest.mark.parametrize("value", [1, "yes", "", [], {}])
def test_flag_nonsense(value: object) -> None:
    """A switch is not guessed."""
    with pytest.raises(InvalidRequest, match="internal is neither"):
        wire.flag({wire.INTERNAL: value}, wire.INTERNAL)


@pytest.mark.parametrize("value", ["text", 7, ["a"], {"mtu": 1400}, {"mtu": None}])
def test_generic_nonsense(value: object) -> None:
    """Driver options are texts by name, and nothing else."""
    with pytest.raises(InvalidRequest, match=r"generic is not a map of strings"):
        wire.generic({wire.GENERIC: value})


def test_long_values_do_not_fill_the_log() -> None:
    """A refusal quotes the beginning of a long value only."""
    with pytest.raises(InvalidRequest) as refused:
        wire.generic({wire.GENERIC: ["x" * 100_000]})
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("key", ["", "/var/run/docker/netns/1a2b3c4d5e6f", "1-default"])
def test_sandboxes(key: str) -> None:
    """Docker's names of sandboxes are taken as they are."""
    assert wire.sandbox(key) == key


@pytest.mark.parametrize("key", ["/", "..", "/run/..", "/run/a\0b", "/run/" + "ü" * 200])
def test_bad_sandboxes(key: str) -> None:
    """What no file can be named is no sandbox."""
    with pytest.raises(InvalidRequest, match="SandboxKey"):
        wire.sandbox(key)


json: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json, st.sampled_from([wire.CreateNetwork, wire.CreateEndpoint, wire.Join, wire.Discovery]))
def test_any_json_is_understood_or_refused(value: object, kind: type[Any]) -> None:
    """Any JSON becomes a request or an InvalidRequest."""
    with contextlib.suppress(InvalidRequest):
        assert isinstance(wire.decode(msgspec.json.encode(value), kind), kind)


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    """Any text becomes an address or an InvalidRequest."""
    parsers: list[Callable[[], object]] = [
        lambda: wire.address("F", text),
        lambda: wire.mac("F", text),
        lambda: wire.sandbox(text),
        lambda: wire.subnets([wire.IPData(Pool=text, Gateway=text)]),
    ]
    for parse in parsers:
        with contextlib.suppress(InvalidRequest):
            parse()


@given(st.ip_addresses(network=ip_network("10.0.0.0/8")), st.integers(1, 32))
def test_addresses_come_back_as_they_went(address: Any, prefix: int) -> None:
    """What is said to Docker is what Docker said."""
    text = f"{address}/{prefix}"
    assert str(wire.ipv4("F", text)) == text
