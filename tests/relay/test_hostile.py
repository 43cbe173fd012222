"""A process or peer that writes invalid data loses its own connection, and no other."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.patience import patience
from testbed.relays import (
    ARENA,
    BROKEN,
    FRAME,
    KINDS,
    NUMBER,
    RING,
    End,
    Relay,
    connect,
    drop,
    give_arena,
    give_bells,
    link,
    pair,
    place,
    relay,
    relays,
    result,
)
from tests.security.lingering import filled, lingering, send

WORDS = {
    "tail": (0, 8),
    "base": (8, 8),
    "start": (16, 8),
    "end": (24, 8),
    "busy": (32, 4),
    "head": (64, 8),
    "ready": (72, 4),
    "stop": (76, 4),
    "any": (128, 4),
    "bells": (136, 8),
    "senders": (192, 4),
    "sender_bells": (200, 8),
    "room": (264, 4),
    "over": (268, 4),
    "stopped": (272, 4),
}
"""Offsets and sizes of words in struct ring."""

ODD = (0, 1, 2, 3712, 65535, 65536, 65537, 1 << 18, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def ring_it(end: End) -> None:
    """Ring the relay's bell, with all slots marked."""
    os.pwrite(end.memory, struct.pack("=Q", (1 << 64) - 1), 64 + 2112 + 64)
    assert end.rings_relay is not None
    end.rings_relay.send(b"x")


@pytest.mark.usefixtures("transport")
def test_a_bell_that_is_kept_full(binary: Path, end: Path) -> None:
    """A process that keeps the relay's bell full does not hold up other connections."""
    with relays(binary) as (a, b):
        link(a, b)
        good, well = connect(a, b)
        bad, _ = connect(a, b)
        assert bad.rings_relay is not None
        before = a.counts()["calls"]
        with filled(bad.rings_relay):
            options = ("send=300000", "message=3000", "pace=200")
            first = good.popen(end, *options, "seed=1", "peer_seed=2")
            second = well.popen(end, *options, "seed=2", "peer_seed=1")
            assert result(first)["received"] == result(second)["received"] == 300_000
            # Those of the honest connection.
            assert a.counts()["calls"] - before < 20_000


def test_a_bell_with_a_descriptor_in_it(binary: Path, end: Path) -> None:
    """A descriptor in a bell whose close() blocks does not block the relay."""
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    with relays(binary) as (a, b):
        link(a, b)
        good, well = connect(a, b)
        for closes in (False, True):
            bad, victim = connect(a, b)
            poison = lingering(namespace)
            try:
                assert bad.rings_relay is not None
                assert send(bad.rings_relay, b"x", poison.closes.fileno())
                poison.let_go(sent=True)
                if not closes:
                    ring_it(bad)
                    time.sleep(0.1)
                drop(bad)
                drop(victim)
                a.raw(ARENA.pack(KINDS["DISCARD"], ARENA.size, 0, bad.arena, 0))
                assert a.counts()["connections"] == 1
            finally:
                poison.close()
        options = ("send=300000", "message=3000", "pace=200")
        first = good.popen(end, *options, "seed=1", "peer_seed=2")
        second = well.popen(end, *options, "seed=2", "peer_seed=1")
        assert result(first)["received"] == result(second)["received"] == 300_000
    os.close(namespace)


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_process_hurts_only_its_own_connection(
    binary: Path, end: Path, seed: int
) -> None:
    """Invalid words in a process's rings do not affect another connection of the same relays."""
    dice = random.Random(seed)
    with relays(binary) as (a, b):
        link(a, b)
        good, well = connect(a, b)
        bad, victim = connect(a, b)
        for each in (bad, victim):
            each.write(1, 72, 1, 4)
        options = ("send=1000000", "message=9000", "pace=400")
        first = good.popen(end, *options, "seed=1", "peer_seed=2")
        second = well.popen(end, *options, "seed=2", "peer_seed=1")
        for _ in range(300):
            offset, size = dice.choice(list(WORDS.values()))
            value = dice.choice((*ODD, dice.getrandbits(64))) & ((1 << 8 * size) - 1)
            bad.write(dice.randrange(2), offset, value, size)
            ring_it(bad)
            if dice.random() < 0.1:
                time.sleep(0.002)
        assert result(first)["received"] == result(second)["received"] == 1_000_000
        drop(bad, BROKEN)
        drop(victim, BROKEN)
        for host in (a, b):
            assert host.counts()["corrupt"] <= 1
            assert host.counts()["connections"] == 1


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    ("direction", "word", "value"),
    [
        (0, "tail", (1 << 18) + 1),
        (0, "tail", (1 << 64) - 1),
        (0, "end", 77),
        (1, "head", 1),
        (1, "head", 1 << 63),
    ],
)
def test_invalid_words_break_the_connection_at_both_ends(
    binary: Path, direction: int, word: str, value: int
) -> None:
    """An invalid word resets both ends, and both routers are told."""
    with relays(binary) as (a, b):
        link(a, b)
        bad, victim = connect(a, b)
        for each in (bad, victim):
            each.write(1, 72, 1, 4)
            ring_it(each)
        offset, size = WORDS[word]
        bad.write(direction, offset, value, size)
        ring_it(bad)
        assert a.expect("ENDED", number=bad.number).state == BROKEN
        assert b.expect("ENDED", number=victim.number).state == BROKEN
        for each in (bad, victim):
            assert each.word(0, 276, 4) == each.word(1, 276, 4) == 1


