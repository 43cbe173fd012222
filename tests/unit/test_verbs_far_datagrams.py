"""Slots for datagrams between two hosts: who gets one, and what happens when any part fails."""

from __future__ import annotations

import random
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from dataplane.control import Limits
from dataplane.errors import WrongMessage
from dataplane.router import peer_wire, verbs_datagrams, verbs_far_datagrams
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_far_datagrams import PATIENCE
from dataplane.router.verbs_wire import (
    VERBS_VERSION,
    SlotKind,
    VerbsDevice,
    VerbsGrant,
    VerbsKind,
    VerbsOpen,
    VerbsRefuse,
)
from tests.unit.remote_world import CONTAINERS, Host, World, started
from tests.unit.test_remote import EQUIPMENT, empty
from tests.unit.ud_world import UdModel
from tests.unit.verbs_world import gid

AGAIN: Final = 40.0
"""Seconds in which all that waits has come about or to nothing."""


class FarUd(UdModel):
    """A process of a host."""

    host: Host
    container: int

    @classmethod
    def on(cls, host: Host, container: int = 1) -> FarUd:
        """The process of a container, with a queue pair that takes datagrams."""
        process = host.processes[container]
        if process not in host.pairing.verbs.processes:
            host.pairing.verbs.open(process, VerbsOpen(VERBS_VERSION))
        (qpn, *_) = [
            message.qpn_first
            for message, _ in host.post.sent[process]
            if isinstance(message, VerbsDevice)
        ]
        made = cls(host, process, qpn)
        made.host, made.container = host, container
        made.takes()
        made.read()
        return made

    @classmethod
    def forked(cls, other: FarUd) -> FarUd:
        """Another process of the same container."""
        host = other.host
        host.processes[other.container] = host.connect(other.container)
        return cls.on(host, other.container)

    @property
    def address(self) -> IPAddress:
        return gid(self.host.ip(self.container))

    def reach(self, peer: FarUd, request: int = 5) -> None:
        """Ask for a slot to another process."""
        self.ask(request, peer.address, peer.qpn)

    def lost(self, grant: VerbsGrant) -> bool:
        """Whether the rings say that the peer is gone: it has ended, or the path is broken."""
        arena = self.host.pairing.arenas[grant.arena]
        return (
            (grant.arena, grant.slot) in self.host.severed
            or (arena.memory, grant.slot) in self.host.memory.severed
            or any(
                lent.ended
                for lent in self.host.relay.lent.values()
                if (lent.arena, lent.slot) == (grant.arena, grant.slot)
            )
        )


@pytest.fixture(params=list(EQUIPMENT))
def world(request: pytest.FixtureRequest) -> World:
    return started(**EQUIPMENT[request.param])


Ends = tuple[FarUd, FarUd]


@pytest.fixture
def ends(world: World) -> Ends:
    return FarUd.on(world.hosts[0]), FarUd.on(world.hosts[1])


def end(world: World) -> None:
    """When all processes are gone nothing is left."""
    for host in world.hosts:
        for process in list(host.pairing.processes):
            host.pairing.gone(process)
    world.loop.run(AGAIN)
    for host in world.hosts:
        slots, datagrams = host.remotes.verbs.datagrams, host.pairing.datagrams
        assert not any((slots.slots, slots.of_process, datagrams.of_process))
        assert not any((datagrams.unasked, datagrams.others))
        assert not len(host.remotes.queue_pairs)
    empty(world)


def refused(request: int, number: int, reason: Reason) -> VerbsRefuse:
    return VerbsRefuse(VerbsKind.DATAGRAM_PEER, request, number, reason)


def over(grant: VerbsGrant, reason: Reason = Reason.PEER_CLOSED) -> VerbsRefuse:
    return VerbsRefuse(VerbsKind.GRANT, 0, grant.number, reason)


@pytest.mark.parametrize("asks", [0, 1])
def test_a_slot(world: World, ends: Ends, asks: int) -> None:
    """Both processes get a slot, whichever host leads, once for all their numbers."""
    one, other = ends[asks], ends[1 - asks]
    one.reach(other)
    world.loop.run(1)
    grant, theirs = one.grant(), other.grant()
    assert (grant.request, theirs.request) == (5, 0)
    assert (grant.peer_gid, theirs.peer_gid) == (other.address, one.address)
    assert (grant.peer_qpn, theirs.peer_qpn) == (other.qpn, one.qpn)
    assert (grant.qpn, grant.peer_count, grant.side) == (0, RANGE, 0)
    assert grant.slot_kind is SlotKind.DATAGRAMS
    one.takes(7)
    one.ask(6, other.address, other.qpn)
    other.reach(one, 7)
    world.loop.run(1)
    assert one.read() == other.read() == []
    end(world)


