"""Arenas as memfds: their kinds, and the reclaiming of their slots."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

import pytest

from dataplane.router import layout
from dataplane.router.arena_memory import LinuxArenaMemory

KINDS = [
    (layout.RING_SIZE, False),
    (layout.REMOTE_RING_LEAST, True),
    (layout.REMOTE_RING_MOST, True),
]


@contextlib.contextmanager
def arena(ring_size: int, remote: bool) -> Iterator[int]:
    memory = LinuxArenaMemory().make(ring_size, remote)
    try:
        yield memory
    finally:
        os.close(memory)


@pytest.mark.parametrize(("ring_size", "remote"), KINDS)
def test_says_what_it_is(ring_size: int, remote: bool) -> None:
    """An arena's header and its size agree."""
    with arena(ring_size, remote) as memory:
        size = os.fstat(memory).st_size
        assert size == layout.arena_size(ring_size)
        assert layout.ring_size_of(size) == ring_size
        header = layout.HEADER.unpack(os.pread(memory, layout.HEADER.size, 0))
        assert header == (layout.MAGIC, layout.VERSION, ring_size, remote)


@pytest.mark.parametrize(
    ("ring_size", "remote"),
    [
        (layout.RING_SIZE, True),
        (layout.REMOTE_RING_MOST, False),
        (layout.REMOTE_RING_LEAST // 2, True),
        (layout.REMOTE_RING_LEAST + layout.PAGE, True),
    ],
)
def test_no_other_kinds(ring_size: int, remote: bool) -> None:
    """No arena is made that the library would refuse."""
    with pytest.raises(ValueError, match=str(ring_size)):
        LinuxArenaMemory().make(ring_size, remote)


@pytest.mark.parametrize(("ring_size", "remote"), KINDS)
def test_reclaim(ring_size: int, remote: bool) -> None:
    """All pages of a slot are reclaimed, and no others."""
    with arena(ring_size, remote) as memory:
        made = LinuxArenaMemory()
        before = made.used(memory)
        for direction in range(layout.SIDES):
            os.pwrite(memory, b"x", layout.ring_offset(5, direction))
            start = layout.bulk_offset(5, direction, ring_size)
            os.pwrite(memory, bytes(range(256)) * (ring_size // 256), start)
        neighbours = (layout.bulk_offset(5, 0, ring_size) - 1, layout.bulk_offset(6, 0, ring_size))
        for place in neighbours:
            os.pwrite(memory, b"n", place)
        assert made.reclaim(memory, 5)
        assert made.used(memory) == before + len(neighbours) * layout.PAGE
        for place in neighbours:
            assert os.pread(memory, 1, place) == b"n"


def test_sever() -> None:
    """Both rings of the slot are marked as broken, and no other rings."""
    with arena(*KINDS[1]) as memory:
        LinuxArenaMemory().sever(memory, 7)
        for slot, broken in ((6, 0), (7, 1), (8, 0)):
            for direction in range(layout.SIDES):
                place = layout.ring_offset(slot, direction) + layout.BROKEN_OFFSET
                assert struct.unpack("=I", os.pread(memory, 4, place)) == (broken,)
