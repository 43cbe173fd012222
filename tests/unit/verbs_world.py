"""Processes that use verbs, in the world of `router_world.py`: each does what a library does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from msgspec.structs import replace

from dataplane.control import Limits
from dataplane.router import library_wire as wire
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import (
    VERBS_VERSION,
    VerbsDevice,
    VerbsEnd,
    VerbsGrant,
    VerbsKind,
    VerbsOpen,
    VerbsQueuePair,
    VerbsRefuse,
    VerbsStatus,
)
from tests.unit.router_world import World

RC: Final = 2
UC: Final = 3


def gid(text: str) -> IPAddress:
    """The GID of an address."""
    return ip_address(text)


@dataclass(eq=False)
class QueuePairModel:
    """A queue pair as its library knows it."""

    qpn: int
    request: int = 0
    """Of the last V_QUEUE_PAIR; 0: there is none."""
    peer: tuple[IPAddress, int] | None = None
    grant: VerbsGrant | None = None
    lost: Reason | None = None
    """Refused, or without its peer any more."""


class VerbsWorld(World):
    """The registry, its fakes, and libraries with verbs."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.models: dict[int, VerbsModel] = {}

    def open(self, namespace: int, qpn_first: int = 0) -> VerbsModel:
        """A process of a container that has opened its device."""
        number = self.process(namespace)
        model = self.models[number] = VerbsModel(self, number)
        self.pairing.verbs.open(number, VerbsOpen(VERBS_VERSION, qpn_first))
        model.read()
        return model

    def pair(self, one: VerbsModel, other: VerbsModel) -> tuple[QueuePairModel, QueuePairModel]:
        """Connect a new queue pair of each process."""
        first, second = one.create(), other.create()
        one.ask(first, other, second)
        other.ask(second, one, first)
        one.read()
        other.read()
        return first, second

    def kill(self, model: VerbsModel) -> None:
        """A process ends."""
        del self.models[model.process]
        self.pairing.gone(model.process)


@dataclass(eq=False)
class VerbsModel:
    """The library of one process."""

    world: VerbsWorld
    process: int
    devices: dict[int, VerbsDevice] = field(default_factory=dict)
    """By index."""
    queue_pairs: dict[int, QueuePairModel] = field(default_factory=dict)
    read_so_far: int = 0
    requests: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    created: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def qpn_first(self) -> int:
        """The first of its numbers."""
        return self.devices[0].qpn_first

    @property
    def gids(self) -> list[IPAddress | None]:
        """Its GIDs by index."""
        return [self.devices[index].gid for index in sorted(self.devices)]

    def create(self) -> QueuePairModel:
        """A new queue pair."""
        model = QueuePairModel(self.qpn_first + next(self.created))
        self.queue_pairs[model.qpn] = model
        return model

    def ask(
        self,
        own: QueuePairModel,
        peer: VerbsModel,
        peers: QueuePairModel,
        *,
        index: int = 0,
        of_type: int = RC,
        paired: bool = False,
    ) -> None:
        """Request a queue pair of another process, by the GID with the same index there."""
        to = peer.devices[index].gid
        assert to is not None
        self.ask_for(own, to, peers.qpn, index=index, of_type=of_type, paired=paired)

    def ask_for(
        self,
        own: QueuePairModel,
        peer_gid: IPAddress | None,
        peer_qpn: int,
        *,
        index: int = 0,
        of_type: int = RC,
        paired: bool = False,
    ) -> None:
        """Request any queue pair."""
        own.request, own.lost = next(self.requests), None
        own.peer = None if peer_gid is None else (peer_gid, peer_qpn)
        message = VerbsQueuePair(own.request, own.qpn, peer_qpn, index, of_type, paired, peer_gid)
        self.world.pairing.verbs.connect(self.process, message)

    def reset(self, own: QueuePairModel) -> None:
        """Reset a queue pair."""
        own.request, own.peer, own.grant, own.lost = 0, None, None, None
        self.world.pairing.verbs.end(self.process, VerbsEnd(VerbsKind.QUEUE_PAIR_END, own.qpn))

    def give_back(self, grant: VerbsGrant) -> None:
        """Release a slot."""
        self.world.pairing.release(
            self.process, wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token)
        )

    def status(self, own: QueuePairModel, operations: int, size: int) -> None:
        """Say what a queue pair has done."""
        status = VerbsStatus(own.qpn, 3, operations, size)
        self.world.pairing.verbs.status(self.process, status)

    def read(self, most: int = 1000) -> None:
        """Take some messages of the router."""
        sent = self.world.post.sent.get(self.process, [])
        taken = sent[self.read_so_far : self.read_so_far + most]
        self.read_so_far += len(taken)
        for message, _ in taken:
            match message:
                case VerbsDevice():
                    self._take_device(message)
                case VerbsGrant():
                    self._take_grant(message)
                case VerbsRefuse():
                    self._take_refusal(message)

    def _take_device(self, message: VerbsDevice) -> None:
        if not message.count:
            self.devices.clear()
        self.devices[message.index] = message

    def _take_grant(self, message: VerbsGrant) -> None:
        own = self.queue_pairs.get(message.qpn)
        if own is None or own.request != message.request:
            self.give_back(message)
            return
        assert own.grant is None
        assert own.peer is not None
        assert message.peer_qpn == own.peer[1]
        own.grant = message

    def _take_refusal(self, message: VerbsRefuse) -> None:
        own = self.queue_pairs.get(message.number)
        assert message.refused == VerbsKind.QUEUE_PAIR
        if own is not None and own.request == message.request:
            assert own.lost is None
            own.lost = Reason(message.reason)


def moved(world: VerbsWorld, **addresses: tuple[str, ...]) -> Knowledge:
    """The world's snapshot with other addresses of some endpoints, none: the endpoint is gone."""
    kept = []
    for endpoint in world.facts.endpoints:
        new = addresses.get(endpoint.id, endpoint.addresses)
        if new:
            kept.append(replace(endpoint, addresses=new))
    return Knowledge(replace(world.facts, endpoints=tuple(kept)))
