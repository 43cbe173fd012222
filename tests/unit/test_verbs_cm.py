"""Connections of rdma_cm: requests reach who listens, and steps only the other end."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from dataplane.control import Limits
from dataplane.errors import WrongMessage
from dataplane.router import verbs_cm
from dataplane.router.knowledge import Knowledge
from dataplane.router.reasons import Reason
from dataplane.router.verbs_cm import LATE, SETTLES
from dataplane.router.verbs_connections import Reject
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_pairing import RETURN
from dataplane.router.verbs_wire import (
    Step,
    VerbsEnd,
    VerbsKind,
    VerbsListen,
    VerbsRefuse,
)
from tests.unit.cm_world import TCP, UDP, CmModel, connect
from tests.unit.router_world import VIP
from tests.unit.verbs_world import VerbsWorld, gid, moved

A, B = gid("10.0.4.1"), gid("10.0.4.2")
PORT = 7471


@pytest.fixture
def world() -> VerbsWorld:
    return VerbsWorld()


@pytest.fixture
def ends(world: VerbsWorld) -> tuple[CmModel, CmModel]:
    """A process that asks, and one that listens."""
    one, other = CmModel.open(world, 1), CmModel.open(world, 2)
    answer = other.listen(100, PORT)
    assert answer == VerbsListen(VerbsKind.LISTENING, 100, TCP, PORT, 8, False, None)
    return one, other


Ends = tuple[CmModel, CmModel]


def books(world: VerbsWorld) -> int:
    """How many connections there are; all tables say the same."""
    cm = world.pairing.verbs_connections
    found = {each for of in cm.table.of_process.values() for each in of}
    assert set(cm.table.by_number.values()) == found
    assert cm.table.asked_by.total() == len(found)
    assert set(cm.table.since) | set(cm.table.returned) | set(cm.table.halves.values()) <= found
    waiting = sum(bound.waiting.total() for bound in cm.ports)
    assert waiting <= sum(each.waiting is not None for each in found)
    return len(found)


# --- requests


def test_a_connection_from_request_to_end(world: VerbsWorld, ends: Ends) -> None:
    """Each end hears what the other one says, with its own ids, GID index and the peer's GID."""
    one, other = ends
    one.ask(1, B, PORT)
    request = other.hear()
    assert (request.step, request.id, request.gid_index, request.peer_gid) == (
        Step.REQUEST,
        100,
        0,
        A,
    )
    assert (request.from_port, request.qpn, request.private[:3]) == (41000, 77, b"abc")
    number = request.connection
    other.say(Step.REPLY, 101, number)
    reply = one.hear()
    assert (reply.step, reply.id, reply.connection, reply.peer_gid) == (Step.REPLY, 1, number, B)
    one.say(Step.READY, 1, number)
    assert other.hear().id == 101
    one.say(Step.DISCONNECT, 1, number)
    assert other.hear().step is Step.DISCONNECT
    assert books(world) == 1
    other.say(Step.DISCONNECTED, 101, number)
    assert one.hear().step is Step.DISCONNECTED
    assert books(world) == 0


def test_nobody_listens(world: VerbsWorld, ends: Ends) -> None:
    """Who asks at a port where nobody listens, or an id is only bound, is told at once."""
    one, other = ends
    other.listen(200, PORT + 1, backlog=0)
    for port, space in ((PORT + 1, TCP), (PORT + 2, TCP), (PORT, UDP)):
        one.ask(1, B, port, space=space)
        rejected = one.hear()
        assert (rejected.step, rejected.id, rejected.reject) == (
            Step.REJECT,
            1,
            Reject.NO_SERVICE,
        )
    one.ask(2, B, PORT, step=Step.RESOLVE, space=UDP)
    answer = one.hear()
    assert (answer.step, answer.id, answer.reject) == (Step.RESOLVED, 2, 1)
    assert other.read() == []
    assert books(world) == 0


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        (None, Reason.FOREIGN),
        (gid("10.9.9.9"), Reason.FOREIGN),
        (gid("10.0.4.77"), Reason.REMOTE),
        (gid("10.0.5.2"), Reason.FOREIGN),
    ],
)
def test_addresses_that_cannot_be_asked(ends: Ends, to: object, reason: Reason) -> None:
    """A request goes only to a container of the same network, on this host."""
    one, _ = ends
    one.ask(1, to, PORT)  # type: ignore[arg-type]
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 1, reason)]


