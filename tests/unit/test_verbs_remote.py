"""Queue pairs with peers on other hosts: which are paired, and what happens when any part fails."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from dataplane.control import Limits
from dataplane.errors import WrongMessage
from dataplane.router import library_wire as wire
from dataplane.router import peer_wire, relay_wire
from dataplane.router.knowledge import Knowledge
from dataplane.router.link_deadlines import QUEUE_PAIRS
from dataplane.router.queue_pairs import QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.remote_events import Transport
from dataplane.router.verbs_listing import objects
from dataplane.router.verbs_wire import (
    VERBS_VERSION,
    VerbsDevice,
    VerbsEnd,
    VerbsGrant,
    VerbsKind,
    VerbsOpen,
    VerbsQueuePair,
    VerbsRefuse,
)
from tests.unit.remote_world import CONTAINERS, Host, World, started
from tests.unit.test_remote import EQUIPMENT, empty
from tests.unit.verbs_world import RC, UC

A, B, C = (0, 1), (1, 1), (2, 1)
Where = tuple[int, int]
"""Host and container."""


@dataclass(eq=False)
class FarQueuePair:
    """A queue pair as its library knows it."""

    world: World
    host: Host
    container: int
    process: int
    qpn: int
    request: int = 0
    requests: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def gid(self) -> IPv4Address:
        return IPv4Address(self.host.ip(self.container))

    def ask(self, peer: FarQueuePair, of_type: int = RC, *, paired: bool = False) -> None:
        """Ask for a peer."""
        self.request = self.qpn * 1000 + next(self.requests)
        message = VerbsQueuePair(self.request, self.qpn, peer.qpn, 0, of_type, paired, peer.gid)
        self.host.pairing.verbs.connect(self.process, message)

    def _said(self) -> list[Any]:
        return [message for message, _ in self.host.post.sent.get(self.process, [])]

    @property
    def grant(self) -> VerbsGrant | None:
        """The slot that it was given."""
        found = [
            message
            for message in self._said()
            if isinstance(message, VerbsGrant) and message.request == self.request
        ]
        assert len(found) <= 1
        return found[0] if found else None

    @property
    def refused(self) -> Reason | None:
        """Why it has no peer, or none any more."""
        found = [
            message.reason
            for message in self._said()
            if isinstance(message, VerbsRefuse) and message.request == self.request
        ]
        assert len(found) <= 1
        return Reason(found[0]) if found else None

    @property
    def broken(self) -> bool:
        """Whether its rings say that the peer is gone for good."""
        grant = self.grant
        assert grant is not None
        arena = self.host.pairing.arenas[grant.arena]
        severed = (grant.arena, grant.slot) in self.host.severed
        return severed or (arena.memory, grant.slot) in self.host.memory.severed

    def end(self) -> None:
        """It is reset, or destroyed."""
        grant = self.grant
        if grant is not None and grant.arena in self.host.pairing.arenas:
            release = wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token)
            self.host.pairing.release(self.process, release)
        self.host.pairing.verbs.end(self.process, VerbsEnd(VerbsKind.QUEUE_PAIR_END, self.qpn))
        self.request = 0


def make(world: World, where: Where) -> FarQueuePair:
    """A new queue pair of the container's process."""
    host, container = world.hosts[where[0]], where[1]
    process = host.processes[container]
    if process not in host.pairing.verbs.processes:
        host.pairing.verbs.open(process, VerbsOpen(VERBS_VERSION, 0))
    (first, *_) = [
        message.qpn_first
        for message, _ in host.post.sent[process]
        if isinstance(message, VerbsDevice)
    ]
    used = {made.qpn for made in everything(world) if made.process == process}
    qpn = next(number for number in itertools.count(first) if number not in used)
    made = FarQueuePair(world, host, container, process, qpn)
    everything(world).append(made)
    return made


def everything(world: World) -> list[FarQueuePair]:
    """All queue pairs that were made."""
    found: list[FarQueuePair] = world.__dict__.setdefault("queue_pairs", [])
    return found