def test_both_ask(world: World, ends: Ends) -> None:
    """Two processes that ask at once get one slot."""
    one, other = ends
    one.reach(other, 5)
    other.reach(one, 6)
    world.loop.run(1)
    assert (one.grant().request, other.grant().request) == (5, 6)
    end(world)


def test_nobody_there(world: World, ends: Ends) -> None:
    """If no queue pair of the other host takes datagrams under a number, its router says so."""
    one, other = ends
    one.ask(5, other.address, other.qpn + 1)
    world.loop.run(1)
    assert one.read() == [refused(5, other.qpn + 1, Reason.NOT_FOUND)]
    other.takes(on=False)
    one.reach(other, 6)
    world.loop.run(1)
    assert one.read() == [refused(6, other.qpn, Reason.NOT_FOUND)]
    one.ask(7, gid(other.host.ip(1)), 1 << 31)
    world.loop.run(1)
    assert one.read() == [refused(7, 1 << 31, Reason.NOT_FOUND)]
    end(world)


def test_a_host_that_takes_little(world: World, ends: Ends) -> None:
    """While much waits to be sent to a host, its router is asked for no slot; whoever asks later
    gets one.
    """
    one, other = ends
    world.crowded.add((one.host.number, other.host.number))
    for request in range(1, 5):
        one.ask(request, other.address, other.qpn + request)
    one.reach(other, 5)
    world.loop.run(1)
    assert one.read() == [
        refused(request, other.qpn + request % 5, Reason.LIMIT) for request in range(1, 6)
    ]
    assert other.read() == []
    world.ease(one.host, other.host)
    one.reach(other, 6)
    world.loop.run(1)
    assert (one.grant().request, other.grant().request) == (6, 0)
    end(world)


def test_hosts_without_verbs() -> None:
    """A host of an earlier version is asked nothing; one without a session later."""
    world = started(verbs_cm=(0,))
    one, other = FarUd.on(world.hosts[0]), FarUd.on(world.hosts[1])
    one.reach(other)
    assert one.read() == [refused(5, other.qpn, Reason.REMOTE)]
    world = started()
    one, other = FarUd.on(world.hosts[0]), FarUd.on(world.hosts[1])
    world.lose(*world.hosts)
    one.reach(other)
    assert one.read() == [refused(5, other.qpn, Reason.LIMIT)]


def test_a_slot_that_does_not_come_about(world: World, ends: Ends) -> None:
    """Without a link a process is told to ask again, and can."""
    one, other = ends
    world.cut()
    world.break_link(*world.hosts)
    one.reach(other)
    world.loop.run(PATIENCE + 1)
    assert one.read() == [refused(5, other.qpn, Reason.LIMIT)]
    assert other.read() == []
    world.cut(mend=True)
    world.loop.run(AGAIN)
    one.reach(other, 6)
    world.loop.run(1)
    assert one.grant().request == 6
    assert other.grant().request == 0
    end(world)


def test_both_ask_in_vain(world: World, ends: Ends) -> None:
    """Two processes that ask for each other are both told to ask again."""
    one, other = ends
    world.cut()
    world.break_link(*world.hosts)
    one.reach(other, 5)
    world.loop.run(1)
    other.reach(one, 6)
    world.loop.run(PATIENCE + 1)
    assert one.read() == [refused(5, other.qpn, Reason.LIMIT)]
    assert other.read() == [refused(6, one.qpn, Reason.LIMIT)]
    end(world)


def test_a_slot_that_is_released(world: World, ends: Ends) -> None:
    """If a process releases its end, the other one's rings say so; both may ask again."""
    one, other = ends
    one.reach(other)
    world.loop.run(1)
    grant, theirs = one.grant(), other.grant()
    one.give_back(grant)
    world.loop.run(1)
    assert other.lost(theirs)
    one.reach(other, 6)
    world.loop.run(1)
    assert one.grant().request == 6
    told, again = other.read()
    assert told == over(theirs)
    assert isinstance(again, VerbsGrant)
    other.give_back(theirs)
    world.loop.run(1)
    assert not other.lost(again)
    end(world)


