"""Lists and counters of the devices and queue pairs of verbs."""

from __future__ import annotations

import pytest

from dataplane.control import RdmaFacts, RelayFacts, VerbsObjects
from dataplane.router import listing, verbs_listing
from tests.unit.verbs_world import UC, QueuePairModel, VerbsWorld, gid


@pytest.fixture
def world() -> VerbsWorld:
    return VerbsWorld()


def listed(world: VerbsWorld, only: int | None = None) -> VerbsObjects:
    *steps, found = verbs_listing.objects(world.pairing, world.now, only)
    assert found is not None
    assert all(step is None for step in steps)
    return found


def test_a_list(world: VerbsWorld) -> None:
    """The list has each device with its GIDs, and each queue pair with its path or why there is
    none; of one container, if that is wanted.
    """
    stranger, a, b = world.open(77), world.open(1), world.open(2)
    one, other = world.pair(a, b)
    waits, ended = a.create(), b.create()
    a.ask(waits, b, ended, of_type=UC)
    a.status(one, 6, 8192)
    world.now += 3
    found = listed(world)
    assert {device.pid for device in found.devices} == {4000 + a.process, 4000 + b.process}
    assert stranger.devices[0].count == 0
    (device,) = listed(world, 1).devices
    assert device.gids == ("10.0.4.1", "10.0.5.1", "fd00::1")
    assert (device.container, device.qpn_first, device.queue_pairs) == ("x1", a.qpn_first, 2)
    assert int(device.guid, 16) == a.devices[0].guid
    first, second = listed(world, 1).queue_pairs
    assert (first.type, first.path, first.reason, first.age) == ("RC", "shm", None, 3)
    assert (first.local, first.qpn) == ("10.0.4.1", one.qpn)
    assert (first.peer, first.peer_qpn) == ("10.0.4.2", other.qpn)
    assert (first.operations, first.bytes) == (6, 8192)
    assert (second.type, second.path, second.reason) == ("UC", "", "waiting")
    world.kill(a)
    (third,) = listed(world).queue_pairs
    assert (third.qpn, third.path, third.reason) == (other.qpn, "", "peer-closed")
    assert list(listed(world).reasons) == ["peer-closed"]


def test_a_long_list(world: VerbsWorld) -> None:
    """A long list is made in steps; a queue pair that ends meanwhile is not in it."""
    a, b = world.open(1), world.open(2)
    for _ in range(1200):
        a.ask(a.create(), b, QueuePairModel(b.qpn_first))
    assert sum(step is None for step in verbs_listing.objects(world.pairing, 0, None)) == 2
    steps = verbs_listing.objects(world.pairing, 0, None)
    assert next(steps) is None
    world.kill(a)
    *_, found = steps
    assert found is not None
    assert len(found.queue_pairs) == 499
    assert [device.container for device in found.devices] == ["e2"]


def test_counts(world: VerbsWorld) -> None:
    """Counters tell of processes, queue pairs and refusals, also by container."""
    a, b = world.open(1), world.open(2)
    world.open(77)
    one, _ = world.pair(a, b)
    world.pair(a, b)
    world.connect(a.process, b.process, 5000)
    a.ask(a.create(), b, QueuePairModel(9))
    a.ask_for(a.create(), gid("8.8.8.8"), 9)
    a.reset(one)
    counts = verbs_listing.counts(world.pairing.verbs, world.pairing.direct_memory)
    assert (counts.processes, counts.queue_pairs, counts.waiting, counts.paired) == (2, 4, 1, 2)
    assert counts.refused == {"foreign": 1, "peer-closed": 1}
    statistics = listing.statistics(
        world.pairing,
        uptime=1,
        wrong_messages=0,
        dropped=0,
        bugs=0,
        rdma=RdmaFacts(),
        relay=RelayFacts(),
    )
    assert statistics.verbs == counts
    assert statistics.connections == 1
    found = {each.namespace: (each.connections, each.queue_pairs) for each in statistics.containers}
    assert found == {1: (1, 2), 2: (1, 2), 77: (0, 0)}
