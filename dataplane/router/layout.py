"""Where things are in an arena: the numbers of `dataplane/library/layout.h`; a test compares both."""

from __future__ import annotations

import struct
from typing import Final

MAGIC: Final = 0x31776F6C66656572
VERSION: Final = 1

PAGE: Final = 4096
SLOTS: Final = 64
SIDES: Final = 2
BELLS: Final = 256
RING_SIZE: Final = 4 << 20
RING_HEADER: Final = 384
SLOT_OFFSET: Final = 2 * PAGE
BULK_OFFSET: Final = 1 << 20
ARENA_SIZE: Final = BULK_OFFSET + SLOTS * SIDES * RING_SIZE

INCARNATION_OFFSET: Final = 256
LEAVE_OFFSET: Final = 76
"""Of struct ring."""

HEADER: Final = struct.Struct("=QII")
"""The beginning of struct arena: magic, version, size_of_ring."""


def ring_offset(slot: int, direction: int) -> int:
    """Where the page of a ring is: its header and first bytes."""
    return SLOT_OFFSET + (slot * SIDES + direction) * PAGE


def bulk_offset(slot: int, direction: int = 0) -> int:
    """Where the bulk area of a ring is."""
    return BULK_OFFSET + (slot * SIDES + direction) * RING_SIZE
