"""Moves between registered memory of two hosts' processes: bytes, lies of processes and of a peer's
relay, and files that are given up meanwhile.

The test is both processes. Each file is filled with a pattern, so a byte that was written where it
must not be is seen.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from dataplane.router.arena_memory import LinuxArenaMemory
from dataplane.router.relay_wire import MOVING_QUEUE_PAIR, QUEUE_PAIR
from testbed.patience import patience
from testbed.relays import (
    BROKEN,
    FILE,
    KINDS,
    LOOPBACK,
    TCP,
    End,
    Relay,
    drop,
    give_arena,
    give_bells,
    link,
    pair,
    place,
    relays,
)
from tests.relay.test_hostile import Channel, block
from tests.relay.test_queue_pair_slots import READY, is_broken, wait_until, wake_relay

MOVE: Final = 288
MOVED: Final = 344
SEEN: Final = 352
MOVES: Final = 360
"""Offsets in struct ring, of the library."""
HEADER: Final = 4096
SIZE: Final = HEADER + (1 << 20)
MOST: Final = HEADER + (64 << 20)
KEY: Final = 0x1234567
DONE, AGAIN, NOT_FROM, NOT_TO = 1, 2, 3, 4
"""enum move_outcome."""
REACH, REACHED, MOVED_FLAG, SEEN_FLAG, REVOKE, REVOKED = (1 << bit for bit in range(11, 17))
"""enum wire_flag."""
OURS, THEIRS, OTHERS = 71, 72, 73
"""Processes: one at each relay, and one more."""
_numbers = iter(range(1000, 1 << 30))


@dataclass
class Memory:
    """A file for registered memory that the relay has."""

    relay: Relay
    number: int
    token: int
    memory: int
    size: int

    def end(self) -> None:
        self.relay.raw(FILE.pack(KINDS["FILE_END"], FILE.size, 0, self.number, 0, 0))

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        return os.pread(self.memory, self.size if size is None else size, offset)

    def put(self, content: bytes, offset: int) -> None:
        os.pwrite(self.memory, content, offset)


def lend(
    relay: Relay, owner: int, size: int = SIZE, *, writable: bool = True, sealed: bool = True
) -> Memory:
    """Give the relay a file of a process, of one pattern behind the header."""
    memory = LinuxArenaMemory().make_file(size) if sealed else os.memfd_create("plain")
    relay.arenas.append((memory, os.fstat(memory).st_ino))
    os.ftruncate(memory, size)
    number = next(_numbers)
    made = Memory(relay, number, random.getrandbits(64), memory, size)
    made.put(KEY.to_bytes(8, "little"), 0)
    made.put(bytes([number % 251 + 1]) * min(size - HEADER, 1 << 20), HEADER)
    packed = FILE.pack(KINDS["FILE"], FILE.size, writable, number, made.token, owner)
    relay.raw(packed, memory)
    return made


@dataclass
class Request:
    """A move, as the process writes it."""

    source: int
    at: int
    to: int
    to_at: int
    token: int
    length: int


def request(mine: Memory, target: Memory, **other: int) -> Request:
    """One of 100,000 bytes, unless it is told otherwise."""
    usual = {"at": HEADER + 5, "to_at": HEADER + 77, "length": 100_000}
    made = {"source": mine.number, "to": target.number, "token": target.token, **usual, **other}
    return Request(**made)


def ask(end: End, wanted: Request) -> int:
    """Have the relay move: the number of it."""
    number = end.word(0, MOVE) + 1
    words = (wanted.source, wanted.at, wanted.to, wanted.to_at, wanted.token, wanted.length)
    for index, word in enumerate(words):
        end.write(0, MOVE + 8 + 8 * index, word)
    end.write(0, MOVE, number)
    wake_relay(end)
    return number


def is_over(end: End, number: int) -> bool:
    return end.word(0, MOVED) // 1000 == number


def move(end: End, wanted: Request) -> int:
    """Have the relay move, and wait for the outcome."""
    number = ask(end, wanted)
    wait_until(lambda: is_over(end, number))
    return end.word(0, MOVED) % 1000


def connected(a: Relay, b: Relay, user: int = MOVING_QUEUE_PAIR) -> tuple[End, End]:
    """Queue pairs of two processes whose libraries know moves. The first one's relay may move."""
    link(a, b)
    ends = give_arena(a, owner=OURS), give_arena(b, owner=THEIRS)
    for end, kind in zip(ends, (user, MOVING_QUEUE_PAIR), strict=True):
        give_bells(end)
        assert not (answer := place(end, user=kind)).error, answer
    for one, two in (ends, ends[::-1]):
        assert not (answer := pair(one, two)).error, answer
        one.write(1, MOVES, 1, 4)
        one.write(1, READY, 1, 4)
        wake_relay(one)
    wait_until(lambda: all(end.word(0, READY, 4) for end in ends))
    return ends


