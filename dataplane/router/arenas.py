"""Arenas as the router keeps them: their slots, the processes of each side, and their bells.

An arena belongs to two processes. A slot is free again when both sides have released it; a side
without processes has released all of its slots. When a side holds no slot any more the arena is
retired: the process has unmapped it and closed its bells, and the next connection of the two
processes gets another arena. A remote arena belongs to one process and the host's relay. The relay
is side 1 and keeps the arena until the router discards it. There is no I/O: descriptors are only
numbers here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

from dataplane.router.layout import SIDES, SLOTS
from dataplane.router.library_wire import Address

RELAY: Final = 0
"""The relay, in place of a container's namespace: no namespace has this inode."""
RELAY_SIDE: Final = 1
"""The relay's side of a remote arena; side 0 is the process's."""


EndKey = int | tuple[str, int]
"""What tells ends in one container apart: a connection's cookie, or what it is and its number."""


class SlotEnd(Protocol):
    """A process's end of something that has a slot."""

    process: int
    namespace: int

    @property
    def key(self) -> EndKey:
        """Its own in its container."""
        ...


@dataclass(slots=True, eq=False)
class ConnectionEnd:
    """A process's end of a connection that has a slot."""

    process: int
    namespace: int
    cookie: int
    network: str
    local: Address
    remote: Address

    @property
    def key(self) -> EndKey:
        """The cookie of its socket."""
        return self.cookie


@dataclass(slots=True, eq=False)
class RelayEnd:
    """The relay's end of a slot, which stands for that on another host."""

    connection: int
    """The relay's number."""
    process: int = RELAY
    namespace: int = RELAY

    @property
    def key(self) -> EndKey:
        """Unused: the relay has no list of ends."""
        return "relay", self.connection


@dataclass(slots=True, eq=False)
class Slot:
    """A slot in use. An end that has released the slot is None."""

    incarnation: int
    since: float
    ends: list[SlotEnd | None]
    lost: bool = False
    """The last check found neither socket in the kernel."""
    left: bool = False
    """Both ends were told to fall back to TCP."""
    why_left: int = 0
    """A `Reason` for which this host brought it back to TCP; 0: another."""
    connection: int = 0
    """The relay's number of the connection, in a remote arena."""


@dataclass(slots=True, eq=False)
class ArenaSide:
    """One side of an arena."""

    token: int
    namespace: int
    members: set[int] = field(default_factory=set)
    """Processes that were granted slots or have shown the token."""
    bells: dict[int, int] = field(default_factory=dict)
    """Index to the ringing end of its socket pair."""
    hears: int | None = None
    """The hearing end of bell 0, until the process has it."""


@dataclass(slots=True, eq=False)
class Arena:
    """Shared memory of two processes."""

    id: int
    memory: int
    pair: tuple[int, int]
    sides: tuple[ArenaSide, ArenaSide]
    slots: dict[int, Slot] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: list(reversed(range(SLOTS))))
    held: list[int] = field(default_factory=lambda: [0] * SIDES)
    """Slots that each side holds."""
    retired: bool = False
    used: int = 0
    """Bytes, at the last measurement."""
    orphaned: bool = False
    """A side's processes have hung up. Others that share their memory may still use the arena."""
    rung: bool = False
    """Its processes have the ringing end of bell 0 of the other side."""
    ring: int = 0
    """Bytes of each ring of a remote arena; 0: the arena isn't remote."""

    def take(self, incarnation: int, since: float, ends: tuple[SlotEnd, SlotEnd]) -> int:
        """Put two ends into a free slot, which there must be. The slot's number."""
        number = self.free.pop()
        self.slots[number] = Slot(incarnation, since, list(ends))
        for side in range(SIDES):
            self.held[side] += 1
        return number

    def side_of(self, token: int, namespace: int) -> int | None:
        """The side with this token, if it is one of this container."""
        for number in range(SIDES):
            side = self.sides[number]
            if side.token == token and side.namespace == namespace:
                return number
        return None

    def release(self, number: int, side: int) -> tuple[SlotEnd | None, bool]:
        """One side is done with a slot. Its end, and whether the slot is free now."""
        slot = self.slots[number]
        end, slot.ends[side] = slot.ends[side], None
        if end is not None:
            self.held[side] -= 1
            self.retired = self.retired or not (self.held[side] or (self.ring and side))
        if any(end is not None for end in slot.ends):
            return end, False
        del self.slots[number]
        self.free.append(number)
        return end, True

    @property
    def has_queue_pairs(self) -> bool:
        """Whether its slots are for queue pairs that a relay carries."""
        return self.ring > 0 and self.pair[1] != -self.ring

    @property
    def done(self) -> bool:
        """Whether nothing is in the arena and nothing will come into it."""
        users = self.sides[:1] if self.ring else self.sides
        return not self.slots and (self.retired or not all(side.members for side in users))
