"""Arenas for which the relay works only in a part of the time: R_SHARE."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from testbed.patience import patience
from testbed.relays import ARENA, KINDS, End, connect, link, relays, result

pytestmark = pytest.mark.usefixtures("transport")


def set_share(end: End, thousandths: int) -> None:
    """Tell the relay of an end."""
    packed = ARENA.pack(KINDS["SHARE"], ARENA.size, thousandths, end.arena, 0)
    end.relay.raw(packed)


@pytest.mark.parametrize("side", [0, 1], ids=["sender", "receiver"])
def test_nothing_is_lost(binary: Path, end: Path, side: int) -> None:
    """Round trips and streams go on with any share, of either side, which may change or end."""
    with relays(binary, spin=0) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=20000000", "message=3000", "pace=50", "patience=60000")
        first = one.popen(end, *options, "seed=1", "peer_seed=2")
        second = two.popen(end, *options, "seed=2", "peer_seed=1")
        for share in (1, 500, 0, 20, 999, 5, 1000, 300):
            set_share((one, two)[side], share)
            time.sleep(0.05)
        set_share((one, two)[side], 0)
        assert result(first)["received"] == result(second)["received"] == 20_000_000


@pytest.mark.parametrize("spin", [0, 50])
def test_nobody_is_forgotten(binary: Path, end: Path, spin: int) -> None:
    """Whoever rests is served again in time, also if nothing else wakes the relay then."""
    with relays(binary, spin=spin) as (a, b):
        link(a, b)
        pairs = [connect(a, b) for _ in range(2)]
        for (one, two), share in zip(pairs, (50, 130), strict=True):
            set_share(one, share)
            set_share(two, share)
        trips = ("rounds=500", "message=100", "check=0", "patience=10000")
        ends = [
            end_of.popen(end, *trips, f"server={server}")
            for pair in pairs
            for server, end_of in enumerate(pair)
        ]
        assert [process.wait(patience(60)) for process in ends] == [0] * 4


def test_idle_relay_sleeps(binary: Path, end: Path) -> None:
    """A relay with shares sleeps when nothing is to be done, and while only resting arenas have
    something to do.
    """
    with relays(binary, spin=0) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        set_share(one, 50)
        trips = ("rounds=20", "message=100", "check=0", "patience=60000")
        first, second = one.popen(end, *trips), two.popen(end, *trips, "server=1")
        assert first.wait(patience(60)) == second.wait(patience(60)) == 0
        time.sleep(0.3)
        before = a.counts()
        time.sleep(1)
        after = a.counts()
        assert after["sleeps"] - before["sleeps"] <= 4
        assert after["turns"] - before["turns"] < 100


def test_rest_is_kept(binary: Path, end: Path) -> None:
    """In each part of the time no more is sent than what was in the ring, or came just then."""
    ring = 64 << 10
    with relays(binary, spin=0) as (a, b):
        link(a, b)
        one, two = connect(a, b, ring=ring)
        set_share(one, 1)
        options = ("message=20000", "patience=60000")
        first = one.popen(end, "send=100000000000", *options, "receive=1")
        second = two.popen(end, "peer_seed=1", "seed=2", "send=1", *options)
        begin = time.monotonic()
        before = a.counts()["bytes_out"]
        time.sleep(1)
        sent = a.counts()["bytes_out"] - before
        periods = (time.monotonic() - begin) / 0.02 + 2
        for process in (first, second):
            process.kill()
            process.wait()
    assert 0 < sent <= periods * 3 * ring