@pytest.mark.parametrize("how", ["dies", "closes"])
def test_the_end_of_a_process(world: World, ends: Ends, how: str) -> None:
    """If a process dies, or none of its queue pairs takes datagrams any more, the peer's rings
    say so once its own are released.
    """
    one, other = ends
    one.reach(other)
    world.loop.run(1)
    grant, theirs = one.grant(), other.grant()
    if how == "dies":
        world.kill(one.host, one.container, child=False)
    else:
        one.takes(on=False)
        assert one.read() == [over(grant)]
        one.give_back(grant)
    world.loop.run(1)
    assert other.lost(theirs)
    other.give_back(theirs)
    world.loop.run(1)
    end(world)


def test_leaving_the_network(world: World, ends: Ends) -> None:
    """If verbs are turned off for a network its slots end, also those that wait."""
    one, other = ends
    one.reach(other)
    world.loop.run(1)
    grant = one.grant()
    later = FarUd.on(world.hosts[0], 2)
    world.break_link(*world.hosts)
    later.reach(other)
    facts = one.host.facts()
    off = tuple(replace(each, verbs=False) for each in facts.networks)
    one.host.pairing.replace_snapshot(Knowledge(replace(facts, networks=off)))
    assert over(grant, Reason.OFF) in one.read()
    assert refused(5, other.qpn, Reason.OFF) in later.read()
    world.loop.run(1)
    assert other.lost(other.grant())
    end(world)


def test_a_router_that_is_restarted(world: World, ends: Ends) -> None:
    """A router's restart breaks the slots of its host; processes ask again."""
    one, other = ends
    one.reach(other)
    world.loop.run(1)
    grant = one.grant()
    world.restart_router(world.hosts[1])
    world.connect_all()
    world.loop.run(1)
    assert one.lost(grant)
    one.give_back(grant)
    world.loop.run(AGAIN)
    again = FarUd.on(world.hosts[1])
    one.read()
    one.reach(again, 6)
    world.loop.run(1)
    assert one.grant().request == 6
    assert again.grant().request == 0
    end(world)


# --- hostile hosts


def raw(world: World, source: Host, target: Host, message: peer_wire.Message) -> None:
    """Deliver what a host's router would not say."""
    target.remotes.message(source.address, message)
    world.loop.run(0.5)


