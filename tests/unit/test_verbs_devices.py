"""GIDs and the numbers of queue pairs, as the processes of a container get them."""

from __future__ import annotations

from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.router.library_wire import IPAddress
from dataplane.router.verbs_devices import (
    RANGE,
    RANGES,
    DeviceView,
    Gids,
    QpnRanges,
    guid_of,
    place_gids,
)

A, B, C = (ip_address(f"10.0.4.{n}") for n in range(1, 4))
SIX = ip_address("fd00::1")

ADDRESSES = st.lists(st.sampled_from([A, B, C, SIX]), unique=True)


@given(st.integers(0, 1 << 64))
def test_all_ranges(random: int) -> None:
    """Every range is given once before any is given again; then there is none."""
    ranges = QpnRanges(random)
    taken = {ranges.take() for _ in range(RANGES - 2)}
    assert taken == set(range(RANGE, (RANGES - 1) * RANGE, RANGE))
    assert ranges.take() is None
    ranges.give_back(5 * RANGE)
    assert ranges.take() == 5 * RANGE


def test_a_range_rests() -> None:
    """The range of a process that is gone is the last one to be given again."""
    ranges = QpnRanges(7)
    first = ranges.take()
    assert first == 7 * RANGE
    ranges.give_back(first)
    assert [ranges.take() for _ in range(3)] == [8 * RANGE, 9 * RANGE, 10 * RANGE]


@pytest.mark.parametrize(
    "wanted", [0, 1, RANGE + 1, (RANGES - 1) * RANGE, RANGES * RANGE, 7 * RANGE, 0xFFFFFFFF]
)
def test_ranges_that_nobody_can_want(wanted: int) -> None:
    """A range that is none, is reserved, or is another process's is not given."""
    ranges = QpnRanges(7)
    ranges.take()
    assert ranges.take(wanted) == 8 * RANGE


def test_a_range_of_an_earlier_router() -> None:
    """A free range is given to who wants it."""
    assert QpnRanges(7).take(99 * RANGE) == 99 * RANGE


@given(st.lists(ADDRESSES, min_size=1))
def test_gids_keep_their_index(changes: list[list[IPAddress]]) -> None:
    """A GID that stays keeps its index, an address has one and a GID is an address; index 0 is in
    use if any is.
    """
    gids: Gids = ()
    for addresses in changes:
        before, gids = gids, place_gids(gids, addresses)
        assert set(gids) - {None} == set(addresses)
        for index, gid in enumerate(before):
            assert gids[index] == gid or gid not in addresses
        assert bool(addresses) == bool(gids and gids[0])


def test_a_device_changes() -> None:
    """A process is told of all GIDs when one changes, of nothing when none does, and that it has
    none.
    """
    device = DeviceView(qpn_first=RANGE)
    assert [(each.index, each.count, each.gid) for each in device.update([A, SIX], 10)] == [
        (0, 2, A),
        (1, 2, SIX),
    ]
    assert device.update([A, SIX], 10) == []
    assert [(each.count, each.gid) for each in device.update([A], 10)] == [(2, A), (2, None)]
    assert [(each.count, each.gid) for each in device.update([], 10)] == [(0, None)]
    (back, other) = device.update([B], 10)
    assert (back.gid, other.gid, back.guid) == (B, None, guid_of(A))


def test_a_device_without_numbers() -> None:
    """A process for which there are no numbers has no device."""
    ((told),) = DeviceView().update([A], 10)
    assert (told.count, told.qpn_count, told.gid) == (0, 0, None)


@given(st.ip_addresses(v=4), st.ip_addresses())
def test_guids(one: IPv4Address, other: IPAddress) -> None:
    """A GUID has 64 bits; that of an IPv4 address is no other address's."""
    assert 0 < guid_of(one) < 1 << 64
    assert 0 <= guid_of(other) < 1 << 64
    if other.version == 4 and one != other:
        assert guid_of(one) != guid_of(other)
