"""Peers and paths that send what no honest relay sends, over TCP."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataplane.router import layout
from testbed.patience import patience
from testbed.relays import (
    ARENA,
    BROKEN,
    KINDS,
    RING,
    SOCKETS,
    TCP,
    End,
    Relay,
    connect,
    drop,
    link,
    pair,
    place,
    relays,
    result,
    socket_pair,
)
from tests.relay.tcp_peer import BLOCK, HEADER, MAGIC, WINDOW, Peer, block, path
from tests.relay.test_hostile import connect_half

SMALL = layout.PAGE - layout.RING_HEADER
TAIL, READY_WORD = 0, 72
GONE = 512
TRIES = 1000
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27


@contextmanager
def a_peer_of(a: Relay, b: Relay, encryption: int = 0) -> Iterator[tuple[End, Peer]]:
    """A connection of `a` whose peer is the test. `b` only lends it a place."""
    b.link(1)
    peer = Peer(a, encryption=encryption)
    one, two = connect_half(a, b)
    one.write(1, READY_WORD, 1, 4)
    assert not pair(one, two).error
    yield one, peer
    peer.close()


def ring_of(end: End, direction: int = 1) -> bytes:
    """A ring's bytes by their offsets."""
    at = layout.ring_offset(end.slot, direction) + layout.RING_HEADER
    bulk = layout.bulk_offset(end.slot, direction, end.ring)
    return os.pread(end.memory, SMALL, at) + os.pread(end.memory, end.ring - SMALL, bulk + SMALL)


def wait_for_tail(end: End, tail: int) -> None:
    until = time.monotonic() + patience(5)
    while end.word(1, TAIL) != tail:
        assert time.monotonic() < until, end.word(1, TAIL)
        time.sleep(0.002)


def wait_for_bytes(end: End) -> None:
    until = time.monotonic() + patience(5)
    while not end.word(1, TAIL):
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.mark.parametrize("sealed", [False, True])
def test_an_honest_record_arrives(binary: Path, sealed: bool) -> None:
    """What the other tests change is a record that is accepted: its bytes, and its `tail`."""
    data = random.Random(1).randbytes(9000)
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        peer.say((block(one, 1, 9000), 9000), payload=data, sealed=True)
        wait_for_tail(one, 9000)
        assert ring_of(one)[:9000] == data
        peer.say(
            (block(one, 1, 9700), 700),
            payload=bytes(700),
            lane=3 if not sealed else 0,
            sealed=sealed,
        )
        wait_for_tail(one, 9700)


@pytest.mark.parametrize("encryption", [0, 1, 2])
def test_what_a_relay_sends(binary: Path, end: Path, encryption: int) -> None:
    """A relay's records open under the peer's key, each with the next nonce. Their bytes are the
    ring's, and encrypted if this host wants it, whatever the peer wants.
    """
    with (
        relays(binary, transport=TCP, encryption=encryption) as (a, b),
        a_peer_of(a, b) as (one, peer),
    ):
        peer.say((block(one), 0), lane=2)
        sender = one.popen(end, "send=30000", "message=3000", "seed=1")
        data = b""
        while len(data) < 30_000:
            heard = peer.hear(0)
            data += heard.data
            assert len(set(heard.numbers)) <= 1
            assert heard.encrypted == (bool(encryption) and bool(heard.data))
        assert data == ring_of(one, 0)[:30_000]
        sender.kill()
        sender.wait()