@pytest.fixture(params=list(EQUIPMENT))
def world(request: pytest.FixtureRequest) -> World:
    return started(**EQUIPMENT[request.param])


def asked(world: World, one: Where = A, other: Where = B) -> tuple[FarQueuePair, FarQueuePair]:
    """Two queue pairs that have asked for each other."""
    first, second = make(world, one), make(world, other)
    first.ask(second)
    second.ask(first)
    return first, second


def paired(world: World, one: Where = A, other: Where = B) -> tuple[FarQueuePair, FarQueuePair]:
    """Two queue pairs that have a slot each."""
    both = asked(world, one, other)
    world.loop.run(1)
    for here, there in (both, reversed(both)):
        grant = here.grant
        assert grant is not None
        assert (grant.qpn, grant.peer_qpn, grant.peer_gid) == (here.qpn, there.qpn, there.gid)
        assert grant.side == 0
        assert not here.broken
    return both


def end(world: World, *queue_pairs: FarQueuePair) -> None:
    """End queue pairs; then nothing is left."""
    for each in queue_pairs:
        each.end()
    world.loop.run(1)
    for host in world.hosts:
        assert not host.pairing.verbs.queue_pairs
        assert not len(host.remotes.queue_pairs)
    empty(world)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("one", "other"), [(A, B), (B, A)])
def test_two_queue_pairs(world: World, one: Where, other: Where, first: int) -> None:
    """Both get a slot on their own host, whichever leads and asks first, without any rule."""
    both = make(world, one), make(world, other)
    both[first].ask(both[1 - first])
    world.loop.run(0.5)
    assert not both[first].grant
    both[1 - first].ask(both[first])
    world.loop.run(0.5)
    assert all(each.grant for each in both)
    for host in world.hosts:
        assert all(lent.queue_pair for lent in host.relay.lent.values())
    end(world, *both)


def test_rule_of_relays_is_for_connections() -> None:
    """Queue pairs use TCP between relays though no connection may enter it."""
    world = started(cards=(), tcp=range(9), ruled=True)
    both = paired(world)
    world.loop.run(30)
    assert not any(each.broken for each in both)
    end(world, *both)


def test_who_is_not_meant(world: World) -> None:
    """A queue pair waits until its peer asks for it, of the same type, whoever else asks."""
    one, other = make(world, A), make(world, B)
    stranger = make(world, (1, 2))
    one.ask(other)
    stranger.ask(one)
    other.ask(one, UC)
    world.loop.run(2)
    assert not any(each.grant or each.refused for each in (one, other, stranger))
    other.ask(one)
    world.loop.run(1)
    assert one.grant
    assert other.grant
    assert not stranger.grant
    end(world, one, other, stranger)


def test_many(world: World) -> None:
    """Each of many queue pairs has its own peer."""
    both = [asked(world) for _ in range(100)]
    world.loop.run(2)
    numbers = set()
    for pair in both:
        for here, there in (pair, reversed(pair)):
            assert here.grant
            assert here.grant.peer_qpn == there.qpn
            numbers.add((here.host.number, here.grant.arena, here.grant.slot))
    assert len(numbers) == 200
    end(world, *itertools.chain(*both))


def test_reset_and_again(world: World) -> None:
    """Queue pairs that are reset can be paired again."""
    one, other = paired(world)
    one.end()
    other.end()
    world.loop.run(1)
    other.ask(one)
    one.ask(other)
    world.loop.run(1)
    assert one.grant
    assert other.grant
    assert not one.broken
    end(world, one, other)


def test_peer_ends(world: World) -> None:
    """A queue pair whose peer has ended keeps its slot until it ends itself; the relay tells it."""
    one, other = paired(world)
    one.end()
    world.loop.run(1)
    (lent,) = other.host.relay.lent.values()
    assert lent.ended
    assert not lent.broken
    end(world, other)


def test_process_ends(world: World) -> None:
    """The same if the peer's process ends."""
    one, other = paired(world)
    world.kill(one.host, one.container, child=False)
    world.loop.run(1)
    (lent,) = other.host.relay.lent.values()
    assert lent.ended
    end(world, other)