def test_claims_of_a_host() -> None:
    """A host asks only for its own GIDs, and refuses only what it was asked."""
    world = started(3)
    one, other, third = (FarUd.on(host) for host in world.hosts)
    network = next(iter(one.host.pairing.knowledge.networks))

    def ask(of: str, to: str, net: str = network) -> peer_wire.VerbsDatagramAsk:
        return peer_wire.VerbsDatagramAsk(net, of, one.qpn, to, other.qpn)

    mine, theirs = str(one.address), str(other.address)
    for message in (ask(str(third.address), theirs), ask(mine, theirs, "n9"), ask(mine, mine)):
        raw(world, one.host, other.host, message)
    assert not other.host.remotes.verbs.datagrams.slots
    with pytest.raises(WrongMessage):
        raw(world, one.host, other.host, ask("what", theirs))
    world.cut()
    world.break_link(one.host, other.host)
    one.reach(other)
    none = peer_wire.VerbsDatagramNone(network, mine, one.qpn, theirs, other.qpn, 5)
    raw(world, third.host, one.host, none)
    assert one.read() == []
    raw(world, other.host, one.host, none)
    assert one.read() == [refused(5, other.qpn, Reason.NOT_FOUND)]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container asks so much of one process, and all together; nothing of one that doesn't read.
    A process has so many slots.
    """
    world = started()
    monkeypatch.setattr(verbs_datagrams, "UNASKED", 1)
    monkeypatch.setattr(verbs_datagrams, "OTHERS", 2)
    one, two = (FarUd.on(world.hosts[0], container) for container in (1, 2))
    same, near = FarUd.forked(one), FarUd.on(world.hosts[1], 2)
    other = FarUd.on(world.hosts[1])
    one.reach(other)
    world.loop.run(1)
    one.grant(), other.grant()
    same.reach(other)
    world.loop.run(1)
    assert same.read() == [refused(5, other.qpn, Reason.LIMIT)]
    two.reach(other)
    world.loop.run(1)
    grant, theirs = two.grant(), other.grant()
    near.reach(other)
    assert near.read() == [refused(5, other.qpn, Reason.LIMIT)]
    two.give_back(grant)
    other.give_back(theirs)
    world.loop.run(1)
    near.reach(other)
    assert near.grant().request == 5
    other.read()
    two.reach(other)
    world.loop.run(1)
    assert two.read() == [refused(5, other.qpn, Reason.LIMIT)]
    monkeypatch.setattr(verbs_datagrams, "OTHERS", 9)
    other.host.post.busy.add(other.process)
    two.reach(other, 6)
    world.loop.run(1)
    assert two.read() == [refused(6, other.qpn, Reason.LIMIT)]
    other.host.post.busy.clear()
    monkeypatch.setattr(verbs_far_datagrams, "OF_PROCESS", 1)
    two.reach(other, 7)
    world.loop.run(1)
    assert two.read() == [refused(7, other.qpn, Reason.LIMIT)]
    end(world)


def test_a_full_container() -> None:
    """A slot counts as a connection."""
    world = started()
    one, other = FarUd.on(world.hosts[0]), FarUd.on(world.hosts[1])
    facts = other.host.facts()
    limits = Limits(connections=0)
    settings_of = replace(facts.settings, limits=limits)
    other.host.pairing.replace_snapshot(Knowledge(replace(facts, settings=settings_of)))
    one.reach(other)
    world.loop.run(1)
    assert one.read() == [refused(5, other.qpn, Reason.LIMIT)]
    end(world)


# --- anything


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 30))
def test_random_life(seed: int) -> None:
    """Whatever happens to processes, sessions, links and routers: no process knows two slots for
    the same, each that asks is answered, and in the end nothing is left.
    """
    rnd = random.Random(seed)
    world = started(2, delays=lambda: rnd.choice([0.0001, 0.01, 0.05]))
    models: dict[Host, dict[int, FarUd]] = {}
    grants: dict[FarUd, dict[int, VerbsGrant]] = {}
    waits: dict[FarUd, dict[int, tuple[IPAddress | None, int]]] = {}

    def refresh() -> None:
        for host in world.hosts:
            of_host = models.setdefault(host, {})
            for container in CONTAINERS:
                old = of_host.get(container)
                if old is None or old.process != host.processes[container]:
                    made = of_host[container] = FarUd.on(host, container)
                    grants[made], waits[made] = {}, {}

    def read(model: FarUd) -> None:
        for message in model.read():
            if isinstance(message, VerbsGrant):
                assert message.number not in grants[model]
                grants[model][message.number] = message
                peer = message.peer_gid, message.peer_qpn
                waits[model] = {of: to for of, to in waits[model].items() if to != peer}
            elif isinstance(message, VerbsRefuse):
                waits[model].pop(message.request, None)

    refresh()
    for request in range(1, rnd.randrange(2, 50)):
        host = rnd.choice(world.hosts)
        model = models[host][rnd.choice(CONTAINERS)]
        peer = models[rnd.choice(world.hosts)][rnd.choice(CONTAINERS)]
        read(model)
        what = rnd.randrange(16)
        if what == 0:
            world.lose(*world.hosts)
        elif what == 1:
            world.connect_all()
        elif what == 2:
            world.kill(host, model.container, child=False)
        elif what == 3 and rnd.random() < 0.3:
            world.restart_router(host)
            models[host].clear()
        elif what == 4:
            world.break_link(*world.hosts)
        elif what == 5:
            model.takes(on=rnd.random() < 0.7)
        elif what < 8 and grants[model]:
            number = rnd.choice(list(grants[model]))
            model.give_back(grants[model].pop(number))
        elif what < 13:
            known = {(each.peer_gid, each.peer_qpn) for each in grants[model].values()}
            if (peer.address, peer.qpn) not in {*known, *waits[model].values()}:
                waits[model][request] = peer.address, peer.qpn
                model.reach(peer, request)
        else:
            world.loop.run(rnd.choice([0.01, 0.2, 1, 6, 31]))
        refresh()
    world.connect_all()
    world.loop.run(AGAIN)
    for host in world.hosts:
        for model in models[host].values():
            read(model)
            assert not waits[model]
        slots = host.remotes.verbs.datagrams
        assert all(record.place is not None for record in slots.slots.values())
    end(world)
