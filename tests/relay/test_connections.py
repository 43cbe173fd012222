"""Connections over two relays, in memory and over TCP: bytes, wake-ups, and ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from dataplane.router import layout
from testbed.patience import patience
from testbed.relays import (
    ARENA,
    BROKEN,
    KINDS,
    RING,
    WHOLE,
    End,
    connect,
    drop,
    give_arena,
    give_bells,
    link,
    more,
    pair,
    place,
    relays,
    result,
)

pytestmark = pytest.mark.usefixtures("transport")


def round_trips(one: End, two: End, program: Path, rounds: int) -> None:
    """The two ends of a connection send each other so many messages of 100 bytes in turn."""
    trips = (f"rounds={rounds}", "message=100", "check=0")
    first, second = one.popen(program, *trips), two.popen(program, *trips, "server=1")
    assert first.wait(patience(30)) == second.wait(patience(30)) == 0


@pytest.mark.parametrize(
    ("ring", "message", "pace"),
    [(64 << 10, 1, 0), (64 << 10, 5000, 200), (256 << 10, 65536, 0), (2 << 20, 1 << 20, 300)],
)
def test_bytes_arrive_whole_and_in_order(
    binary: Path, end: Path, ring: int, message: int, pace: int
) -> None:
    """Bytes arrive whole and in order for all sizes of writes and reads, both ways at once."""
    size = 300_000 if message < 100 else 6_000_000
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b, ring=ring)
        options = (f"message={message}", f"pace={pace}")
        first = one.popen(end, f"send={size}", "seed=7", "peer_seed=8", *options)
        second = two.popen(end, f"send={size // 3}", "seed=8", "peer_seed=7", *options)
        for process, sent, received in (first, size, size // 3), (second, size // 3, size):
            said = result(process)
            assert (said["sent"], said["received"], said["broken"]) == (sent, received, 0)
        assert a.counts()["bytes_out"] == b.counts()["bytes_in"] == size


def test_both_ends_may_be_of_one_relay(binary: Path, end: Path) -> None:
    """Both ends of a connection can be on one relay, over two links to itself."""
    with relays(binary, count=1) as (a,):
        link(a, a, 1, 2)
        one, two = connect(a, a, link=1, peer_link=2)
        first = one.popen(end, "send=3000000")
        second = two.popen(end, "send=0", "peer_seed=1")
        assert result(second)["received"] == 3_000_000
        assert result(first)["sent"] == 3_000_000


def test_many_connections_share_a_link(binary: Path, end: Path) -> None:
    """Connections whose blocks share messages each receive their own bytes."""
    with relays(binary) as (a, b):
        link(a, b)
        first, second = connect(a, b)
        ones, twos = [first], [second]
        for slot in range(1, 12):
            one, two = more(first, slot), more(second, slot)
            assert not pair(one, two).error
            assert not pair(two, one).error
            ones.append(one)
            twos.append(two)
        senders = [
            each.popen(end, "send=400000", f"seed={n}", "message=3000")
            for n, each in enumerate(ones)
        ]
        takers = [each.popen(end, f"peer_seed={n}") for n, each in enumerate(twos)]
        for process in takers:
            assert result(process)["received"] == 400_000
        for process in senders:
            result(process)
        assert a.counts()["connections"] == 12


def test_a_process_that_sleeps_is_woken(binary: Path, end: Path) -> None:
    """No wake-up is lost in round trips without spinning."""
    with relays(binary, spin=0) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        round_trips(one, two, end, 500)
        assert b.counts()["bells"] > 100


def test_a_relay_that_is_told_to_spin_no_more(binary: Path, end: Path, transport: int) -> None:
    """A relay whose transport is opened again spins for as long as that says, not longer."""
    with relays(binary, spin=1000) as (a, b):
        for relay in (a, b):
            assert not relay.open(transport=transport, spin=0).error
        link(a, b)
        one, two = connect(a, b)
        round_trips(one, two, end, 500)
        assert a.counts()["spins"] == b.counts()["spins"] == 0


def test_a_relay_that_spins_finds_messages(binary: Path, end: Path) -> None:
    """A relay that spins finds what processes and the other relay send without sleeping."""
    with relays(binary, spin=1000) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        round_trips(one, two, end, 2000)
        assert a.counts()["spins"] > 0
        assert b.counts()["spins"] > 0


def test_an_arena_whose_process_has_no_bell_is_polled(binary: Path, end: Path) -> None:
    """The relay polls an arena whose process cannot ring the relay's bell."""
    with relays(binary, spin=0) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        first = one.popen(
            end, "send=200000", "message=1000", "pace=40000", "no_bell=1", "patience=30000"
        )
        assert result(two.popen(end, "peer_seed=1", "patience=30000"))["received"] == 200_000
        result(first)


