"""Which queue pairs are paired, with whom, and what becomes of them: the registry, with fakes."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from dataplane.control import (
    EndpointFact,
    Limits,
    RouterSettings,
)
from dataplane.errors import WrongMessage
from dataplane.router import layout, verbs_listing
from dataplane.router import library_wire as wire
from dataplane.router.knowledge import Knowledge
from dataplane.router.reasons import Reason
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_pairing import RETURN
from dataplane.router.verbs_wire import (
    VERBS_VERSION,
    VerbsDevice,
    VerbsGrant,
    VerbsOpen,
    VerbsStatus,
)
from tests.unit.router_world import VIP
from tests.unit.verbs_world import RC, UC, QueuePairModel, VerbsModel, VerbsWorld, gid, moved


@pytest.fixture
def world() -> VerbsWorld:
    return VerbsWorld()


def granted(own: QueuePairModel) -> VerbsGrant:
    assert own.grant is not None
    return own.grant


# --- devices


def test_welcome_names_the_version(world: VerbsWorld) -> None:
    """A library is told which version of verbs the router speaks: older routers say 0 there."""
    ((welcome, _),) = world.heard(world.process(1), wire.Welcome)
    assert welcome.verbs == VERBS_VERSION


def test_a_device(world: VerbsWorld) -> None:
    """A process is told of its container's addresses on all networks, IPv4 first, and has numbers
    of its own.
    """
    one, other = world.open(1), world.open(1)
    assert one.gids == [gid("10.0.4.1"), gid("10.0.5.1"), gid("fd00::1")]
    assert other.gids == one.gids
    assert {model.qpn_first % RANGE for model in (one, other)} == {0}
    assert one.qpn_first != other.qpn_first
    assert one.devices[0].qpn_count == RANGE
    assert one.devices[0].guid == other.devices[0].guid != world.open(2).devices[0].guid


def test_no_device(world: VerbsWorld) -> None:
    """A process of no container has no device, nor has a library of another version, or one whose
    verbs are of another version.
    """
    stranger = world.open(77)
    assert world.pairing.connected(300, 1, 1)
    world.pairing.hello(300, wire.Hello(1, layout.VERSION))
    world.pairing.verbs.open(300, VerbsOpen(VERBS_VERSION))
    newer = world.process(1)
    world.pairing.verbs.open(newer, VerbsOpen(VERBS_VERSION + 1))
    for process in (stranger.process, 300, newer):
        ((device, _),) = world.heard(process, VerbsDevice)
        assert (device.count, device.qpn_count, device.gid) == (0, 0, None)


@pytest.mark.parametrize(
    "settings", [RouterSettings(verbs=False), RouterSettings(acceleration=False)]
)
def test_verbs_are_off(world: VerbsWorld, settings: RouterSettings) -> None:
    """Where verbs, or all faster paths, are off there is no device; when that changes, processes
    are told, and paired queue pairs end.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    late, _ = a.create(), b.create()
    a.ask_for(late, gid("10.0.4.2"), 12345)
    world.pairing.replace_snapshot(Knowledge(replace(world.facts, settings=settings)))
    a.read()
    b.read()
    assert a.gids == b.gids == [None]
    assert one.lost == other.lost == late.lost == Reason.OFF
    assert world.memory.severed == [(1000, granted(one).slot)] * 2
    assert world.open(3).gids == [None]
    world.pairing.replace_snapshot(Knowledge(world.facts))
    a.read()
    assert a.gids[0] == gid("10.0.4.1")


def test_verbs_are_off_for_a_network(world: VerbsWorld) -> None:
    """The addresses of a network without verbs are no GIDs; those of others are."""
    a, b = world.open(1), world.open(2)
    one, _ = world.pair(a, b)
    networks = tuple(replace(each, verbs=each.id != "n1") for each in world.facts.networks)
    world.pairing.replace_snapshot(Knowledge(replace(world.facts, networks=networks)))
    a.read()
    assert one.lost == Reason.OFF
    assert a.gids == [gid("10.0.5.1"), gid("10.0.5.1"), None]
    assert world.open(1).gids == [gid("10.0.5.1")]
    assert world.open(2).gids == [None]