def test_a_foreign_index(ends: Ends) -> None:
    """A request names a GID of the container's own."""
    one, _ = ends
    one.ask(1, B, PORT, index=9)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 1, Reason.FOREIGN)]


def test_a_service(world: VerbsWorld, ends: Ends) -> None:
    """A request to a service's VIP goes to a task that listens, whose address the reply says."""
    one, other = ends
    facts = world.facts
    networks = tuple(
        replace(each, vips={VIP: ("10.0.4.3", "10.0.4.2", "10.0.4.200")})
        if each.id == "n1"
        else each
        for each in facts.networks
    )
    world.pairing.replace_snapshot(Knowledge(replace(facts, networks=networks)))
    one.read(), other.read()
    one.ask(1, gid(VIP), PORT)
    other.say(Step.REPLY, 101, other.hear().connection)
    assert one.hear().peer_gid == B
    one.ask(2, gid(VIP), PORT + 1)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 2, Reason.REMOTE)]
    world.pairing.replace_snapshot(Knowledge(facts))
    one.ask(3, gid(VIP), PORT + 1)
    assert one.hear().reject == Reject.NO_SERVICE


def test_a_repeated_request(world: VerbsWorld, ends: Ends) -> None:
    """A request is repeated to the listener as the same one until it is answered."""
    one, other = ends
    one.ask(1, B, PORT)
    first = other.hear()
    one.ask(1, B, PORT)
    assert other.hear() == first
    world.post.busy.add(other.process)
    one.ask(1, B, PORT)
    assert other.read() == []
    world.post.busy.clear()
    other.say(Step.REPLY, 101, first.connection)
    one.ask(1, B, PORT)
    assert other.read() == []
    assert books(world) == 1


def test_datagrams_are_resolved(world: VerbsWorld, ends: Ends) -> None:
    """Who asks where to send datagrams gets one answer, and there is no connection."""
    one, other = ends
    other.listen(200, PORT, space=UDP)
    one.ask(5, B, PORT, step=Step.RESOLVE, space=UDP)
    asked = other.hear()
    assert (asked.step, asked.id) == (Step.RESOLVE, 200)
    other.say(Step.REPLY, 201, asked.connection)
    assert one.read() == []
    other.say(Step.RESOLVED, 201, asked.connection)
    assert one.hear().step is Step.RESOLVED
    assert books(world) == 0


def test_one_process_with_itself(world: VerbsWorld) -> None:
    """Both ends may be one process's: its ids tell them apart."""
    one = CmModel.open(world, 1)
    one.listen(100, PORT)
    one.ask(1, A, PORT)
    number = one.hear().connection
    one.say(Step.REPLY, 101, number)
    assert one.hear().id == 1
    one.say(Step.READY, 1, number)
    assert one.hear().id == 101
    one.say(Step.DISCONNECT, 101, number)
    heard = one.hear()
    assert (heard.step, heard.id) == (Step.DISCONNECT, 1)
    one.say(Step.DISCONNECTED, 1, number)
    assert one.hear().id == 101
    assert books(world) == 0


# --- rejections and deaths


def test_rejections(world: VerbsWorld, ends: Ends) -> None:
    """Either end may reject; who asks may give up before it knows the connection's number."""
    one, other = ends
    one.ask(1, B, PORT)
    other.say(Step.REJECT, 0, other.hear().connection, Reject.BY_PROGRAM)
    assert one.hear().reject == Reject.BY_PROGRAM
    one.ask(2, B, PORT)
    number = other.hear().connection
    one.say(Step.REJECT, 2, 0, Reject.TIMEOUT)
    gave_up = other.hear()
    assert (gave_up.step, gave_up.id, gave_up.connection) == (Step.REJECT, 0, number)
    assert books(world) == 0


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("step", [Step.REQUEST, Step.RESOLVE])
def test_death_before_the_answer(world: VerbsWorld, asks: bool, step: Step) -> None:
    """If one end dies before the answer, the other one's request is rejected."""
    one, other = CmModel.open(world, 1), CmModel.open(world, 2)
    space = UDP if step is Step.RESOLVE else TCP
    other.listen(100, PORT, space=space)
    one.ask(1, B, PORT, step=step, space=space)
    number = other.hear().connection
    (one if asks else other).kill()
    heard = (other if asks else one).hear()
    assert (heard.connection, heard.id) == (number, 0 if asks else 1)
    if asks:
        assert (heard.step, heard.reject) == (Step.REJECT, Reject.TIMEOUT)
    elif step is Step.RESOLVE:
        assert (heard.step, heard.reject) == (Step.RESOLVED, 1)
    else:
        assert (heard.step, heard.reject) == (Step.REJECT, Reject.BY_PROGRAM)
    assert books(world) == 0


