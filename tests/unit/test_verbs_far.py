"""Connections of rdma_cm between two hosts: both routers agree, whatever is lost between them."""

from __future__ import annotations

import random
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from dataplane.control import RouterSnapshot
from dataplane.errors import WrongMessage
from dataplane.router import peer_wire, verbs_far
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.remote import SESSION_PATIENCE
from dataplane.router.verbs_cm import LATE
from dataplane.router.verbs_connections import CmStage, Reject
from dataplane.router.verbs_wire import (
    VERBS_VERSION,
    Step,
    VerbsConnection,
    VerbsKind,
    VerbsListen,
    VerbsOpen,
    VerbsRefuse,
)
from tests.unit.cm_world import TCP, UDP, CmModel
from tests.unit.remote_world import CONTAINERS, Host, World, started
from tests.unit.verbs_world import gid

PORT: Final = 7471
STEPS: Final = [Step.REPLY, Step.READY, Step.REJECT, Step.DISCONNECT, Step.DISCONNECTED]


class FarModel(CmModel):
    """A process of a host."""

    host: Host
    container: int

    @classmethod
    def on(cls, host: Host, container: int = 1) -> FarModel:
        """The process of a container."""
        made = cls(host, host.processes[container])
        made.host, made.container = host, container
        verbs = host.pairing.verbs
        if made.process not in verbs.processes:
            verbs.open(made.process, VerbsOpen(VERBS_VERSION))
        made.read()
        return made

    @property
    def address(self) -> IPAddress:
        return gid(self.host.ip(self.container))


@pytest.fixture
def world() -> World:
    return started()


Ends = tuple[FarModel, FarModel]


@pytest.fixture
def ends(world: World) -> Ends:
    """A process that asks, and one of another host that listens."""
    one, other = FarModel.on(world.hosts[0]), FarModel.on(world.hosts[1])
    assert isinstance(other.listen(100, PORT), VerbsListen)
    return one, other


def wait(world: World, seconds: float = 0.1) -> None:
    """Let messages arrive."""
    world.loop.run(seconds)


def table(host: Host) -> Any:
    """A host's connections."""
    return host.pairing.verbs_connections.table


def nothing_left(world: World) -> None:
    for host in world.hosts:
        of = table(host)
        assert not any(
            (of.by_number, of.of_process, of.asking, of.asked_by, of.far, of.of_host, of.since)
        )
        assert not any(bound.waiting.total() for bound in host.pairing.verbs_connections.ports)


def connect(world: World, one: FarModel, other: FarModel, number: int = 1) -> tuple[int, int]:
    """Connect; the connection's number at both ends."""
    one.ask(number, other.address, PORT)
    wait(world)
    there = other.hear().connection
    other.say(Step.REPLY, 100 + number, there)
    wait(world)
    here = one.hear().connection
    one.say(Step.READY, number, here)
    wait(world)
    assert other.hear().step is Step.READY
    return here, there


def steps(model: CmModel) -> list[Step]:
    """The steps that have come."""
    return [each.step for each in model.read() if isinstance(each, VerbsConnection)]


# --- connections


def test_a_connection(world: World, ends: Ends) -> None:
    """Each end hears the other one's steps, with all that they say, as on one host."""
    one, other = ends
    one.ask(1, other.address, PORT)
    wait(world)
    request = other.hear()
    assert (request.step, request.id, request.peer_gid) == (Step.REQUEST, 100, one.address)
    assert (request.from_port, request.qpn, request.psn) == (41000, 77, 9)
    assert (request.private_size, request.private) == (3, b"abc".ljust(256, b"\0"))
    other.say(Step.REPLY, 101, request.connection)
    wait(world)
    reply = one.hear()
    assert (reply.step, reply.id, reply.peer_gid) == (Step.REPLY, 1, other.address)
    one.say(Step.READY, 1, reply.connection)
    wait(world)
    assert other.hear().id == 101
    other.say(Step.DISCONNECT, 101, request.connection)
    wait(world)
    assert one.hear().step is Step.DISCONNECT
    one.say(Step.DISCONNECTED, 1, reply.connection)
    wait(world)
    assert other.hear().step is Step.DISCONNECTED
    nothing_left(world)