def test_end_before_the_answer(world: World) -> None:
    """A queue pair that ends while it is being paired leaves nothing behind at either host."""
    for steps in range(1, 12):
        one, other = asked(world)
        world.loop.run(steps * 0.0007)
        one.end()
        world.loop.run(2)
        end(world, other)


def test_waits_for_a_session(world: World) -> None:
    """Without a session a queue pair waits for the next."""
    one, other = make(world, A), make(world, B)
    world.lose(*world.hosts)
    one.ask(other)
    other.ask(one)
    world.loop.run(100)
    assert not any(each.grant or each.refused for each in (one, other))
    world.connect_all()
    world.loop.run(5)
    assert one.grant
    assert other.grant
    end(world, one, other)


def test_waits_for_a_link(world: World) -> None:
    """Without a link a queue pair waits, though connections are refused."""
    world.cut()
    world.break_link(*world.hosts)
    world.loop.run(20)
    one, other = asked(world)
    world.loop.run(5)
    assert not any(each.grant or each.refused for each in (one, other))
    world.cut(mend=True)
    world.loop.run(4000)
    assert one.grant
    assert other.grant
    end(world, one, other)


def test_waits_for_an_address(world: World) -> None:
    """A queue pair waits until a host says that it has the GID."""
    one, other = make(world, A), make(world, B)
    host = other.host
    facts = host.facts()
    gone = tuple(each for each in facts.endpoints if each.id != f"e{other.container}")
    host.pairing.replace_snapshot(Knowledge(replace(facts, endpoints=gone)))
    world.loop.run(2)
    one.ask(other)
    world.loop.run(20)
    assert not one.refused
    host.pairing.replace_snapshot(Knowledge(facts))
    world.loop.run(2)
    other.ask(one)
    world.loop.run(2)
    assert one.grant
    assert other.grant
    end(world, one, other)


def test_peer_without_verbs() -> None:
    """A router that knows nothing of queue pairs is told of none."""
    world = started(verbs=(0,))
    one, other = asked(world)
    world.loop.run(10)
    assert not any(each.grant or each.refused for each in (one, other))
    end(world, one, other)


def test_lost_link(world: World) -> None:
    """Queue pairs go on over a link that is made again."""
    one, other = paired(world)
    world.break_link(*world.hosts)
    world.loop.run(5)
    assert not one.broken
    assert not other.broken
    end(world, one, other)


@pytest.mark.parametrize("equipment", ["rdma", "relay"])
def test_hosts_that_do_not_reach_each_other(equipment: str) -> None:
    """A queue pair that waits for its peer ends after half a minute without a link and a session,
    not before, and its peer when the hosts reach each other again. An idle one goes on then.
    """
    world = started(**EQUIPMENT[equipment])
    one, other = paired(world)
    idle = paired(world, A, B)
    assert one.grant is not None
    arena = one.host.pairing.arenas[one.grant.arena]
    one.host.relay.stuck.add(arena.slots[one.grant.slot].connection)
    world.cut()
    world.lose(*world.hosts)
    world.break_link(*world.hosts)
    world.loop.run(QUEUE_PAIRS - 1)
    assert not one.broken
    world.loop.run(10)
    assert one.broken
    assert not other.broken
    one.end()
    world.loop.run(4000)
    world.cut(mend=True)
    world.connect_all()
    world.loop.run(10)
    assert other.broken
    assert not any(each.broken for each in idle)
    end(world, other, *idle)


@pytest.mark.parametrize("equipment", ["rdma", "relay"])
def test_link_that_stays_lost(equipment: str) -> None:
    """Queue pairs end if their hosts' routers reach each other and the relays don't."""
    world = started(**EQUIPMENT[equipment])
    one, other = paired(world)
    world.cut()
    world.break_link(*world.hosts)
    world.loop.run(20)
    assert one.broken
    assert other.broken
    one.end()
    other.end()
    world.cut(mend=True)
    world.loop.run(4000)
    end(world)


def test_relay_is_killed(world: World) -> None:
    """Queue pairs are broken at both ends when a relay dies; new ones use the next relay."""
    one, other = paired(world)
    world.kill_relay(one.host)
    world.loop.run(5)
    assert one.broken
    assert other.broken
    one.end()
    other.end()
    world.loop.run(60)
    end(world, *paired(world))


