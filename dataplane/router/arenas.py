"""Arenas as the router keeps them: which slot carries which connection, who may speak for a side, whose bells there are.

An arena belongs to two processes. A slot is free again when both sides have released it; a side without processes has
released all. When a side holds no slot any more the arena is retired: that process has unmapped it and closed its bells,
and the next connection of the two gets another. A remote arena belongs to one process and the host's relay, which is side 1
and keeps it until it is told otherwise. No I/O: descriptors are numbers here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from dataplane.router.layout import SIDES, SLOTS
from dataplane.router.library_wire import Address

RELAY_SIDE: Final = 1
"""The relay's side of a remote arena; side 0 is the process's."""


@dataclass(slots=True, eq=False)
class ConnectionEnd:
    """One end of a connection that has a slot."""

    process: int
    namespace: int
    cookie: int
    network: str
    local: Address
    remote: Address


@dataclass(slots=True, eq=False)
class Slot:
    """A slot in use. An end that has released it is None."""

    incarnation: int
    since: float
    ends: list[ConnectionEnd | None]
    lost: bool = False
    """The kernel knew neither socket when last asked."""
    left: bool = False
    """Both ends were asked to go on over TCP."""
    connection: int = 0
    """The relay's number of it, in a remote arena."""


@dataclass(slots=True, eq=False)
class Side:
    """One side of an arena."""

    token: int
    namespace: int
    members: set[int] = field(default_factory=set)
    """Processes that were granted slots or have shown the token."""
    bells: dict[int, int] = field(default_factory=dict)
    """Index to the ringing end of its socket pair."""
    hears: int | None = None
    """The hearing end of bell 0, until its process has it."""


@dataclass(slots=True, eq=False)
class Arena:
    """Shared memory of two processes."""

    id: int
    memory: int
    pair: tuple[int, int]
    sides: tuple[Side, Side]
    slots: dict[int, Slot] = field(default_factory=dict)
    free: list[int] = field(default_factory=lambda: list(reversed(range(SLOTS))))
    held: list[int] = field(default_factory=lambda: [0] * SIDES)
    """Slots that each side holds."""
    retired: bool = False
    used: int = 0
    """Bytes, when last looked."""
    orphaned: bool = False
    """A side's processes have hung up; what shares their memory may still use it."""
    rung: bool = False
    """Its processes have what rings bell 0 of the other side."""
    ring: int = 0
    """Bytes of its rings if it is a remote one."""

    def take(
        self, incarnation: int, since: float, ends: tuple[ConnectionEnd, ConnectionEnd]
    ) -> int:
        """Put a connection in a free slot; there must be one."""
        number = self.free.pop()
        self.slots[number] = Slot(incarnation, since, list(ends))
        for side in range(SIDES):
            self.held[side] += 1
        return number

    def side_of(self, token: int, namespace: int) -> int | None:
        """The side that a token is of, if the container is that side's."""
        for number in range(SIDES):
            side = self.sides[number]
            if side.token == token and side.namespace == namespace:
                return number
        return None

    def release(self, number: int, side: int) -> tuple[ConnectionEnd | None, bool]:
        """One side is done with a slot. What end that was, and whether the slot is free now."""
        slot = self.slots[number]
        end, slot.ends[side] = slot.ends[side], None
        if end is not None:
            self.held[side] -= 1
            self.retired = self.retired or not (self.held[side] or (self.ring and side))
        if any(each is not None for each in slot.ends):
            return end, False
        del self.slots[number]
        self.free.append(number)
        return end, True

    @property
    def done(self) -> bool:
        """Nothing is in it, and nothing will come."""
        users = self.sides[:1] if self.ring else self.sides
        return not self.slots and (self.retired or not all(side.members for side in users))