def test_a_container_that_just_came(world: VerbsWorld) -> None:
    """A process that asked before its container was known is told of its device later."""
    early = world.open(9)
    came = EndpointFact(id="e9", network="n1", addresses=("10.0.4.9",), namespace=9)
    facts = replace(world.facts, endpoints=(*world.facts.endpoints, came))
    world.pairing.replace_snapshot(Knowledge(facts))
    early.read()
    assert early.gids == [gid("10.0.4.9")]
    one, other = world.pair(early, world.open(1))
    assert granted(one).slot == granted(other).slot


def test_addresses_change(world: VerbsWorld) -> None:
    """A process is told when its container leaves a network or joins one, once."""
    a = world.open(1)
    for _ in range(2):
        world.pairing.replace_snapshot(moved(world, x1=(), e1=("10.0.4.1", "10.0.4.77")))
    assert len(world.heard(a.process, VerbsDevice)) == 6
    a.read()
    assert a.gids == [gid("10.0.4.1"), gid("10.0.4.77"), None]


def test_numbers_of_an_earlier_router(world: VerbsWorld) -> None:
    """A process keeps the numbers that it had of an earlier router, unless another one has them."""
    first = world.open(1, qpn_first=77 * RANGE)
    assert first.qpn_first == 77 * RANGE
    assert world.open(2, qpn_first=77 * RANGE).qpn_first == 77 * RANGE
    assert world.open(1, qpn_first=77 * RANGE).qpn_first != 77 * RANGE
    world.kill(first)
    assert world.open(1, qpn_first=77 * RANGE).qpn_first == 77 * RANGE


def test_order_of_messages(world: VerbsWorld) -> None:
    """HELLO comes before V_OPEN, which comes once and before all others."""
    process = world.process(1, hello=False)
    verbs = world.pairing.verbs
    with pytest.raises(WrongMessage, match="before HELLO"):
        verbs.open(process, VerbsOpen(VERBS_VERSION))
    a = world.open(1)
    with pytest.raises(WrongMessage, match="second V_OPEN"):
        verbs.open(a.process, VerbsOpen(VERBS_VERSION))
    closed = VerbsModel(world, world.process(1))
    own = QueuePairModel(a.qpn_first)
    with pytest.raises(WrongMessage, match="before V_OPEN"):
        closed.ask_for(own, gid("10.0.4.2"), 1)
    with pytest.raises(WrongMessage, match="before V_OPEN"):
        closed.reset(own)
    with pytest.raises(WrongMessage, match="before V_OPEN"):
        closed.status(own, 1, 1)


# --- pairing


def test_both_must_ask(world: VerbsWorld) -> None:
    """One request has no answer. The other one has two: each side's own grant, of one slot and one
    incarnation, with its own number.
    """
    a, b = world.open(1), world.open(2)
    one, other = a.create(), b.create()
    a.ask(one, b, other)
    assert not world.heard(a.process, VerbsGrant)
    b.ask(other, a, one)
    ((mine, memory),) = world.heard(a.process, VerbsGrant)
    ((theirs, memory2),) = world.heard(b.process, VerbsGrant)
    assert (mine.arena, mine.slot, mine.incarnation) == (
        theirs.arena,
        theirs.slot,
        theirs.incarnation,
    )
    assert {mine.side, theirs.side} == {0, 1}
    assert mine.token != theirs.token
    assert memory == memory2 == 1000
    assert (mine.qpn, mine.peer_qpn, mine.request) == (one.qpn, other.qpn, one.request)
    assert (theirs.qpn, theirs.peer_qpn, theirs.request) == (other.qpn, one.qpn, other.request)
    assert (mine.peer_gid, theirs.peer_gid) == (gid("10.0.4.2"), gid("10.0.4.1"))
    assert world.memory.prepared == [(1000, mine.slot, mine.incarnation)]