@pytest.mark.usefixtures("transport")
def test_bytes_before_ready_are_invalid(binary: Path, end: Path) -> None:
    """A sender that does not wait for `ready` is reset."""
    with relays(binary) as (a, b):
        link(a, b)
        bad, victim = connect(a, b)
        sender = bad.popen(end, "send=100000", "at_once=1")
        assert a.expect("ENDED", number=bad.number).state == BROKEN
        assert b.expect("ENDED", number=victim.number).state == BROKEN
        assert result(sender)["broken"] == 1


def test_places_and_addresses_are_checked(binary: Path) -> None:
    """Invalid places and addresses of a peer give an error, or a connection that never works."""
    dice = random.Random(1)
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        good = two.place
        address = b.link(7)
        for number in range(120):
            drop(one, BROKEN)
            assert not place(one).error
            words = bytearray(good if number % 2 else dice.randbytes(len(good)))
            for _ in range(dice.randrange(1, 4)):
                words[dice.randrange(len(words))] = dice.getrandbits(8)
            two.place = bytes(words[: dice.choice((72, 72, 72, 71, 0))])
            pair(one, two)
            a.link(8)
            words = bytearray(address if number % 2 else dice.randbytes(len(address)))
            words[dice.randrange(len(words))] ^= 1 << dice.randrange(8)
            a.connect(8, bytes(words))
        assert a.counts()["connections"] == 1


def test_an_invalid_request_ends_the_relay(binary: Path) -> None:
    """A relay ends on an invalid request of its router."""
    for request in (b"x", struct.pack("=HH", 99, 4), NUMBER.pack(KINDS["LINK"], 9, 1, 0)):
        with contextlib.suppress(AssertionError), relay(binary) as a:
            a.raw(request)
            assert a.process.wait(patience(5)) == 1
        assert a.process.returncode == 1


class Channel:
    """A peer's relay in Python, on the loopback transport, that can send anything."""

    SLOT = 8 + 16 + 16 * 64
    LETTERS = 192

    def __init__(self, address: bytes) -> None:
        process, channel = struct.unpack_from("=ii", address, 8)
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(process)
        fd = libc.syscall(438, pidfd, channel, 0)
        os.close(pidfd)
        self.memory = mmap.mmap(fd, os.fstat(fd).st_size)
        os.close(fd)

    def put(self, content: bytes) -> None:
        (tail,) = struct.unpack_from("=Q", self.memory, 64)
        at = self.LETTERS + tail % 128 * self.SLOT
        self.memory[at : at + 8] = struct.pack("=II", len(content), 0)
        part = content[: self.SLOT - 8]
        self.memory[at + 8 : at + 8 + len(part)] = part
        struct.pack_into("=Q", self.memory, 64, tail + 1)

    def say(self, *blocks: bytes, granted: int = 128) -> None:
        self.put(struct.pack("=IHHQ", 0x6C657231, len(blocks), 0, granted) + b"".join(blocks))


def block(end: End, flags: int, *words: int) -> bytes:
    """A block with the cookie that the end's relay gave."""
    (cookie,) = struct.unpack_from("=Q", end.place, 16)
    return struct.pack("=IIQ6Q", end.number, flags, cookie, *words)


@contextlib.contextmanager
def a_peer_of(a: Relay, b: Relay) -> Iterator[tuple[End, Channel]]:
    """A connection of `a` whose peer is the test."""
    address = a.link(1)
    theirs = b.link(1)
    assert not a.connect(1, theirs).error
    one, two = connect_half(a, b)
    assert not pair(one, two).error
    yield one, Channel(address)