def test_idle_connections_cost_nothing(binary: Path, end: Path) -> None:
    """Relays sleep while their connections are idle."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        round_trips(one, two, end, 50)
        time.sleep(0.3)
        before = [each.counts() for each in (a, b)]
        time.sleep(1)
        for each, counts in zip((a, b), before, strict=True):
            assert each.counts()["sleeps"] - counts["sleeps"] <= 4


def test_a_connection_ends_when_both_ends_are_gone(binary: Path, end: Path) -> None:
    """When both processes have closed, all bytes arrive, then `over`; both routers are told."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        sender = one.popen(end, "send=150000", "ends=0", "receive=1")
        taker = two.popen(end, "peer_seed=1", "seed=2", "send=1", "linger=300")
        result(sender)
        a.number("CLOSE", one.number)
        said = result(taker)
        assert (said["received"], said["over"], said["broken"]) == (150_000, 1, 0)
        assert a.expect("FINISHED", number=one.number).state == WHOLE
        assert b.expect("ENDED", number=two.number).state == WHOLE
        b.number("CLOSE", two.number)
        assert b.expect("FINISHED", number=two.number).state == WHOLE
        assert a.expect("ENDED", number=one.number).state == WHOLE
        drop(one)
        drop(two)
        assert a.counts()["connections"] == b.counts()["connections"] == 0
        assert a.counts()["broken"] == 0


def test_a_process_that_is_killed_ends_its_connection(binary: Path, end: Path) -> None:
    """All bytes that a killed process had published arrive, and none of an unfinished write."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        sender = one.popen(end, "send=1000000", "die_at=123456", "message=1000")
        taker = two.popen(end, "peer_seed=1")
        assert sender.wait(patience(10)) == 9
        a.number("CLOSE", one.number)
        said = result(taker)
        assert (said["received"], said["over"], said["broken"]) == (123_000, 1, 0)


def test_full_rings_do_not_keep_a_connection_from_ending(binary: Path, end: Path) -> None:
    """A connection whose ends are both closed finishes although its rings are full."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b, ring=64 << 10)
        stuck = [
            each.popen(
                end, "send=1000000", "pace=1000000", "message=300000", "patience=500", "receive=1"
            )
            for each in (one, two)
        ]
        for process in stuck:
            process.wait(patience(20))
        for each in (one, two):
            each.relay.number("CLOSE", each.number)
        for each in (one, two):
            each.relay.expect("FINISHED", number=each.number)
            each.relay.expect("ENDED", number=each.number)
            drop(each)


def test_leaving_ends_both_rings_where_both_ends_agree(binary: Path, end: Path) -> None:
    """Leaving in the middle of a stream delivers all bytes, and then needs no relay."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=1000000000", "message=20000", "pace=500")
        first = one.popen(end, *options, "seed=1", "peer_seed=2")
        second = two.popen(end, *options, "seed=2", "peer_seed=1")
        time.sleep(0.3)
        a.number("LEAVE", one.number)
        left, right = result(first), result(second)
        assert left["stopped"] == right["stopped"] == 1
        assert left["sent"] == right["received"] == right["end"] - 1
        assert right["sent"] == left["received"] == left["end"] - 1
        a.expect("LEFT", number=one.number)
        b.expect("LEFT", number=two.number)


def test_an_idle_connection_leaves_without_its_processes(binary: Path) -> None:
    """An idle connection leaves without its processes, which find the end of the ring later."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        b.number("LEAVE", two.number)
        a.expect("LEFT", number=one.number)
        b.expect("LEFT", number=two.number)
        for each in (one, two):
            assert each.word(0, 76, 4) == 1
            assert each.word(1, 24) == 1
            assert each.word(1, 272, 4) == 1


def test_a_process_stops_the_other_end(binary: Path, end: Path) -> None:
    """`stop` in one ring is answered by `stopped` after its last byte; the other ring goes on."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        sender = one.popen(
            end, "send=100000000", "pace=200", "message=8000", "peer_seed=2", "seed=1"
        )
        taker = two.popen(
            end, "stop_at=500000", "send=4000000", "pace=200", "peer_seed=1", "seed=2"
        )
        said = result(sender)
        assert said["stopped"] == 1
        assert said["received"] == 4_000_000
        assert result(taker)["received"] == said["sent"]
        assert two.word(1, 272, 4) == 1


def test_a_dropped_connection_that_breaks_is_seen_at_both_ends(binary: Path, end: Path) -> None:
    """Dropping a connection as broken resets both ends, and both routers are told."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=1000000000", "message=20000", "pace=500")
        first = one.popen(end, *options, "seed=1", "peer_seed=2")
        second = two.popen(end, *options, "seed=2", "peer_seed=1")
        time.sleep(0.2)
        drop(one, BROKEN)
        assert b.expect("ENDED", number=two.number).state == BROKEN
        assert result(first)["broken"] == result(second)["broken"] == 1
        drop(two)


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_relay_that_ends_loses_nothing(binary: Path, end: Path, by_signal: bool) -> None:
    """A relay whose router ends, or that gets SIGTERM, first brings all connections back to TCP."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=1000000000", "message=20000", "pace=500")
        first = one.popen(end, *options, "seed=1", "peer_seed=2")
        second = two.popen(end, *options, "seed=2", "peer_seed=1")
        time.sleep(0.2)
        if by_signal:
            a.process.send_signal(signal.SIGTERM)
            assert a.process.wait(patience(5)) == 0
        else:
            assert a.stop() == 0
        left, right = result(first), result(second)
        assert left["stopped"] == right["stopped"] == 1
        assert left["broken"] == right["broken"] == 0
        assert (left["sent"], right["sent"]) == (right["received"], left["received"])
        b.expect("LEFT", number=two.number)


def test_a_slot_can_be_used_again(binary: Path, end: Path) -> None:
    """The next connection can use a slot as soon as the last one was dropped."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        for _ in range(3):
            first, second = (
                one.popen(end, "send=100000"),
                two.popen(end, "peer_seed=1", "seed=2", "send=5"),
            )
            assert result(second)["received"] == 100_000
            result(first)
            drop(one)
            drop(two)
            for each in (one, two):
                assert not place(each).error
            for mine, theirs in (one, two), (two, one):
                assert not pair(mine, theirs).error


