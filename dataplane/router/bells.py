"""Bells: the sockets by which a sleeping thread is woken.

A bell is a pair of unix sockets. Its hearing end belongs to the thread that sleeps, its ringing
end to whoever has to wake it. The router makes both, keeps a copy of the ringing end, and closes
its copy of the hearing end before anybody gets the ringing end: a hearing end that only its process
has can't be used to send the router descriptors.
"""

from __future__ import annotations

from dataplane.errors import KernelRefused
from dataplane.router.arenas import RELAY_SIDE, Arena, ArenaSide
from dataplane.router.library_wire import Bell, Fetch, Hear, Ring
from dataplane.router.registry import Registry
from dataplane.router.seams import ArenaMemory


class Bells:
    """Makes, hands out and closes the bells of all arenas."""

    def __init__(self, registry: Registry, memory: ArenaMemory) -> None:
        self._registry = registry
        self._memory = memory

    def make(self, side: ArenaSide, index: int) -> int | None:
        """A new bell of a side: its hearing end; None if the side can't have one."""
        container = self._registry.containers[side.namespace]
        if container.bells >= self._registry.limits.bells:
            return None
        try:
            hears, side.bells[index] = self._memory.make_bell()
        except KernelRefused:
            return None
        container.bells += 1
        return hears

    def add_relay_bell(self, arena: Arena, descriptor: int) -> None:
        """Bell 0 of the relay, which has no limit."""
        side = arena.sides[RELAY_SIDE]
        side.bells[0] = descriptor
        self._registry.containers[side.namespace].bells += 1

    def answer(self, process_id: int, message: Bell, arena: Arena | None) -> None:
        """Make a bell of a process's own side, in place of one with the same index."""
        answer = Hear(message.index, message.arena, message.side)
        if arena is None:
            self._registry.outbox.send(process_id, answer)
            return
        side = arena.sides[message.side]
        old = side.bells.pop(message.index, None)
        if old is not None:
            self._close(side, old)
        hears = self.make(side, message.index)
        if hears is None:
            self._registry.outbox.send(process_id, answer)
            return
        self._registry.outbox.send(process_id, answer, hears)
        self._memory.close_hearing(hears)
        if arena.ring:
            self._registry.remote.bell_made(arena.id, message.index, side.bells[message.index])

    def fetch(self, process_id: int, message: Fetch, arena: Arena | None) -> None:
        """Ring a bell of the other side, and hand it out.

        A thread never sleeps on a bell that the router doesn't know.
        """
        answer = Ring(message.index, message.arena, message.side)
        bells = {} if arena is None else arena.sides[message.side].bells
        descriptor = bells.get(message.index)
        if descriptor is None:
            self._registry.outbox.send(process_id, answer)
            return
        self._memory.ring(descriptor)
        self._registry.outbox.send(process_id, answer, descriptor)

    def hand_out_first(self, arena: Arena, side: int, process_id: int) -> None:
        """Give a process the ringing end of bell 0 of a side."""
        descriptor = arena.sides[side].bells.get(0)
        if descriptor is not None:
            self._registry.outbox.send(process_id, Ring(0, arena.id, side), descriptor)

    def close_hearing(self, side: ArenaSide) -> None:
        """The hearing end of bell 0 is in its process alone from now on."""
        if side.hears is not None:
            self._memory.close_hearing(side.hears)
            side.hears = None

    def close_side(self, side: ArenaSide) -> None:
        """Close the ringing ends of a side's bells."""
        for descriptor in side.bells.values():
            self._close(side, descriptor)
        side.bells.clear()

    def close_arena(self, arena: Arena) -> None:
        """Close all bells of an arena."""
        for side in arena.sides:
            self.close_hearing(side)
            self.close_side(side)

    def _close(self, side: ArenaSide, descriptor: int) -> None:
        self._memory.close_bell(descriptor)
        self._registry.containers[side.namespace].bells -= 1