def connect_half(a: Relay, b: Relay) -> tuple[End, End]:
    ends = give_arena(a), give_arena(b)
    for each in ends:
        give_bells(each)
        assert not place(each).error
    return ends


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_peer_hurts_only_its_own_connection(binary: Path, end: Path, seed: int) -> None:
    """Invalid blocks of a peer do not affect connections of another link."""
    dice = random.Random(seed)
    with relays(binary, count=3) as (a, b, c):
        link(a, c, 2)
        good, well = connect(a, c, link=2)
        options = ("send=500000", "message=9000", "pace=400")
        first = good.popen(end, *options, "seed=1", "peer_seed=2")
        second = well.popen(end, *options, "seed=2", "peer_seed=1")
        with a_peer_of(a, b) as (one, peer):
            one.write(1, 72, 1, 4)
            for number in range(100):
                words = [dice.choice((*ODD, dice.getrandbits(64))) for _ in range(6)]
                peer.say(block(one, dice.getrandbits(10) & ~128, *words))
                if number % 10 == 9:
                    drop(one, BROKEN)
                    assert not place(one).error
                    time.sleep(0.001)
            assert result(first)["received"] == result(second)["received"] == 500_000
            for direction in range(2):
                for offset, size in WORDS.values():
                    one.word(direction, offset, size)


def test_invalid_messages_take_the_link_down(binary: Path) -> None:
    """A message with a wrong size, magic number or grant takes the link down, with the reason."""
    messages = (
        b"",
        b"x" * 16,
        struct.pack("=IHHQ", 0x6C657231, 17, 0, 128),
        struct.pack("=IHHQ", 0x6C657231, 2, 0, 128) + bytes(64),
        struct.pack("=IHHQ", 0x6C657231, 0, 0, 1 << 40),
        struct.pack("=IHHQ", 0x6C657231, 0, 0, 5),
        b"x" * 5000,
    )
    for content in messages:
        with relays(binary) as (a, b), a_peer_of(a, b) as (_, peer):
            peer.put(content)
            # Without a wake-up the relay polls its links when it handles a request.
            a.number("COUNT")
            assert "peer sent a message" in a.expect("DOWN", number=1).text


def test_frames_of_a_hostile_peer_change_nothing_outside_its_rings(binary: Path) -> None:
    """Offsets, sizes and cookies of a frame are checked before a byte is written."""
    dice = random.Random(4)
    with relays(binary) as (a, b):
        link(a, b)
        one, _ = connect(a, b)
        (cookie,) = struct.unpack_from("=Q", one.place, 16)
        a.number("STREAM", 1)
        for _ in range(300):
            size = dice.choice((0, 1, 8, 100, 3712, 3713, 50000, 1 << 31, (1 << 32) - 1))
            offset = dice.choice((0, 1, 3711, 3712, 4096, (1 << 18) - 1, 1 << 18, (1 << 32) - 1))
            head = struct.pack(
                "=IIQII", size, dice.choice((0, one.number, 5)), dice.choice((cookie, 0)), offset, 0
            )
            body = head + bytes(min(size, 50000) if dice.random() < 0.8 else 3)
            a.raw(FRAME.pack(KINDS["FRAME"], FRAME.size + len(body), 1) + body)
        assert a.counts()["connections"] == 1


def test_an_arena_without_its_descriptors_is_refused(binary: Path) -> None:
    """An arena whose descriptors were lost is refused, with its slots; others go on."""
    with relays(binary) as (a, b):
        link(a, b)
        one, _ = connect(a, b)
        a.raw(ARENA.pack(KINDS["ARENA"], ARENA.size, RING, 4711, 0))
        one.slot, one.arena = 5, 4711
        assert place(one).text == "no such arena"
        assert a.counts()["connections"] == 1


def test_an_arena_whose_bell_has_no_sender_is_polled(binary: Path, end: Path) -> None:
    """The relay polls an arena whose bell has no sender any more."""
    with relays(binary, spin=0) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        assert one.rings_relay is not None
        dead, other = socket.socketpair()
        one.rings_relay.close()
        one.rings_relay = dead
        sender = one.popen(
            end, "send=60000", "message=1000", "pace=20000", "patience=30000", "no_bell=1"
        )
        assert result(two.popen(end, "peer_seed=1", "patience=30000"))["received"] == 60_000
        result(sender)
        other.close()