def test_nobody_listens(world: World, ends: Ends) -> None:
    """The other host says that nobody listens."""
    one, other = ends
    one.ask(1, other.address, PORT + 1)
    one.ask(2, other.address, PORT, step=Step.RESOLVE, space=UDP)
    wait(world)
    rejected, resolved = one.read()
    assert isinstance(rejected, VerbsConnection)
    assert isinstance(resolved, VerbsConnection)
    assert (rejected.id, rejected.step, rejected.reject) == (1, Step.REJECT, Reject.NO_SERVICE)
    assert (resolved.id, resolved.step, resolved.reject) == (2, Step.RESOLVED, 1)
    nothing_left(world)


def test_datagrams_are_resolved(world: World, ends: Ends) -> None:
    """Where to send datagrams is answered once."""
    one, other = ends
    other.listen(200, PORT, space=UDP)
    one.ask(5, other.address, PORT, step=Step.RESOLVE, space=UDP)
    wait(world)
    other.say(Step.RESOLVED, 201, other.hear().connection)
    wait(world)
    assert one.hear().step is Step.RESOLVED
    nothing_left(world)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("ready", [True, False])
def test_death(world: World, ends: Ends, asks: bool, ready: bool) -> None:
    """If a process dies, its peer on the other host is told as on one host."""
    one, other = ends
    if ready:
        connect(world, one, other)
    else:
        one.ask(1, other.address, PORT)
        wait(world)
        other.read()
    (one if asks else other).kill()
    wait(world)
    left = other if asks else one
    heard = left.hear()
    if ready:
        assert heard.step is Step.DISCONNECT
        left.say(Step.DISCONNECTED, heard.id, heard.connection)
        wait(world)
    else:
        reason = Reject.TIMEOUT if asks else Reject.BY_PROGRAM
        assert (heard.step, heard.reject) == (Step.REJECT, reason)
    nothing_left(world)


def test_a_service() -> None:
    """A request to a service's VIP goes to a task of this host that listens, else to another."""
    world = started()
    one, other = FarModel.on(world.hosts[0]), FarModel.on(world.hosts[1])
    own = FarModel.on(world.hosts[0], 2)
    other.listen(100, PORT)
    host = world.hosts[0]
    vip = "10.0.4.250"
    _with_vip(host, vip, (str(own.address), str(other.address)))
    one.ask(1, gid(vip), PORT)
    wait(world)
    other.say(Step.REPLY, 101, other.hear().connection)
    wait(world)
    assert one.hear().peer_gid == other.address
    own.listen(100, PORT)
    one.ask(2, gid(vip), PORT)
    assert own.hear().step is Step.REQUEST


def _with_vip(host: Host, vip: str, tasks: tuple[str, ...]) -> None:
    facts: RouterSnapshot = host.facts()
    networks = tuple(replace(each, vips={vip: tasks}) for each in facts.networks)
    host.pairing.replace_snapshot(Knowledge(replace(facts, networks=networks)))


# --- what can't be asked


def test_a_host_of_an_earlier_version() -> None:
    """A host that knows nothing of rdma_cm is told nothing of it."""
    world = started(verbs_cm=(0,))
    one, other = FarModel.on(world.hosts[0]), FarModel.on(world.hosts[1])
    one.ask(1, other.address, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 1, Reason.REMOTE)]
    nothing_left(world)


def test_without_a_session(world: World, ends: Ends) -> None:
    """An address that no host has for now can be asked later."""
    one, other = ends
    world.lose(*world.hosts)
    one.ask(1, other.address, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 1, Reason.LIMIT)]
    world.connect_all()
    wait(world, 1)
    one.ask(1, other.address, PORT)
    wait(world)
    assert other.hear().step is Step.REQUEST


