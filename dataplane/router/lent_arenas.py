"""The arenas that the relay has, with the bells of their processes."""

from __future__ import annotations

from collections.abc import Callable

from dataplane.router import relay_wire
from dataplane.router.arenas import Arena
from dataplane.router.relay_wire import RelayKind
from dataplane.router.seams import ArenaMemory


class LentArenas:
    """Part of a `RemotePairing`. `tell_relay` is `RelayProcess.send`."""

    def __init__(self, tell_relay: Callable[..., None], memory: ArenaMemory) -> None:
        self._tell_relay = tell_relay
        self._memory = memory
        self._lent: set[int] = set()

    def bell_made(self, arena: int, index: int, descriptor: int) -> None:
        """Give the relay a bell of a process."""
        if arena in self._lent:
            self._tell_relay(relay_wire.RelayArena(RelayKind.BELL, arena, index), (descriptor,))

    def arena_made(self, arena: Arena, bell: int) -> None:
        """Give the relay an arena, with the receiving end of its bell 0."""
        try:
            self._lent.add(arena.id)
            message = relay_wire.RelayArena(RelayKind.ARENA, arena.id, arena.ring, arena.pair[0])
            self._tell_relay(message, (arena.memory, bell))
        finally:
            self._memory.close_hearing(bell)

    def share(self, arena: int, part: int) -> None:
        """Have the relay work for an arena in so many thousandths of the time."""
        if arena in self._lent:
            self._tell_relay(relay_wire.RelayArena(RelayKind.SHARE, arena, part))

    def arena_closed(self, arena: Arena) -> None:
        """The relay doesn't need an arena any more."""
        if arena.id in self._lent:
            self._lent.remove(arena.id)
            self._tell_relay(relay_wire.RelayArena(RelayKind.DISCARD, arena.id))
