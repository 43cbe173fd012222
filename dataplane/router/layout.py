"""The layout of an arena: the numbers of `dataplane/library/layout.h`. A test compares both."""

from __future__ import annotations

import struct
from typing import Final

MAGIC: Final = 0x31776F6C66656572
VERSION: Final = 3

PAGE: Final = 4096
SLOTS: Final = 64
SIDES: Final = 2
BELLS: Final = 256
RING_SIZE: Final = 4 << 20
"""In arenas whose sides are both processes of this host."""
REMOTE_RING_LEAST: Final = 64 << 10
REMOTE_RING_MOST: Final = RING_SIZE // 2
"""In arenas whose side 1 is the host's relay: the size tells the two kinds apart."""
RING_HEADER: Final = 384
SLOT_OFFSET: Final = 2 * PAGE
BULK_OFFSET: Final = 1 << 20
ARENA_SIZE: Final = BULK_OFFSET + SLOTS * SIDES * RING_SIZE

MESSAGES_OFFSET: Final = 56
INCARNATION_OFFSET: Final = 256
STOP_OFFSET: Final = 76
OVER_OFFSET: Final = 268
STOPPED_OFFSET: Final = 272
BROKEN_OFFSET: Final = 276
RECEIVED_OFFSET: Final = 280
"""Offsets in struct ring."""
DIRTY_OFFSET: Final = 128
"""Offset in struct arena: the slots that the waiters of side 0 have to check, a word per bell."""

HEADER: Final = struct.Struct("=QIII")
"""The first fields of struct arena: magic, version, size_of_ring, remote."""


def arena_size(ring_size: int) -> int:
    """Bytes of an arena with such rings."""
    return BULK_OFFSET + SLOTS * SIDES * ring_size


def ring_size_of(size: int) -> int:
    """Bytes of each ring of an arena of so many bytes."""
    return (size - BULK_OFFSET) // (SLOTS * SIDES)


def ring_offset(slot: int, direction: int) -> int:
    """Offset of a ring's page, which has its header and first bytes."""
    return SLOT_OFFSET + (slot * SIDES + direction) * PAGE


def bulk_offset(slot: int, direction: int = 0, ring_size: int = RING_SIZE) -> int:
    """Offset of a ring's bulk area."""
    return BULK_OFFSET + (slot * SIDES + direction) * ring_size