@pytest.mark.parametrize("asks", [True, False])
def test_death_of_a_connected_end(world: VerbsWorld, ends: Ends, asks: bool) -> None:
    """If one end dies, the other one is disconnected; what it says then is answered."""
    one, other = ends
    number = connect(one, other, B, PORT)
    (one if asks else other).kill()
    left, own = (other, 101) if asks else (one, 1)
    heard = left.hear()
    assert (heard.step, heard.id, heard.connection) == (Step.DISCONNECT, own, number)
    left.say(Step.DISCONNECTED, own, number)
    assert left.read() == []
    left.say(Step.DISCONNECT, own, number)
    assert left.hear().step is Step.DISCONNECTED
    left.say(Step.REPLY, own, number)
    assert left.read() == [VerbsRefuse(VerbsKind.CONNECTION, number, own, Reason.NOT_FOUND)]
    assert books(world) == 0


def test_death_while_one_leaves(world: VerbsWorld, ends: Ends) -> None:
    """Who has disconnected, and waits for the other end's word, gets it from the router if the
    other end dies.
    """
    one, other = ends
    number = connect(one, other, B, PORT)
    one.say(Step.DISCONNECT, 1, number)
    other.kill()
    assert one.hear().step is Step.DISCONNECTED
    assert books(world) == 0


def test_a_listener_that_ends(world: VerbsWorld, ends: Ends) -> None:
    """Requests and connections outlive the listener; its port is free."""
    one, other = ends
    one.ask(1, B, PORT)
    number = other.hear().connection
    other.listen_end(100)
    assert isinstance(other.listen(200, PORT), VerbsListen)
    other.say(Step.REPLY, 101, number)
    assert one.hear().step is Step.REPLY
    assert books(world) == 1


def test_leaving_the_network(world: VerbsWorld, ends: Ends) -> None:
    """If a container leaves the network, both ends are told that their connection has ended."""
    one, other = ends
    number = connect(one, other, B, PORT)
    world.pairing.replace_snapshot(moved(world, e2=()))
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, number, 1, Reason.FOREIGN)]
    assert other.read() == [VerbsRefuse(VerbsKind.CONNECTION, number, 101, Reason.FOREIGN)]
    assert books(world) == 0


def test_what_has_come_to_nothing(world: VerbsWorld, ends: Ends) -> None:
    """Requests that nobody answers or repeats are forgotten, and so are ends that don't say that
    they are disconnected.
    """
    one, other = ends
    number = connect(one, other, B, PORT)
    one.say(Step.DISCONNECT, 1, number)
    one.ask(2, B, PORT)
    other.read()
    world.now += LATE / 2
    one.ask(2, B, PORT)
    other.read()
    world.now += LATE / 2 + 1
    world.pairing.sweep(100)
    assert books(world) == 1
    world.now += LATE
    world.pairing.sweep(100)
    late = other.hear()
    assert (late.step, late.reject) == (Step.REJECT, Reject.TIMEOUT)
    assert books(world) == 0


# --- hostile ends


def test_only_the_ends_have_a_say(world: VerbsWorld, ends: Ends) -> None:
    """A process of the same container, or any other, can't say anything on a connection."""
    one, other = ends
    number = connect(one, other, B, PORT)
    for namespace in (1, 2, 3):
        thief = CmModel.open(world, namespace)
        for step in (Step.REJECT, Step.DISCONNECT, Step.DISCONNECTED, Step.REPLY, Step.READY):
            thief.say(step, 1, number)
            thief.say(step, 101, number)
    assert one.read() == []
    assert other.read() == []
    assert books(world) == 1