@pytest.mark.parametrize(
    ("words", "size", "cookie"),
    [
        ((100 + RING,), 100, None),  # not behind what has arrived
        ((1 << 63,), 5000, None),
        ((0,), 5000, None),
        ((50,), 5000, None),
        ((5000, 77), 5000, None),  # another base
        ((5000, 5000), 5000, None),
        ((5000,), 0, None),  # bytes that do not come
        ((5000,), 4000, None),
        ((5000,), 5000, 4711),  # another connection of this number
    ],
)
def test_bytes_without_a_place_are_not_written(
    binary: Path, words: tuple[int, ...], size: int, cookie: int | None
) -> None:
    """A record whose bytes do not follow what has arrived, or belong to another connection, changes
    no byte of a ring; the next record is read all the same.
    """
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        good, _ = connect_half(a, b)
        good.write(1, READY_WORD, 1, 4)
        payload = b"\xee" * size
        peer.say((block(one, 1, *words, cookie=cookie), size), payload=payload, sealed=True)
        if cookie is None:
            assert a.expect("ENDED", number=one.number).state == BROKEN
        peer.say((block(good, 1, 3), 3), payload=b"abc", sealed=True)
        wait_for_tail(good, 3)
        assert b"\xee" not in ring_of(one)
        assert one.word(1, TAIL) == 0


def test_bytes_that_the_process_has_not_taken_are_not_overwritten(binary: Path) -> None:
    """A peer that sends more than a ring holds is reset, and the ring keeps what it has."""
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        peer.say((block(one, 1, 200_000), 200_000), payload=b"\x11" * 200_000, lane=3)
        wait_for_tail(one, 200_000)
        peer.say((block(one, 1, 300_000), 100_000), payload=b"\xee" * 100_000, lane=3)
        assert a.expect("ENDED", number=one.number).state == BROKEN
        assert b"\xee" not in ring_of(one)


def test_a_connection_goes_while_its_bytes_are_half_received(binary: Path) -> None:
    """The rest of a record of a dropped connection is thrown away, to the byte."""
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        good, _ = connect_half(a, b)
        good.write(1, READY_WORD, 1, 4)
        for sealed, lane in (True, 0), (False, 3):
            record = peer.record(
                (block(one, 1, 60_000), 60_000),
                (block(good, 1, 3 if sealed else 6), 3),
                payload=b"\xee" * 60_000 + b"abc",
                sealed=sealed,
                lane=lane,
            )
            peer.sockets[lane].sendall(record[:20_000])
            time.sleep(0.05)
            a.number("DROP", one.number, BROKEN)
            # The peer promises to write no more, and so does not keep its word.
            peer.say((block(one, GONE), 0), lane=1)
            a.expect("DROPPED", number=one.number)
            memory = ring_of(one)
            peer.sockets[lane].sendall(record[20_000:])
            wait_for_tail(good, 3 if sealed else 6)
            assert ring_of(one) == memory
            assert not place(one).error


def test_two_lanes_cannot_write_the_same_bytes(binary: Path) -> None:
    """Bytes that a process can read already are not written again by a record on another lane."""
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        slow = peer.record((block(one, 1, 60_000), 60_000), payload=b"\xee" * 60_000, lane=3)
        peer.sockets[3].sendall(slow[:1000])
        time.sleep(0.05)
        peer.say((block(one, 1, 60_000), 60_000), payload=b"\x11" * 60_000, sealed=True)
        wait_for_tail(one, 60_000)
        peer.sockets[3].sendall(slow[1000:])
        good, _ = connect_half(a, b)
        peer.say((block(good, 1, 3), 3), payload=b"abc", lane=3)
        wait_for_tail(good, 3)
        assert b"\xee" not in ring_of(one)


def forged(peer: Peer) -> dict[str, bytes]:
    """Bytes that are no record of this link."""
    body = HEADER.pack(MAGIC, 0, 0, WINDOW)
    honest = peer.seal(0, len(body), body)
    peer.sent[0] -= 1
    return {
        "a changed byte": honest[:7] + bytes([honest[7] ^ 1]) + honest[8:],
        "another flag": honest[:3] + bytes([honest[3] ^ 128]) + honest[4:],
        "a size": struct.pack("=I", 17) + honest[4:],
        "the longest size": struct.pack("=I", 0x7FFFFFFF) + honest[4:],
        "zeros": bytes(500),
        "another lane's": peer.seal(1, len(body), body),
        "an old one": honest + honest,
        "one too far": peer.seal(0, len(body), body) and peer.seal(0, len(body), body),
        "text": b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(100),
    }


