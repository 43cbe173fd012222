"""Connections between hosts: who is paired with whom, and what becomes of it when anything on the way is lost."""

from __future__ import annotations

import itertools
import random
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.router import library_wire as wire
from dataplane.router.links import GIVE_UP
from dataplane.router.reasons import STATUS_ONLY, Reason
from dataplane.router.remote import SESSION_PATIENCE
from dataplane.router.remote_connections import CONNECTIONS
from dataplane.router.remote_events import Phase
from dataplane.router.remote_hosts import RemoteHost
from dataplane.router.remote_requests import OWNER_PATIENCE
from tests.unit.remote_world import CONTAINERS, RING, Tcp, World

A, B, C = (0, 1), (1, 1), (2, 1)


@pytest.fixture
def world() -> World:
    made = World()
    made.connect_all()
    made.loop.run(1)
    return made


def upgraded(world: World, client: tuple[int, int] = A, server: tuple[int, int] = B) -> Tcp:
    """A connection whose ends have asked and were granted."""
    tcp = world.connect(client, server)
    for side in (0, 1):
        world.ask(tcp, side)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    return tcp


def finer(world: World, tcp: Tcp, side: int) -> Reason | None:
    """What the router remembers of a refusal."""
    host, container, _, _, cookie = tcp.ends[side]
    note = host.pairing.containers[host.namespace(container)].notes.get(cookie)
    return None if note is None else Reason(note[0])


def peer_of(world: World, host: int, other: int) -> RemoteHost:
    """What a host knows of another."""
    found = world.hosts[host].remotes.hosts.get(world.hosts[other].address)
    assert found is not None
    return found


def empty(world: World) -> None:
    """Nothing is left of any connection, anywhere."""
    for host in world.hosts:
        assert not list(host.remotes.connections)
        assert not host.remotes.connections.registered
        assert not len(host.remotes.requests)
        assert not [each for each in host.pairing.arenas.values() if each.ring]
        assert not host.memory.arenas
        assert not host.memory.bells
        assert not host.relay.lent
        assert not host.relay.arenas


# --- pairing


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("client", "server"), [(A, B), (B, A)])
def test_two_ends(
    world: World, client: tuple[int, int], server: tuple[int, int], first: int
) -> None:
    """Both ends are granted a slot of their own host, whoever leads and whoever asks first; side 1 is the relay's."""
    tcp = world.connect(client, server)
    for side in (first, 1 - first):
        assert world.grant(tcp, 0) is None
        world.ask(tcp, side)
        world.loop.run(1)
    grants = [world.grant(tcp, side) for side in (0, 1)]
    assert [grant.side for grant in grants if grant] == [0, 0]
    one, other = world.remote(tcp, 0), world.remote(tcp, 1)
    assert one is not None
    assert other is not None
    assert (one.number, one.state.peer_number) == (other.state.peer_number, other.number)
    assert (one.state.phase, other.state.phase) == (Phase.GRANTED, Phase.GRANTED)
    world.check()
    for side in (0, 1):
        world.close(tcp, side)
    world.loop.run(1)
    empty(world)


def test_behind_a_vip(world: World) -> None:
    """A client that knows the VIP alone is paired with the task that its kernel chose."""
    tcp = world.connect(A, (1, 2), vip=True)
    for side in (0, 1):
        world.ask(tcp, side)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    world.check()


def test_one_port_twice(world: World) -> None:
    """A port that serves a task and its service's VIP at once stays on TCP: nobody can tell which is which."""
    first = world.connect(A, B)
    host, container, local, remote, _ = first.ends[0]
    vip = wire.Address(world.connect(A, B, vip=True).ends[0][3].ip, remote.port)
    host.kernel.sockets[host.namespace(container), local, vip] = 1
    world.ask(first, 0)
    assert finer(world, first, 0) is Reason.AMBIGUOUS


def test_a_vip_that_the_kernel_does_not_explain(world: World) -> None:
    """Without the kernel's word for where a VIP's connection leads, it stays on TCP."""
    tcp = world.connect(A, B, vip=True)
    world.hosts[0].kernel.translations.clear()
    world.ask(tcp, 0)
    assert finer(world, tcp, 0) is Reason.UNTRACKED


def test_many_share_what_they_can(world: World) -> None:
    """Connections of one process share its arena, whichever host they go to."""
    made = World(3)
    made.connect_all()
    made.loop.run(1)
    one, other = upgraded(made, A, B), upgraded(made, A, C)
    first, second = made.grant(one, 0), made.grant(other, 0)
    assert first is not None
    assert second is not None
    assert first.arena == second.arena
    assert first.slot != second.slot


# --- why not