def test_a_network_of_one_host(world: World, ends: Ends) -> None:
    """If nothing of a network may go to another host, nothing is asked there, and what there is
    ends.
    """
    one, other = ends
    here, there = connect(world, one, other)
    for host in world.hosts:
        world.options = {"rdma": False, "relay": False}
        host.pairing.replace_snapshot(Knowledge(host.facts()))
    wait(world)
    assert VerbsRefuse(VerbsKind.CONNECTION, here, 1, Reason.FOREIGN) in one.read()
    assert other.read()[0] == VerbsRefuse(VerbsKind.CONNECTION, there, 101, Reason.FOREIGN)
    one.ask(2, other.address, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 2, Reason.REMOTE)]
    nothing_left(world)


# --- sessions


def test_a_session_that_is_lost(world: World, ends: Ends) -> None:
    """Connections outlive a session; what has ended meanwhile is told in the next one. A step that
    was lost is said again by the library.
    """
    one, other = ends
    first, _ = connect(world, one, other, 1)
    second, there = connect(world, one, other, 2)
    third, _ = connect(world, one, other, 3)
    world.lose(*world.hosts)
    one.say(Step.DISCONNECT, 1, first)
    other.say(Step.REJECT, 102, there)
    world.connect_all()
    wait(world)
    assert one.hear().connection == second
    assert other.read() == []
    one.say(Step.DISCONNECT, 1, first)
    one.say(Step.DISCONNECT, 3, third)
    wait(world)
    assert steps(other) == [Step.DISCONNECT, Step.DISCONNECT]


def test_a_request_that_is_lost(world: World, ends: Ends) -> None:
    """A request that was lost with the session is repeated, and passed on as a new one."""
    one, other = ends
    one.ask(1, other.address, PORT)
    world.lose(*world.hosts)
    world.connect_all()
    wait(world)
    assert other.read() == []
    one.ask(1, other.address, PORT)
    wait(world)
    assert other.hear().step is Step.REQUEST
    one.ask(1, other.address, PORT)
    wait(world)
    assert steps(other) == [Step.REQUEST]
    assert one.read() == []
    assert len(table(other.host).far) == 1


def test_a_session_that_does_not_come_back(world: World, ends: Ends) -> None:
    """Without a session for a while connections end."""
    one, other = ends
    connect(world, one, other)
    world.lose(*world.hosts)
    wait(world, SESSION_PATIENCE - 1)
    assert one.read() == other.read() == []
    wait(world, 2)
    assert one.hear().step is Step.DISCONNECT
    assert other.hear().step is Step.DISCONNECT
    nothing_left(world)


def test_a_router_that_is_restarted(world: World, ends: Ends) -> None:
    """If a router is restarted, the connections of its host end; neither end hangs."""
    one, other = ends
    _, there = connect(world, one, other)
    world.restart_router(world.hosts[1])
    world.connect_all()
    wait(world, 1)
    assert one.hear().step is Step.DISCONNECT
    again = FarModel.on(world.hosts[1])
    again.resume(101, there, one.address)
    assert again.read() == [VerbsRefuse(VerbsKind.CONNECTION, there, 101, Reason.FOREIGN)]
    nothing_left(world)


def test_a_router_of_an_earlier_version(world: World, ends: Ends) -> None:
    """If the router that is started knows nothing of verbs, connections with its host end."""
    one, other = ends
    connect(world, one, other)
    world.verbs = (0,)
    world.restart_router(world.hosts[1])
    world.connect_all()
    wait(world, 1)
    assert one.hear().step is Step.DISCONNECT
    nothing_left(world)