def test_connections_and_queue_pairs_share_an_arena(world: VerbsWorld) -> None:
    """Two processes have one arena for all that they have in common, whoever asked first."""
    a, b = world.open(1), world.open(2)
    world.connect(a.process, b.process, 5000)
    one, _ = world.pair(b, a)
    _, other = world.pair(a, b)
    world.connect(b.process, a.process, 5001)
    arenas = {grant.arena for grant in world.grants(b.process)}
    assert arenas == {granted(one).arena} == {granted(other).arena}
    assert granted(one).side == granted(other).side == world.grants(b.process)[0].side


def test_two_queue_pairs_of_one_process(world: VerbsWorld) -> None:
    """A process can connect two of its own queue pairs, and gets both sides of a slot."""
    a = world.open(1)
    one, other = world.pair(a, a)
    assert granted(one).slot == granted(other).slot
    assert {granted(one).side, granted(other).side} == {0, 1}
    world.kill(a)
    assert not world.memory.arenas
    assert not world.memory.bells


def test_families_may_differ(world: VerbsWorld) -> None:
    """Two containers may name each other by addresses of different families on one network."""
    a, b = world.open(1), world.open(2)
    one, other = a.create(), b.create()
    a.ask_for(one, gid("fd00::2"), other.qpn)
    b.ask_for(other, gid("10.0.4.1"), one.qpn)
    a.read()
    assert granted(one).peer_gid == gid("10.0.4.2")


@pytest.mark.parametrize("difference", ["qpn", "peer", "type", "paired"])
def test_requests_that_do_not_fit(world: VerbsWorld, difference: str) -> None:
    """Two queue pairs are paired only if each asks for the other one, of its own type, and both are
    new.
    """
    a, b, c = world.open(1), world.open(2), world.open(3)
    one, other, third = a.create(), b.create(), c.create()
    a.ask(one, b, other)
    if difference == "qpn":
        b.ask_for(other, gid("10.0.4.1"), one.qpn + 1)
    elif difference == "peer":
        b.ask_for(other, gid("10.0.4.3"), one.qpn)
    elif difference == "type":
        b.ask(other, a, one, of_type=UC)
    else:
        b.ask(other, a, one, paired=True)
    c.ask_for(third, gid("10.0.4.1"), one.qpn)
    for model in (a, b, c):
        assert not world.heard(model.process, VerbsGrant)
    b.ask(other, a, one)
    a.read()
    assert granted(one).peer_qpn == other.qpn


def test_networks_are_apart(world: VerbsWorld) -> None:
    """Containers that share two networks are paired on one if both ask there, and a container can't
    be reached by its address on a network that the asker is not on.
    """
    second = EndpointFact(id="x2", network="n2", addresses=("10.0.5.2",), namespace=2)
    facts = replace(world.facts, endpoints=(*world.facts.endpoints, second))
    world.pairing.replace_snapshot(Knowledge(facts))
    a, b, c = world.open(1), world.open(2), world.open(3)
    one, other = a.create(), b.create()
    a.ask_for(one, gid("10.0.4.2"), other.qpn, index=0)
    b.ask_for(other, gid("10.0.5.1"), one.qpn, index=1)
    assert not world.heard(a.process, VerbsGrant)
    a.ask_for(one, gid("10.0.5.2"), other.qpn, index=1)
    a.read()
    assert granted(one).gid_index == 1
    third = c.create()
    c.ask_for(third, gid("10.0.5.1"), one.qpn)
    a.ask_for(a.create(), gid("10.0.5.2"), other.qpn, index=0)
    c.read()
    a.read()
    assert third.lost == Reason.FOREIGN
    assert list(a.queue_pairs.values())[-1].lost == Reason.FOREIGN


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("10.0.4.66", Reason.REMOTE),
        ("fd00::66", Reason.REMOTE),
        ("10.0.5.1", Reason.FOREIGN),
        ("8.8.8.8", Reason.FOREIGN),
        (VIP, Reason.FOREIGN),
        (None, Reason.FOREIGN),
    ],
)
def test_foreign_peers(world: VerbsWorld, address: str | None, reason: Reason) -> None:
    """A peer that is no container of the network on this host is refused at once."""
    b = world.open(2)
    own = b.create()
    b.ask_for(own, gid(address) if address else None, 5)
    b.read()
    assert own.lost == reason
    assert not list(world.pairing.verbs)


