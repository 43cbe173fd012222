"""What the registry of connections needs from outside: processes, the kernel's sockets, the arenas' memory.

`pairing.py` does no I/O of its own: it calls these interfaces, and tests give it fakes of them.
"""

from __future__ import annotations

from typing import Protocol

from dataplane.router import layout
from dataplane.router.library_wire import Address, Answer


class Outbox(Protocol):
    """How answers reach processes."""

    def send(self, process: int, answer: Answer, *descriptors: int) -> bool:
        """Send now or never; false if the process can't take it. It is then gone soon, not yet."""
        ...


class SocketTable(Protocol):
    """What the kernel knows of a container's sockets."""

    def is_open(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        """Whether this very socket is connected."""
        ...

    def exists(self, namespace: int, local: Address, remote: Address) -> bool:
        """Whether there is any socket of these addresses, in any state."""
        ...

    def is_held(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        """Whether some process still has this very socket."""
        ...

    def translated(
        self, namespace: int, local: Address, remote: Address
    ) -> tuple[Address, Address] | None:
        """Where a connection of this namespace really leads, and as whom it comes there; None: not known."""
        ...


class ArenaMemory(Protocol):
    """Arenas' memory."""

    def make(self, ring_size: int = layout.RING_SIZE, remote: bool = False) -> int:
        """A new arena. Raises KernelRefused."""
        ...

    def prepare(self, memory: int, slot: int, incarnation: int) -> None:
        """Make a slot new: nothing of its last connection is left. Raises KernelRefused."""
        ...

    def leave(self, memory: int, slot: int) -> None:
        """Request both ends of the slot's connection to go on over TCP."""
        ...

    def sever(self, memory: int, slot: int) -> None:
        """Say to the ends of a remote slot's connection that nothing can be delivered any more."""
        ...

    def finish(self, memory: int, slot: int) -> None:
        """Say to the end of a remote slot's connection that nothing comes in the ring, and that it is to use TCP."""
        ...

    def alarm(self, memory: int) -> None:
        """Have the process look at all slots of a remote arena when its bells are rung."""
        ...

    def make_bell(self) -> tuple[int, int]:
        """A new bell: the end that hears, the end that rings. Raises KernelRefused."""
        ...

    def ring(self, descriptor: int) -> None:
        """Ring a bell."""
        ...

    def close_hearing(self, descriptor: int) -> None:
        """The end of a bell that hears is its owner's alone now."""
        ...

    def reclaim(self, memory: int, slot: int) -> bool:
        """Give the pages of a slot back; false if that fails."""
        ...

    def used(self, memory: int) -> int:
        """Bytes that it costs."""
        ...

    def close(self, memory: int) -> None:
        """The router's hold on it ends; the processes keep theirs."""
        ...

    def close_bell(self, descriptor: int) -> None:
        """A bell isn't needed any more."""
        ...
