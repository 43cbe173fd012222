"""Faults of links: slow and reordered writes, and links that are lost and made again, or not."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dataplane.router.layout import REMOTE_RING_LEAST, SLOTS
from testbed.patience import patience, within
from testbed.relays import (
    BROKEN,
    FRAME,
    KINDS,
    WHOLE,
    End,
    Relay,
    connect,
    drop,
    give_arena,
    link,
    pair,
    parse,
    place,
    relays,
    result,
)


def test_slow_completions_and_bytes_in_any_order(binary: Path, end: Path) -> None:
    """Bytes are read only after their message, and reused only after their completion."""
    with relays(binary, "delay=400,shuffle=1,seed=5") as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=4000000", "pace=100", "message=30000")
        first = one.popen(end, *options, "seed=3", "peer_seed=4")
        second = two.popen(end, *options, "seed=4", "peer_seed=3")
        assert result(first)["received"] == result(second)["received"] == 4_000_000


@contextmanager
def kept_up(a: Relay, b: Relay) -> Iterator[list[int]]:
    """Make a link again whenever it is down, as routers do, from either side; how often."""
    stopped = threading.Event()
    made = [0]

    def keep() -> None:
        down = False
        while not stopped.is_set():
            for each in (a, b):
                each.receive()
                lost = [message for message in each.received if message.kind == "DOWN"]
                each.received = [message for message in each.received if message.kind != "DOWN"]
                down = down or bool(lost)
            if down:
                first, second = (a, b) if made[0] % 2 else (b, a)
                # The link may be lost again before it is connected.
                down = not link(first, second, lost=True)
                made[0] += 1
            time.sleep(0.002)

    thread = threading.Thread(target=keep)
    thread.start()
    try:
        yield made
    finally:
        stopped.set()
        thread.join()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_lost_link_goes_on_where_it_was(binary: Path, end: Path, seed: int) -> None:
    """Bytes are neither lost, doubled nor moved by lost completions and half-written batches."""
    with relays(binary, f"delay=200,shuffle=1,lose=12,seed={seed}") as (a, b):
        link(a, b)
        one, two = connect(a, b)
        with kept_up(a, b) as made:
            options = ("send=4000000", "pace=100", "message=30000")
            first = one.popen(end, *options, "seed=3", "peer_seed=4")
            second = two.popen(end, *options, "seed=4", "peer_seed=3")
            assert result(first)["received"] == result(second)["received"] == 4_000_000
        assert made[0] > 2
        assert a.counts()["resumed"] >= made[0] // 2
        assert a.counts()["corrupt"] == b.counts()["corrupt"] == 0


def wait_for(kind: str, *some: Relay) -> None:
    """Wait for a message from each of these relays while another thread receives."""
    until = time.monotonic() + patience(10)
    while not all(any(message.kind == kind for message in each.received) for each in some):
        assert time.monotonic() < until, (kind, [each.received for each in some])
        time.sleep(0.005)


def test_connections_end_over_links_that_get_lost(binary: Path, end: Path) -> None:
    """Closing, leaving and dropping are repeated when a lost link is up again."""
    with relays(binary, "lose=5,seed=9") as (a, b):
        link(a, b)
        with kept_up(a, b) as made:
            for _ in range(3):
                one, two = connect(a, b)
                sender = one.popen(end, "send=40000", "ends=0", "receive=1")
                taker = two.popen(end, "peer_seed=1", "seed=2", "send=1")
                result(sender)
                a.number("CLOSE", one.number)
                assert result(taker)["received"] == 40_000
                b.number("CLOSE", two.number)
                wait_for("FINISHED", a, b)
                wait_for("ENDED", a, b)
                assert all(
                    m.state == WHOLE for each in (a, b) for m in each.received if m.kind == "ENDED"
                )
                for each in (one, two):
                    each.relay.number("DROP", each.number)
                wait_for("DROPPED", a, b)
                a.received, b.received = [], []
            assert made[0] > 1
        assert a.counts()["connections"] == b.counts()["connections"] == 0
        assert a.counts()["broken"] == b.counts()["broken"] == 0


@pytest.mark.usefixtures("transport")
def test_a_peer_that_is_killed_is_noticed(binary: Path, end: Path) -> None:
    """When the peer's relay dies the link is down at once; connections wait for the router."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        sender = one.popen(end, "send=100000000", "pace=300", "seed=1")
        taker = two.popen(end, "peer_seed=1", "seed=2")
        time.sleep(0.2)
        b.kill()
        assert "gone" in a.expect("DOWN", number=1).text
        drop(one, 1)
        assert result(sender)["broken"] == 1
        # That end belongs to another router.
        taker.kill()
        taker.wait()