@pytest.mark.parametrize("index", [3, 0xFFFFFFFF])
def test_foreign_gids(world: VerbsWorld, index: int) -> None:
    """A GID that the process's device doesn't have is refused."""
    a = world.open(1)
    own = a.create()
    a.ask_for(own, gid("10.0.4.2"), 5, index=index)
    a.read()
    assert own.lost == Reason.FOREIGN


def test_numbers_of_others(world: VerbsWorld) -> None:
    """A process can't ask for, end or report a queue pair with the number of another process of its
    container, nor with one that nobody has.
    """
    a, neighbour, b = world.open(1), world.open(1), world.open(2)
    one, other = world.pair(a, b)
    for qpn in (one.qpn, 0, 1, (1 << 24) - 1, (1 << 32) - 1):
        own = neighbour.queue_pairs[qpn] = QueuePairModel(qpn)
        neighbour.ask_for(own, gid("10.0.4.2"), other.qpn)
        neighbour.read()
        assert own.lost == Reason.NOT_FOUND
    neighbour.reset(neighbour.queue_pairs[one.qpn])
    neighbour.status(one, 5, 5)
    a.read()
    b.read()
    assert one.lost is other.lost is None
    assert all(record.status is None for record in world.pairing.verbs)


def test_a_queue_pair_with_itself(world: VerbsWorld) -> None:
    """A queue pair can't be its own peer."""
    a = world.open(1)
    own = a.create()
    a.ask(own, a, own)
    a.read()
    assert own.lost == Reason.NOT_FOUND


def test_limit_of_queue_pairs() -> None:
    """A container's queue pairs over its limit are refused, and those of others are not; ended ones
    don't count.
    """
    world = VerbsWorld(Limits(queue_pairs=2))
    a, neighbour, b = world.open(1), world.open(1), world.open(2)
    own = [a.create(), neighbour.create(), a.create()]
    for model, each in zip((a, neighbour, a), own, strict=True):
        model.ask_for(each, gid("10.0.4.2"), 99)
        model.read()
    assert [each.lost for each in own] == [None, None, Reason.LIMIT]
    world.pair(b, world.open(3))
    neighbour.reset(own[1])
    a.ask_for(own[2], gid("10.0.4.2"), 99)
    a.read()
    assert own[2].lost is None
    assert a.devices[0].queue_pairs == 2


@pytest.mark.parametrize("limits", [Limits(connections=1), Limits(memory=0)])
def test_limits_of_connections(limits: Limits) -> None:
    """A queue pair counts as a connection in shared memory: at such a limit both are refused."""
    world = VerbsWorld(limits)
    a, b = world.open(1), world.open(2)
    pairs = [world.pair(a, b), world.pair(a, b)]
    assert [each.lost for each in pairs[-1]] == [Reason.LIMIT] * 2
    if limits.connections == 1:
        assert pairs[0][0].lost is None
        world.connect(a.process, b.process, 5000)
        assert world.refusals(a.process) == world.refusals(b.process) == [Reason.LIMIT]


def test_both_ends_count() -> None:
    """Two queue pairs of one container count as two connections of it."""
    world = VerbsWorld(Limits(connections=1))
    a = world.open(1)
    assert [each.lost for each in world.pair(a, a)] == [Reason.LIMIT] * 2


