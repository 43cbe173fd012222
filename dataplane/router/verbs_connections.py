"""A connection of rdma_cm as the router keeps it, and what its ends may say when. No I/O here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Protocol

from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import PRIVATE, Step, VerbsConnection


class Reject(IntEnum):
    """Why a request is rejected (enum ib_cm_rej_reason of rdma/ib_cm.h)."""

    TIMEOUT = 4
    NO_SERVICE = 8
    BY_PROGRAM = 28


UNSUPPORTED: Final = 1
"""Nobody takes datagrams at a port (enum ib_cm_sidr_status)."""


HalfKey = tuple[int, frozenset[int]]
"""A number of an earlier router, and the namespaces of both ends."""


class CmStage(IntEnum):
    """How far a connection is."""

    ASKED = 0
    REPLIED = 1
    READY = 2


@dataclass(slots=True, eq=False)
class ConnectionSide:
    """One end of a connection of rdma_cm."""

    process: int
    namespace: int
    gid: IPAddress
    id: int
    """Its number in its process; 0: it has not said so far, or is on another host."""
    host: IPAddress | None = None
    """The other host that has it. `process` is 0, and `namespace` RELAY."""
    said: set[Step] = field(default_factory=set)

    @property
    def container(self) -> int | IPAddress:
        """What its requests count for: its container, or another host."""
        return self.namespace if self.host is None else self.host


@dataclass(slots=True, eq=False)
class CmConnection:
    """A connection, or the request for one."""

    number: int
    network: str
    sides: list[ConnectionSide]
    """Who asked comes first. One that was made by an earlier router may have one side so far."""
    request: VerbsConnection
    listener: int = 0
    """The id that a request is for."""
    stage: CmStage = CmStage.ASKED
    waiting: Counter[int | IPAddress] | None = None
    """The listener's requests, as long as this is one."""
    half: HalfKey | None = None
    """As long as an earlier router's has one side."""
    far_number: int = 0
    """The number of the host that asked, if the two ends are on two hosts."""

    @property
    def far_side(self) -> int | None:
        """The side that is on another host."""
        return next((side for side, end in enumerate(self.sides) if end.host is not None), None)

    @property
    def for_datagrams(self) -> bool:
        """Whether it only asks where to send datagrams."""
        return self.request.step is Step.RESOLVE

    def side_of(self, process: int, number: int) -> int | None:
        """The side of a process; its id decides where both are of one process."""
        own = [
            side
            for side, end in enumerate(self.sides)
            if end.process == process and end.host is None
        ]
        if len(own) == 2:
            return 0 if number == self.sides[0].id else 1
        return own[0] if own else None

    def peer_gid(self, side: int) -> IPAddress | None:
        """The GID of the end opposite to a side."""
        return self.sides[1 - side].gid if len(self.sides) == 2 else self.request.peer_gid

    def is_other_half(self, own: ConnectionSide, network: KnownNetwork) -> bool:
        """Whether an end is the one that is missing."""
        first, peer_gid = self.sides[0], self.request.peer_gid
        return (
            network.id == self.network
            and peer_gid is not None
            and network.owners.get(peer_gid) == own.namespace
            and (first.process, first.id) != (own.process, own.id)
        )

    @property
    def left(self) -> bool:
        """Whether one end has left."""
        return any(Step.DISCONNECT in side.said for side in self.sides)

    def may_say(self, side: int, step: Step) -> bool:
        """Whether a step of one side makes sense now. Others are late, or nonsense."""
        asked = side == 1
        match step:
            case Step.REPLY:
                return asked and not self.for_datagrams and self.stage < CmStage.READY
            case Step.READY:
                return not asked and self.stage > CmStage.ASKED
            case Step.RESOLVED:
                return asked and self.for_datagrams
            case Step.DISCONNECT:
                return self.stage > CmStage.ASKED
            case Step.DISCONNECTED:
                return self.left
            case _:
                return step is Step.REJECT

    def last_word(self, side: int) -> tuple[Step, int]:
        """What one side is told when the other one is gone: a step and its reason."""
        if self.stage > CmStage.ASKED:
            has_left = Step.DISCONNECT in self.sides[side].said
            return (Step.DISCONNECTED if has_left else Step.DISCONNECT), 0
        if side == 1:
            return Step.REJECT, Reject.TIMEOUT
        if self.for_datagrams:
            return Step.RESOLVED, UNSUPPORTED
        return Step.REJECT, Reject.BY_PROGRAM


def plain(step: Step, reject: int = 0, request: VerbsConnection | None = None) -> VerbsConnection:
    """A step that says nothing else; the answer to a request, if there is one."""
    return VerbsConnection(
        step=step,
        id=0 if request is None else request.id,
        connection=0,
        gid_index=0 if request is None else request.gid_index,
        space=0 if request is None else request.space,
        port=0 if request is None else request.port,
        from_port=0,
        qpn=0,
        type=0,
        psn=0,
        qkey=0,
        reject=reject,
        responder_resources=0,
        initiator_depth=0,
        flow_control=0,
        retry=0,
        rnr_retry=0,
        srq=0,
        private_size=0,
        peer_gid=None if request is None else request.peer_gid,
        private=bytes(PRIVATE),
    )


def nobody(request: VerbsConnection) -> VerbsConnection:
    """The answer to a request for a port where nobody listens."""
    if request.step is Step.RESOLVE:
        return plain(Step.RESOLVED, UNSUPPORTED, request)
    return plain(Step.REJECT, Reject.NO_SERVICE, request)


class FarEnds(Protocol):
    """Ends on other hosts. Hosts are named by their addresses."""

    def host_of(self, network: KnownNetwork, gid: IPAddress) -> IPAddress | Reason:
        """The host that has a GID, or why none can be asked. REMOTE: never; LIMIT: for now."""

    def has(self, host: IPAddress, network: str, gid: IPAddress) -> bool:
        """Whether a host still has a GID."""

    def has_room(self, host: IPAddress) -> bool:
        """Whether a host can be told of what is new, or what it has been told before."""

    def tell(self, connection: CmConnection, side: int, message: VerbsConnection) -> None:
        """Tell the end of a side, which is on another host, what the other one says."""


class NoFarEnds:
    """There are no other hosts."""

    def host_of(self, network: KnownNetwork, gid: IPAddress) -> IPAddress | Reason:
        return Reason.REMOTE

    def has(self, host: IPAddress, network: str, gid: IPAddress) -> bool:
        return False

    def has_room(self, host: IPAddress) -> bool:
        return False

    def tell(self, connection: CmConnection, side: int, message: VerbsConnection) -> None:
        pass