def test_reasons_at_once() -> None:
    """Who can't be helped is told so at once, and the router remembers the finer reason."""
    world = World()
    tcp = world.connect(A, B)
    world.ask(tcp, 0)
    assert finer(world, tcp, 0) is Reason.NO_SESSION
    assert world.refusals(tcp, 0) == [Reason.REMOTE]
    assert all(reason < STATUS_ONLY for reason in world.refusals(tcp, 0))
    world.connect_all()
    world.loop.run(1)
    world.hosts[1].remotes.device("unplugged")
    world.hello_again(world.hosts[1])
    world.loop.run(1)
    for end, reason in ((A, Reason.PEER_NO_RDMA), (B, Reason.NO_RDMA)):
        tcp = world.connect(end, (1 - end[0], 1))
        world.ask(tcp, 0)
        assert finer(world, tcp, 0) is reason


def test_nobodys_address(world: World) -> None:
    """An address that no host claims gets some time, for its container may just have come; then the ask is refused."""
    tcp = world.connect(A, B)
    peer_of(world, 0, 1).owned = {}
    world.ask(tcp, 0)
    world.loop.run(OWNER_PATIENCE / 2)
    assert world.refusals(tcp, 0) == []
    world.loop.run(OWNER_PATIENCE)
    assert finer(world, tcp, 0) is Reason.REMOTE


def test_an_address_that_is_claimed_late(world: World) -> None:
    """An ask that came before the peer had said that it has the address is paired as soon as it has."""
    tcp = world.connect(B, A)
    peer = peer_of(world, 1, 0)
    owned, peer.owned = peer.owned, {}
    for side in (0, 1):
        world.ask(tcp, side)
    world.loop.run(0.5)
    assert world.grant(tcp, 0) is None
    peer.owned = owned
    world.hosts[1].remotes.reassign(peer)
    world.loop.run(0.5)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)


def test_an_address_that_two_hosts_claim() -> None:
    """An address that two hosts say they have is nobody's."""
    world = World(3)
    world.connect_all()
    world.loop.run(1)
    tcp = world.connect(A, B)
    peer_of(world, 0, 2).owned = peer_of(world, 0, 1).owned
    world.ask(tcp, 0)
    world.loop.run(OWNER_PATIENCE + 0.1)
    assert finer(world, tcp, 0) is Reason.REMOTE


def test_limit_of_memory() -> None:
    """Past the memory that may be registered both ends stay on TCP, and what is given back can be used again."""
    cost = 2 * RING + 2 * 4096
    world = World(remote_memory=2 * cost)
    world.connect_all()
    world.loop.run(1)
    kept = [upgraded(world), upgraded(world)]
    late = world.connect(A, B)
    for side in (0, 1):
        world.ask(late, side)
    world.loop.run(1)
    assert [finer(world, late, side) for side in (0, 1)] == [Reason.LIMIT, Reason.LIMIT]
    for side in (0, 1):
        world.close(kept[0], side)
    world.loop.run(1)
    upgraded(world)
    assert CONNECTIONS == 4096


# --- the ends of connections


def test_memory_is_used_again_when_both_relays_have_let_go(world: World) -> None:
    """A slot whose process has released it isn't anybody's before the relay is done with it."""
    tcp = upgraded(world)
    world.close(tcp, 0)
    world.loop.run(1)
    host = world.hosts[0]
    assert host.relay.lent
    assert host.memory.reclaimed == []
    assert host.memory.arenas
    world.close(tcp, 1)
    world.loop.run(1)
    empty(world)


def test_children_keep_a_connection(world: World) -> None:
    """A process that hangs up while a child has its sockets: the connection lives as long as the socket."""
    tcp = upgraded(world)
    world.kill(world.hosts[0], 1, child=True)
    world.loop.run(20)
    assert world.remote(tcp, 0) is not None
    host, container, local, remote, _ = tcp.ends[0]
    del host.kernel.sockets[host.namespace(container), local, remote]
    tcp.open[0] = False
    world.close(tcp, 1)
    world.loop.run(5)
    empty(world)


def test_a_process_dies_while_its_connection_is_paired(world: World) -> None:
    """Whatever step it dies at, nothing stays behind, and the other end isn't left in a ring."""
    for steps in range(1, 12):
        tcp = world.connect(A, B)
        for side in (0, 1):
            world.ask(tcp, side)
        world.loop.run(steps * 0.001)
        world.kill(world.hosts[steps % 2], 1, child=False)
        world.loop.run(2)
        world.close(tcp, 0)
        world.close(tcp, 1)
        world.loop.run(5)
        empty(world)


def test_leaving(world: World) -> None:
    """A container that is disconnected takes both ends back to TCP, over the relays, once."""
    tcp = upgraded(world)
    remote = world.remote(tcp, 0)
    assert remote is not None
    world.hosts[0].pairing.remote.leave(remote.number)
    world.hosts[0].pairing.remote.leave(remote.number)
    world.loop.run(1)
    assert world.remote(tcp, 0) is None
    assert world.remote(tcp, 1) is None
    assert not world.hosts[0].severed
    for side in (0, 1):
        world.close(tcp, side)
    world.loop.run(1)
    empty(world)


