"""The router's control socket: lists that are made in steps, beside other work."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from dataplane import control
from dataplane.router.control_socket import MOST, SHARE, ControlSocket
from dataplane.router.loop import EpollLoop

STEPS = 100
STEP = 0.001
"""Seconds that a step takes."""


class World:
    """A control socket, time that only steps and tests move, and one client that wants a list."""

    def __init__(self, path: Path) -> None:
        self.now = 100.0
        self.made = 0
        self.fails = STEPS
        """The step at which there is a bug."""
        self.epoll = select.epoll()
        loop = EpollLoop(self.epoll, lambda: self.now)
        self.control = ControlSocket(loop, path, lambda _: self.steps())
        self.client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.client.connect(str(path))
        self.client.sendall(msgspec.json.encode(control.PathsRequest()) + b"\n")
        while not self.control.is_busy:
            for descriptor, events in self.epoll.poll(1):
                loop.serve(descriptor, events)

    def steps(self) -> Iterator[control.PathCounts | None]:
        for number in range(STEPS - 1):
            if number == self.fails:
                raise KeyError(number)
            self.made += 1
            self.now += STEP
            yield None
        yield control.PathCounts(paths=())

    def close(self) -> None:
        self.client.close()
        self.control.close()
        self.epoll.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "control.sock")
    yield made
    made.close()


def test_short_rounds(world: World) -> None:
    """Between short rounds of the loop a list goes on by one step, so clients don't wait for it."""
    for steps in range(1, 20):
        world.control.work()
        assert world.made == steps


def test_long_rounds(world: World) -> None:
    """A list has its share of the time even if clients keep each round long, and its client gets
    the reply; no client waits for more than a part of that.
    """
    rounds = 0
    while world.control.is_busy:
        world.now += 1.2 * MOST / SHARE
        before = world.now
        world.control.work()
        assert world.now - before <= MOST + STEP
        rounds += 1
    assert rounds <= STEPS * STEP / MOST + 2
    assert msgspec.json.decode(world.client.recv(1000), type=control.ControlReply) == (
        control.PathCounts(paths=())
    )


def test_a_bug_in_a_list(world: World) -> None:
    """A bug in a list costs that list: its client is told, and nothing is left to be done."""
    world.fails = 3
    for _ in range(3):
        world.control.work()
    with pytest.raises(KeyError):
        world.control.work()
    assert not world.control.is_busy
    reply = msgspec.json.decode(world.client.recv(1000), type=control.ControlReply)
    assert isinstance(reply, control.Failed)
    world.control.work()
