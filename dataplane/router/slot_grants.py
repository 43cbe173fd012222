"""Gives two processes a slot of their arena: an end each."""

from __future__ import annotations

from dataplane.router.arena_table import ArenaTable
from dataplane.router.arenas import RELAY_SIDE, Arena, RelayEnd, SlotEnd
from dataplane.router.bells import Bells
from dataplane.router.library_wire import Grant
from dataplane.router.registry import Registry
from dataplane.router.verbs_wire import VerbsGrant

GrantMessage = Grant | VerbsGrant


class SlotGrants:
    """Takes slots for pairs of ends, and hands out what belongs to them."""

    def __init__(self, registry: Registry, table: ArenaTable, bells: Bells) -> None:
        self._registry = registry
        self._table = table
        self._bells = bells

    def take(self, one: SlotEnd, other: SlotEnd) -> tuple[Arena, int]:
        """Take a slot: side 0 is for `one`. Their processes are not told yet.

        `one` is of the process that came first, so that two processes always have the same sides.

        Raises:
            KernelRefused: there is no memory for it.
        """
        arena = self._table.of_processes(one, other)
        incarnation = self._table.prepare(arena)
        slot = self._table.take(arena, incarnation, (one, other))
        for side, end in enumerate((one, other)):
            self._table.hold(end, arena, slot, side)
            self._table.join(self._registry.processes[end.process], arena, side)
        return arena, slot

    def hand_out(self, arena: Arena, one: GrantMessage, other: GrantMessage) -> None:
        """Send both their grants, and the bells of an arena that is new."""
        for side, message in enumerate((one, other)):
            self.send(arena, side, message)
        if not arena.rung:
            arena.rung = True
            for side in range(len(arena.sides)):
                self._bells.hand_out_first(arena, side, arena.pair[1 - side])

    # --- slots whose other side is the relay

    def take_remote(self, end: SlotEnd, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot for something with an end on another host. Its process is not told yet.

        Raises:
            KernelRefused: there is no memory for it.
        """
        arena = self._table.of_relay(end, ring)
        incarnation = self._table.prepare(arena)
        slot = self._table.take(arena, incarnation, (end, RelayEnd(connection)))
        arena.slots[slot].connection = connection
        self._table.join(self._registry.processes[end.process], arena, 0)
        return arena, slot

    def hand_out_remote(self, arena: Arena, message: GrantMessage) -> None:
        """Send a process its grant, and the relay's bell of an arena that is new."""
        self.send(arena, 0, message)
        if not arena.rung:
            arena.rung = True
            self._bells.hand_out_first(arena, RELAY_SIDE, arena.pair[0])

    def send(self, arena: Arena, side: int, message: GrantMessage) -> None:
        """Send a grant to the process of a side.

        The memory comes with it each time: a process unmaps an arena together with the last slot
        that it has there, and says so a moment later.
        """
        of_side = arena.sides[side]
        bells = () if of_side.hears is None else (of_side.hears,)
        self._registry.outbox.send(arena.pair[side], message, arena.memory, *bells)
        self._bells.close_hearing(of_side)