def test_router_is_killed(world: World) -> None:
    """The peers of a router that is killed are broken. Its own processes are told, too, when they
    tell the next router of what they had.
    """
    one, other = paired(world)
    world.restart_router(one.host)
    world.loop.run(1)
    assert other.broken
    one.host.pairing.verbs.open(one.process, VerbsOpen(VERBS_VERSION, one.qpn))
    one.ask(other, paired=True)
    assert one.refused is Reason.PEER_CLOSED
    one.request = 0
    world.connect_all()
    world.loop.run(60)
    end(world, other)


@pytest.mark.parametrize("option", ["verbs", "acceleration", "transports"])
def test_network_is_not_carried_any_more(world: World, option: str) -> None:
    """When a network may not have queue pairs to other hosts any more, both ends are broken, and
    those that wait are refused.
    """
    one, other = paired(world)
    waits = make(world, A)
    waits.ask(other)
    options = {"rdma": False, "relay": False} if option == "transports" else {option: False}
    world.options = options
    for host in world.hosts:
        host.pairing.replace_snapshot(Knowledge(host.facts()))
    world.loop.run(1)
    assert one.refused
    assert waits.refused
    lent = [lent for host in world.hosts for lent in host.relay.lent.values()]
    assert lent
    assert all(each.broken for each in lent)
    for each in (one, other):
        each.end()
    world.loop.run(60)
    end(world)


def test_limits() -> None:
    """A queue pair of a container that has all it may have is refused."""
    world = started()
    host = world.hosts[0]
    few = Limits(connections=1)
    facts = host.facts()
    learned = Knowledge(replace(facts, settings=replace(facts.settings, limits=few)))
    host.pairing.replace_snapshot(learned)
    first, second = paired(world)
    third, fourth = asked(world)
    world.loop.run(1)
    assert third.refused is Reason.LIMIT
    third.end()
    end(world, first, second, fourth)


def test_hostile_offers(world: World) -> None:
    """A host can offer no queue pair that isn't its own, and no GID that is none."""
    one, other = make(world, A), make(world, B)
    leader, follower = world.hosts
    assert leader.node < follower.node
    one.ask(other)
    world.loop.run(1)
    theirs = leader.remotes.hosts.get(follower.address)
    ours = follower.remotes.hosts.get(leader.address)
    assert theirs is not None
    assert ours is not None
    offer = peer_wire.VerbsOffer(7, "n1", "10.0.4.99", other.qpn, str(one.gid), one.qpn, RC)
    for message in (
        offer,
        replace(offer, offer=8, network="other"),
        replace(offer, offer=9, gid=str(one.gid)),
        replace(offer, offer=10, gid=str(other.gid), peer_gid="10.0.4.98"),
        replace(offer, offer=11, gid=str(other.gid), service=UC),
    ):
        assert leader.remotes.queue_pairs.take_offer(theirs, message) is None
    with pytest.raises(WrongMessage):
        leader.remotes.queue_pairs.take_offer(theirs, replace(offer, gid="nonsense"))
    with pytest.raises(WrongMessage):
        follower.remotes.queue_pairs.take_offer(ours, offer)
    world.loop.run(1)
    assert not one.grant


def test_offers_wait_while_much_is_to_be_sent(world: World) -> None:
    """A queue pair that is asked for again and again fills no session, and is paired afterwards."""
    one, other = make(world, A), make(world, B)
    leader, follower = world.hosts
    sent = sends(world)
    world.crowded.add((follower.number, leader.number))
    one.ask(other)
    for _ in range(5):
        other.ask(one)
    world.loop.run(1)
    assert not sent
    world.ease(follower, leader)
    world.loop.run(1)
    assert [type(message) for message in sent[:1]] == [peer_wire.VerbsOffer]
    assert one.grant
    assert other.grant
    world.ease(follower, leader)
    world.ease(leader, follower)
    world.loop.run(1)
    assert sum(isinstance(message, peer_wire.VerbsOffer) for message in sent) == 1
    end(world, one, other)


