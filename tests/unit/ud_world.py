"""Processes with queue pairs of type UD, in the world of `verbs_world.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final, Protocol

from dataplane.router import library_wire as wire
from dataplane.router import verbs_messages
from dataplane.router.library_wire import IPAddress
from dataplane.router.pairing import Pairing
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsGrant, VerbsKind, VerbsRefuse
from tests.unit.router_world import FakePost
from tests.unit.verbs_world import VerbsWorld

GROUP: Final = IPv4Address("239.1.2.3")


class UdHost(Protocol):
    """A registry, and what it has sent to processes."""

    pairing: Pairing
    post: FakePost


Said = VerbsGrant | VerbsRefuse | VerbsDatagrams


@dataclass(eq=False)
class UdModel:
    """A process with queue pairs of type UD."""

    world: UdHost
    process: int
    qpn: int
    """Its first number."""
    read_so_far: int = 0

    @classmethod
    def open(cls, world: VerbsWorld, namespace: int, pairs: Sequence[int] = (0,)) -> UdModel:
        """A process whose queue pairs take datagrams."""
        model = world.open(namespace)
        made = cls(world, model.process, model.qpn_first)
        for pair in pairs:
            made.takes(pair)
        made.read()
        return made

    def takes(self, pair: int = 0, *, on: bool = True) -> None:
        self.say(VerbsDatagrams(VerbsKind.DATAGRAMS, 0, self.qpn + pair, 0, 0, on, 0, None))

    def ask(self, request: int, to: IPAddress | None, peer_qpn: int, index: int = 0) -> None:
        self.say(
            VerbsDatagrams(VerbsKind.DATAGRAM_PEER, request, self.qpn, index, peer_qpn, True, 0, to)
        )

    def join(self, group: IPAddress = GROUP, pair: int = 0, *, on: bool = True) -> None:
        self.say(VerbsDatagrams(VerbsKind.GROUP, 0, self.qpn + pair, 0, 0, on, 0, group))

    def send_to(self, request: int, group: IPAddress = GROUP, *, on: bool = True) -> None:
        self.say(VerbsDatagrams(VerbsKind.DATAGRAM_PEER, request, self.qpn, 0, 0, on, 0, group))

    def say(self, message: VerbsDatagrams) -> None:
        verbs_messages.handle(self.world.pairing, self.process, message)

    def read(self) -> list[Said]:
        sent = self.world.post.sent.get(self.process, [])
        taken = [message for message, _ in sent[self.read_so_far :]]
        self.read_so_far = len(sent)
        return [each for each in taken if isinstance(each, Said)]

    def grant(self) -> VerbsGrant:
        """The one message that has come."""
        (heard,) = self.read()
        assert isinstance(heard, VerbsGrant)
        return heard

    def give_back(self, grant: VerbsGrant) -> None:
        self.world.pairing.release(
            self.process, wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token)
        )

    def kill(self) -> None:
        self.world.pairing.gone(self.process)


def clean(world: VerbsWorld) -> None:
    """When all processes are gone nothing is left."""
    pairing = world.pairing
    for process in list(pairing.processes):
        pairing.gone(process)
    datagrams, groups = pairing.datagrams, pairing.groups
    assert not any(
        (
            datagrams.open_at,
            datagrams.open_of,
            datagrams.slots,
            datagrams.of_process,
            datagrams.between,
            datagrams.unasked,
            datagrams.others,
            groups.groups,
            groups._uses,
            groups._of_container,
            groups._due,
            groups._due.between,
            groups._told_of,
            pairing.arenas,
            pairing.containers,
            world.memory.arenas,
        )
    )