def allowed(ends: tuple[End, End]) -> bool:
    return all(end.word(0, MOVES, 4) for end in ends)


@pytest.fixture
def ends(binary: Path) -> Iterator[tuple[End, End]]:
    with relays(binary, transport=LOOPBACK) as (a, b):
        made = connected(a, b)
        wait_until(lambda: allowed(made))
        try:
            yield made
        finally:
            for one in (a, b):
                one.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("size", [1, 4095, 65_536, (1 << 20) - 4096])
def test_bytes(ends: tuple[End, End], size: int) -> None:
    """Exactly these bytes are in the other file afterwards, and its header is what is told."""
    one, two = ends
    source, target = lend(one.relay, OURS), lend(two.relay, THEIRS)
    content, before = random.Random(size).randbytes(size), target.read()
    source.put(content, HEADER + 3)
    wanted = request(source, target, at=HEADER + 3, to_at=HEADER + 1001, length=size)
    assert move(one, wanted) == DONE
    assert one.word(0, SEEN) == KEY
    at = HEADER + 1001
    assert target.read() == before[:at] + content + before[at + size :]
    counts = one.relay.counts()
    assert (counts["moves"], counts["bytes_moved"], counts["moves_refused"]) == (1, size, 0)


def test_many_files(ends: tuple[End, End]) -> None:
    """More files than a relay remembers of its peer's, in turn, from both sides."""
    mine = [lend(ends[0].relay, OURS, HEADER + 8192) for _ in range(20)]
    theirs = [lend(ends[1].relay, THEIRS, HEADER + 8192) for _ in range(20)]
    for turn in range(2):
        for (one, _), (sources, targets) in (
            (ends, (mine, theirs)),
            (ends[::-1], (theirs, mine)),
        ):
            for source, target in zip(sources, targets, strict=True):
                content = random.Random(source.number + turn).randbytes(4000)
                source.put(content, HEADER)
                assert move(one, request(source, target, at=HEADER, length=4000)) == DONE
                assert target.read(HEADER + 77, 4000) == content


Lie = Callable[[End, End], tuple[Memory, Memory, dict[str, Any]]]


def lies_about_words(**words: int) -> Lie:
    return lambda one, two: (lend(one.relay, OURS), lend(two.relay, THEIRS), words)


