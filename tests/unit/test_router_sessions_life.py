"""Sessions under random use: whatever hosts and the network do, a session carries what was sent in
it, in order.

Each router numbers its messages in a session from 0 on. Its peer must receive 0, 1, 2 … and nothing
else, and all of them unless the session was lost.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from dataclasses import dataclass, field
from typing import Final

import pytest

from dataplane.router.library_wire import IPAddress
from dataplane.router.peer_wire import Message, PeerFrame, PeerHello
from tests.unit.session_world import Recorder, Router, World, session_world
from tests.unit.swarm_ca import write

STEPS: Final = 250
SEEDS: Final = int(os.environ.get("SESSION_LIVES", "3"))


@dataclass
class Listener(Recorder):
    """Counts what it sends and receives in each session."""

    said: dict[IPAddress, int] = field(default_factory=dict)
    heard: dict[IPAddress, int] = field(default_factory=dict)

    def up(self, peer: IPAddress, hello: PeerHello) -> None:
        super().up(peer, hello)
        self.said[peer] = self.heard[peer] = 0

    def down(self, peer: IPAddress, reason: str) -> None:
        super().down(peer, reason)
        del self.said[peer], self.heard[peer]

    def message(self, peer: IPAddress, message: Message) -> None:
        assert peer in self.sessions
        if isinstance(message, PeerFrame):
            assert message.link == self.heard[peer]
            self.heard[peer] += 1


class Life:
    """A few hosts, and everything that may happen to them."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.hosts: dict[int, Router] = {
            number: world.router(number, user=Listener()) for number in (1, 2, 3)
        }
        world.acquaint(*self.hosts.values())

    def step(self) -> None:
        """One thing happens, and some time passes."""
        host = self.random.choice(list(self.hosts.values()))
        (
            self.random.choices(
                [self.talk, self.cut, self.forget, self.restart, self.renew, self.leave, self.wait],
                [12, 4, 2, 2, 1, 1, 4],
            )[0]
        )(host)
        for _ in range(self.random.randrange(6)):
            self.world.round(0.001)

    def talk(self, host: Router) -> None:
        listener = host.user
        assert isinstance(listener, Listener)
        for peer in list(listener.sessions):
            for _ in range(self.random.randrange(1, 12)):
                data = bytes(self.random.choice((0, 10, 2000, 60_000)))
                if host.sessions.send(peer, PeerFrame(listener.said[peer], data)):
                    listener.said[peer] += 1

    def cut(self, host: Router) -> None:
        """A connection is lost: both sides lose it, or one side closes it and then dials again."""
        for connection in host.sessions._connections():
            if self.random.random() < 0.5 and connection._socket is not None:
                if self.random.random() < 0.5:
                    connection.end("lost", "cut")
                else:
                    with contextlib.suppress(OSError):
                        connection._socket.shutdown(self.random.randrange(3))

    def forget(self, host: Router) -> None:
        others = {each.address for each in self.hosts.values() if each is not host}
        host.sessions.want({each for each in others if self.random.random() < 0.7}, host.address)

    def restart(self, host: Router) -> None:
        number = int(str(host.address).rpartition(".")[2])
        host.sessions.close()
        self.hosts[number] = self.world.router(number, user=Listener(), keep=True)
        self.forget(self.hosts[number])

    def renew(self, host: Router) -> None:
        number = int(str(host.address).rpartition(".")[2])
        write(host.folder, self.world.authority.root, self.world.authority.node(f"node{number}"))

    def leave(self, host: Router) -> None:
        shutil.rmtree(host.folder / "certificates", ignore_errors=True)

    def wait(self, host: Router) -> None:
        self.world.skipped += self.random.choice((0.1, 1, 3, 20))

    def heal(self) -> None:
        """Repair all faults."""
        for host in self.hosts.values():
            if not (host.folder / "certificates").exists():
                self.renew(host)
        self.world.acquaint(*self.hosts.values())
        for _ in range(40):
            self.world.skip(5)
            if self.world.joined(*self.hosts.values()):
                break
        assert self.world.joined(*self.hosts.values()), self.world.state()

    def settled(self) -> bool:
        """Whether all messages of the current sessions have arrived."""
        for host in self.hosts.values():
            for other in self.hosts.values():
                if other is not host:
                    said, heard = host.user, other.user
                    assert isinstance(said, Listener)
                    assert isinstance(heard, Listener)
                    if said.said[other.address] != heard.heard[host.address]:
                        return False
        return True


world = session_world


@pytest.mark.parametrize("seed", [random.SystemRandom().randrange(10**6) for _ in range(SEEDS)])
def test_life(world: World, seed: int) -> None:
    """The promise of this module holds; after all faults are repaired, every two hosts have a
    session.
    """
    life = Life(world, seed)
    for _ in range(STEPS):
        life.step()
    life.heal()
    begun = [host.sessions.counts().begun for host in life.hosts.values()]
    for host in life.hosts.values():
        life.talk(host)
        assert isinstance(host.user, Listener)
        assert set(host.user.said) == host.user.sessions
    world.until("all to be heard", life.settled)
    assert [host.sessions.counts().begun for host in life.hosts.values()] == begun