def test_a_greedy_pair() -> None:
    """Two containers share half of the memory that each may have, at most; others can have more."""
    world = VerbsWorld(Limits(memory=40_000))
    a, b, c = world.open(1), world.open(2), world.open(3)
    one, _ = world.pair(a, b)
    world.memory.weight = 30_000
    world.pairing.weigh()
    more, _ = world.pair(a, b)
    elsewhere, _ = world.pair(a, c)
    assert (one.lost, more.lost, elsewhere.lost) == (None, Reason.LIMIT, None)


def test_no_memory(world: VerbsWorld) -> None:
    """Without memory for an arena both are told so, and neither waits."""
    world.memory.refuses = True
    one, other = world.pair(world.open(1), world.open(2))
    assert one.lost == other.lost == Reason.MEMORY
    assert not list(world.pairing.verbs)


# --- the end


def test_reset_before_the_peer_asked(world: VerbsWorld) -> None:
    """A queue pair that was reset, or whose process has ended, doesn't wait."""
    a, b = world.open(1), world.open(2)
    one, other, dead = a.create(), b.create(), a.create()
    a.ask(one, b, other)
    a.reset(one)
    b.ask(other, a, one)
    assert not world.heard(b.process, VerbsGrant)
    b.ask(other, a, dead)
    a.ask(dead, b, other)
    b.read()
    assert granted(other).peer_qpn == dead.qpn


@pytest.mark.parametrize("how", ["reset", "release", "kill", "again"])
def test_the_peer_is_told(world: VerbsWorld, how: str) -> None:
    """When a queue pair ends in whatever way its peer is told, once, and keeps its slot until it
    has released it.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    grant, theirs = granted(one), granted(other)
    match how:
        case "reset":
            a.reset(one)
        case "release":
            a.give_back(grant)
        case "kill":
            world.kill(a)
        case _:
            a.ask(one, b, other)
    b.read()
    assert other.lost == Reason.PEER_CLOSED
    assert not world.memory.reclaimed
    assert not world.memory.severed
    assert ("qp", other.qpn) in world.pairing.containers[2].ends
    if how in ("reset", "release"):
        a.give_back(grant)
        a.reset(one)
    b.give_back(theirs)
    b.read()
    assert ("qp", other.qpn) not in world.pairing.containers[2].ends
    assert other.lost == Reason.PEER_CLOSED
    assert not world.memory.arenas


def test_a_new_life(world: VerbsWorld) -> None:
    """Two queue pairs that are reset on both sides can be paired again, in another slot or
    incarnation; neither is paired with the other's earlier life.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    first = granted(one)
    a.reset(one)
    a.ask(one, b, other)
    a.read()
    assert one.grant is None
    b.read()
    b.reset(other)
    b.ask(other, a, one)
    a.read()
    b.read()
    assert (granted(one).arena, granted(one).incarnation) != (first.arena, first.incarnation)
    assert granted(one).incarnation == granted(other).incarnation


def test_a_late_grant(world: VerbsWorld) -> None:
    """A process that reset and asked again before it read the grant can tell it from the answer to
    its new request.
    """
    a, b = world.open(1), world.open(2)
    one, other = a.create(), b.create()
    a.ask(one, b, other)
    b.ask(other, a, one)
    a.reset(one)
    a.ask(one, b, other)
    a.read()
    b.read()
    assert one.grant is None
    assert other.lost == Reason.PEER_CLOSED
    b.reset(other)
    b.ask(other, a, one)
    a.read()
    assert granted(one).request == one.request