def test_invalid_slots_and_places_are_refused_with_a_reason(binary: Path) -> None:
    """Slots in use, unequal rings, unknown links and connections are refused, with the reason."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = give_arena(a), give_arena(b, 128 << 10)
        assert place(one, link=9).text == "no such link"
        assert not place(one).error
        number = one.number
        assert "in use" in place(one).text
        one.number = number
        assert not place(two).error
        assert "131072 bytes at the peer" in pair(one, two).text
        two.place = bytes(5)
        assert "another size" in pair(one, two).text
        two.place = bytes(72)
        assert "version" in pair(one, two).text
        one.number = 1 << 30
        assert pair(one, two).error
        drop(one)
        one.number = number
        drop(one)


def test_an_invalid_arena_is_refused(binary: Path) -> None:
    """An arena that is not sealed, or has another size, is refused; so are slots in it."""
    with relays(binary) as (a, b):
        link(a, b)
        odd = give_arena(a)
        unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(unsealed, layout.arena_size(RING))
        receives, rings = socket.socketpair()
        with receives, rings:
            for memory, ring in (odd.memory, RING * 2), (odd.memory, RING - 1), (unsealed, RING):
                odd.arena += 1000
                packed = ARENA.pack(KINDS["ARENA"], ARENA.size, ring, odd.arena, 0)
                a.raw(packed, memory, receives.fileno())
                assert place(odd).text == "no such arena"
        os.close(unsealed)


def test_arenas_may_go_while_their_bells_ring(binary: Path) -> None:
    """The bell of a discarded arena may ring at the same moment."""
    with relays(binary, count=1) as (a,):
        for _ in range(30):
            some = [give_arena(a) for _ in range(5)]
            os.kill(a.process.pid, signal.SIGSTOP)
            for each in some:
                a.raw(ARENA.pack(KINDS["DISCARD"], ARENA.size, 0, each.arena, 0))
                assert each.rings_relay is not None
                each.rings_relay.send(b"x")
            os.kill(a.process.pid, signal.SIGCONT)
            a.counts()
            for each in some:
                assert each.rings_relay is not None
                each.rings_relay.close()
                os.close(each.memory)


def test_a_connection_that_has_left_may_be_dropped_at_once(binary: Path) -> None:
    """A router may drop a connection as soon as it has left; the peer does not report a loss."""
    with relays(binary) as (a, b):
        link(a, b)
        for _ in range(20):
            one, two = connect(a, b)
            a.number("LEAVE", one.number)
            a.expect("LEFT", number=one.number)
            a.number("DROP", one.number)
            b.expect("LEFT", number=two.number)
            b.number("DROP", two.number)
            a.expect("DROPPED", number=one.number)
            b.expect("DROPPED", number=two.number)
        assert a.counts()["broken"] == b.counts()["broken"] == 0


@pytest.mark.parametrize("when", ["before pairing", "after pairing", "while leaving"])
def test_a_drop_is_reported_to_an_end_that_nobody_has(binary: Path, when: str) -> None:
    """When the peer's end is dropped before our process has got its own, our router is told,
    whatever our relay is doing with it.
    """
    with relays(binary) as (a, b):
        link(a, b)
        one, two = give_arena(a), give_arena(b)
        for each in (one, two):
            give_bells(each)
            assert not place(each).error
        assert not pair(two, one).error
        if when != "before pairing":
            assert not pair(one, two).error
        if when == "while leaving":
            a.number("LEAVE", one.number)
        b.number("DROP", two.number)
        a.expect("ENDED", "LEFT", number=one.number)
        a.number("DROP", one.number)
        a.expect("DROPPED", number=one.number)
        b.expect("DROPPED", number=two.number)