NAMES = [
    "a changed byte", "another flag", "a size", "the longest size", "zeros", "another lane's",
    "an old one", "one too far", "text",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_authentic_takes_the_link_down(binary: Path, name: str) -> None:
    """A record that was changed, doubled, moved or made without the key ends the link, with the
    reason, before anything of it is read.
    """
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        peer.sockets[0].sendall(forged(peer)[name])
        found = a.expect("DOWN", number=1).text
        assert found in (
            "a record of the peer's relay is not authentic",
            "the peer sent a record of an invalid size",
        )
        assert one.word(1, TAIL) == 0
        assert a.counts()["corrupt"] == 0


def test_payload_that_must_be_sealed(binary: Path) -> None:
    """A peer cannot choose less encryption than this host."""
    with relays(binary, transport=TCP, encryption=1) as (a, b), a_peer_of(a, b) as (one, peer):
        peer.say((block(one, 1, 5), 5), lane=3)
        wait_for_tail(one, 5)
        peer.say((block(one, 1, 9), 4), lane=0)
        assert "invalid" in a.expect("DOWN", number=1).text
        assert one.word(1, TAIL) == 5


def test_payload_whose_tag_is_wrong(binary: Path) -> None:
    """Sealed payload that was changed is never announced to the process."""
    with relays(binary, transport=TCP, encryption=2) as (a, b), a_peer_of(a, b) as (one, peer):
        record = bytearray(peer.record((block(one, 1, 5000), 5000), sealed=True))
        record[-30] ^= 1
        peer.sockets[0].sendall(record)
        assert "authentic" in a.expect("DOWN", number=1).text
        assert one.word(1, TAIL) == 0


def nonsense(dice: random.Random, one: End) -> list[tuple[bytes, int]]:
    """Blocks for a connection, some of which could be those of an honest peer."""
    odd = (0, 1, SMALL, RING - 1, RING, RING + 1, 1 << 31, 1 << 32, (1 << 63) + 1, (1 << 64) - 1)
    tail = one.word(1, TAIL)
    blocks = []
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3, 16))):
        size = dice.choice((0, 1, 100, 5000, 70_000 if dice.random() < 0.3 else 7))
        words = [tail + size, 0, 0, 0, 0, 0]
        tail += size
        if dice.random() < 0.2:
            words[dice.randrange(6)] = dice.choice((*odd, dice.getrandbits(64)))
        said = bytearray(
            block(one, dice.getrandbits(10) & ~896 if dice.random() < 0.2 else 1, *words)
        )
        if dice.random() < 0.05:
            said[dice.randrange(BLOCK.size)] ^= 1 << dice.randrange(8)
        if dice.random() < 0.01:
            size = 1 << 30
        blocks.append((bytes(said), size))
    return blocks