def lies_about_token(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    target = lend(two.relay, THEIRS)
    return lend(one.relay, OURS), target, {"token": target.token ^ 1}


def names_file_of_others(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    return lend(one.relay, OURS), lend(two.relay, OTHERS), {}


def names_source_of_others(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    return lend(one.relay, OTHERS), lend(two.relay, THEIRS), {}


def names_file_to_read(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    return lend(one.relay, OURS), lend(two.relay, THEIRS, writable=False), {}


def names_ended_file(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    target = lend(two.relay, THEIRS)
    target.end()
    two.relay.expect("FILE_ENDED", number=target.number)
    return lend(one.relay, OURS), target, {}


def can_shrink(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    return lend(one.relay, OURS), lend(two.relay, THEIRS, sealed=False), {}


def own_can_shrink(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    return lend(one.relay, OURS, sealed=False), lend(two.relay, THEIRS), {}


def is_too_large(one: End, two: End) -> tuple[Memory, Memory, dict[str, Any]]:
    return lend(one.relay, OURS), lend(two.relay, THEIRS, MOST + 4096), {}


ALL: Final = (1 << 64) - 1
LIES: Final[list[tuple[str, Lie, int]]] = [
    ("source", lies_about_words(source=5), NOT_FROM),
    ("source of others", names_source_of_others, NOT_FROM),
    ("source that can shrink", own_can_shrink, NOT_FROM),
    ("header of the source", lies_about_words(at=HEADER - 1), NOT_FROM),
    ("behind the source", lies_about_words(at=SIZE - 99_999), NOT_FROM),
    ("source overflows", lies_about_words(at=ALL - 50_000), NOT_FROM),
    ("no bytes", lies_about_words(length=0), NOT_FROM),
    ("too many bytes", lies_about_words(length=ALL), NOT_FROM),
    ("file", lies_about_words(to=5), NOT_TO),
    ("token", lies_about_token, NOT_TO),
    ("file of others", names_file_of_others, NOT_TO),
    ("file to read", names_file_to_read, NOT_TO),
    ("ended file", names_ended_file, NOT_TO),
    ("file that can shrink", can_shrink, NOT_TO),
    ("too large", is_too_large, NOT_TO),
    ("header", lies_about_words(to_at=0), NOT_TO),
    ("last byte of the header", lies_about_words(to_at=HEADER - 1), NOT_TO),
    ("behind the file", lies_about_words(to_at=SIZE - 99_999), NOT_TO),
    ("far behind the file", lies_about_words(to_at=ALL - 50_000), NOT_TO),
]


def test_lies_of_a_process(ends: tuple[End, End]) -> None:
    """A process that lies about anything moves nothing, and honest moves go on."""
    one, two = ends
    for name, lie, outcome in LIES:
        source, target, words = lie(one, two)
        before = target.read(size=SIZE)
        assert move(one, request(source, target, **words)) == outcome, name
        assert target.read(size=SIZE) == before, name
    source, target = lend(one.relay, OURS), lend(two.relay, THEIRS)
    assert move(one, request(source, target)) == DONE
    assert one.relay.counts()["moves_refused"] == len(LIES)
    assert one.relay.counts()["corrupt"] == two.relay.counts()["corrupt"] == 0


def test_other_words_while_it_moves(ends: tuple[End, End]) -> None:
    """Words that change while a move is under way change nothing."""
    one, two = ends
    source, target = lend(one.relay, OURS), lend(two.relay, THEIRS)
    other = lend(two.relay, THEIRS)
    before = other.read()
    dice = random.Random(1)
    for _ in range(50):
        number = ask(one, request(source, target, length=1 << 19))
        until = time.monotonic() + patience(10)
        while not is_over(one, number):
            one.write(0, MOVE + 8 * dice.randrange(1, 7), dice.choice((0, HEADER, ALL, SIZE)))
            assert time.monotonic() < until
    assert other.read() == before
    assert target.read(size=HEADER) == KEY.to_bytes(8, "little") + bytes(HEADER - 8)
    assert move(one, request(source, target)) == DONE


def test_file_given_up(ends: tuple[End, End]) -> None:
    """A file whose process gives it up is free only when the peer's relay can't reach it any more,
    and nothing moves there afterwards.
    """
    one, two = ends
    source, target = lend(one.relay, OURS), lend(two.relay, THEIRS)
    assert move(one, request(source, target)) == DONE
    one.relay.process.send_signal(signal.SIGSTOP)
    target.end()
    assert two.relay.counts()["registered"]
    assert two.relay.silent("FILE_ENDED")
    one.relay.process.send_signal(signal.SIGCONT)
    two.relay.expect("FILE_ENDED", number=target.number)
    before = target.read()
    assert move(one, request(source, target)) == NOT_TO
    assert target.read() == before
    source.end()
    one.relay.expect("FILE_ENDED", number=source.number)


def test_key_taken_away(ends: tuple[End, End]) -> None:
    """The process is told what the header says after the last byte: no key, no success."""
    one, two = ends
    source, target = lend(one.relay, OURS), lend(two.relay, THEIRS)
    target.put(bytes(8), 0)
    assert move(one, request(source, target)) == DONE
    assert one.word(0, SEEN) == 0


def stuck(ends: tuple[End, End]) -> tuple[int, Memory, Memory]:
    """A move that ends no sooner than the peer's relay goes on, which stands still."""
    one, two = ends
    source, target = lend(one.relay, OURS), lend(two.relay, THEIRS)
    assert move(one, request(source, target)) == DONE
    two.relay.process.send_signal(signal.SIGSTOP)
    source.put(b"last", HEADER + 5 + 99_996)
    number = ask(one, request(source, target))
    wait_until(lambda: target.read(HEADER + 77 + 99_996, 4) == b"last")
    assert not is_over(one, number)
    return number, source, target


def test_own_file_given_up_meanwhile(ends: tuple[End, End]) -> None:
    """A process's own file stays with the relay until its move is over."""
    number, source, _ = stuck(ends)
    source.end()
    assert ends[0].relay.silent("FILE_ENDED")
    ends[1].relay.process.send_signal(signal.SIGCONT)
    wait_until(lambda: is_over(ends[0], number))
    assert ends[0].word(0, MOVED) % 1000 == DONE
    ends[0].relay.expect("FILE_ENDED", number=source.number)


def test_link_lost_meanwhile(ends: tuple[End, End]) -> None:
    """A move that loses its link is told to be undecided, and both relays let the
    files go."""
    one, two = ends
    number, source, target = stuck(ends)
    one.relay.number("UNLINK", 1)
    wait_until(lambda: is_over(one, number))
    assert one.word(0, MOVED) % 1000 == AGAIN
    assert one.relay.counts()["moves_lost"] == 1
    two.relay.process.send_signal(signal.SIGCONT)
    two.relay.number("UNLINK", 1)
    target.end()
    two.relay.expect("FILE_ENDED", number=target.number)
    source.end()
    one.relay.expect("FILE_ENDED", number=source.number)


def test_connection_ends_meanwhile(ends: tuple[End, End]) -> None:
    """A move whose connection is broken is told to be over before the slot is released, and the
    files are free afterwards.
    """
    one, two = ends
    number, source, target = stuck(ends)
    one.relay.number("DROP", one.number, BROKEN)
    wait_until(lambda: is_over(one, number))
    assert one.word(0, MOVED) % 1000 == AGAIN
    two.relay.process.send_signal(signal.SIGCONT)
    one.relay.expect("DROPPED", number=one.number)
    wait_until(lambda: is_broken(two))
    drop(two)
    for memory in (source, target):
        memory.end()
        memory.relay.expect("FILE_ENDED", number=memory.number)
        wait_until(lambda memory=memory: not memory.relay.counts()["registered"])  # type: ignore[misc]


def go_round(*some: Relay) -> None:
    """Have each relay go through its loop a few times."""
    for _ in range(5):
        for relay in some:
            relay.counts()


def test_only_if_both_may(binary: Path) -> None:
    """With a relay that doesn't offer moves, as an older one, processes aren't told of them, and a
    process that requests one all the same is ignored.
    """
    with relays(binary, transport=LOOPBACK) as (a, b):
        one, two = connected(a, b, QUEUE_PAIR)
        source, target = lend(b, THEIRS), lend(a, OURS)
        ask(two, request(source, target))
        go_round(a, b)
        assert [end.word(0, MOVES, 4) for end in (one, two)] == [0, 0]
        assert not two.word(0, MOVED)
        assert b.counts()["moves_refused"] == 0


def test_not_over_tcp(binary: Path) -> None:
    """Relays without RDMA offer none."""
    with relays(binary, transport=TCP) as (a, b):
        one, two = connected(a, b)
        go_round(a, b)
        assert [end.word(0, MOVES, 4) for end in (one, two)] == [0, 0]


class Peer(Channel):
    """A peer's relay in Python that knows moves, and reads what it is told."""

    def __init__(self, one: End, address: bytes, inbox: bytes) -> None:
        super().__init__(address)
        self.one = one
        self.inbox = Channel(inbox).memory
        self.taken = 0

    def tell(self, flags: int, *words: int) -> None:
        self.say(block(self.one, flags, *words, *([0] * (6 - len(words)))))
        self.one.relay.number("COUNT")
        self.one.relay.expect("COUNTS")

    def hear(self, flag: int) -> tuple[int, ...]:
        """The words of the next block with this flag."""
        until = time.monotonic() + patience(10)
        while time.monotonic() < until:
            (tail,) = struct.unpack_from("=Q", self.inbox, 64)
            while self.taken < tail:
                at = self.LETTERS + self.taken % 128 * self.SLOT + 8
                self.taken += 1
                (count,) = struct.unpack_from("=H", self.inbox, at + 4)
                for index in range(count):
                    words = struct.unpack_from("=IIQ6Q", self.inbox, at + 16 + 64 * index)
                    if words[1] == flag:
                        return words[3:]
            time.sleep(0.005)
        raise AssertionError(flag)


@pytest.fixture
def peer(binary: Path) -> Iterator[Peer]:
    """The peer of a queue pair of a relay, whose process knows moves."""
    with relays(binary, transport=LOOPBACK) as (a, b):
        address, theirs = a.link(1), b.link(1)
        assert not a.connect(1, theirs).error
        one, two = give_arena(a, owner=OURS), give_arena(b, owner=THEIRS)
        for end in (one, two):
            give_bells(end)
            assert not place(end, user=MOVING_QUEUE_PAIR).error
        assert not pair(one, two).error
        one.write(1, MOVES, 1, 4)
        one.write(1, READY, 1, 4)
        wake_relay(one)
        yield Peer(one, address, theirs)


def test_a_peer_that_asks_for_files(peer: Peer) -> None:
    """A peer's relay gets the place of a file only if it shows the token of one of the process at
    its own connection that may be written to.
    """
    relay = peer.one.relay
    good, read = lend(relay, OURS), lend(relay, OURS, writable=False)
    registered = relay.counts()["registered"]
    others, ended = lend(relay, OTHERS), lend(relay, OURS)
    ended.end()
    relay.expect("FILE_ENDED", number=ended.number)
    for number, token in (
        (good.number, good.token ^ 1),
        (good.number, 0),
        (good.number + 1000, good.token),
        (read.number, read.token),
        (others.number, others.token),
        (ended.number, ended.token),
    ):
        peer.tell(REACH, number, token)
        assert peer.hear(REACHED) == (number, token, 0, 0, 0, 0)
    assert relay.counts()["registered"] == registered
    peer.tell(REACH, good.number, good.token)
    number, token, _, _, size, _ = peer.hear(REACHED)
    assert (number, token, size) == (good.number, good.token, good.size)
    assert relay.counts()["registered"] == registered + good.size
    assert not is_broken(peer.one)


def test_a_peer_that_lies(peer: Peer) -> None:
    """What a peer's relay says unasked, or about files that it doesn't have, ends no move, and
    reaches no memory.
    """
    one = peer.one
    source = lend(one.relay, OURS)
    peer.tell(1024 | 1)
    wait_until(lambda: one.word(0, MOVES, 4) == 1)
    for flag in (REACHED, MOVED_FLAG, SEEN_FLAG, REVOKE, REVOKED):
        for words in ((1, 2, 3, 4, 5, 6), (source.number, source.token, 0, 0, source.size, 0)):
            peer.tell(flag, *words)
    assert not one.word(0, MOVED)
    # It says that there is a file of another size, and then that there is one that can't be had.
    target = replace_number(source)
    number = ask(one, request(source, target))
    assert peer.hear(REACH)[:2] == (target.number, target.token)
    peer.tell(SEEN_FLAG, target.number, number, 0, 0, KEY)
    assert not is_over(one, number)
    peer.tell(REACHED, target.number, target.token, 1, 1, 1 << 50)
    wait_until(lambda: is_over(one, number))
    assert one.word(0, MOVED) % 1000 == NOT_TO
    assert not is_broken(one)


def replace_number(memory: Memory) -> Memory:
    """A file of the peer's that isn't there."""
    return Memory(memory.relay, next(_numbers), 99, memory.memory, memory.size)


@pytest.mark.parametrize("flags", [REACH | REACHED, SEEN_FLAG | REVOKE, REVOKE | 1])
def test_blocks_that_cannot_be(peer: Peer, flags: int) -> None:
    """A peer's relay that says two things in one block loses the connection."""
    peer.tell(flags, 1)
    wait_until(lambda: is_broken(peer.one))


def test_a_peer_that_keeps_files(peer: Peer) -> None:
    """A peer's relay that doesn't give a file back loses the link: the file is free by then."""
    relay = peer.one.relay
    good = lend(relay, OURS)
    peer.tell(REACH, good.number, good.token)
    peer.hear(REACHED)
    good.end()
    assert peer.hear(REVOKE)[0] == good.number
    assert relay.silent("FILE_ENDED")
    relay.number("UNLINK", 1)
    relay.expect("FILE_ENDED", number=good.number)
