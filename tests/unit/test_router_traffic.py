"""What connections have carried, as the router says it: kernel counters, and words that containers
can write.
"""

from __future__ import annotations

import os
import struct
import time

import pytest

from dataplane.control import RING_MOST, RingTraffic
from dataplane.router import layout
from dataplane.router.arena_memory import LinuxArenaMemory
from dataplane.router.connection_traffic import cpu_of, is_possible, ring_traffic, tcp_traffic
from dataplane.router.seams import Sent
from dataplane.router.socket_table import TcpSocket
from dataplane.router.tcp_counters import TcpCounters
from tests.unit.router_world import World, at

CLIENT, SERVER = "10.0.4.1:5000", "10.0.4.2:80"


def connected() -> tuple[World, int, TcpSocket, TcpSocket]:
    """A connection of containers 1 and 2 that has a slot; both sockets."""
    world = World()
    a, b = world.process(1), world.process(2)
    one, other = world.connect(a, b, 5000)
    ends = [
        TcpSocket(local=at(local), remote=at(remote), cookie=cookie, inode=1)
        for local, remote, cookie in (
            (CLIENT, SERVER, one),
            (SERVER, CLIENT, other),
        )
    ]
    return world, a, ends[0], ends[1]


def rings(world: World, *sockets: TcpSocket) -> list[RingTraffic | None]:
    """What the rings of the sockets of containers 1, 2, … have carried."""
    return [
        ring_traffic(world.pairing, world.memory, namespace, tcp, world.now)
        for namespace, tcp in enumerate(sockets, 1)
    ]


def test_both_ends_of_a_ring() -> None:
    """What one end has sent the other has received; messages are unknown if nobody counts them."""
    world, a, one, other = connected()
    world.now += 10
    (grant,) = world.grants(a)
    said = (Sent(5000, 50), Sent(70, 0))
    world.memory.says = said if grant.side == 0 else (said[1], said[0])
    first, second = rings(world, one, other)
    assert first == RingTraffic(
        incarnation=grant.incarnation,
        bytes_in=70,
        bytes_out=5000,
        messages_in=None,
        messages_out=50,
    )
    assert second is not None
    assert (second.bytes_in, second.bytes_out) == (5000, 70)
    assert (second.messages_in, second.messages_out) == (50, None)


def test_without_a_slot() -> None:
    """A connection without a slot has no ring."""
    world, _, one, _ = connected()
    strange = TcpSocket(local=one.local, remote=one.remote, cookie=9, inode=1)
    assert rings(world, strange) == [None]
    world.memory.says = None
    assert rings(world, one) == [None]


@pytest.mark.parametrize(
    "said",
    [
        Sent((1 << 64) - 1, 0),
        Sent(1 << 63, 1),
        Sent(RING_MOST * 11, 1),
    ],
)
def test_hostile_words(said: Sent) -> None:
    """What no ring can have carried counts as unknown, whichever side says it."""
    world, _, one, other = connected()
    world.now += 10
    for says in ((said, Sent(1, 1)), (Sent(1, 1), said)):
        world.memory.says = says
        assert rings(world, one, other) == [None, None]


def test_no_more_messages_than_bytes() -> None:
    """However many messages a side claims, each has a byte at least."""
    world, _, one, other = connected()
    world.memory.says = (Sent(100, (1 << 64) - 1), Sent(0, 1 << 63))
    for found in rings(world, one, other):
        assert found is not None
        assert sorted([found.messages_in or 0, found.messages_out or 0]) == [0, 100]


def test_a_young_slot() -> None:
    """The limit grows with the age of the slot, and a clock that stands still is no error."""
    assert is_possible(Sent(0, 0), -1.0)
    assert is_possible(Sent(4096, 1), 0.0)
    assert not is_possible(Sent(RING_MOST, 1), 0.5)
    assert is_possible(Sent(RING_MOST, 1), 1.0)


def test_words_of_an_arena() -> None:
    """The words of each direction are those of its own ring, and a slot without pages has zeros."""
    memory = LinuxArenaMemory()
    arena = memory.make()
    try:
        used = memory.used(arena)
        assert memory.sent(arena, 63) == (Sent(0, 0), Sent(0, 0))
        assert memory.used(arena) == used
        for direction, (tail, messages) in enumerate(((11, 3), ((1 << 64) - 1, 1 << 63))):
            start = layout.ring_offset(5, direction)
            os.pwrite(arena, struct.pack("=Q", tail), start)
            os.pwrite(arena, struct.pack("=Q", messages), start + layout.MESSAGES_OFFSET)
        assert memory.sent(arena, 5) == (Sent(11, 3), Sent((1 << 64) - 1, 1 << 63))
    finally:
        os.close(arena)
    assert memory.sent(arena, 5) is None


def test_kernel_counters() -> None:
    """The kernel's counters keep their names."""
    found = tcp_traffic(TcpCounters(1, 2, 30, 40, 1398, 5, 600))
    assert (found.segments_in, found.segments_out) == (1, 2)
    assert (found.bytes_in, found.bytes_out) == (30, 40)
    assert (found.retransmits, found.round_trip) == (5, 600)


def test_processor_time() -> None:
    """The processor time of any process is read without its help; one that has ended has none."""
    before = time.process_time()
    found = cpu_of(os.getpid())
    assert found is not None
    assert before <= found <= time.process_time()
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    assert cpu_of(child) is None