def test_steps_out_of_order(world: VerbsWorld, ends: Ends) -> None:
    """A step that can't come now goes nowhere."""
    one, other = ends
    one.ask(1, B, PORT)
    number = other.hear().connection
    for step in (Step.REPLY, Step.READY, Step.DISCONNECT, Step.DISCONNECTED, Step.RESOLVED):
        one.say(step, 1)
    for step in (Step.READY, Step.DISCONNECT, Step.DISCONNECTED, Step.RESOLVED):
        other.say(step, 101, number)
    assert one.read() == []
    assert other.read() == []
    other.say(Step.REPLY, 101, number)
    one.read()
    one.say(Step.DISCONNECTED, 1, number)
    one.say(Step.REPLY, 1, number)
    assert other.read() == []


def test_repeated_steps_fill_no_socket(world: VerbsWorld, ends: Ends) -> None:
    """A process that doesn't read is told each step once."""
    one, other = ends
    number = connect(one, other, B, PORT)
    world.post.busy.add(other.process)
    for _ in range(50):
        one.say(Step.READY, 1, number)
        one.say(Step.DISCONNECT, 1, number)
    assert [
        each.step for each in other.read() if not isinstance(each, VerbsRefuse | VerbsListen)
    ] == [Step.DISCONNECT]


def test_requests_to_one_that_does_not_read(world: VerbsWorld, ends: Ends) -> None:
    """Who asks a process that doesn't read is refused; nothing is kept."""
    one, other = ends
    world.post.busy.add(other.process)
    one.ask(1, B, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 1, Reason.LIMIT)]
    assert other.read() == []
    assert books(world) == 0


def test_unanswered_requests(
    world: VerbsWorld, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener has so many unanswered requests, and half of them of one container."""
    monkeypatch.setattr(verbs_cm, "UNANSWERED", 4)
    one, other = ends
    third = CmModel.open(world, 3)
    for number in range(1, 4):
        one.ask(number, B, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 3, Reason.LIMIT)]
    third.ask(1, B, PORT)
    asked = other.read()
    assert len(asked) == 3
    other.say(Step.REPLY, 101, asked[0].connection)  # type: ignore[union-attr]
    one.ask(3, B, PORT)
    assert other.hear().step is Step.REQUEST


def test_limits_of_a_container() -> None:
    """A container has twice as many connections as queue pairs, and so many ports."""
    world = VerbsWorld(Limits(queue_pairs=2))
    one, other = CmModel.open(world, 1), CmModel.open(world, 2)
    other.listen(100, PORT)
    for number in range(1, 6):
        one.ask(number, B, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 5, Reason.LIMIT)]


def test_ports_that_are_refused(
    world: VerbsWorld, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port is refused that another id has, at an address that isn't the container's, in no known
    space, or to a container with many.
    """
    one, _ = ends
    again = CmModel.open(world, 2)
    refused = VerbsRefuse(VerbsKind.LISTEN, 0, 7, Reason.SHARED)
    assert again.listen(7, PORT) == refused
    assert again.listen(7, PORT + 1, A) == replace(refused, reason=Reason.FOREIGN)
    assert again.listen(7, PORT + 1, space=99) == replace(refused, reason=Reason.NOT_FOUND)
    monkeypatch.setattr(verbs_cm, "PORTS", 1)
    assert again.listen(7, PORT + 1) == replace(refused, reason=Reason.LIMIT)
    assert isinstance(one.listen(7, PORT), VerbsListen)
    assert isinstance(one.listen(7, PORT, backlog=9), VerbsListen)
    alone = CmModel.open(world, 3)
    world.pairing.replace_snapshot(moved(world, e3=()))
    alone.read()
    assert alone.listen(7, PORT) == replace(refused, reason=Reason.OFF)


def test_nonsense(world: VerbsWorld, ends: Ends) -> None:
    """Messages that no library sends end the connection to the router."""
    one, _ = ends
    cm = world.pairing.verbs_connections
    with pytest.raises(WrongMessage):
        one.ask(0, B, PORT)
    with pytest.raises(WrongMessage):
        one.listen(0, PORT)
    with pytest.raises(WrongMessage):
        cm.listen(one.process, VerbsListen(VerbsKind.LISTENING, 1, TCP, 1, 1, False, None))
    stranger = world.process(1)
    with pytest.raises(WrongMessage):
        cm.listen_end(stranger, VerbsEnd(VerbsKind.LISTEN_END, 1))
    with pytest.raises(WrongMessage):
        CmModel(world, stranger).ask(1, B, PORT)


# --- a router that was restarted


def test_listeners_that_may_come_back(world: VerbsWorld) -> None:
    """Nobody is told that nobody listens while processes come back from an earlier router."""
    one = CmModel.open(world, 1)
    back = CmModel(world, world.open(2, qpn_first=3 * RANGE).process)
    one.ask(1, B, PORT)
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 0, 1, Reason.LIMIT)]
    back.listen(100, PORT)
    one.ask(1, B, PORT)
    assert back.hear().step is Step.REQUEST
    world.now += SETTLES
    one.ask(2, B, PORT + 1)
    assert one.hear().reject == Reject.NO_SERVICE