# --- faults


def test_session_lost(world: World) -> None:
    """Without a session connections go on and no new ones begin; with it they do again."""
    tcp = upgraded(world)
    world.lose(*world.hosts)
    late = world.connect(A, B)
    world.ask(late, 0)
    assert finer(world, late, 0) is Reason.NO_SESSION
    world.loop.run(SESSION_PATIENCE * 3)
    assert world.remote(tcp, 0)
    world.connect_all()
    world.loop.run(1)
    upgraded(world)
    for side in (0, 1):
        world.close(tcp, side)


def test_asks_outlast_a_short_loss(world: World) -> None:
    """An ask that waits when the session is lost is paired when it's back; if it doesn't come back it is refused."""
    tcp = world.connect(B, A)
    world.ask(tcp, 0)
    world.loop.run(1)
    world.lose(*world.hosts)
    world.loop.run(5)
    world.connect_all()
    world.loop.run(1)
    world.ask(tcp, 1)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    other = world.connect(B, A)
    world.ask(other, 0)
    world.loop.run(1)
    world.lose(*world.hosts)
    world.loop.run(SESSION_PATIENCE + 1)
    assert finer(world, other, 0) is Reason.NO_SESSION


def test_session_lost_in_the_middle(world: World) -> None:
    """Whatever step the session is lost at, both ends are granted or neither is, once it is back."""
    for steps in range(1, 14):
        tcp = world.connect(B, A)
        for side in (0, 1):
            world.ask(tcp, side)
        world.loop.run(steps * 0.001)
        world.lose(*world.hosts)
        world.loop.run(1)
        world.connect_all()
        world.loop.run(5)
        assert (world.remote(tcp, 0) is None) == (world.remote(tcp, 1) is None), steps
        assert not world.hosts[0].severed
        assert not world.hosts[1].severed
        for side in (0, 1):
            world.close(tcp, side)
        world.loop.run(5)
        empty(world)


def test_link_lost(world: World) -> None:
    """A link that breaks is made again, and its connections are on it."""
    tcp = upgraded(world)
    world.break_link(*world.hosts)
    world.loop.run(5)
    assert world.hosts[0].remotes.links.is_up(world.hosts[1].address)
    assert world.remote(tcp, 0)
    assert world.remote(tcp, 1)
    assert not world.hosts[0].severed
    upgraded(world)
    for side in (0, 1):
        world.close(tcp, side)


def test_link_gone(world: World) -> None:
    """A link that can't be made again: its connections go back to TCP over the session, whole; new ones stay there."""
    tcp = upgraded(world)
    world.cut = True
    world.break_link(*world.hosts)
    world.loop.run(15)
    assert world.remote(tcp, 0) is None
    assert world.remote(tcp, 1) is None
    assert not world.hosts[0].severed
    assert not world.hosts[1].severed
    assert world.hosts[0].remotes.connections.counts.left == 1
    world.loop.run(60)
    late = world.connect(A, B)
    for side in (0, 1):
        world.ask(late, side)
    world.loop.run(1)
    assert finer(world, late, 0) is Reason.NO_LINK
    world.cut = False
    world.loop.run(70)
    upgraded(world)


def test_link_and_session_gone(world: World) -> None:
    """Without link and session nothing can be delivered: both ends see a reset, after a while."""
    tcp = upgraded(world)
    world.lose(*world.hosts)
    world.break_link(*world.hosts)
    world.loop.run(GIVE_UP - 1)
    assert not world.hosts[0].severed
    world.loop.run(2)
    assert world.hosts[0].severed
    assert world.hosts[1].severed
    for side in (0, 1):
        world.close(tcp, side)
    world.loop.run(1)
    empty(world)


@pytest.mark.parametrize("dies", [0, 1])
def test_relay_dies(world: World, dies: int) -> None:
    """A relay that dies resets its connections, at both ends; new ones find the next relay."""
    tcp = upgraded(world)
    here, there = world.hosts[dies], world.hosts[1 - dies]
    world.kill_relay(here)
    world.loop.run(0.2)
    assert here.memory.severed
    assert here.memory.alarmed
    assert there.severed
    world.loop.run(10)
    for side in (0, 1):
        world.close(tcp, side)
    world.loop.run(1)
    empty(world)
    upgraded(world)


@pytest.mark.parametrize("dies", [0, 1])
def test_router_dies(world: World, dies: int) -> None:
    """A router that is killed: its relay brings connections back to TCP; with the next router there are new ones."""
    tcp = upgraded(world)
    world.restart_router(world.hosts[dies])
    world.loop.run(2)
    assert world.remote(tcp, 0) is None
    assert world.remote(tcp, 1) is None
    assert not world.hosts[1 - dies].severed
    world.connect_all()
    world.loop.run(10)
    upgraded(world)


