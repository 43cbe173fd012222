"""Links over TCP: calls that move little or nothing, lost sockets, and what is encrypted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataplane.router.relay_wire import ENCRYPT_ALL, ENCRYPT_MESSAGES, ENCRYPT_NOTHING
from testbed.relays import TCP, End, Relay, connect, link, more, pair, relays, result
from tests.relay.test_faults import kept_up

LOSSES = int(os.environ.get("RELAY_LOSSES", "25"))
SEED = int(os.environ.get("TORTURE_SEED") or "1")
MODES = [ENCRYPT_NOTHING, ENCRYPT_MESSAGES, ENCRYPT_ALL]


def crowd(a: Relay, b: Relay, count: int) -> tuple[list[End], list[End]]:
    """Connections between two arenas."""
    first, second = connect(a, b)
    ones, twos = [first], [second]
    for slot in range(1, count):
        ones.append(more(first, slot))
        twos.append(more(second, slot))
        assert not pair(ones[-1], twos[-1]).error
        assert not pair(twos[-1], ones[-1]).error
    return ones, twos


def exchange(end: Path, ones: list[End], twos: list[End], size: int, *options: str) -> None:
    """Each end sends checked bytes, and receives those of the other."""
    processes = []
    for number, (one, two) in enumerate(zip(ones, twos, strict=True), 1):
        for each, mine, other in (one, number, number + 1000), (two, number + 1000, number):
            seeds = f"seed={mine}", f"peer_seed={other}"
            processes.append(each.popen(end, f"send={size}", *seeds, *options))
    for process in processes:
        said = result(process, 120)
        assert (said["sent"], said["received"], said["broken"]) == (size, size, 0)


@pytest.mark.parametrize("encryption", MODES)
@pytest.mark.parametrize("faults", ["short=2,again=3,seed=1", "short=9,again=9,seed=2"])
def test_calls_that_move_a_byte_or_nothing(
    binary: Path, end: Path, faults: str, encryption: int
) -> None:
    """Reads of one byte, sends of a part and EAGAIN at any point change no byte."""
    with relays(binary, faults, transport=TCP, encryption=encryption) as (a, b):
        link(a, b)
        ones, twos = crowd(a, b, 4)
        exchange(end, ones, twos, 300_000, "message=20000", "pace=100")


@pytest.mark.parametrize("encryption", MODES)
def test_a_connection_in_bulk_goes_over_to_a_lane_of_its_own(
    binary: Path, end: Path, encryption: int
) -> None:
    """A connection changes its lane, to bulk and back, without moving a byte of its stream."""
    with relays(binary, transport=TCP, encryption=encryption) as (a, b):
        link(a, b)
        ones, twos = crowd(a, b, 3)
        exchange(end, ones, twos, 12_000_000, "message=100000")
        # What is not encrypted is not copied: it is received into its place.
        copied = a.counts()["copied"]
        assert (copied < 30_000_000) == (encryption != ENCRYPT_ALL), copied


@pytest.mark.parametrize("encryption", MODES)
def test_a_link_that_is_lost_again_and_again_loses_nothing(
    binary: Path, end: Path, encryption: int
) -> None:
    """A link that is lost at any call, and made again, loses, doubles and moves no byte."""
    faults = f"short=10,again=10,reset=40,seed={encryption + SEED}"
    with relays(binary, faults, transport=TCP, encryption=encryption) as (a, b):
        link(a, b)
        with kept_up(a, b) as made:
            while made[0] < LOSSES:
                ones, twos = crowd(a, b, 3)
                exchange(end, ones, twos, 3_000_000, "message=30000", "pace=100")
        for each in (a, b):
            assert each.counts()["corrupt"] == each.counts()["broken"] == 0
            assert each.counts()["resumed"] >= LOSSES // 2