def test_a_child_releases_nothing(world: VerbsWorld) -> None:
    """A child of a process has its arena, and connections there, but no queue pair of it: those end
    with the process though the child goes on.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    grant = granted(one)
    child = VerbsModel(world, world.process(1))
    child.give_back(grant)
    b.read()
    assert other.lost is None
    world.kill(a)
    b.read()
    assert other.lost == Reason.PEER_CLOSED


def test_slots_of_queue_pairs_need_no_socket(world: VerbsWorld) -> None:
    """A queue pair keeps its slot however long it lasts: no socket shows that it is alive."""
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    for _ in range(5):
        world.now += 1000
        world.pairing.sweep(100)
    a.read()
    assert one.lost is other.lost is None
    assert world.pairing.arena_table.checks == 0


@pytest.mark.parametrize("endpoint", ["e1", "e2"])
def test_a_container_leaves_the_network(world: VerbsWorld, endpoint: str) -> None:
    """When either container leaves the network both are told, nothing more can be delivered, and
    they are not paired there again.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    for _ in range(2):
        world.pairing.replace_snapshot(moved(world, **{endpoint: ()}))
    a.read()
    b.read()
    assert {one.lost, other.lost} == {Reason.FOREIGN, Reason.PEER_CLOSED}
    assert world.memory.severed == [(1000, granted(one).slot)]
    a.reset(one)
    b.reset(other)
    a.ask_for(one, gid("10.0.4.2"), other.qpn)
    b.ask_for(other, gid("10.0.4.1"), one.qpn)
    a.read()
    b.read()
    assert one.grant is None
    assert other.grant is None
    assert not world.memory.arenas


def test_another_network(world: VerbsWorld) -> None:
    """When a network with the same addresses takes the place of another one, what was paired on
    that one ends.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    renamed = replace(
        world.facts,
        networks=tuple(
            replace(each, id="n3" if each.id == "n1" else each.id) for each in world.facts.networks
        ),
        endpoints=tuple(
            replace(each, network="n3" if each.network == "n1" else each.network)
            for each in world.facts.endpoints
        ),
    )
    world.pairing.replace_snapshot(Knowledge(renamed))
    a.read()
    b.read()
    assert one.lost == other.lost == Reason.FOREIGN


def test_a_container_ends(world: VerbsWorld) -> None:
    """A container's processes may end before or after the driver says that it is gone; its numbers
    are forgotten.
    """
    a, b = world.open(1), world.open(2)
    world.kill(a)
    world.pairing.replace_snapshot(moved(world, e1=(), x1=(), e2=()))
    world.kill(b)
    assert list(world.pairing.verbs.ranges) == [2]
    world.pairing.replace_snapshot(moved(world, e1=(), x1=(), e2=()))
    assert not world.pairing.verbs.ranges


def test_other_networks_stay(world: VerbsWorld) -> None:
    """When a network goes, or a connection falls back to TCP, queue pairs of other networks stay,
    and have no part in it.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    world.pairing.replace_snapshot(moved(world, x1=()))
    a.read()
    assert one.lost is None
    facts = replace(
        world.facts,
        networks=tuple(
            replace(each, acceleration=each.id != "n1") for each in world.facts.networks
        ),
    )
    world.connect(a.process, b.process, 5000)
    world.pairing.replace_snapshot(Knowledge(facts))
    b.read()
    assert len(world.memory.left) == 1
    assert other.lost == Reason.OFF


# --- the router's restart


def restarted(*qpns: int) -> tuple[VerbsWorld, list[VerbsModel]]:
    """A new router, and processes of containers 1, 2, ... which had these numbers."""
    world = VerbsWorld()
    return world, [world.open(n, qpn_first=qpn) for n, qpn in enumerate(qpns, 1)]


def test_returned_queue_pairs() -> None:
    """Queue pairs that an earlier router paired get no slot; the end of one is told to the other
    one.
    """
    world, (a, b) = restarted(9 * RANGE, 9 * RANGE)
    one, other = a.create(), b.create()
    a.ask(one, b, other, paired=True)
    b.ask(other, a, one, paired=True)
    world.now += RETURN + 1
    world.pairing.sweep(100)
    a.read()
    b.read()
    assert (one.grant, other.grant, one.lost, other.lost) == (None,) * 4
    world.kill(b)
    a.read()
    assert one.lost == Reason.PEER_CLOSED
    a.reset(one)
    assert not list(world.pairing.verbs)


