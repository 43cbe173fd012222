"""When the relay opens a transport: if another host has it, and again when its device changes."""

from __future__ import annotations

from typing import Any, Final

import pytest

from dataplane.router import relay_wire as wire
from dataplane.router.relay_transports import OPEN_AGAIN, STUCK, RelayTransport
from dataplane.router.remote import OPENING
from dataplane.router.remote_events import Transport
from tests.unit.remote_world import VirtualLoop

DEVICE: Final = wire.RelayOpen("mlx5_0", 1, 3, wire.VERBS, 50)
OTHER: Final = wire.RelayOpen("mlx5_1", 1, 3, wire.VERBS, 50)
OPENED: Final = wire.RelayOpened(0, "", 4096)
FAILED: Final = wire.RelayOpened(19, "no such device", 0)


class Relay:
    """A relay's process that runs as soon as something is wanted, unless it can't be started."""

    def __init__(self) -> None:
        self.why = ""
        self.wanted: dict[int, wire.RelayOpen] = {}
        self.told: list[wire.RelayOpen] = []

    def opened(self, kind: int) -> wire.RelayOpen | None:
        mine = [one for one in self.told if one.transport == kind]
        return mine[-1] if mine else None

    def want(self, device: wire.RelayOpen) -> None:
        self.wanted[device.transport] = device
        if not self.why:
            self.told.append(device)

    def forget(self, kind: int) -> None:
        self.wanted.pop(kind, None)


class Links:
    """Whether links are up or there are any, and failed attempts, by transport."""

    def __init__(self) -> None:
        self.up: set[Transport] = set()
        self.present: set[Transport] = set()
        self.failed = 0

    def works(self, transport: Transport) -> bool:
        return transport in self.up

    def idle(self, transport: Transport) -> bool:
        return transport not in self.present

    def tries(self, transport: Transport) -> int:
        return self.failed


class World:
    """One transport with its surroundings; `why` is what others are told of it."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.relay = Relay()
        self.links = Links()
        self.why = "?"
        self.scans = 0
        rdma: Any = self
        relay: Any = self.relay
        self.one = RelayTransport(Transport.RDMA, wire.VERBS, self.loop, relay, rdma, self.scan)

    def use(self, transport: Transport, why: str) -> None:
        assert transport is Transport.RDMA
        self.why = why

    def scan(self) -> None:
        self.scans += 1

    def decide(self, wanted: wire.RelayOpen | None = DEVICE, *, others: bool = True) -> None:
        self.one.decide(wanted, "no device", others=others)


@pytest.fixture
def world() -> World:
    """A relay that has opened the device."""
    made = World()
    made.decide()
    assert made.why == OPENING
    made.one.opened(OPENED)
    assert made.why == ""
    return made


def test_nobody_else_has_it() -> None:
    """Nothing is opened as long as no other host has the transport, or this one has no device."""
    world = World()
    world.decide(others=False)
    assert world.why == "no other host has it"
    world.decide(None)
    assert world.why == "no device"
    assert not world.relay.told


def test_opened_once(world: World) -> None:
    """An open device stays open, whatever the links do, and even if no other host has one."""
    for up in (set(), {Transport.RDMA}):
        world.links.up = up
        for others in (True, False):
            world.loop.run(OPEN_AGAIN * 2)
            world.decide(others=others)
            assert world.why == ""
    assert world.relay.told == [DEVICE]


def test_another_device(world: World) -> None:
    """Another device is opened when the links over the one before are gone, and not those of other
    transports.
    """
    world.links.present = {Transport.RDMA, Transport.RELAY}
    world.loop.run(OPEN_AGAIN * 2)
    world.decide(OTHER)
    assert world.why == "it is opened again"
    assert world.relay.told == [DEVICE]
    world.links.present = {Transport.RELAY}
    world.decide(OTHER)
    assert world.why == OPENING
    assert world.relay.told == [DEVICE, OTHER]
    assert world.scans == 1
    world.one.opened(OPENED)
    assert world.why == ""


def test_a_device_that_comes_back(world: World) -> None:
    """A device that was removed and has come back is opened again, though it has the same name; the
    next relay need not open what isn't there.
    """
    world.decide(None)
    assert world.why == "no device"
    assert not world.relay.wanted
    world.loop.run(OPEN_AGAIN * 2)
    world.decide()
    assert world.relay.told == [DEVICE, DEVICE]


def test_a_device_that_can_not_be_opened() -> None:
    """A failure is kept until the device could be opened; it is tried every ten seconds."""
    world = World()
    world.decide()
    world.one.opened(FAILED)
    assert world.why == world.one.failure == "no such device"
    world.decide()
    assert world.relay.told == [DEVICE]
    world.loop.run(OPEN_AGAIN + 1)
    world.decide()
    assert world.relay.told == [DEVICE, DEVICE]
    assert world.one.failure
    world.one.opened(OPENED)
    assert world.why == world.one.failure == ""


def test_links_that_fail(world: World) -> None:
    """If links fail again and again, the device is opened again: it may have been replaced."""
    world.links.failed = STUCK
    world.loop.run(OPEN_AGAIN + 1)
    world.decide()
    assert world.relay.told == [DEVICE]
    world.links.failed = STUCK + 1
    world.decide()
    assert world.relay.told == [DEVICE, DEVICE]


def test_a_relay_that_can_not_be_started() -> None:
    """Without a relay the reason is that of the process."""
    world = World()
    world.relay.why = "it can't be started"
    world.decide()
    assert world.why == "it can't be started"
    assert world.relay.wanted == {wire.VERBS: DEVICE}
