"""What the relay has of this host's processes: arenas with their bells, and files for registered
memory."""

from __future__ import annotations

from collections.abc import Callable

from dataplane.router import relay_wire
from dataplane.router.arenas import Arena
from dataplane.router.pairing import Pairing
from dataplane.router.relay_wire import RelayKind
from dataplane.router.seams import ArenaMemory, LentFile


class LentArenas:
    """Part of a `RemotePairing`. `tell_relay` is `RelayProcess.send`."""

    def __init__(
        self, pairing: Pairing, tell_relay: Callable[..., None], memory: ArenaMemory
    ) -> None:
        self._pairing = pairing
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

    def relay_lost(self) -> None:
        """The relay has ended: nobody waits for its bells, and it has no files."""
        for arena in self._pairing.arenas.values():
            if arena.ring:
                self._pairing.close_relay_bells(arena)
        self._pairing.direct_memory.relay_died()

    def lend_file(self, file: LentFile) -> None:
        """Give the relay a file for registered memory."""
        message = relay_wire.RelayFile(
            RelayKind.FILE, file.number, file.token, file.process, file.writable
        )
        self._tell_relay(message, (file.memory,))

    def end_file(self, number: int) -> None:
        """The relay is to let a file go."""
        self._tell_relay(relay_wire.RelayFile(RelayKind.FILE_END, number))
