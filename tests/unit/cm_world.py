"""Processes that use rdma_cm, in the world of `verbs_world.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

from msgspec.structs import replace

from dataplane.router.library_wire import IPAddress
from dataplane.router.pairing import Pairing
from dataplane.router.verbs_connections import plain
from dataplane.router.verbs_wire import (
    Step,
    VerbsConnection,
    VerbsEnd,
    VerbsKind,
    VerbsListen,
    VerbsRefuse,
)
from tests.unit.router_world import FakePost
from tests.unit.verbs_world import VerbsWorld

TCP: Final = 0x0106
UDP: Final = 0x0111

Heard = VerbsListen | VerbsConnection | VerbsRefuse


class CmHost(Protocol):
    """A registry, and what it has sent to processes."""

    pairing: Pairing
    post: FakePost


@dataclass(eq=False)
class CmModel:
    """A process that uses rdma_cm."""

    world: CmHost
    process: int
    heard: list[Heard] = field(default_factory=list)
    read_so_far: int = 0

    @classmethod
    def open(cls, world: VerbsWorld, namespace: int) -> CmModel:
        """A process of a container that has opened its device."""
        return cls(world, world.open(namespace).process)

    def listen(
        self,
        number: int,
        port: int = 0,
        gid: IPAddress | None = None,
        *,
        space: int = TCP,
        backlog: int = 8,
        reuse: bool = False,
    ) -> VerbsListen | VerbsRefuse:
        """Bind an id to a port, and listen. What the router says."""
        message = VerbsListen(VerbsKind.LISTEN, number, space, port, backlog, reuse, gid)
        self.world.pairing.verbs_connections.listen(self.process, message)
        (answer,) = self.read()
        assert isinstance(answer, VerbsListen | VerbsRefuse)
        return answer

    def listen_end(self, number: int) -> None:
        """An id has no port any more."""
        message = VerbsEnd(VerbsKind.LISTEN_END, number)
        self.world.pairing.verbs_connections.listen_end(self.process, message)

    def ask(
        self,
        number: int,
        to: IPAddress | None,
        port: int,
        *,
        step: Step = Step.REQUEST,
        space: int = TCP,
        index: int = 0,
    ) -> None:
        """Request a connection, or where to send datagrams."""
        message = replace(
            plain(step),
            id=number,
            gid_index=index,
            space=space,
            port=port,
            from_port=41000,
            qpn=77,
            psn=9,
            private_size=3,
            private=b"abc".ljust(256, b"\0"),
            peer_gid=to,
        )
        self.world.pairing.verbs_connections.step(self.process, message)

    def say(self, step: Step, number: int, connection: int = 0, reject: int = 0) -> None:
        """Any other step."""
        message = replace(plain(step, reject), id=number, connection=connection)
        self.world.pairing.verbs_connections.step(self.process, message)

    def resume(self, number: int, connection: int, peer: IPAddress | None) -> None:
        """Tell a new router of a connection."""
        message = replace(plain(Step.RESUME), id=number, connection=connection, peer_gid=peer)
        self.world.pairing.verbs_connections.step(self.process, message)

    def read(self) -> list[Heard]:
        """What the router has said of listeners and connections since the last time."""
        sent = self.world.post.sent.get(self.process, [])
        taken = [message for message, _ in sent[self.read_so_far :]]
        self.read_so_far = len(sent)
        found: list[Heard] = [each for each in taken if isinstance(each, Heard)]
        self.heard += found
        return found

    def hear(self) -> VerbsConnection:
        """The one step that has come."""
        (heard,) = self.read()
        assert isinstance(heard, VerbsConnection)
        return heard

    def kill(self) -> None:
        """It ends."""
        self.world.pairing.gone(self.process)


def connect(
    one: CmModel, other: CmModel, to: IPAddress, port: int, first: int = 1, second: int = 101
) -> int:
    """Connect two processes, of which the other listens. The connection's number."""
    one.ask(first, to, port)
    number = other.hear().connection
    other.say(Step.REPLY, second, number)
    assert one.hear().step is Step.REPLY
    one.say(Step.READY, first, number)
    assert other.hear().step is Step.READY
    return number
