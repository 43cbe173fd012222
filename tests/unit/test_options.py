"""Options of networks and endpoints."""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network

import pytest

from driver import options
from driver.errors import InvalidRequest

ALLOCATED = {
    "freeflow.format": "1",
    "freeflow.vni": "70012",
    "freeflow.port": "4799",
    "freeflow.mtu": "1450",
    "freeflow.prefix6": "fd00:1:2:3::/64",
}


def test_defaults() -> None:
    """A network without options leaves every choice to FreeFlow, and acceleration on."""
    parsed = options.parse({})
    assert (parsed.mtu, parsed.vni, parsed.acceleration) == (None, None, True)
    assert parsed.upgrade_operations is None
    assert parsed.rdma
    assert parsed.relay
    assert parsed.verbs
    assert not parsed.verbs_direct
    assert parsed.own_vni is None


def test_user_options() -> None:
    """The user's options are taken as given."""
    parsed = options.parse(
        {
            "mtu": "9000",
            "vni": "70012",
            "acceleration": "off",
            "rdma": "off",
            "relay": "off",
            "verbs": "off",
            "verbs_direct": "on",
            "balance": "Local",
            "upgrade_operations": "16",
        }
    )
    assert parsed.upgrade_operations == 16
    assert parsed.balance == "local"
    assert not parsed.rdma
    assert not parsed.relay
    assert not parsed.verbs
    assert parsed.verbs_direct
    assert (parsed.mtu, parsed.vni, parsed.acceleration) == (9000, 70012, False)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [("on", True), ("true", True), ("TRUE", True), ("off", False), ("false", False)],
)
def test_acceleration_spellings(text: str, meaning: bool) -> None:
    """Acceleration can be switched with the usual words."""
    assert options.parse({"acceleration": text}).acceleration is meaning


def test_mtu_by_dockers_name() -> None:
    """The MTU can also be given under the name that Docker's other drivers use."""
    assert options.parse({"com.docker.network.driver.mtu": "1400"}).mtu == 1400


def test_mtu_by_both_names() -> None:
    """Two names for the MTU with two values are refused rather than one of them ignored."""
    same = {"mtu": "1400", "com.docker.network.driver.mtu": "1400"}
    assert options.parse(same).mtu == 1400
    with pytest.raises(InvalidRequest, match="contradict"):
        options.parse(same | {"mtu": "9000"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mtu", "1279"),
        ("mtu", "65536"),
        ("mtu", ""),
        ("mtu", "-1500"),
        ("mtu", "9_000"),
        ("mtu", " 9000"),
        ("mtu", "٩٠٠٠"),
        ("mtu", "9" * 5000),
        ("com.docker.network.driver.mtu", "jumbo"),
        ("vni", "0"),
        ("vni", "16777216"),
        ("acceleration", "maybe"),
        ("rdma", "auto"),
        ("relay", "tcp"),
        ("verbs", "rxe"),
        ("verbs_direct", "maybe"),
        ("balance", "near"),
        ("upgrade_operations", "0"),
        ("upgrade_operations", "many"),
    ],
)
def test_bad_values(key: str, value: str) -> None:
    """A bad value is refused with the key's name and an example line."""
    with pytest.raises(InvalidRequest, match=rf"option {key}=.*for example -o {key}="):
        options.parse({key: value})


@pytest.mark.parametrize("key", ["mtuu", "MTU", "com.docker.network.bridge.name", "vxlanid"])
def test_unknown_key(key: str) -> None:
    """An unknown option is refused by name, with the known ones and an example line."""
    with pytest.raises(InvalidRequest) as refused:
        options.parse({key: "1", "mtu": "1400"})
    message = str(refused.value)
    assert f"unknown option {key}" in message
    assert all(known in message for known in options.USER_KEYS)
    assert "-o mtu=9000" in message


@pytest.mark.parametrize(
    ("value", "encrypted"),
    [("", True), ("true", True), ("on", True), ("1", True), ("false", False), ("off", False)],
)
def test_encrypted(value: str, encrypted: bool) -> None:
    """`encrypted` is on as users of Docker's overlay write it, and off where they say so."""
    assert options.parse({"encrypted": value}).encrypted is encrypted


def test_encrypted_is_not_guessed() -> None:
    """A value that is neither on nor off is refused, not taken for off."""
    with pytest.raises(InvalidRequest, match="neither on nor off"):
        options.parse({"encrypted": "aes"})


def test_not_encrypted_by_itself() -> None:
    """Without the option a network is not encrypted."""
    assert not options.parse({}).encrypted


@pytest.mark.parametrize(
    "key",
    [
        "com.docker.network.advertise_addr_nmsgs",
        "com.docker.network.advertise_addr_ms",
        "com.docker.network.enable_ipv6",
    ],
)
def test_engine_keys_pass(key: str) -> None:
    """Options that the engine consumes are accepted."""
    assert options.parse({key: "3"}) == options.parse({})


def test_allocated() -> None:
    """What an allocation chose comes back as chosen."""
    parsed = options.parse(ALLOCATED)
    assert parsed.own_format == 1
    assert (parsed.own_vni, parsed.own_port, parsed.own_mtu) == (70012, 4799, 1450)
    assert parsed.own_prefix6 == IPv6Network("fd00:1:2:3::/64")


@pytest.mark.parametrize("key", ["freeflow.vni", "freeflow.typo"])
def test_own_keys_are_not_the_users(key: str) -> None:
    """A user can't set what FreeFlow chooses; the refusal lists the user's options."""
    with pytest.raises(InvalidRequest, match=rf"{key}: chosen by FreeFlow.*vni"):
        options.parse({key: "5"})


def test_later_additions_pass() -> None:
    """A manager of a later version may add keys within the same format."""
    assert options.parse(ALLOCATED | {"freeflow.colour": "blue"}) == options.parse(ALLOCATED)


def test_later_format() -> None:
    """A network of a later format is refused with the remedy, whatever its other options are."""
    with pytest.raises(InvalidRequest, match="upgrade the plugin on this host"):
        options.parse({"freeflow.format": "3", "freeflow.cipher": "x", "surprise": "y"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("freeflow.vni", "0"),
        ("freeflow.port", "70000"),
        ("freeflow.prefix6", "fd00::/48"),
        ("freeflow.prefix6", "10.0.0.0/8"),
        ("freeflow.mtu", "x"),
        ("freeflow.format", "0"),
    ],
)
def test_damaged_allocation(key: str, value: str) -> None:
    """An invalid allocation is refused by key, and not partly used."""
    with pytest.raises(InvalidRequest, match=key):
        options.parse(ALLOCATED | {key: value})


def test_endpoint_options() -> None:
    """Docker's own per-endpoint options pass, one is ours, others are refused by name."""
    assert options.parse_endpoint({"ip6": "fd00::9"}) == IPv6Address("fd00::9")
    assert not options.parse_endpoint(
        {"com.docker.network.endpoint.exposedports": [], "com.docker.network.portmap": []}
    )
    with pytest.raises(InvalidRequest, match="driver-opt speed, turbo"):
        options.parse_endpoint({"turbo": "1", "speed": "2"})