def test_a_resumed_connection(world: VerbsWorld, ends: Ends) -> None:
    """Both ends tell a new router of their connection; then one hears of the other as before."""
    one, other = ends
    one.resume(1, 4711, B)
    other.resume(101, 4711, A)
    assert one.read() == other.read() == []
    assert books(world) == 1
    other.kill()
    heard = one.hear()
    assert (heard.step, heard.id, heard.connection, heard.peer_gid) == (
        Step.DISCONNECT,
        1,
        4711,
        B,
    )
    assert books(world) == 0


def test_an_end_that_does_not_come_back(world: VerbsWorld, ends: Ends) -> None:
    """An end whose peer doesn't tell the new router of their connection is disconnected; one that
    has left meanwhile gets its answer.
    """
    one, other = ends
    one.resume(1, 4711, B)
    other.resume(101, 4712, A)
    other.say(Step.DISCONNECT, 101, 4712)
    world.now += RETURN + 1
    world.pairing.sweep(100)
    assert one.hear().step is Step.DISCONNECT
    assert other.hear().step is Step.DISCONNECTED
    assert books(world) == 0


def test_an_end_that_leaves_before_the_other_comes_back(world: VerbsWorld, ends: Ends) -> None:
    """An end that comes back late is told that the other one has disconnected."""
    one, other = ends
    one.resume(1, 4711, B)
    one.say(Step.DISCONNECT, 1, 4711)
    other.resume(101, 4711, A)
    assert other.hear().step is Step.DISCONNECT
    other.say(Step.DISCONNECTED, 101, 4711)
    assert one.hear().step is Step.DISCONNECTED
    assert books(world) == 0


def test_nobody_takes_part_in_another_ones_connection(world: VerbsWorld, ends: Ends) -> None:
    """A container that knows the number of a connection gets no part in it, and keeps nobody from
    it.
    """
    one, other = ends
    thief = CmModel.open(world, 3)
    thief.resume(1, 4711, B)
    thief.resume(2, 4711, A)
    one.resume(1, 4711, B)
    one.resume(9, 4711, B)
    other.resume(101, 4711, A)
    thief.read()
    assert one.read() == [VerbsRefuse(VerbsKind.CONNECTION, 4711, 9, Reason.NOT_FOUND)]
    thief.say(Step.DISCONNECT, 1, 4711)
    thief.kill()
    assert one.read() == []
    assert other.read() == []
    one.say(Step.DISCONNECT, 1, 4711)
    assert other.hear().step is Step.DISCONNECT


def test_what_cannot_be_resumed(world: VerbsWorld, ends: Ends) -> None:
    """A connection to an address of nobody here, without a number, or over the limit is refused."""
    one, _ = ends
    one.resume(1, 4711, gid("10.0.4.77"))
    one.resume(2, 0, B)
    assert one.read() == [
        VerbsRefuse(VerbsKind.CONNECTION, 4711, 1, Reason.FOREIGN),
        VerbsRefuse(VerbsKind.CONNECTION, 0, 2, Reason.NOT_FOUND),
    ]
    assert books(world) == 0