# --- a hostile peer


def test_offers_of_what_is_not_its_own(world: World) -> None:
    """A peer that offers an end which isn't its own gets nothing."""
    tcp = world.connect(B, A)
    peer = peer_of(world, 0, 1)
    world.ask(tcp, 1)
    peer.owned = {}
    world.ask(tcp, 0)
    world.loop.run(OWNER_PATIENCE / 2)
    assert world.grant(tcp, 0) is None
    assert world.grant(tcp, 1) is None


def test_words_about_others() -> None:
    """A peer's word about a connection with another host means nothing."""
    world = World(3)
    world.connect_all()
    world.loop.run(1)
    tcp = upgraded(world, A, B)
    remote = world.remote(tcp, 0)
    assert remote is not None
    from dataplane.router import peer_wire

    third = world.hosts[2].address
    for message in (
        peer_wire.PeerDrop(remote.number, 0),
        peer_wire.PeerAccept(remote.offer, 1, b""),
        peer_wire.Paired(remote.number),
        peer_wire.Decline(remote.offer, 0),
        peer_wire.Withdraw(remote.offer),
        peer_wire.Placement(remote.offer, 1, b""),
    ):
        world.hosts[0].remotes.message(third, message)
    world.loop.run(1)
    assert world.remote(tcp, 0) is remote
    assert remote.state.phase is Phase.GRANTED


# --- all of it at random

STEPS: Final = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "connect",
                "connect",
                "connect",
                "vip",
                "ask",
                "ask",
                "ask",
                "ask",
                "close",
                "close",
                "kill",
                "child",
                "lose",
                "session",
                "link",
                "cut",
                "mend",
                "relay",
                "router",
                "part",
                "wait",
            ]
        ),
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.integers(0, 30),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(size=st.sampled_from([2, 3]), seed=st.integers(0, 1 << 20), steps=STEPS)
def test_anything(size: int, seed: int, steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever happens and in whatever order: no two ends are paired that aren't one connection, no memory is used that
    a relay still has, no end stays alone in a ring, every ask has an answer, and in the end nothing is left."""
    chance = random.Random(seed)
    world = World(size, lambda: chance.random() * 0.01)
    world.connect_all()
    world.loop.run(chance.random())
    for what, x, y, pause in steps:
        step(world, what, x, y)
        world.loop.run(pause / 1000)
        world.check()
    world.cut = False
    world.connect_all()
    world.loop.run(200)
    for tcp in world.connections:
        alive = [world.remote(tcp, side) is not None for side in (0, 1)]
        if all(tcp.open):
            assert alive[0] == alive[1], "one end is alone in a ring"
        for side in (0, 1):
            answered = world.grant(tcp, side) or world.refusals(tcp, side)
            waits = (
                tcp.ends[side][0]
                .pairing.containers[tcp.ends[side][0].namespace(tcp.ends[side][1])]
                .waiting.get(tcp.ends[side][4])
            )
            if tcp.asked[side] and tcp.asked[1 - side] and all(tcp.open) and waits is not None:
                assert not answered
                assert world.refusals(tcp, 1 - side) or world.grant(tcp, 1 - side)
    for tcp in world.connections:
        for side in (0, 1):
            world.close(tcp, side)
    for host in world.hosts:
        for container in CONTAINERS:
            world.kill(host, container, child=False)
    world.loop.run(400)
    empty(world)


def step(world: World, what: str, x: int, y: int) -> None:
    a, b = list(itertools.permutations(world.hosts, 2))[x % (world.size * (world.size - 1))]
    container = CONTAINERS[y % 2]
    tcp = world.connections[x % len(world.connections)] if world.connections else None
    match what:
        case "connect" | "vip":
            made = world.connect((a.number, container), (b.number, 1 + x % 2), vip=what == "vip")
            world.ask(made, y % 2)
            if y % 3:
                world.ask(made, 1 - y % 2)
        case "ask" if tcp is not None:
            world.ask(tcp, y % 2)
        case "close" if tcp is not None:
            world.close(tcp, y % 2)
        case "kill" | "child":
            world.kill(a, container, child=what == "child")
        case "lose":
            world.lose(a, b)
        case "session":
            world.session(a, b)
        case "link":
            world.break_link(a, b)
        case "cut" | "mend":
            world.cut = what == "cut"
        case "relay":
            world.kill_relay(a)
        case "router":
            world.restart_router(a)
        case "part" if tcp is not None:
            remote = world.remote(tcp, y % 2)
            if remote is not None:
                tcp.ends[y % 2][0].remotes.leave(remote.number)
        case "wait":
            world.loop.run(y / 10)
