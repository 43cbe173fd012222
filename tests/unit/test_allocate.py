"""What all hosts must agree on."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import allocate
from driver.errors import Conflict
from driver.model import Network

SWARM_IDS = st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=25, max_size=25)
ID = "p3l8f1w0gk2c9d7h5m6n4b0aq"
OTHER = "zzz8f1w0gk2c9d7h5m6n4b0aq"


def make(
    network_id: str = ID,
    generic: dict[str, str] | None = None,
    taken: dict[int, str] | None = None,
    mtu: int = 1450,
    port: int = 4799,
) -> Network:
    return allocate.network(
        network_id, generic or {}, port=port, default_mtu=lambda encrypted: mtu, taken=taken or {}
    )


@given(SWARM_IDS)
def test_leaders_agree(network_id: str) -> None:
    """Two leaders without each other's state make the same choices, within the ranges."""
    first, second = make(network_id), make(network_id)
    assert first == second
    assert 1 <= first.vni < 1 << 24
    assert first.prefix6.subnet_of(IPv6Network("fd00::/8"))
    assert first.prefix6.prefixlen == 64


def test_choices_are_kept_for_life() -> None:
    """The choices for an ID never change between versions: hosts of two versions must meet."""
    chosen = make()
    assert (chosen.vni, str(chosen.prefix6)) == (16551524, "fdeb:c79:efc5:2c5c::/64")


@given(SWARM_IDS, st.sets(st.integers(1, (1 << 24) - 1), max_size=50))
def test_taken_vnis_are_avoided(network_id: str, taken: set[int]) -> None:
    """A VNI of another network is never assigned again."""
    first = allocate.vni_for(network_id, ())
    taken |= {first, first % ((1 << 24) - 1) + 1}
    vni = allocate.vni_for(network_id, taken)
    assert vni not in taken
    assert 1 <= vni < 1 << 24


@given(SWARM_IDS, st.sampled_from(["", "mtu", "vni", "both"]))
def test_reallocation_is_the_same_answer(network_id: str, given_by_user: str) -> None:
    """After a change of leader the answer is the same, whatever the new leader's settings and
    networks."""
    user = {
        "": {},
        "mtu": {"mtu": "9000"},
        "vni": {"vni": "77"},
        "both": {"mtu": "8950", "vni": "78", "acceleration": "off"},
    }[given_by_user]
    answer = allocate.answer(make(network_id, user))
    assert user.items() <= answer.items()
    crowded = {int(answer["freeflow.vni"]): OTHER}
    again = make(network_id, answer, taken=crowded, mtu=1300, port=5000)
    assert allocate.answer(again) == answer


def test_user_vni_conflict() -> None:
    """A requested VNI that another network has is refused, with that network's ID."""
    assert make(generic={"vni": "77"}, taken={77: ID}).vni == 77
    with pytest.raises(Conflict, match=f"vni=77 is taken by network {OTHER}"):
        make(generic={"vni": "77"}, taken={77: OTHER})


def test_underlay_is_asked_only_when_needed() -> None:
    """With an MTU given, the underlay isn't read, so a host without underlay can allocate."""

    def no_underlay(encrypted: bool) -> int:
        raise AssertionError("asked")

    chosen = allocate.network(ID, {"mtu": "1400"}, port=4799, default_mtu=no_underlay, taken={})
    assert chosen.mtu == 1400


@given(st.ip_addresses(v=4))
def test_derived_addresses_are_unique(address: IPv4Address) -> None:
    """MAC and IPv6 address name their IPv4 address, so no two endpoints of a network share them."""
    mac = allocate.mac_for(address)
    assert mac.startswith("02:42:")
    assert IPv4Address(bytes.fromhex(mac.replace(":", ""))[2:]) == address
    prefix = IPv6Network("fd00:1:2:3::/64")
    derived = allocate.ipv6_for(prefix, address)
    assert derived in prefix
    assert int(derived) & 0xFFFFFFFF == int(address)


def test_derived_address_examples() -> None:
    """The derived addresses are those of the documentation."""
    assert allocate.mac_for(IPv4Address("10.0.4.7")) == "02:42:0a:00:04:07"
    derived = allocate.ipv6_for(IPv6Network("fd00:1:2:3::/64"), IPv4Address("10.0.4.7"))
    assert derived == IPv6Address("fd00:1:2:3::a00:407")


def test_mac_without_address() -> None:
    """An endpoint without IPv4 address has a stable unicast MAC that no derived one can equal."""
    mac = allocate.mac_for_id("e" * 64)
    assert mac == allocate.mac_for_id("e" * 64) != allocate.mac_for_id("f" * 64)
    assert int(mac[:2], 16) & 3 == 2
    assert not mac.startswith("02:")