def test_offers_wait_in_a_new_session(world: World) -> None:
    """A queue pair that was offered in a session that was lost, and found no room in the next one,
    is paired when there is room.
    """
    one, other = make(world, A), make(world, B)
    leader, follower = world.hosts
    other.ask(one)
    world.loop.run(1)
    world.lose(leader, follower)
    world.crowded.add((follower.number, leader.number))
    world.session(leader, follower)
    one.ask(other)
    world.loop.run(1)
    assert not other.grant
    world.ease(follower, leader)
    world.loop.run(1)
    assert one.grant
    assert other.grant
    end(world, one, other)


def sends(world: World) -> list[peer_wire.Message]:
    """What the second host's router sends from now on."""
    sent: list[peer_wire.Message] = []
    carry = world.carry

    def note(source: Host, target: Host, message: peer_wire.Message) -> bool:
        if source is world.hosts[1]:
            sent.append(message)
        return carry(source, target, message)

    world.carry = note  # type: ignore[method-assign]
    return sent


def test_hostile_leader(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that takes an offer, declines it and takes the next one gives a queue pair one slot,
    however late the relay is.
    """
    one, other = make(world, A), make(world, B)
    leader, follower = world.hosts
    assert leader.node < follower.node
    other.ask(one)
    world.loop.run(0.5)
    late: list[relay_wire.Message] = []
    monkeypatch.setattr(follower.relay, "answer", late.append)

    def say(message: peer_wire.Message) -> None:
        follower.remotes.message(leader.address, message)

    for number in (901, 902):
        (offer,) = follower.remotes.queue_pairs._of[leader.address].offered
        say(peer_wire.Placement(offer, number, b"place"))
        say(peer_wire.Decline(offer, Reason.NOT_FOUND))
        world.loop.run(1.5)
    monkeypatch.undo()
    while late:
        follower.relay.answer(late.pop(0))
    world.loop.run(5)
    one.ask(other)
    world.loop.run(5)
    assert one.grant
    assert other.grant
    end(world, one, other)


def shown(host: Host) -> dict[int, tuple[str, str | None]]:
    """The path of each queue pair, and why it has none, as people see it."""
    *_, said = objects(host.pairing, 0.0, None)
    assert said is not None
    assert {fact.reason for fact in said.queue_pairs} - {None} == set(said.reasons)
    return {fact.qpn: (fact.path, fact.reason) for fact in said.queue_pairs}


def test_path_is_shown(world: World) -> None:
    """Lists show what carries a queue pair, or for what it waits."""
    one, other = paired(world)
    path = Transport.RDMA if 0 in world.cards else Transport.RELAY
    waits = make(world, A)
    waits.ask(other)
    assert shown(one.host) == {one.qpn: (path.value, None), waits.qpn: ("", "waiting")}
    world.lose(*world.hosts)
    assert shown(one.host) == {one.qpn: (path.value, None), waits.qpn: ("", "no-session")}
    world.connect_all()
    world.loop.run(1)
    end(world, one, other, waits)


def test_no_path_is_shown(world: World) -> None:
    """Lists show of an idle queue pair that its link is lost, until there is another one."""
    one, other = paired(world)
    path = shown(one.host)[one.qpn]
    world.cut()
    world.lose(*world.hosts)
    world.break_link(*world.hosts)
    world.loop.run(3600)
    for each in (one, other):
        assert not each.broken
        assert shown(each.host) == {each.qpn: ("", "no-link")}
    world.cut(mend=True)
    world.connect_all()
    world.loop.run(10)
    assert shown(one.host) == {one.qpn: path}
    end(world, one, other)


@pytest.mark.parametrize("what", ["peer", "relay", "router"])
def test_lost_path_is_shown(world: World, what: str) -> None:
    """Lists show of a queue pair that its peer has ended, or that its path is lost for good, though
    its program doesn't look. A change of the network changes nothing about it.
    """
    one, other = paired(world)
    if what == "peer":
        one.end()
    elif what == "relay":
        world.kill_relay(one.host)
    else:
        world.restart_router(one.host)
    world.loop.run(5)
    lost = {other.qpn: ("", "peer-closed" if what == "peer" else "broken")}
    assert shown(other.host) == lost
    if what != "peer":
        world.options = {"rdma": False}
        other.host.pairing.replace_snapshot(Knowledge(other.host.facts()))
        assert shown(other.host) == lost
        assert not other.refused
    world.connect_all()
    end(world, *([other] if what == "router" else [one, other]))


STEPS: Final = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "ask",
                "ask",
                "both",
                "both",
                "end",
                "kill",
                "relay",
                "router",
                "lose",
                "sessions",
                "break",
                "cut",
                "mend",
            ]
        ),
        st.integers(0, 99),
        st.integers(0, 99),
        st.sampled_from([0, 1, 3, 20, 600, 40_000]),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.sampled_from([2, 3]),
    equipment=st.sampled_from([*EQUIPMENT.values()]),
    seed=st.integers(0, 1 << 20),
    steps=STEPS,
)
def test_anything(
    size: int, equipment: dict[str, Any], seed: int, steps: list[tuple[str, int, int, int]]
) -> None:
    """Whatever happens in whatever order: only queue pairs that name each other are paired, no
    memory that a relay has is reused, and nothing is left.
    """
    chance = random.Random(seed)
    world = World(size, lambda: chance.random() * 0.01, **equipment)
    world.connect_all()
    world.loop.run(chance.random())
    for what, x, y, pause in steps:
        step(world, what, x, y)
        world.loop.run(pause / 1000)
        check(world)
    world.cut(mend=True)
    world.connect_all()
    world.loop.run(200)
    check(world)
    for each in everything(world):
        if each.process in each.host.pairing.verbs.processes:
            each.end()
    for host in world.hosts:
        for container in CONTAINERS:
            world.kill(host, container, child=False)
    world.loop.run(400)
    end(world)


def step(world: World, what: str, x: int, y: int) -> None:
    """One thing happens."""
    host = world.hosts[x % world.size]
    other = world.hosts[(x + 1 + y % (world.size - 1)) % world.size]
    known = everything(world)
    mine = [each for each in known if each.process in each.host.pairing.verbs.processes]
    match what:
        case "ask" if len(mine) > 1:
            one, two = mine[x % len(mine)], mine[y % len(mine)]
            if one.host is not two.host:
                one.ask(two)
        case "both":
            asked(world, (host.number, 1 + x % 2), (other.number, 1 + y % 2))
        case "end" if mine:
            mine[x % len(mine)].end()
        case "kill":
            container = CONTAINERS[y % len(CONTAINERS)]
            forget(world, host, container)
            world.kill(host, container, child=False)
        case "relay":
            world.kill_relay(host)
        case "router":
            for container in CONTAINERS:
                forget(world, host, container)
            world.restart_router(host)
        case "lose":
            world.lose(host, other)
        case "sessions":
            world.connect_all()
        case "break":
            world.break_link(host, other)
        case "cut" | "mend":
            world.cut(mend=what == "mend")


def forget(world: World, host: Host, container: int) -> None:
    """The queue pairs of a process that ends."""
    kept = [
        each for each in everything(world) if each.host is not host or each.container != container
    ]
    everything(world)[:] = kept


def check(world: World) -> None:
    """Two queue pairs whose slots are connected have named each other."""
    for host in world.hosts:
        for one in host.remotes.connections:
            there = world.by_address[one.host.address]
            if one.host.instance != there.instance or not one.state.peer_number:
                continue
            for other in there.remotes.connections:
                if other.number == one.state.peer_number and other.state.peer_number == one.number:
                    mine, theirs = one.user, other.user
                    assert isinstance(mine, QueuePairRecord)
                    assert isinstance(theirs, QueuePairRecord)
                    assert mine.peer_gid == theirs.gid
                    assert mine.message.peer_qpn == theirs.message.qpn
                    assert theirs.message.peer_qpn == mine.message.qpn
        connections = host.remotes.connections
        assert connections.room.registered == sum(one.bytes for one in connections)
