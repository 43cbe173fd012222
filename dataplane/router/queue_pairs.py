"""What the router knows of a queue pair of verbs."""

from __future__ import annotations

from dataclasses import dataclass

from dataplane.router.arenas import Arena, EndKey
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import VerbsQueuePair, VerbsStatus


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