@pytest.mark.parametrize("seed", range(4))
def test_authentic_nonsense(binary: Path, end: Path, seed: int) -> None:
    """Random records under the right key neither stop the relay, nor touch another link."""
    dice = random.Random(seed)
    with relays(binary, count=3, transport=TCP) as (a, b, c):
        link(a, c, 2)
        good, well = connect(a, c, link=2)
        options = ("send=1500000", "message=9000", "pace=300")
        first = good.popen(end, *options, "seed=1", "peer_seed=2")
        second = well.popen(end, *options, "seed=2", "peer_seed=1")
        b.link(1)
        peer = Peer(a)
        one, _ = connect_half(a, b)
        for _ in range(TRIES):
            lane = dice.randrange(4)
            blocks = nonsense(dice, one)
            sizes = sum(size for _, size in blocks)
            granted = 1 << 40 if dice.random() < 0.01 else WINDOW
            with contextlib.suppress(OSError):
                peer.say(
                    *blocks,
                    lane=lane,
                    payload=bytes(sizes if sizes < 1 << 20 else 50),
                    sealed=lane != 3 or dice.random() < 0.3,
                    granted=granted,
                )
            a.counts()
            told = {message.kind for message in a.received}
            a.received.clear()
            if "DOWN" in told:
                peer.close()
                peer = Peer(a)
                drop(one, BROKEN)
                assert not place(one).error
            elif "ENDED" in told:
                a.number("DROP", one.number, BROKEN)
                a.expect("DROPPED", number=one.number)
                assert not place(one).error
        assert result(first)["received"] == result(second)["received"] == 1_500_000
        peer.close()
        counts = a.counts()
        assert counts["connections"] == 2
        # Some were valid, some broke their connection, some their link.
        assert min(counts["messages_in"] // 10, counts["corrupt"], counts["downs"]) > 10, counts


def test_a_flood_delays_others_but_does_not_stop_them(binary: Path, end: Path) -> None:
    """A peer that sends valid records without end, and reads nothing, leaves turns to others, and
    the relay's memory does not grow.
    """
    with relays(binary, count=3, transport=TCP) as (a, b, c), a_peer_of(a, b) as (one, peer):
        for each in peer.sockets:
            each.setblocking(False)
        link(a, c, 2)
        good, well = connect(a, c, link=2)
        options = ("send=600000", "message=3000", "pace=100")
        first = good.popen(end, *options, "seed=1", "peer_seed=2")
        second = well.popen(end, *options, "seed=2", "peer_seed=1")
        before = a.counts()["messages_in"]
        memory = int(Path(f"/proc/{a.process.pid}/statm").read_text().split()[1])
        left = b""
        for number in range(20_000):
            left = left or peer.record((block(one), 0), granted=WINDOW)
            try:
                left = left[peer.sockets[0].send(left) :]
            except BlockingIOError:
                time.sleep(0.0005)
            if first.poll() is not None and second.poll() is not None and number > 5000:
                break
        assert result(first)["received"] == result(second)["received"] == 600_000
        assert a.counts()["messages_in"] - before > 1000
        grown = int(Path(f"/proc/{a.process.pid}/statm").read_text().split()[1]) - memory
        assert grown * 4096 < 64 << 20


@pytest.mark.parametrize("seed", range(3))
def test_a_path_that_is_cut_at_any_byte(binary: Path, end: Path, seed: int) -> None:
    """A link whose sockets are cut in the middle of a record, and made again, loses nothing."""
    dice = random.Random(seed)
    with relays(binary, transport=TCP) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        options = ("send=3000000", "message=20000", "pace=200")
        first = one.popen(end, *options, "seed=1", "peer_seed=2")
        second = two.popen(end, *options, "seed=2", "peer_seed=1")
        cuts = 0
        while first.poll() is None or second.poll() is None:
            room = [dice.randrange(1, 400_000)]

            def change(
                lane: int, direction: int, data: bytes, room: list[int] = room
            ) -> list[bytes] | None:
                del lane, direction
                if room[0] < len(data):
                    part, room[0] = data[: room[0]], 0
                    return [part] if part else None
                room[0] -= len(data)
                return [data]

            with path(a, b, change):
                while room[0] and (first.poll() is None or second.poll() is None):
                    time.sleep(0.002)
                cuts += 1
        assert result(first)["received"] == result(second)["received"] == 3_000_000
        assert cuts > 3
        for each in (a, b):
            assert each.counts()["corrupt"] == each.counts()["broken"] == 0


@pytest.mark.parametrize("fault", ["double", "swap", "flip"])
def test_a_path_that_changes_what_it_carries(binary: Path, end: Path, fault: str) -> None:
    """Bytes that a path doubles, swaps or changes end the link, and reach no process."""
    with relays(binary, transport=TCP, encryption=2) as (a, b):
        seen = [0]

        def change(lane: int, direction: int, data: bytes) -> list[bytes]:
            del lane
            seen[0] += not direction
            if direction or seen[0] != 5:
                return [data]
            if fault == "swap":
                return [data[len(data) // 2 :], data[: len(data) // 2]]
            if fault == "flip":
                return [data[:-1] + bytes([data[-1] ^ 4])]
            return [data, data]

        with path(a, b, change):
            one, two = connect(a, b)
            options = ("message=20000", "pace=200")
            first = one.popen(end, "send=2000000", *options, "seed=1", "peer_seed=2")
            second = two.popen(end, "send=0", "seed=2", "peer_seed=1")
            text = b.expect("DOWN", number=1).text
            assert "authentic" in text or "invalid size" in text, text
        link(a, b)
        assert result(second)["received"] == 2_000_000
        result(first)


def test_a_stalled_socket_stalls_only_its_connections(binary: Path, end: Path) -> None:
    """Connections on other sockets of a link go on while those of bulk take no bytes."""
    bulk = [0]
    stalled = [False]

    def change(lane: int, direction: int, data: bytes) -> list[bytes]:
        bulk[0] += len(data) * (lane > 1)
        return [] if stalled[0] and lane > 1 and not direction else [data]

    with relays(binary, transport=TCP) as (a, b), path(a, b, change):
        one, two = connect(a, b)
        options = ("message=100000", "check=0")
        sender = one.popen(end, "send=200000000", *options, "seed=1")
        taker = two.popen(end, *options, "seed=2")
        until = time.monotonic() + patience(10)
        while not bulk[0]:
            assert time.monotonic() < until
            time.sleep(0.002)
        stalled[0] = True
        good, well = connect(a, b)
        first = good.popen(end, "send=400000", "message=1000", "seed=1")
        assert result(well.popen(end, "peer_seed=1"))["received"] == 400_000
        result(first)
        before = two.word(1, TAIL)
        time.sleep(0.2)
        assert sender.poll() is None
        assert two.word(1, TAIL) == before
        sender.kill()
        taker.kill()
        sender.wait()
        taker.wait()


@contextlib.contextmanager
def losable(a: Relay, b: Relay, lane: int) -> Iterator[Callable[[bool], None]]:
    """A link, and a function that has a lane's packets be lost, or not any more."""
    nothing = struct.pack("=HBBI", 0x06, 0, 0, 0)
    kept: list[socket.socket] = []

    def lose(loses: bool) -> None:
        code = ctypes.create_string_buffer(nothing)
        program = struct.pack("@HP", 1, ctypes.addressof(code))
        for one in kept:
            if loses:
                one.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
            else:
                one.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)

    mine, theirs = a.link(1), b.link(1)
    for index in range(SOCKETS):
        ends = socket_pair()
        for host, one in zip((a, b), ends, strict=True):
            host.give_socket(1, index, one.fileno())
            if index == lane:
                kept.append(one)
            else:
                one.close()
    assert not b.connect(1, mine).error
    assert not a.connect(1, theirs).error
    yield lose
    for one in kept:
        one.close()


@pytest.mark.parametrize("notices", [0, 1])
def test_messages_leave_a_socket_that_is_stalled(binary: Path, end: Path, notices: int) -> None:
    """If the socket of a link's messages stalls, connections none of whose messages are stuck in it
    go on over another one, and the others go on, whole, when it goes on.
    """
    with relays(binary, transport=TCP) as both, losable(both[0], both[1], 0) as lose:
        a, b = both[notices], both[1 - notices]
        one, two = connect(a, b)
        options = ("rounds=300", "message=100", "pace=10000", "check=0")
        pings = [one.popen(end, *options), two.popen(end, *options, "server=1")]
        wait_for_bytes(one)
        for process in pings:
            process.send_signal(signal.SIGSTOP)
            # What there is to say about their connection is said by then.
            time.sleep(0.5)
        patient = ("patience=60000",)
        stuck, sticks = connect(a, b)
        sender = stuck.popen(end, "send=3000000", "message=1000", "pace=1000", "seed=3", *patient)
        taker = sticks.popen(end, "peer_seed=3", *patient)
        wait_for_bytes(sticks)
        lose(True)
        time.sleep(1)
        new, fresh = connect(a, b)
        first = new.popen(end, "send=100000", "message=1000", "pace=500", "seed=5")
        for process in pings:
            process.send_signal(signal.SIGCONT)
        assert result(fresh.popen(end, "peer_seed=5"))["received"] == 100_000
        for process in (first, *pings):
            result(process)
        assert sender.poll() is None
        lose(False)
        assert result(taker)["received"] == 3_000_000
        result(sender)
        assert not a.counts()["downs"]


def test_a_reply_that_waits_behind_bulk(binary: Path) -> None:
    """A link on which a slow network delays the peer's reply to a dropped connection stays up as
    long as the peer says something; without a word it goes down, and the memory is free.
    """
    with relays(binary, transport=TCP) as (a, b), a_peer_of(a, b) as (one, peer):
        peer.say((block(one), 0))
        a.number("DROP", one.number, 0)
        for _ in range(13):
            time.sleep(1)
            peer.say(lane=3)
        assert a.silent("DOWN", "DROPPED")
        assert "not answer" in a.expect("DOWN", number=1, seconds=14).text
        a.expect("DROPPED", number=one.number)


def test_who_sends_is_chosen_late(binary: Path) -> None:
    """The kernel takes little more than it can send, above all of messages: what it has taken goes
    before all that other processes have to send.
    """
    with relays(binary, transport=TCP) as (a, b):
        ends = [socket_pair() for _ in range(SOCKETS)]
        addresses = a.link(1), b.link(1)
        for index, pair_of in enumerate(ends):
            for host, one in zip((a, b), pair_of, strict=True):
                host.give_socket(1, index, one.fileno())
        assert not b.connect(1, addresses[0]).error
        assert not a.connect(1, addresses[1]).error
        for one, other in ends:
            with one, other:
                sizes = {
                    each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
                    for each in (one, other)
                }
            assert sizes == {64 << 10 if (one, other) in ends[:2] else 256 << 10}


def test_a_link_that_is_lost_says_what_it_has_received(binary: Path, end: Path) -> None:
    """A relay reports how many of its peer's messages came over a link that is down, each time."""
    carries = [True]

    def change(lane: int, direction: int, data: bytes) -> list[bytes] | None:
        del lane, direction
        return [data] if carries[0] else None

    with relays(binary, transport=TCP) as (a, b):
        with path(a, b, change):
            one, two = connect(a, b)
            first = one.popen(end, "send=200000", "message=1000", "pace=100", "seed=1")
            assert result(two.popen(end, "peer_seed=1"))["received"] == 200_000
            result(first)
            received = b.counts()["messages_in"]
            carries[0] = False
            connect(a, b)
            assert b.expect("DOWN", number=1).state >= received > 0
        a.expect("DOWN", number=1)
        with path(a, b, change):
            assert b.expect("DOWN", number=1).state == 0


def test_an_arena_that_goes_while_it_is_sent(binary: Path, end: Path) -> None:
    """Memory that a full socket still has to send is not read after its arena is gone: the link is
    made again instead, and others on it go on.
    """
    with relays(binary, transport=TCP, encryption=0) as (a, b):
        held = [False]

        def change(lane: int, direction: int, data: bytes) -> list[bytes]:
            del lane, direction
            while held[0]:
                time.sleep(0.002)
            return [data]

        with path(a, b, change, buffer=8192):
            one, two = connect(a, b, ring=2 << 20)
            good, well = connect(a, b)
            sender = one.popen(end, "send=100000000", "message=100000", "check=0", "seed=1")
            taker = two.popen(end, "seed=2", "check=0")
            while not two.word(1, TAIL):
                time.sleep(0.002)
            held[0] = True
            time.sleep(0.3)
            a.raw(ARENA.pack(KINDS["DISCARD"], ARENA.size, 0, one.arena, 0))
            held[0] = False
            assert "memory" in a.expect("DOWN", number=1).text
            a.expect("ENDED", number=one.number)
        link(a, b)
        b.expect("ENDED", number=two.number)
        for process in (sender, taker):
            process.kill()
            process.wait()
        first = good.popen(end, "send=100000", "seed=1")
        assert result(well.popen(end, "peer_seed=1"))["received"] == 100_000
        result(first)