def test_a_peer_that_does_not_return() -> None:
    """The peer of a queue pair that an earlier router paired counts as gone after a while, not
    before.
    """
    world, (a, b) = restarted(9 * RANGE, 9 * RANGE)
    one, other = a.create(), b.create()
    a.ask(one, b, other, paired=True)
    world.now += RETURN - 1
    world.pairing.sweep(100)
    a.read()
    assert one.lost is None
    world.now += 1
    world.pairing.sweep(100)
    a.read()
    assert one.lost == Reason.PEER_CLOSED
    assert not list(world.pairing.verbs)
    b.ask(other, a, one, paired=True)
    world.now += RETURN
    world.pairing.sweep(100)
    b.read()
    assert other.lost == Reason.PEER_CLOSED


def test_a_returned_queue_pair_that_ends() -> None:
    """A queue pair that an earlier router paired can be reset while its peer is not back."""
    world, (a, b) = restarted(9 * RANGE, 9 * RANGE)
    one, other = a.create(), b.create()
    a.ask(one, b, other, paired=True)
    a.reset(one)
    world.now += RETURN + 1
    world.pairing.sweep(100)
    a.read()
    assert one.lost is None
    a.ask(one, b, other)
    b.ask(other, a, one)
    a.read()
    assert granted(one).peer_qpn == other.qpn


# --- what a process says


def test_status(world: VerbsWorld) -> None:
    """What a process says of its queue pair is kept, for lists."""
    a, b = world.open(1), world.open(2)
    one, _ = world.pair(a, b)
    a.status(one, 5, 4096)
    a.status(one, 6, 8192)
    (record,) = [each for each in world.pairing.verbs if each.status is not None]
    assert record.message.type == RC
    assert record.status == VerbsStatus(one.qpn, 3, 6, 8192)


def test_sums(world: VerbsWorld) -> None:
    """What queue pairs have done is summed up, those that have ended included; a queue pair that is
    reset starts anew.
    """
    a, b = world.open(1), world.open(2)
    one, other = world.pair(a, b)
    counts = world.pairing.verbs.counts
    a.status(one, 5, 4096)
    a.status(one, 6, 8192)
    b.status(other, 1, 10)
    assert (counts.operations, counts.bytes) == (7, 8202)
    a.reset(one)
    a.status(one, 100, 100)
    assert (counts.operations, counts.bytes) == (7, 8202)
    two, _ = world.pair(a, b)
    a.status(two, 2, 3)
    assert (counts.operations, counts.bytes) == (9, 8205)


def test_sums_of_an_earlier_router() -> None:
    """What a queue pair did before the router's start is no growth of its counters."""
    world, (a, b) = restarted(9 * RANGE, 9 * RANGE)
    one, other = a.create(), b.create()
    a.ask(one, b, other, paired=True)
    b.ask(other, a, one, paired=True)
    a.status(one, 1003, 1004)
    a.status(one, 1005, 1005)
    counts = world.pairing.verbs.counts
    assert (counts.operations, counts.bytes) == (2, 1)


def test_a_process_that_lies(world: VerbsWorld) -> None:
    """Sums never fall, and always fit a message, whatever a process says."""
    a, b = world.open(1), world.open(2)
    one, _ = world.pair(a, b)
    counts = world.pairing.verbs.counts
    most = (1 << 64) - 1
    before = 0
    for operations in (7, 0, most, 3, most, most - 1, most):
        a.status(one, operations, operations)
        assert before <= counts.operations == counts.bytes < 1 << 63
        before = counts.operations
    assert before <= 3 * (1 << 40) + 7
    counts.operations = counts.bytes = (1 << 63) - 2
    a.status(one, 0, 0)
    a.status(one, most, most)
    msgspec.msgpack.encode(verbs_listing.counts(world.pairing.verbs, world.pairing.direct_memory))
    assert counts.bytes == (1 << 63) - 1