def cut(a: Relay, b: Relay) -> None:
    """Break a link: both relays make new channels, which nobody connects."""
    for each in (a, b):
        each.link(1)


@pytest.mark.usefixtures("transport")
def test_a_connection_that_is_dropped_while_the_link_is_down(binary: Path) -> None:
    """The peer hears of it when the link is up again; otherwise its end would wait for ever."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        cut(a, b)
        a.number("DROP", one.number, BROKEN)
        a.expect("DROPPED", number=one.number)
        assert b.silent("ENDED")
        link(a, b)
        assert b.expect("ENDED", number=two.number).state == BROKEN
        b.number("DROP", two.number, BROKEN)
        b.expect("DROPPED", number=two.number)
        # It was confirmed, and is not said about the next connections either.
        cut(a, b)
        link(a, b)
        connect(a, b)
        assert b.silent("ENDED")


def thousands(a: Relay, b: Relay, count: int) -> list[tuple[End, End]]:
    """So many connections between a few processes."""
    made: list[tuple[End, End]] = []
    while len(made) < count:
        arenas = give_arena(a, REMOTE_RING_LEAST), give_arena(b, REMOTE_RING_LEAST)
        for slot in range(SLOTS):
            one, two = (replace(arena, slot=slot) for arena in arenas)
            for end in (one, two):
                assert not place(end).error
            for end, peer in ((two, one), (one, two)):
                assert not pair(end, peer).error
            made.append((one, two))
    return made


def test_thousands_that_are_dropped_while_the_link_is_down(binary: Path) -> None:
    """The peer hears of each of them when the link is up again."""
    with relays(binary) as (a, b):
        link(a, b)
        made = thousands(a, b, 4200)
        cut(a, b)
        for one, _ in made:
            a.number("DROP", one.number, BROKEN)
            a.expect("DROPPED", number=one.number)
        link(a, b)
        for _, two in made:
            assert b.expect("ENDED", number=two.number).state == BROKEN
        # All were confirmed.
        cut(a, b)
        link(a, b)
        assert b.silent("ENDED")


@pytest.mark.usefixtures("transport")
def test_no_link_for_a_long_time(binary: Path, end: Path) -> None:
    """Connections with bytes on the way are reset at both ends; idle ones go on when the link is up
    again.
    """
    with relays(binary) as (a, b):
        link(a, b)
        busy, peer = connect(a, b)
        idle, other = connect(a, b)
        sender = busy.popen(end, "send=100000000", "pace=300", "seed=1")
        taker = peer.popen(end, "peer_seed=1", "seed=2")
        until = time.monotonic() + patience(10)
        while not peer.word(1, 0):
            assert time.monotonic() < until
            time.sleep(0.01)
        # While there is a link nothing happens.
        for each in (a, b):
            each.number("EXPIRE", 1, 1)
        assert a.silent("ENDED")
        cut(a, b)
        time.sleep(0.1)
        for each in (a, b):
            each.number("EXPIRE", 1, 2)
        assert a.silent("ENDED")
        for each in (a, b):
            each.number("EXPIRE", 1, 2)
        assert a.expect("ENDED", number=busy.number).state == BROKEN
        assert result(sender)["broken"] == 1
        assert b.silent("ENDED")
        assert a.silent("ENDED")
        link(a, b)
        assert b.expect("ENDED", number=peer.number).state == BROKEN
        assert result(taker)["broken"] == 1
        first = idle.popen(end, "send=300000", "seed=3", "peer_seed=4")
        second = other.popen(end, "send=300000", "seed=4", "peer_seed=3")
        assert result(first)["received"] == result(second)["received"] == 300_000


@contextmanager
def carried(a: Relay, b: Relay, number: int = 1) -> Iterator[list[int]]:
    """Carry frames between two relays, as routers with a session do; how many."""
    stopped = threading.Event()
    frames = [0]

    def carry() -> None:
        while not stopped.is_set():
            for mine, peer in (a, b), (b, a):
                while select.select([mine.socket], [], [], 0)[0]:
                    message = parse(mine.socket.recv(65536))
                    if message.kind != "FRAME":
                        mine.received.append(message)
                        continue
                    frames[0] += 1
                    size = FRAME.size + len(message.words)
                    peer.raw(FRAME.pack(KINDS["FRAME"], size, number) + message.words)
            time.sleep(0.001)

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield frames
    finally:
        stopped.set()
        thread.join()


def test_without_rdma_a_connection_goes_on_over_the_session(binary: Path, end: Path) -> None:
    """A stream goes on over frames, and then leaves, without losing a byte."""
    with relays(binary, "lose=40,seed=3") as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=1000000000", "pace=300", "message=30000")
        first = one.popen(end, *options, "seed=3", "peer_seed=4")
        second = two.popen(end, *options, "seed=4", "peer_seed=3")
        while not any(m.kind == "DOWN" for each in (a, b) for m in each.received):
            for each in (a, b):
                each.receive(0.005)
        with carried(a, b) as frames:
            a.number("STREAM", 1)
            time.sleep(0.5)
            before = two.word(1, 0)
            time.sleep(0.2)
            assert two.word(1, 0) > before
            a.number("LEAVE", one.number)
            left, right = result(first), result(second)
            wait_for("LEFT", a, b)
        assert frames[0] > 10
        assert left["broken"] == right["broken"] == 0
        assert (left["sent"], right["sent"]) == (right["received"], left["received"])
        drop(one)
        drop(two)


@pytest.mark.usefixtures("transport")
def test_a_streamed_link_ends_with_its_relay(binary: Path, end: Path) -> None:
    """Frames need a router: without it connections that have not left are reset."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("pace=300", "message=30000")
        first = one.popen(end, "send=1000000000", *options, "seed=3", "peer_seed=4")
        two.popen(end, *options, "seed=4", "peer_seed=3")
        until = time.monotonic() + patience(10)
        while not two.word(1, 0):
            assert time.monotonic() < until
            time.sleep(0.01)
        b.kill()
        a.number("STREAM", 1)
        begun = time.monotonic()
        assert a.stop() == 0
        assert time.monotonic() - begun < within(4)
        assert one.word(0, 276, 4) == one.word(1, 276, 4) == 1
        assert first.wait(patience(10)) == 0
        two.started[0].kill()


def test_the_shipped_relay_makes_no_faults(
    binary: Path, shipped: Path, plain: Path, end: Path
) -> None:
    """Only builds for tests can inject faults: the shipped binary has neither options nor code."""
    for word in (b"lose=", b"on purpose", b"faulty"):
        assert word in binary.read_bytes()
        assert word not in shipped.read_bytes()
    with relays(plain, "lose=1,delay=1000000") as (a, b):
        link(a, b)
        one, two = connect(a, b)
        first = one.popen(end, "send=300000")
        assert result(two.popen(end, "peer_seed=1"))["received"] == 300_000
        result(first)
        assert a.counts()["downs"] == 0
