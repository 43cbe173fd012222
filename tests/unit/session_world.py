"""Hosts with real sessions over loopback, in one loop whose clock tests can move."""

from __future__ import annotations

import itertools
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest

from dataplane.errors import WrongMessage
from dataplane.router.identities import Identities, SwarmIdentity
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import EpollLoop
from dataplane.router.peer_wire import Message, PeerHello, Withdraw
from dataplane.router.sessions import Sessions
from testbed.patience import patience
from tests.unit.swarm_ca import Authority, Node, write

_instances: Final = itertools.count(1)
INVALID: Final = Withdraw(666)
"""What a `Recorder` takes for invalid."""
BUG: Final = Withdraw(999)
"""What makes it fail."""


@dataclass
class Recorder:
    """Records what it is told. Checks that ups and downs alternate, and that messages come only in
    between.
    """

    told: list[tuple[str, IPAddress, object]] = field(default_factory=list)
    sessions: set[IPAddress] = field(default_factory=set)

    def up(self, peer: IPAddress, hello: PeerHello) -> None:
        assert peer not in self.sessions
        self.sessions.add(peer)
        self.told.append(("up", peer, hello))

    def down(self, peer: IPAddress, reason: str) -> None:
        self.sessions.remove(peer)
        self.told.append(("down", peer, reason))

    def message(self, peer: IPAddress, message: Message) -> None:
        assert peer in self.sessions
        if message == INVALID:
            raise WrongMessage("invalid")
        if message == BUG:
            raise ZeroDivisionError
        self.told.append(("message", peer, message))

    def eased(self, peer: IPAddress) -> None:
        self.told.append(("eased", peer, None))

    def all(self, kind: str) -> list[object]:
        """The contents of all records of a kind."""
        return [content for each, _, content in self.told if each == kind]


@dataclass
class Router:
    """One host's sessions."""

    address: IPv4Address
    folder: Path
    user: Recorder
    sessions: Sessions


class World:
    """The loop, the Swarm's authority, and routers on 127.0.0.1, .2 …, which all use one port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped = 0.0
        self.bugs = 0
        self.epoll = select.epoll()
        self.loop = EpollLoop(self.epoll, lambda: time.monotonic() + self.skipped)
        self.authority = Authority()
        self.routers: list[Router] = []
        self.port = free_port()

    def close(self) -> None:
        """End all routers. There were no more bugs than tests have caused."""
        bugs = 0
        for router in self.routers:
            router.sessions.close()
            bugs += router.sessions.counts().ended.get("bug", 0)
        self.epoll.close()
        assert bugs == self.bugs

    def router(
        self,
        number: int,
        node: Node | None = None,
        *,
        identities: Identities | None = None,
        wall: Callable[[], float] = time.time,
        user: Recorder | None = None,
        keep: bool = False,
    ) -> Router:
        """The router of host `number`, with a new node certificate, the one given, or its last one
        (`keep`).
        """
        address = IPv4Address("127.0.0.0") + number
        folder = self.folder / f"host{number}"
        if identities is None and not keep:
            write(folder, self.authority.root, node or self.authority.node(f"node{number}"))
        user = user or Recorder()
        sessions = Sessions(
            self.loop,
            identities or SwarmIdentity(folder, wall),
            user,
            instance=f"{next(_instances):032x}",
            port=self.port,
            build="test",
            bind=str(address),
            wall=wall,
            jitter=lambda: 0.5,
        )
        sessions.start()
        sessions.introduce(data_path=str(address), rdma=True)
        made = Router(address, folder, user, sessions)
        self.routers.append(made)
        return made

    def acquaint(self, *routers: Router) -> None:
        """Let hosts share a network."""
        for router in routers:
            router.sessions.want(
                {each.address for each in routers if each is not router}, router.address
            )

    def pair(self, one: int = 1, other: int = 2) -> tuple[Router, Router]:
        """Two routers with a session."""
        made = self.router(one), self.router(other)
        self.acquaint(*made)
        self.until("a session", lambda: self.joined(*made))
        return made

    def joined(self, *routers: Router) -> bool:
        """Whether each of them has a session with each other."""
        return all(
            each.sessions.session(other.address) is not None
            for each in routers
            for other in routers
            if each is not other
        )

    def round(self, wait: float = 0.02) -> None:
        """One round of the loop."""
        for descriptor, events in self.epoll.poll(self.loop.timeout(wait), 64):
            self.loop.serve(descriptor, events)
        self.loop.fire()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.round()

    def skip(self, seconds: float) -> None:
        """Let time pass quickly, in steps that are shorter than a tick."""
        for _ in range(int(seconds * 2)):
            self.skipped += 0.5
            for _ in range(4):
                self.round(0.001)

    def until(self, what: str, true: Callable[[], object], seconds: float = 15) -> None:
        """Let time pass until a condition is true."""
        end = time.monotonic() + patience(seconds)
        while not true():
            assert time.monotonic() < end, f"waited in vain for {what}: {self.state()}"
            self.round()

    def state(self) -> str:
        """The state of all sessions, for messages of failed tests."""
        return "; ".join(
            f"{router.address}: {router.sessions.reasons()} {router.sessions.counts()}"
            for router in self.routers
        )


@pytest.fixture
def session_world(tmp_path: Path) -> Iterator[World]:
    """A world that ends with the test."""
    made = World(tmp_path)
    yield made
    made.close()


def free_port() -> int:
    """A TCP port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
