"""All arenas: which processes share them, their slots, and the memory that they use.

A slot is freed when both its ends have released it, or when the kernel knows neither socket of the
connection any more. The pages of an arena whose process has hung up are not reclaimed: children
of the process, or others that share its memory, may still use them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from dataplane.errors import KernelRefused, WrongMessage
from dataplane.router import layout
from dataplane.router.agenda import RARELY, Agenda
from dataplane.router.arenas import (
    RELAY,
    RELAY_SIDE,
    Arena,
    ArenaSide,
    ConnectionEnd,
    Slot,
    SlotEnd,
)
from dataplane.router.bells import Bells
from dataplane.router.registry import ProcessRecord, Registry
from dataplane.router.seams import ArenaMemory, SocketTable

SLOT_AGE: Final = 30.0
"""Seconds until the first check whether the kernel still knows the sockets of a slot. Two checks
that find neither free the slot, whatever its processes say."""


class ArenaTable:
    """The arenas by number, and those with a free slot by their processes."""

    def __init__(
        self,
        registry: Registry,
        bells: Bells,
        sockets: SocketTable,
        memory: ArenaMemory,
        secret: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._bells = bells
        self._sockets = sockets
        self._memory = memory
        self._secret = secret
        self.arenas: dict[int, Arena] = {}
        self.with_room: dict[tuple[int, int], dict[int, Arena]] = {}
        """Arenas with a free slot, by their two processes."""
        # Processes may still have arenas of an earlier router: none of its numbers comes again.
        self._ids = itertools.count(secret() >> 2)
        self._incarnations = itertools.count(1)
        self._checks: Agenda[tuple[Arena, int, int]] = Agenda(SLOT_AGE, RARELY)

    @property
    def checks(self) -> int:
        """Entries of the schedule of checks."""
        return len(self._checks)

    # --- slots

    def of_processes(self, one: SlotEnd, other: SlotEnd) -> Arena:
        """The arena of two processes, with a free slot.

        Raises:
            KernelRefused: there is no memory for a new one.
        """
        pair = (one.process, other.process)
        arena = self._with_room(pair)
        if arena is None:
            sides = (self._side(one.namespace), self._side(other.namespace))
            arena = Arena(next(self._ids), self._memory.make(), pair, sides)
            self._add(arena)
            for side in sides:
                side.hears = self._bells.make(side, 0)
        return arena

    def of_relay(self, end: SlotEnd, ring: int) -> Arena:
        """The arena of a process and the relay, with rings of so many bytes and a free slot.

        Connections and queue pairs have arenas of their own: what the relay does for either is
        known, and can be limited.

        Raises:
            KernelRefused: there is no memory for a new one.
        """
        pair = (end.process, -ring if isinstance(end, ConnectionEnd) else -ring - 1)
        return self._with_room(pair) or self._make_remote(end.namespace, pair, ring)

    def _make_remote(self, namespace: int, pair: tuple[int, int], ring: int) -> Arena:
        sides = (self._side(namespace), self._side(RELAY))
        memory = self._memory.make(ring, True)
        try:
            hears, rings = self._memory.make_bell()
        except KernelRefused:
            self._memory.close(memory)
            raise
        arena = Arena(next(self._ids), memory, pair, sides, ring=ring)
        if RELAY not in self._registry.containers:
            self._registry.add_container(RELAY, 0)
        self._add(arena)
        self._bells.add_relay_bell(arena, rings)
        self._registry.remote.arena_made(arena, hears)
        own = sides[0]
        own.hears = self._bells.make(own, 0)
        if own.hears is not None:
            self._registry.remote.bell_made(arena.id, 0, own.bells[0])
        return arena

    def _side(self, namespace: int) -> ArenaSide:
        return ArenaSide(self._secret(), namespace)

    def _with_room(self, pair: tuple[int, int]) -> Arena | None:
        arenas = self.with_room.get(pair)
        return next(reversed(arenas.values())) if arenas else None

    def _add(self, arena: Arena) -> None:
        self.arenas[arena.id] = arena
        for side in arena.sides:
            self._registry.containers[side.namespace].sides += 1
        self.with_room.setdefault(arena.pair, {})[arena.id] = arena

    def prepare(self, arena: Arena) -> int:
        """Clear the slot that is taken next. Its incarnation.

        Raises:
            KernelRefused: the memory can't be written.
        """
        incarnation = next(self._incarnations)
        self._memory.prepare(arena.memory, arena.free[-1], incarnation)
        return incarnation

    def take(self, arena: Arena, incarnation: int, ends: tuple[SlotEnd, SlotEnd]) -> int:
        """Put two ends into the slot that was prepared. The slot's number."""
        slot = arena.take(incarnation, self._registry.clock(), ends)
        if not arena.free:
            self._withdraw(arena)
        return slot

    def join(self, process: ProcessRecord, arena: Arena, side: int) -> None:
        """A process is one of a side."""
        arena.sides[side].members.add(process.id)
        process.arenas[arena.id] = arena

    def hold(self, end: SlotEnd, arena: Arena, slot: int, side: int) -> None:
        """An end's container has it in a slot from now on."""
        container = self._registry.containers[end.namespace]
        container.ends[end.key] = (arena, slot, side)
        if isinstance(end, ConnectionEnd):
            container.notes.pop(end.cookie, None)

    def check_later(self, arena: Arena, slot: int) -> None:
        """Check now and then whether the sockets of a slot still exist."""
        incarnation = arena.slots[slot].incarnation
        self._checks.add((arena, slot, incarnation), self._registry.clock())

    def side_of(self, process_id: int, arena: Arena, token: int) -> int:
        """The side for which a process may speak. The process is one of that side from now on.

        Raises:
            WrongMessage: the token belongs to no side that this process's container has.
        """
        process = self._registry.processes[process_id]
        side = arena.side_of(token, process.namespace)
        if side is None:
            raise WrongMessage(f"arena {arena.id}: the token is of neither side in this container")
        if process_id not in arena.sides[side].members:
            self.join(process, arena, side)
        return side

    # --- the end of slots and arenas

    def release(self, arena: Arena, number: int, side: int) -> None:
        """A side is done with a slot. `close_if_done` is to be called afterwards."""
        slot = arena.slots[number]
        end, free = arena.release(number, side)
        if free:
            self._checks.forget((arena, number, slot.incarnation))
        if arena.retired:
            self._withdraw(arena)
        elif free and all(end in self._registry.processes or end < 0 for end in arena.pair):
            self.with_room.setdefault(arena.pair, {})[arena.id] = arena
        if end is not None and end.namespace != RELAY:
            ends = self._registry.containers[end.namespace].ends
            if ends.get(end.key) == (arena, number, side):
                del ends[end.key]
            if arena.ring:
                self._registry.remote.released(slot.connection)
        if free and not arena.orphaned:
            self._memory.reclaim(arena.memory, number)

    def _withdraw(self, arena: Arena) -> None:
        """No connection gets a slot of the arena, for now or for ever."""
        arenas = self.with_room.get(arena.pair, {})
        arenas.pop(arena.id, None)
        if not arenas:
            self.with_room.pop(arena.pair, None)

    def close_if_done(self, arena: Arena) -> None:
        """Close an arena that nothing is in, and nothing will come into."""
        if not arena.done or arena.id not in self.arenas:
            return
        del self.arenas[arena.id]
        self._withdraw(arena)
        self._bells.close_arena(arena)
        if arena.ring:
            self._registry.remote.arena_closed(arena)
        self._account(arena, 0)
        self._memory.close(arena.memory)
        for side in arena.sides:
            for member in side.members:
                self._registry.processes[member].arenas.pop(arena.id, None)
            self._registry.containers[side.namespace].sides -= 1
            self._registry.forget_if_unused(side.namespace)

    def retire_remote(self) -> None:
        """The relay has ended: no connection gets a slot of an arena that it had mapped."""
        for arena in [arena for arena in self.arenas.values() if arena.ring]:
            arena.retired = True
            self._withdraw(arena)
            self.close_if_done(arena)

    def process_gone(self, process: ProcessRecord) -> None:
        """A process has closed its connection to the router."""
        for arena in list(process.arenas.values()):
            if process.id in arena.pair:
                self.with_room.pop(arena.pair, None)
            for number, side in enumerate(arena.sides):
                side.members.discard(process.id)
                if side.members or (arena.ring and number == RELAY_SIDE):
                    continue
                # Children of the process may go on with the connections and never tell the router.
                arena.orphaned = True
                if arena.ring:
                    self._orphan_remote(arena)
                else:
                    for slot in list(arena.slots):
                        self.release(arena, slot, number)
            self.close_if_done(arena)

    def _orphan_remote(self, arena: Arena) -> None:
        """Processes that share the sockets of one that has hung up may still use them."""
        for number, slot in list(arena.slots.items()):
            if slot.ends[RELAY_SIDE] is None:
                self.release(arena, number, 0)
            elif slot.ends[0] is not None:
                self._registry.remote.orphaned(slot.connection)

    def leave_networks(self) -> None:
        """Bring back to TCP the connections whose networks are not accelerated any more."""
        for arena in self.arenas.values():
            for number, slot in arena.slots.items():
                if slot.left or all(self._may_stay(arena, slot, end) for end in slot.ends):
                    continue
                slot.left = True
                if arena.ring:
                    self._registry.remote.leave(slot.connection)
                else:
                    self._memory.leave(arena.memory, number)

    def _may_stay(self, arena: Arena, slot: Slot, end: SlotEnd | None) -> bool:
        if not isinstance(end, ConnectionEnd) or end.namespace == RELAY:
            return True
        knowledge = self._registry.knowledge
        if not arena.ring:
            return (end.namespace, end.local.ip) in knowledge.accelerated
        transport = self._registry.remote.transport(slot.connection)
        return (transport, end.namespace, end.local.ip) in knowledge.remote

    # --- memory and time

    def weigh(self) -> None:
        """Measure the memory that each container's arenas use."""
        for arena in self.arenas.values():
            used = self._memory.used(arena.memory)
            self._account(arena, used if arena.ring else min(used, _needed(arena)))

    def _account(self, arena: Arena, used: int) -> None:
        """Both containers bear the memory; an arena within one container counts once."""
        namespaces = [side.namespace for side in arena.sides]
        for namespace, other in {(namespaces[0], namespaces[1]), (namespaces[1], namespaces[0])}:
            memory = self._registry.containers[namespace].memory
            memory[other] += used - arena.used
            if not memory[other]:
                del memory[other]
        arena.used = used

    def sweep(self, now: float, most: int) -> None:
        """Free slots whose sockets are gone without a word; check so many at most."""
        self._checks.check(now, most, self._still_used)

    def _still_used(self, slot_of: tuple[Arena, int, int]) -> bool:
        arena, number, incarnation = slot_of
        slot = arena.slots.get(number)
        if slot is None or slot.incarnation != incarnation:
            return False
        if any(
            isinstance(end, ConnectionEnd)
            and end.namespace != RELAY
            and self._sockets.exists(end.namespace, end.local, end.remote)
            for end in slot.ends
        ):
            slot.lost = False
            return True
        if not slot.lost:
            # A reset may have ended both while there is something to read.
            slot.lost = True
            return True
        # The relay itself says when its side is done.
        for side in range(1 if arena.ring else layout.SIDES):
            if number in arena.slots:
                self.release(arena, number, side)
        self.close_if_done(arena)
        return False


def _needed(arena: Arena) -> int:
    """Bytes that the slots in use and all headers can need.

    Memory that a side writes elsewhere is charged to its own cgroup alone.
    """
    return layout.BULK_OFFSET + len(arena.slots) * layout.SIDES * layout.RING_SIZE