def test_many_connections(world: World, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """More connections than one message names are told of in several."""
    monkeypatch.setattr(verbs_far, "MAX_ALIVE", 2)
    one, other = ends
    numbers = [connect(world, one, other, number)[0] for number in range(1, 6)]
    other.read()
    world.lose(*world.hosts)
    one.say(Step.REJECT, 2, numbers[1])
    world.connect_all()
    wait(world)
    assert [each.id for each in other.read() if isinstance(each, VerbsConnection)] == [102]
    assert one.read() == []
    assert len(table(one.host).far) == len(table(other.host).far) == 4


# --- hostile hosts


def raw(world: World, source: Host, target: Host, message: peer_wire.Message) -> None:
    """Deliver what a host's router would not say."""
    target.remotes.message(source.address, message)
    wait(world)


def step_of(model: FarModel, peer: FarModel, step: Step, **fields: Any) -> peer_wire.VerbsStep:
    """A step that a host sends for its process."""
    network = next(iter(model.host.pairing.knowledge.networks))
    return peer_wire.VerbsStep(
        number=fields.pop("number", 5),
        asks=fields.pop("asks", True),
        step=step,
        network=fields.pop("network", network),
        gid=fields.pop("gid", str(model.address)),
        peer_gid=fields.pop("peer_gid", str(peer.address)),
        space=TCP,
        port=PORT,
        **fields,
    )


def test_claims_of_a_host() -> None:
    """A host asks only for GIDs that it has itself, in a network that both share, and for
    containers of this host.
    """
    world = started(3)
    one, other, third = (FarModel.on(host) for host in world.hosts)
    other.listen(100, PORT)
    for fields in (
        {"gid": str(third.address)},
        {"gid": "10.0.4.222"},
        {"network": "unknown"},
        {"peer_gid": str(third.address)},
    ):
        raw(world, one.host, other.host, step_of(one, other, Step.REQUEST, **fields))
    assert other.read() == []
    for wrong in (
        step_of(one, other, Step.REQUEST, gid="what"),
        step_of(one, other, Step.REQUEST, asks=False),
    ):
        with pytest.raises(WrongMessage):
            raw(world, one.host, other.host, wrong)
    raw(world, one.host, other.host, step_of(one, other, Step.REQUEST))
    assert other.hear().step is Step.REQUEST


def test_a_third_host(world: World) -> None:
    """A host has no say in the connections of two others."""
    world = started(3)
    one, other, third = (FarModel.on(host) for host in world.hosts)
    other.listen(100, PORT)
    connect(world, one, other)
    (key,) = table(other.host).far
    for step in STEPS:
        for asks in (True, False):
            message = step_of(third, other, step, number=key[2], asks=asks)
            raw(world, third.host, other.host, message)
            raw(world, third.host, one.host, message)
    raw(world, third.host, other.host, peer_wire.VerbsAlive((), (), True))
    assert one.read() == other.read() == []
    assert len(table(other.host).far) == 1


def test_what_a_host_may_have(world: World, ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host has so many connections, and half of what a listener has not answered."""
    one, other = ends
    monkeypatch.setattr("dataplane.router.verbs_cm.UNANSWERED", 4)
    for number in range(5):
        raw(world, one.host, other.host, step_of(one, other, Step.REQUEST, number=number))
    assert steps(other) == [Step.REQUEST] * 2
    monkeypatch.setattr("dataplane.router.verbs_cm.UNANSWERED", 40)
    monkeypatch.setattr(verbs_far, "OF_HOST", 3)
    for number in range(10, 15):
        raw(world, one.host, other.host, step_of(one, other, Step.REQUEST, number=number))
    assert steps(other) == [Step.REQUEST]
    with pytest.raises(WrongMessage):
        raw(world, one.host, other.host, peer_wire.VerbsAlive(tuple(range(99)), (), False))


def test_a_process_that_does_not_read(world: World, ends: Ends) -> None:
    """A process that doesn't read is asked nothing; who asks tries again."""
    one, other = ends
    other.host.post.busy.add(other.process)
    one.ask(1, other.address, PORT)
    wait(world)
    assert one.read() == other.read() == []
    other.host.post.busy.clear()
    one.ask(1, other.address, PORT)
    wait(world)
    assert other.hear().step is Step.REQUEST


@pytest.mark.parametrize("step", [Step.REQUEST, Step.RESOLVE])
def test_a_host_that_takes_little(world: World, ends: Ends, step: Step) -> None:
    """A process that asks, takes it back and asks again fills no session: while much waits to be
    sent to a host its requests are refused for now, and passed on afterwards.
    """
    one, other = ends
    space = TCP if step is Step.REQUEST else UDP
    other.listen(200, PORT, space=UDP)
    world.crowded.add((one.host.number, other.host.number))
    for number in range(1, 9):
        one.ask(number, other.address, PORT, step=step, space=space)
        one.say(Step.REJECT, number)
    wait(world)
    assert one.read() == [
        VerbsRefuse(VerbsKind.CONNECTION, 0, number, Reason.LIMIT) for number in range(1, 9)
    ]
    assert other.read() == []
    nothing_left(world)
    world.ease(one.host, other.host)
    one.ask(9, other.address, PORT, step=step, space=space)
    wait(world)
    assert other.hear().step is step


def test_a_container_that_moves(world: World, ends: Ends) -> None:
    """If another host claims the address of an end, too, the connection ends."""
    one, other = ends
    connect(world, one, other)
    network = next(iter(one.host.pairing.knowledge.networks))
    raw(world, other.host, one.host, peer_wire.Owns({network: ()}))
    assert one.read()[0].reason == Reason.FOREIGN  # type: ignore[union-attr]
    assert other.hear().step is Step.DISCONNECT


# --- anything


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 30))
def test_random_life(seed: int) -> None:
    """Whatever happens to processes, sessions and routers: when all is calm the hosts agree, and
    when all processes are gone nothing is left.
    """
    rnd = random.Random(seed)
    world = started(2, delays=lambda: rnd.choice([0.0001, 0.01, 0.05]))
    models: list[FarModel] = []

    def refresh() -> None:
        models[:] = [FarModel.on(host, each) for host in world.hosts for each in CONTAINERS]
        for model in models:
            model.listen(100, PORT)
            model.listen(200, PORT, space=UDP)

    refresh()
    for _ in range(rnd.randrange(60)):
        model, peer = rnd.choice(models), rnd.choice(models)
        what = rnd.randrange(20)
        if what == 0:
            world.lose(*world.hosts)
        elif what == 1:
            world.connect_all()
        elif what == 2:
            world.kill(model.host, model.container, child=False)
            refresh()
        elif what == 3 and rnd.random() < 0.3:
            world.restart_router(rnd.choice(world.hosts))
            refresh()
        elif what < 9:
            udp = rnd.random() < 0.3
            step, space = (Step.RESOLVE, UDP) if udp else (Step.REQUEST, TCP)
            model.ask(rnd.randrange(1, 5), peer.address, PORT, step=step, space=space)
        elif what < 18:
            known = [
                number
                for process, number in table(model.host).by_number
                if process == model.process
            ]
            if known:
                step = rnd.choice([*STEPS, Step.REPLY, Step.READY, Step.RESOLVED])
                model.say(step, rnd.randrange(1, 9), rnd.choice(known))
        else:
            world.loop.run(rnd.choice([0.01, 1, 5, 31]))
    world.connect_all()
    world.loop.run(2)
    world.lose(*world.hosts)
    world.connect_all()
    world.loop.run(2)
    here, there = (table(host) for host in world.hosts)
    for of, other, address in (
        (here, there, world.hosts[0].address),
        (there, here, world.hosts[1].address),
    ):
        for (_, asked, number), connection in of.far.items():
            is_request = asked and connection.stage is CmStage.ASKED
            assert is_request or (address, not asked, number) in other.far
    world.loop.run(LATE + 1)
    for host in world.hosts:
        host.pairing.sweep(100)
        for process in list(host.processes.values()):
            host.pairing.gone(process)
    world.loop.run(1)
    for host in world.hosts:
        host.processes.clear()
    nothing_left(world)
