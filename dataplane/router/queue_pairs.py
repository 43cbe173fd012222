"""What the router knows of a queue pair of verbs, and of what is paired as queue pairs are."""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.router.arenas import Arena, EndKey
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Timer
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsQueuePair, VerbsStatus


@dataclass(slots=True, eq=False)
class QueuePairRecord:
    """A queue pair that is connected, or wants to be: the end of one, if it has a slot."""

    process: int
    namespace: int
    message: VerbsQueuePair
    network: str
    gid: IPAddress
    peer_gid: IPAddress
    peer_namespace: int
    since: float
    peer: QueuePairRecord | None = None
    place: tuple[Arena, int, int] | None = None
    """Arena, slot and side."""
    is_remote: bool = False
    """The peer is on another host; `peer_namespace` is that of the relay, which stands for it."""
    refused: Reason | None = None
    """It was told that it has no peer any more; it still has its slot."""
    direct: bool = False
    """It may use direct memory: the network allows it, and both processes have the same library."""
    moving: bool = False
    """The peer is on another host, and the relays may move bytes between registered memory of both
    processes."""
    reached: bool = False
    """Its process has got a file of the peer's memory by it."""
    status: VerbsStatus | None = None
    """What its process said last."""

    @property
    def number(self) -> tuple[int, int]:
        """Its namespace and its QPN."""
        return self.namespace, self.message.qpn

    @property
    def peer_number(self) -> tuple[int, int]:
        """The peer's."""
        return self.peer_namespace, self.message.peer_qpn

    @property
    def key(self) -> EndKey:
        """See `SlotEnd`."""
        return "qp", self.message.qpn

    @property
    def waits(self) -> bool:
        """Whether the peer has not asked for it yet."""
        return self.peer is None and self.place is None

    def fits(self, other: QueuePairRecord) -> bool:
        """Whether this one asks for the other one, which may be of another network or type."""
        mine, theirs = self.message, other.message
        return (
            self.network == other.network
            and self.peer_number == other.number
            and mine.type == theirs.type
            and mine.paired == theirs.paired
        )


FarName = tuple[str, IPAddress, int, IPAddress, int]
"""A network, GID and first number of the own process, and those of the peer's."""


@dataclass(slots=True, eq=False)
class FarDatagrams:
    """A process's end of a slot for datagrams to and from a process of another host."""

    process: int
    namespace: int
    network: str
    gid: IPAddress
    peer_gid: IPAddress
    message: VerbsQueuePair
    """With the first number of both processes."""
    slot_number: int
    host: IPAddress
    asked: VerbsDatagrams | None
    """What its process has asked; None: the other process has."""
    place: tuple[Arena, int, int] | None = None
    """Arena, slot and side."""
    timer: Timer | None = None
    """Runs while it has no place."""

    @property
    def key(self) -> EndKey:
        """See `SlotEnd`."""
        return "ud", 2 * self.slot_number

    @property
    def name(self) -> FarName:
        """What it is for."""
        return self.network, self.gid, self.message.qpn, self.peer_gid, self.message.peer_qpn
