"""What the registry of connections needs from outside: processes, sockets and memory.

`pairing.py` does no I/O of its own: it calls these interfaces, and tests give it fakes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from dataplane.router import layout
from dataplane.router.library_wire import Address, Answer, IPAddress
from dataplane.router.tcp_counters import TcpCounters
from dataplane.router.verbs_wire import VerbsAnswer

SocketEnd = tuple[Address, Address, int]
"""Local and remote address of a connected socket, and its cookie."""


class Sent(NamedTuple):
    """What the sender of a ring says that it has put there since the slot was granted."""

    bytes: int
    messages: int
    """Times that it has put bytes there; 0: it doesn't count them."""


class Outbox(Protocol):
    """Sends answers to processes."""

    def send(self, process: int, answer: Answer | VerbsAnswer, *descriptors: int) -> bool:
        """Send now or never. False: the process can't take it, and its connection closes."""
        ...

    def has_room(self, process: int) -> bool:
        """Whether a process reads its answers, so that it may be told what others ask of it."""
        ...


class SocketTable(Protocol):
    """The kernel's table of a container's sockets."""

    def is_open(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        """Whether the socket with this cookie is connected."""
        ...

    def exists(self, namespace: int, local: Address, remote: Address) -> bool:
        """Whether there is any socket with these addresses, in any state."""
        ...

    def is_held(self, namespace: int, local: Address, remote: Address, cookie: int) -> bool:
        """Whether a process still has the socket with this cookie."""
        ...

    def counters(self, namespace: int, ends: Sequence[SocketEnd]) -> list[TcpCounters | None]:
        """The counters of some connections of a container, `socket_table.AT_ONCE` at most.

        None: the kernel doesn't know such a socket as connected, or doesn't answer.
        """
        ...

    def translated(
        self, namespace: int, local: Address, remote: Address
    ) -> tuple[Address, Address] | None:
        """The server that a connection leads to, and the client as that server sees it.

        None: unknown.
        """
        ...

    def is_translated(self, namespace: int, local: Address, remote: Address) -> bool:
        """Whether a namespace changes the addresses of a connection. True too if the kernel
        doesn't tell.
        """
        ...

    def is_listed(self, namespace: int) -> bool:
        """Whether a namespace is still the one of its container. The kernel uses the number of one
        that has gone for a new one.
        """
        ...

    def has_address(self, namespace: int, ip: IPAddress) -> bool:
        """Whether an address is one of a namespace's own."""
        ...

    def is_carried(self, bridge: str, local: Address, remote: Address, *, trusted: bool) -> bool:
        """Whether a container's connection passes this host's own namespace as it is: nothing
        translates it, ends it, or keeps the two ends apart.

        `bridge` is that of the network, or `ANY_DEVICE`. `trusted`: nothing keeps them apart.
        """
        ...


class LentFile(Protocol):
    """A file for registered memory of a process."""

    number: int
    token: int
    process: int
    memory: int
    writable: bool


class ArenaMemory(Protocol):
    """The memory and the bells of arenas. Arenas and bells are descriptors."""

    def make(self, ring_size: int = layout.RING_SIZE, remote: bool = False) -> int:
        """A new arena. Raises KernelRefused."""
        ...

    def prepare(self, memory: int, slot: int, incarnation: int) -> None:
        """Clear a slot for its next connection. Raises KernelRefused."""
        ...

    def leave(self, memory: int, slot: int) -> None:
        """Ask both ends of a slot's connection to fall back to TCP."""
        ...

    def sever(self, memory: int, slot: int) -> None:
        """Tell the ends of a remote slot's connection that nothing can be delivered any more."""
        ...

    def finish(self, memory: int, slot: int) -> None:
        """Tell the end of a remote slot's connection that its ring is empty for good: use TCP."""
        ...

    def alarm(self, memory: int) -> None:
        """Have the process check all slots of a remote arena when its bells ring."""
        ...

    def make_bell(self) -> tuple[int, int]:
        """A new bell: its hearing end and its ringing end. Raises KernelRefused."""
        ...

    def ring(self, descriptor: int) -> None:
        """Ring a bell."""
        ...

    def close_hearing(self, descriptor: int) -> None:
        """Close the router's copy of a hearing end: only its process has it now."""
        ...

    def reclaim(self, memory: int, slot: int) -> bool:
        """Reclaim the pages of a slot; false if that fails."""
        ...

    def sent(self, memory: int, slot: int) -> tuple[Sent, Sent] | None:
        """What was put into the rings of a slot, by direction; None if the kernel can't say.

        The words are the containers': they may hold anything.
        """
        ...

    def make_file(self, size: int) -> int:
        """Memory for what a process registers, of so many bytes. Raises KernelRefused."""
        ...

    def protect(self, memory: int) -> None:
        """Let nobody map a file to write there any more; who has may go on.

        Raises KernelRefused.
        """
        ...

    def used(self, memory: int) -> int:
        """Bytes of memory that an arena uses."""
        ...

    def close(self, memory: int) -> None:
        """Close the router's descriptor of an arena; processes keep theirs."""
        ...

    def close_bell(self, descriptor: int) -> None:
        """Close the router's copy of a ringing end."""
        ...
