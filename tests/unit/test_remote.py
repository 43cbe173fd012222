"""Connections between hosts: which ends are paired, and what happens when any part fails."""

from __future__ import annotations

import errno
import itertools
import random
from functools import partial
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataplane.router import library_wire as wire
from dataplane.router import peer_wire, remote_room
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import IPAddress
from dataplane.router.link_deadlines import CHECKS, GIVE_UP
from dataplane.router.link_table import LOSSES
from dataplane.router.link_transport import FAILURES, LASTS, LEAST_REST, MOST_REST
from dataplane.router.links import AGAIN, STEP
from dataplane.router.reasons import STATUS_ONLY, Reason
from dataplane.router.remote import OPENING, SESSION_PATIENCE
from dataplane.router.remote_events import LEADER, Phase, Transport
from dataplane.router.remote_hosts import RemoteHost
from dataplane.router.remote_requests import OWNER_PATIENCE, Closed, RemoteRequest
from tests.unit.remote_world import CONTAINERS, RELAY_RING, RING, Host, Tcp, World, started

A, B, C = (0, 1), (1, 1), (2, 1)


ALL: Final = range(99)
EQUIPMENT: Final[dict[str, dict[str, Any]]] = {
    "rdma": {"cards": ALL, "tcp": ()},
    "relay": {"cards": (), "tcp": ALL},
    "both": {"cards": ALL, "tcp": ALL},
}
"""What all hosts have."""
MIXED: Final = {"cards": (0, 2), "tcp": (0, 1)}
"""Of three hosts the first and the last have cards; the last has a router of the last version."""


@pytest.fixture(params=list(EQUIPMENT))
def world(request: pytest.FixtureRequest) -> World:
    return started(**EQUIPMENT[request.param])


def requested(
    world: World, client: tuple[int, int], server: tuple[int, int], *, vip: bool = False
) -> Tcp:
    """A connection whose ends have sent requests."""
    tcp = world.connect(client, server, vip=vip)
    for side in (0, 1):
        world.request(tcp, side)
    return tcp


def upgraded(world: World, client: tuple[int, int] = A, server: tuple[int, int] = B) -> Tcp:
    """A connection whose ends have sent requests and were granted."""
    tcp = requested(world, client, server)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    return tcp


def end(world: World, tcp: Tcp, seconds: float = 1) -> None:
    """Close both ends. After so many seconds nothing is left."""
    for side in (0, 1):
        world.close(tcp, side)
    world.loop.run(seconds)
    empty(world)


def finer(world: World, tcp: Tcp, side: int) -> Reason | None:
    """The reason that the router notes for a refusal."""
    host, container, _, _, cookie = tcp.ends[side]
    note = host.pairing.containers[host.namespace(container)].notes.get(cookie)
    return None if note is None else Reason(note[0])


def peer_of(world: World, host: int, other: int) -> RemoteHost:
    """What a host knows about another."""
    peer = world.hosts[host].remotes.hosts.get(world.hosts[other].address)
    assert peer is not None
    return peer


def empty(world: World) -> None:
    """Assert that nothing is left of any connection on any host."""
    for host in world.hosts:
        assert not list(host.remotes.connections)
        assert not host.remotes.connections.room.registered
        assert not len(host.remotes.requests)
        assert not [arena for arena in host.pairing.arenas.values() if arena.ring]
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
    """Both ends are granted a slot on their own host, whichever leads and sends its request
    first.
    """
    tcp = world.connect(client, server)
    for side in (first, 1 - first):
        assert world.grant(tcp, 0) is None
        world.request(tcp, side)
        world.loop.run(1)
    grants = [world.grant(tcp, side) for side in (0, 1)]
    assert [grant.side for grant in grants if grant] == [0, 0]
    one, other = world.remote(tcp, 0), world.remote(tcp, 1)
    assert one is not None
    assert other is not None
    assert (one.number, one.state.peer_number) == (other.state.peer_number, other.number)
    assert (one.state.phase, other.state.phase) == (Phase.GRANTED, Phase.GRANTED)
    world.check()
    end(world, tcp)


def test_behind_a_vip(world: World) -> None:
    """A client that knows only the VIP is paired with the task that its kernel chose."""
    tcp = requested(world, A, (1, 2), vip=True)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    world.check()


def test_one_port_twice(world: World) -> None:
    """A client port with connections to a task and to its VIP stays on TCP: they can't be told
    apart.
    """
    first = world.connect(A, B)
    host, container, local, remote, _ = first.ends[0]
    vip = wire.Address(world.connect(A, B, vip=True).ends[0][3].ip, remote.port)
    host.kernel.sockets[host.namespace(container), local, vip] = 1
    world.request(first, 0)
    assert finer(world, first, 0) is Reason.AMBIGUOUS


def test_a_vip_that_the_kernel_does_not_explain(world: World) -> None:
    """A connection to a VIP stays on TCP if connection tracking doesn't say where it leads."""
    tcp = world.connect(A, B, vip=True)
    world.hosts[0].kernel.translations.clear()
    world.request(tcp, 0)
    assert finer(world, tcp, 0) is Reason.UNTRACKED


def test_offers_wait_while_much_is_to_be_sent(world: World) -> None:
    """A request of the follower is offered when the session has room, and is granted then."""
    leader, follower = world.hosts
    world.crowded.add((follower.number, leader.number))
    tcp = requested(world, A, B)
    world.loop.run(5)
    assert not world.grant(tcp, 0)
    world.ease(follower, leader)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    end(world, tcp)


def test_offers_wait_in_a_new_session(world: World) -> None:
    """What was offered in a session that was lost, and found no room in the next one, is offered
    when there is room.
    """
    leader, follower = world.hosts
    tcp = world.connect(A, B)
    world.request(tcp, 1)
    world.loop.run(1)
    world.lose(leader, follower)
    world.crowded.add((follower.number, leader.number))
    world.session(leader, follower)
    world.loop.run(1)
    world.request(tcp, 0)
    world.loop.run(1)
    assert not world.grant(tcp, 1)
    world.ease(follower, leader)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    end(world, tcp)


def test_many_share_what_they_can(world: World) -> None:
    """Connections of one process share its arena, whichever host they lead to."""
    made = started(3)
    one, other = upgraded(made, A, B), upgraded(made, A, C)
    first, second = made.grant(one, 0), made.grant(other, 0)
    assert first is not None
    assert second is not None
    assert first.arena == second.arena
    assert first.slot != second.slot


# --- refusals


def test_reasons_at_once() -> None:
    """A request that can't be granted is refused at once, and the router notes the exact reason."""
    world = World()
    tcp = world.connect(A, B)
    world.request(tcp, 0)
    assert finer(world, tcp, 0) is Reason.NO_SESSION
    assert world.refusals(tcp, 0) == [Reason.REMOTE]
    assert all(reason < STATUS_ONLY for reason in world.refusals(tcp, 0))
    world.connect_all()
    world.loop.run(1)
    world.hosts[1].unplug()
    world.loop.run(1)
    for end, reason in ((A, Reason.PEER_NO_RDMA), (B, Reason.NO_RDMA)):
        tcp = world.connect(end, (1 - end[0], 1))
        world.request(tcp, 0)
        assert finer(world, tcp, 0) is reason


def test_an_address_that_no_host_claims(world: World) -> None:
    """A request for an address that no host claims waits 2 s, for a container may have just
    started.
    """
    tcp = world.connect(A, B)
    peer_of(world, 0, 1).owned = {}
    world.request(tcp, 0)
    world.loop.run(OWNER_PATIENCE / 2)
    assert world.refusals(tcp, 0) == []
    world.loop.run(OWNER_PATIENCE)
    assert finer(world, tcp, 0) is Reason.REMOTE


def test_an_address_that_is_claimed_late(world: World) -> None:
    """A request is paired as soon as the peer's host claims the address."""
    tcp = world.connect(B, A)
    peer = peer_of(world, 1, 0)
    owned, peer.owned = peer.owned, {}
    for side in (0, 1):
        world.request(tcp, side)
    world.loop.run(0.5)
    assert world.grant(tcp, 0) is None
    peer.owned = owned
    world.hosts[1].remotes.reassign(peer)
    world.loop.run(0.5)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)


def test_an_address_that_two_hosts_claim() -> None:
    """An address that two hosts claim belongs to neither."""
    world = World(3)
    world.connect_all()
    world.loop.run(1)
    tcp = world.connect(A, B)
    peer_of(world, 0, 2).owned = peer_of(world, 0, 1).owned
    world.request(tcp, 0)
    world.loop.run(OWNER_PATIENCE + 0.1)
    assert finer(world, tcp, 0) is Reason.REMOTE


def test_limit_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit of registered memory both ends stay on TCP. Freed memory can be used
    again.
    """
    monkeypatch.setattr(remote_room, "MEMORY_OF_CONTAINER", 1)
    cost = 2 * RING + 2 * 4096
    world = World(remote_memory=2 * cost)
    world.connect_all()
    world.loop.run(1)
    kept = [upgraded(world), upgraded(world)]
    limited(world)
    for side in (0, 1):
        world.close(kept[0], side)
    world.loop.run(1)
    upgraded(world)


def limited(world: World, client: tuple[int, int] = A, server: tuple[int, int] = B) -> None:
    """One more connection between two containers has no room."""
    late = requested(world, client, server)
    world.loop.run(1)
    assert [finer(world, late, side) for side in (0, 1)] == [Reason.LIMIT, Reason.LIMIT]


def test_room_of_a_container(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers can't take a whole link: others get connections, until the link is full."""
    monkeypatch.setattr(remote_room, "LINK_CONNECTIONS", 3)
    monkeypatch.setattr(remote_room, "OF_CONTAINER", 2)
    kept = [upgraded(world), upgraded(world)]
    limited(world)
    limited(world, A, (1, 2))
    other = (0, 2), (1, 2)
    kept.append(upgraded(world, *other))
    limited(world, *other)
    for tcp in kept:
        for side in (0, 1):
            world.close(tcp, side)
    world.loop.run(1)
    end(world, upgraded(world))


def test_memory_of_a_container() -> None:
    """Two containers can't register all memory: an eighth of it is left for others."""
    world = World(remote_memory=8 * (2 * RING + 2 * 4096))
    world.connect_all()
    world.loop.run(1)
    for _ in range(7):
        upgraded(world)
    limited(world)
    upgraded(world, (0, 2), (1, 2))
    limited(world, (0, 2), (1, 2))


# --- the ends of connections


def test_memory_is_used_again_when_both_relays_have_let_go(world: World) -> None:
    """A slot that its process has released isn't reused before the relay has dropped it."""
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
    """If a process ends and a child has its socket, the connection lives as long as the socket."""
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
    """Whichever step a process ends at, nothing is left, and its peer isn't left alone in a
    ring.
    """
    for steps in range(1, 12):
        tcp = requested(world, A, B)
        world.loop.run(steps * 0.001)
        world.kill(world.hosts[steps % 2], 1, child=False)
        world.loop.run(2)
        end(world, tcp, 5)


@pytest.mark.parametrize("side", [0, 1])
def test_a_process_hangs_up_while_its_connection_is_paired(world: World, side: int) -> None:
    """Whichever step a process hangs up at while a child keeps its socket, both ends are in the
    ring or both are on TCP, and neither is reset.
    """
    for steps in range(1, 30):
        tcp = requested(world, A, B)
        world.loop.run(steps * 0.0005)
        world.kill(world.hosts[side], 1, child=True)
        world.loop.run(2)
        in_step(world, tcp)
        end(world, tcp, 5)


@pytest.mark.parametrize("side", [0, 1])
def test_leaving_while_it_is_paired(world: World, side: int) -> None:
    """Whichever step a connection is to go back to TCP at, both ends do, and neither is reset."""
    for steps in range(1, 30):
        tcp = requested(world, A, B)
        world.loop.run(steps * 0.0005)
        for connection in world.hosts[side].remotes.connections:
            world.hosts[side].remotes.leave(connection.number)
        world.loop.run(2)
        in_step(world, tcp)
        end(world, tcp, 5)


@pytest.mark.parametrize("lost", ["session", "relay"])
def test_hang_up_and_loss(world: World, lost: str) -> None:
    """If a process hangs up during pairing, and then the session or the leader's relay is lost, the
    other end goes back to TCP, and isn't reset.
    """
    seen: set[Phase] = set()
    for steps, more in itertools.product(range(1, 30), range(6)):
        tcp = requested(world, A, B)
        world.loop.run(steps * 0.0005)
        if world.grant(tcp, 0):
            break
        seen.update(one.state.phase for one in world.hosts[0].remotes.connections)
        world.kill(world.hosts[0], 1, child=True)
        world.loop.run(more * 0.0005)
        if lost == "session":
            world.lose(*world.hosts)
            world.loop.run(5)
            world.connect_all()
        else:
            world.kill_relay(world.hosts[0])
        world.loop.run(5)
        in_step(world, tcp)
        end(world, tcp, 5)
    assert seen >= set(LEADER)


def in_ring(world: World, tcp: Tcp) -> list[bool]:
    """Whether each end, which must be open, uses the ring: has more to send, and wasn't reset."""
    ends = [world.remote(tcp, side) for side in (0, 1)]
    return [end is not None and not end.state.sent for end in ends]


def in_step(world: World, tcp: Tcp) -> None:
    """Assert that both ends of a connection use the ring or neither does, and no end was reset."""
    assert len(set(in_ring(world, tcp))) == 1
    assert not any(host.severed or host.memory.severed for host in world.hosts)


def test_leaving(world: World) -> None:
    """The relays bring both ends back to TCP, once, if a container leaves the network."""
    tcp = upgraded(world)
    remote = world.remote(tcp, 0)
    assert remote is not None
    world.hosts[0].pairing.remote.leave(remote.number)
    world.hosts[0].pairing.remote.leave(remote.number)
    world.loop.run(1)
    assert world.remote(tcp, 0) is None
    assert world.remote(tcp, 1) is None
    assert not world.hosts[0].severed
    end(world, tcp)


# --- faults


def test_session_lost(world: World) -> None:
    """Without a session connections go on, and no new ones begin until there is one again."""
    tcp = upgraded(world)
    world.lose(*world.hosts)
    late = world.connect(A, B)
    world.request(late, 0)
    assert finer(world, late, 0) is Reason.NO_SESSION
    world.loop.run(SESSION_PATIENCE * 3)
    assert world.remote(tcp, 0)
    world.connect_all()
    world.loop.run(1)
    upgraded(world)
    for side in (0, 1):
        world.close(tcp, side)


def test_requests_outlast_a_short_loss(world: World) -> None:
    """A waiting request survives a short loss of the session, and is refused after a long one."""
    tcp = world.connect(B, A)
    world.request(tcp, 0)
    world.loop.run(1)
    world.lose(*world.hosts)
    world.loop.run(5)
    world.connect_all()
    world.loop.run(1)
    world.request(tcp, 1)
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)
    other = world.connect(B, A)
    world.request(other, 0)
    world.loop.run(1)
    world.lose(*world.hosts)
    world.loop.run(SESSION_PATIENCE + 1)
    assert finer(world, other, 0) is Reason.NO_SESSION


def test_session_lost_in_the_middle(world: World) -> None:
    """Whichever step the session is lost at, both ends are granted in the end, or neither is."""
    for steps in range(1, 14):
        tcp = requested(world, B, A)
        world.loop.run(steps * 0.001)
        world.lose(*world.hosts)
        world.loop.run(1)
        world.connect_all()
        world.loop.run(5)
        assert (world.remote(tcp, 0) is None) == (world.remote(tcp, 1) is None), steps
        assert not world.hosts[0].severed
        assert not world.hosts[1].severed
        end(world, tcp, 5)


@pytest.mark.parametrize("seed", range(20))
def test_session_lost_after_a_short_use(seed: int) -> None:
    """Nothing is left of a connection whose follower was granted, used and closed before the leader
    was, if the session is lost then.
    """
    random_delays = random.Random(seed)
    world = started(delays=lambda: random_delays.choice([0.0001, 0.01, 0.05]))
    tcp = requested(world, A, B)
    while not world.grant(tcp, 1):
        world.loop.run(0.001)
    for side in (1, 0):
        world.close(tcp, side)
    world.lose(*world.hosts)
    world.loop.run(1)
    world.connect_all()
    world.loop.run(20)
    empty(world)


def test_link_lost(world: World) -> None:
    """A link that breaks is made again, with its connections."""
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


def test_link_fails_again_on_one_host(world: World) -> None:
    """A link that fails on one host while it is made again is made again on both, without a
    reset.
    """
    tcp = upgraded(world)
    for host in (0, 1):
        for steps in range(12):
            world.break_link(*world.hosts)
            world.loop.run(steps * 0.001)
            world.down_of(world.hosts[host], 1 - host)
            world.loop.run(LASTS + 5)
            assert not world.hosts[0].severed
            for here, there in itertools.permutations(world.hosts):
                assert here.remotes.links.is_up(there.address)
    end(world, tcp)


def test_link_lost_after_a_process(world: World) -> None:
    """Nothing is left of a connection whose process and then whose link go away during pairing."""
    links, there = world.hosts[0].remotes.links, world.hosts[1].address
    for steps in range(1, 30):
        tcp = requested(world, A, B)
        world.loop.run(steps * 0.0005)
        world.kill(world.hosts[0], 1, child=False)
        links.forget(there)
        links.wake(there)
        world.loop.run(2)
        world.close(tcp, 1)
        world.loop.run(5)
        empty(world)


def test_link_gone(world: World) -> None:
    """If a link can't be made again, its connections go back to TCP unharmed. New ones stay on
    TCP.
    """
    tcp = upgraded(world)
    world.cut()
    world.break_link(*world.hosts)
    world.loop.run(15)
    assert world.remote(tcp, 0) is None
    assert world.remote(tcp, 1) is None
    assert not world.hosts[0].severed
    assert not world.hosts[1].severed
    assert sum(counts.left for counts in world.hosts[0].remotes.connections.counts.values()) == 1
    world.loop.run(60)
    late = requested(world, A, B)
    world.loop.run(1)
    assert finer(world, late, 0) is Reason.NO_LINK
    world.cut(mend=True)
    world.loop.run(70)
    upgraded(world)


def test_link_and_session_gone(world: World) -> None:
    """Without link and session an end is reset after a while, if there is something to deliver or
    it is closed.
    """
    tcp = upgraded(world)
    remote = world.remote(tcp, 0)
    assert remote is not None
    transport = remote.state.transport
    world.hosts[0].relay.stuck.add(remote.number)
    world.lose(*world.hosts)
    world.break_link(*world.hosts)
    world.loop.run(GIVE_UP[transport] - 1)
    assert not world.hosts[0].severed
    world.loop.run(2 + GIVE_UP[transport] / CHECKS)
    assert world.hosts[0].severed
    assert not world.hosts[1].severed
    world.close(tcp, 1)
    world.loop.run(2 + GIVE_UP[transport] * (1 + 1 / CHECKS))
    assert world.hosts[1].severed
    end(world, tcp)


@pytest.mark.parametrize("gone", [0, 1])
def test_host_gone(gone: int) -> None:
    """If a host is gone while nothing is on the way to it, its link is found to be lost. An end
    that waits for it is reset in time, and an idle one stays.
    """
    world = started()
    here = world.hosts[1 - gone]
    waits, idle = upgraded(world), upgraded(world)
    remote = world.remote(waits, 1 - gone)
    assert remote is not None
    here.relay.stuck.add(remote.number)
    world.switch_off(world.hosts[gone])
    world.loop.run(GIVE_UP[Transport.RDMA] - 1)
    assert not here.severed
    world.loop.run(2 + GIVE_UP[Transport.RDMA] / CHECKS)
    assert here.severed == {(remote.arena.id, remote.slot)}
    world.loop.run(3600)
    assert len(here.severed) == 1
    assert world.remote(idle, 1 - gone)


def test_no_session_for_long() -> None:
    """Without a session, a link that works is checked, and nobody on it is reset."""
    world = started()
    tcp = upgraded(world)
    for side in (0, 1):
        remote = world.remote(tcp, side)
        assert remote is not None
        world.hosts[side].relay.stuck.add(remote.number)
    world.lose(*world.hosts)
    world.loop.run(3 * GIVE_UP[Transport.RDMA])
    world.session(*world.hosts)
    world.loop.run(1)
    checked = [host.relay.checks for host in world.hosts]
    assert min(checked) > CHECKS
    world.loop.run(3 * GIVE_UP[Transport.RDMA])
    assert [host.relay.checks for host in world.hosts] == checked
    assert not any(host.severed for host in world.hosts)
    assert world.remote(tcp, 0)
    assert world.remote(tcp, 1)


@pytest.mark.parametrize("dies", [0, 1])
def test_relay_dies(world: World, dies: int) -> None:
    """The end of a relay resets its connections at both ends. New ones use the next relay."""
    tcp = upgraded(world)
    here, there = world.hosts[dies], world.hosts[1 - dies]
    world.kill_relay(here)
    world.loop.run(0.2)
    assert here.memory.severed
    assert here.memory.alarmed
    assert there.severed
    world.loop.run(10)
    end(world, tcp)
    upgraded(world)


@pytest.mark.parametrize("dies", [0, 1])
def test_router_dies(world: World, dies: int) -> None:
    """If a router is killed, its relay brings connections back to TCP. The next router makes new
    ones.
    """
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
    """An offer for an address that its host doesn't own is not matched."""
    tcp = world.connect(B, A)
    peer = peer_of(world, 0, 1)
    world.request(tcp, 1)
    peer.owned = {}
    world.request(tcp, 0)
    world.loop.run(OWNER_PATIENCE / 2)
    assert world.grant(tcp, 0) is None
    assert world.grant(tcp, 1) is None


def test_messages_about_connections_of_others() -> None:
    """A host can't affect a connection with another host."""
    world = World(3)
    world.connect_all()
    world.loop.run(1)
    tcp = upgraded(world, A, B)
    remote = world.remote(tcp, 0)
    assert remote is not None
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


# --- transports


def moved(world: World, client: tuple[int, int] = A, server: tuple[int, int] = B) -> Transport:
    """The transport of a new connection, which both hosts agree on."""
    tcp = upgraded(world, client, server)
    ends = [world.remote(tcp, side) for side in (0, 1)]
    transports = {end.state.transport for end in ends if end is not None}
    assert len(transports) == 1
    rings = {end.arena.ring for end in ends if end is not None}
    (transport,) = transports
    assert rings == {RING if transport is Transport.RDMA else RELAY_RING}
    for side in (0, 1):
        world.close(tcp, side)
    world.loop.run(1)
    return transport


@pytest.mark.parametrize(
    ("equipment", "transport"),
    [("rdma", Transport.RDMA), ("relay", Transport.RELAY), ("both", Transport.RDMA)],
)
def test_transport(equipment: str, transport: Transport) -> None:
    """Two hosts use RDMA if both have a device, else TCP between their relays."""
    assert moved(started(**EQUIPMENT[equipment])) is transport


def test_addresses_are_forgotten(world: World) -> None:
    """The addresses of a link, which may contain keys, are forgotten once it is up or gone."""
    here, there = world.hosts
    for gone in (False, True):
        if gone:
            here.remotes.links.forget(there.address)
        for one, other in ((here, there), (there, here)):
            link = one.remotes.links.link(other.address)
            assert (link.own, link.address) == (b"", b"")


def test_hosts_with_cards_and_hosts_without() -> None:
    """Each pair of hosts uses the best transport that both have; a pair without one uses TCP."""
    world = started(4, cards=(0, 1), tcp=(0, 1, 2, 3))
    assert moved(world, (0, 1), (1, 1)) is Transport.RDMA
    for pair in ((0, 2), (2, 1), (3, 2), (1, 3)):
        assert moved(world, (pair[0], 1), (pair[1], 1)) is Transport.RELAY


@pytest.mark.parametrize("old", [0, 1])
def test_a_peer_of_the_last_version(old: int) -> None:
    """A peer whose Hello doesn't know of TCP gets no message that it doesn't know, and connections
    with it use RDMA, or stay on TCP with the reason.
    """
    new = 1 - old
    world = started(cards=ALL, tcp=(new,))
    assert moved(world) is Transport.RDMA
    world = started(cards=(new,), tcp=(new,))
    tcp = world.connect((new, 1), (old, 1))
    world.request(tcp, 0)
    world.request(tcp, 1)
    world.loop.run(1)
    assert finer(world, tcp, 0) is Reason.PEER_NO_RDMA
    assert finer(world, tcp, 1) is Reason.NO_RDMA


def test_devices_that_do_not_reach_each_other() -> None:
    """If links over RDMA fail several times, the link uses TCP. When it has no connections, RDMA is
    tried again after a minute, then more rarely, and used once it works.
    """
    world = World(cards=ALL, tcp=ALL)
    world.cut_rdma = True
    world.connect_all()
    world.loop.run(8)
    assert moved(world) is Transport.RELAY
    world.loop.run(LEAST_REST)
    world.loop.run(8)
    kept = upgraded(world)
    world.cut_rdma = False
    world.loop.run(10 * LEAST_REST)
    assert world.hosts[0].transport(world.hosts[1]) is Transport.RELAY
    for side in (0, 1):
        world.close(kept, side)
    world.loop.run(5)
    assert moved(world) is Transport.RDMA


def test_requests_wait_for_the_other_transport() -> None:
    """Requests that come while RDMA is tried in vain are not refused: TCP takes them."""
    world = World(cards=ALL, tcp=ALL)
    world.cut_rdma = True
    world.connect_all()
    world.loop.run(3)
    tcp = requested(world, A, B)
    world.loop.run(8)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)


def test_links_over_rdma_that_do_not_last() -> None:
    """Links over RDMA that can be made but break soon count as failed."""
    world = started(cards=ALL, tcp=ALL)
    for _ in range(FAILURES):
        assert world.hosts[0].transport(world.hosts[1]) is Transport.RDMA
        world.break_link(*world.hosts)
        world.loop.run(5)
    assert moved(world) is Transport.RELAY


@pytest.mark.parametrize("equipment", EQUIPMENT)
def test_a_link_that_breaks_as_soon_as_it_is_used(equipment: str) -> None:
    """If something between two hosts ends each link as soon as it carries bytes, its connections go
    back to TCP by way of the session, and links are tried more and more rarely.
    """
    world = started(**EQUIPMENT[equipment])
    world.received = 1
    tcp = upgraded(world)
    for _ in range(FAILURES if equipment == "relay" else LOSSES + len(AGAIN)):
        assert world.remote(tcp, 0) is not None
        world.break_link(*world.hosts)
        world.loop.run(4)
    assert world.remote(tcp, 0) is None
    assert not world.hosts[0].severed
    made = 0
    for _ in range(600):
        if world.hosts[0].transport(world.hosts[1]) is not None:
            made += 1
            world.break_link(*world.hosts)
        world.loop.run(0.5)
    assert 1 < made < 20


@pytest.mark.parametrize("first", [0, 1])
def test_a_link_that_loses_every_byte(first: int) -> None:
    """If links over TCP come up and lose what they are to carry, connections stay on the overlay
    with the reason `no-link`; links are tried after a minute, then more and more rarely, and
    connections use TCP between relays again once a link works. `first`: the host that notices.
    """
    world = started(cards=(), tcp=ALL)
    leader, follower = world.hosts
    world.received, world.error = 200, errno.ETIMEDOUT
    stalled = 0.0
    for _ in range(2 * 3600):
        if leader.transport(follower) is None:
            world.loop.run(1)
            continue
        tcp = upgraded(world)
        world.loop.run(7)
        stalled += 7
        for host in (first, 1 - first):
            world.down_of(world.hosts[host], 1 - host)
            world.loop.run(0.1)
        world.loop.run(5)
        if leader.transport(follower) is None:
            assert world.remote(tcp, 0) is None
            late = requested(world, A, B)
            world.loop.run(1)
            assert {finer(world, late, side) for side in (0, 1)} == {Reason.NO_LINK}
    assert not any(host.severed for host in world.hosts)
    assert (FAILURES + 2) * 7 <= stalled <= (FAILURES + 8) * 7
    world.loop.run(MOST_REST)
    assert moved(world) is Transport.RELAY


def test_a_link_that_is_killed_again_and_again() -> None:
    """A link over TCP that carries bytes is made again, however often it is killed."""
    world = started(cards=(), tcp=ALL)
    tcp = upgraded(world)
    for _ in range(100):
        world.break_link(*world.hosts)
        world.loop.run(1)
    assert world.remote(tcp, 0) is not None
    assert world.hosts[0].transport(world.hosts[1]) is Transport.RELAY


def test_an_answer_that_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to an offer that was given up is not taken for that to the next one, which would
    fail by that.
    """
    world = started(cards=(), tcp=ALL)
    upgraded(world)
    leader, follower = world.hosts
    links = leader.remotes.links
    late: list[peer_wire.LinkAnswer] = []
    real = links.answered

    def answered(peer: IPAddress, message: peer_wire.LinkAnswer) -> None:
        if message.ticket and not late:
            late.append(message)
            return
        if message.ticket:
            real(peer, late[0])
        real(peer, message)

    monkeypatch.setattr(links, "answered", answered)
    world.break_link(*world.hosts)
    world.loop.run(STEP + AGAIN[1] + 0.5)
    assert late
    assert leader.transport(follower) is Transport.RELAY


def test_both_transports_rest() -> None:
    """While neither RDMA nor TCP between relays works, each is tried only after its own rest."""
    world = started(cards=ALL, tcp=ALL)
    world.received = 0
    leader, follower = world.hosts
    made = []
    for _ in range(2 * 3600):
        transport = leader.transport(follower)
        if transport is not None:
            made.append(transport)
            world.break_link(*world.hosts)
        world.loop.run(0.5)
    assert {made.count(transport) for transport in Transport} <= set(range(FAILURES + 3, 12))


def test_a_lasting_link_that_breaks() -> None:
    """Losses of links over RDMA that have lasted don't turn it off."""
    world = started(cards=ALL, tcp=ALL)
    for _ in range(FAILURES + 1):
        world.loop.run(LASTS)
        world.break_link(*world.hosts)
        world.loop.run(5)
    assert moved(world) is Transport.RDMA


def test_the_device_is_removed_and_comes_back() -> None:
    """When a device goes, connections go back to the overlay and new ones use TCP; when it is
    there again, and the link has no connections, new ones use RDMA at once.
    """
    world = started(cards=ALL, tcp=ALL)
    tcp = upgraded(world)
    world.hosts[1].unplug()
    world.break_link(*world.hosts)
    world.loop.run(10)
    assert world.remote(tcp, 0) is None
    assert not world.hosts[0].severed
    assert moved(world) is Transport.RELAY
    world.hosts[1].open()
    world.hello_again(world.hosts[1])
    world.loop.run(3)
    for host in world.hosts:
        host.remotes.learned()
    world.loop.run(3)
    assert moved(world) is Transport.RDMA


def opening(host: Host) -> None:
    """The host's device is being opened; its Hello names it already."""
    host.remotes.use(Transport.RDMA, OPENING)


def test_a_device_that_is_being_opened() -> None:
    """While a device is being opened no link over TCP is made, which would be in its way; one that
    there is stays. If the device can't be opened, the link uses TCP.
    """
    world = World(cards=ALL, tcp=ALL)
    for host in world.hosts:
        opening(host)
    world.rdma = True
    world.connect_all()
    world.loop.run(3)
    one, other = world.hosts
    assert one.transport(other) is None
    one.remotes.use(Transport.RDMA, "it can't be opened")
    world.loop.run(3)
    assert one.transport(other) is Transport.RELAY
    opening(one)
    world.loop.run(3)
    assert one.transport(other) is Transport.RELAY
    for host in world.hosts:
        host.open()
    world.loop.run(3)
    assert one.transport(other) is Transport.RDMA


def test_a_link_that_could_not_be_tried_again() -> None:
    """A link whose next attempt found no transport is made as soon as there is one."""
    world = World(cards=ALL, tcp=ALL)
    world.cut_rdma = True
    world.connect_all()
    world.loop.run(0.5)
    leader, follower = world.hosts
    for transport in Transport:
        leader.remotes.use(transport, "the relay can't use it")
    world.loop.run(10)
    opening(leader)
    leader.remotes.use(Transport.RELAY, "")
    world.loop.run(3)
    assert leader.transport(follower) is None
    leader.remotes.use(Transport.RDMA, "it can't be opened")
    world.loop.run(3)
    assert leader.transport(follower) is Transport.RELAY


def test_a_follower_that_is_not_ready() -> None:
    """A follower whose device is being opened refuses links over RDMA; that says nothing about
    whether the devices reach each other.
    """
    world = World(cards=ALL, tcp=ALL)
    leader, follower = world.hosts
    opening(follower)
    world.rdma = True
    world.connect_all()
    world.loop.run(10)
    assert leader.transport(follower) is None
    follower.open()
    world.loop.run(2)
    assert leader.transport(follower) is Transport.RDMA


def test_tcp_between_relays_is_blocked() -> None:
    """If the sockets of a link can't be made, requests are refused, and it is tried again."""
    world = World(cards=(), tcp=ALL)
    world.cut()
    world.connect_all()
    world.loop.run(20)
    tcp = world.connect(A, B)
    world.request(tcp, 0)
    world.loop.run(1)
    assert finer(world, tcp, 0) is Reason.NO_LINK
    world.cut(mend=True)
    world.loop.run(70)
    assert moved(world) is Transport.RELAY


def test_the_link_is_up_at_both_ends_first() -> None:
    """However slow the messages of either host are, no connection is placed on a link over TCP
    that isn't up at the follower.
    """
    for seed in range(50):
        chance = random.Random(seed)
        world = World(2, partial(chance.uniform, 0, 0.5), cards=(), tcp=ALL)
        world.connect_all()
        tcp = world.connect(A, B)
        world.loop.run(1)
        for side in (0, 1):
            world.request(tcp, side)
        world.loop.run(20)
        assert world.grant(tcp, 0), seed
        assert world.grant(tcp, 1), seed


@pytest.mark.parametrize("equipment", ["relay", "rdma"])
def test_entry_rule(equipment: str) -> None:
    """A connection enters TCP between relays only when the leader's rule admits it; until then its
    request waits, with the rule's reason. RDMA has no such rule.
    """
    rule = Gate()
    world = started(rule=rule, **EQUIPMENT[equipment])
    tcp = requested(world, A, B)
    world.loop.run(5)
    if equipment == "rdma":
        assert world.grant(tcp, 0)
        return
    assert not world.grant(tcp, 0)
    assert not world.refusals(tcp, 0)
    for side in (0, 1):
        host, container, _, _, cookie = tcp.ends[side]
        waiting = host.pairing.containers[host.namespace(container)].waiting[cookie]
        assert host.remotes.why_waiting(waiting) is Reason.BULK
    rule.open = True
    world.hosts[0].remotes.reconsider(peer_of(world, 0, 1))
    world.loop.run(1)
    assert world.grant(tcp, 0)
    assert world.grant(tcp, 1)


def test_a_request_whose_peer_has_none_yet() -> None:
    """The leader says of a request without its counterpart that the peer has sent none."""
    world = started(rule=Gate(), **EQUIPMENT["relay"])
    tcp = world.connect(A, B)
    world.request(tcp, 0)
    world.loop.run(1)
    host, container, _, _, cookie = tcp.ends[0]
    waiting = host.pairing.containers[host.namespace(container)].waiting[cookie]
    assert host.remotes.why_waiting(waiting) is Reason.PEER_SHORT


class Gate(Closed):
    """An `EntryRule` that a test opens."""

    open = False

    def may_enter(self, request: RemoteRequest) -> bool:
        return self.open

    def why_waiting(self, request: RemoteRequest) -> Reason:
        return Reason.BULK


@pytest.mark.parametrize("equipment", ["relay", "both"])
def test_relay_off_for_the_network(equipment: str) -> None:
    """If a network's connections may not use TCP between relays, those that do go back to TCP
    unharmed, new ones don't, and RDMA is not affected.
    """
    world = started(**EQUIPMENT[equipment])
    tcp = upgraded(world)
    world.options = {"relay": False}
    for host in world.hosts:
        host.pairing.replace_snapshot(Knowledge(host.facts()))
        host.remotes.learned()
    world.loop.run(2)
    assert not any(host.severed for host in world.hosts)
    assert (world.remote(tcp, 0) is None) == (equipment == "relay")
    late = requested(world, A, B)
    world.loop.run(1)
    if equipment == "relay":
        assert finer(world, late, 0) is Reason.NO_RDMA
    else:
        assert world.grant(late, 0)


def test_rdma_off_for_the_network() -> None:
    """If a network's connections may not use RDMA, they use TCP between relays."""
    world = World(cards=ALL, tcp=ALL)
    world.options = {"rdma": False}
    for host in world.hosts:
        host.pairing.replace_snapshot(Knowledge(host.facts()))
    world.connect_all()
    world.loop.run(1)
    assert moved(world) is Transport.RELAY


def test_a_long_outage() -> None:
    """If hosts don't reach each other for ten minutes, connections over TCP between relays go on
    afterwards, as those over TCP would.
    """
    world = started(cards=(), tcp=ALL)
    tcp = upgraded(world)
    world.cut()
    world.break_link(*world.hosts)
    world.lose(*world.hosts)
    world.loop.run(600)
    assert not any(host.severed for host in world.hosts)
    world.cut(mend=True)
    world.connect_all()
    world.loop.run(10)
    assert world.remote(tcp, 0)
    assert world.remote(tcp, 1)
    assert world.hosts[0].transport(world.hosts[1]) is Transport.RELAY


def test_a_very_long_outage(world: World) -> None:
    """If hosts don't reach each other for hours, idle connections go on afterwards. One that had
    bytes on the way is reset at both ends, though one of them was closed and forgotten meanwhile.
    """
    stuck, idle = upgraded(world), upgraded(world)
    remote = world.remote(stuck, 0)
    assert remote is not None
    world.hosts[0].relay.stuck.add(remote.number)
    world.cut()
    world.break_link(*world.hosts)
    world.lose(*world.hosts)
    world.loop.run(3 * GIVE_UP[Transport.RELAY])
    assert world.hosts[0].severed == {(remote.arena.id, remote.slot)}
    assert not world.hosts[1].severed
    world.close(stuck, 0)
    world.loop.run(1)
    assert world.remote(stuck, 0) is None
    world.cut(mend=True)
    world.connect_all()
    world.loop.run(10)
    assert world.remote(idle, 0)
    assert world.remote(idle, 1)
    assert len(world.hosts[0].severed) == len(world.hosts[1].severed) == 1
    for side in (0, 1):
        world.close(stuck, side)
        world.close(idle, side)
    world.loop.run(10)
    empty(world)


def test_memory_of_tcp_is_not_registered() -> None:
    """Connections over TCP don't count as memory that is registered with a device."""
    world = started(cards=(), tcp=ALL, remote_memory=0)
    upgraded(world)
    assert not world.hosts[0].remotes.connections.room.registered


@pytest.mark.parametrize("equipment", ["relay", "both"])
def test_a_hostile_offer_of_a_link(equipment: str) -> None:
    """An offer of a link with a transport that this host doesn't have is refused, and the link that
    is up stays up.
    """
    world = started(**EQUIPMENT[equipment])
    leader, follower = world.hosts
    before = follower.transport(leader)
    for word in ("", "relay", "pigeon"):
        if follower.remotes.links.link(leader.address).transport.value == (word or "rdma"):
            continue
        if equipment == "both" and word == "relay":
            continue
        follower.remotes.message(leader.address, peer_wire.LinkOffer(77, b"", False, word))
        world.loop.run(1)
        assert follower.transport(leader) is before


# --- all of it at random

STEPS: Final = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "connect",
                "connect",
                "connect",
                "vip",
                "request",
                "request",
                "request",
                "request",
                "close",
                "close",
                "kill",
                "child",
                "lose",
                "session",
                "link",
                "cut",
                "mend",
                "cut rdma",
                "unplug",
                "plug in",
                "relay",
                "router",
                "leave",
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
@given(
    size=st.sampled_from([2, 3]),
    equipment=st.sampled_from([*EQUIPMENT.values(), MIXED]),
    seed=st.integers(0, 1 << 20),
    steps=STEPS,
)
def test_anything(
    size: int, equipment: dict[str, Any], seed: int, steps: list[tuple[str, int, int, int]]
) -> None:
    """Whatever happens in whatever order: only ends of one connection are paired, no memory that a
    relay has is reused, no end stays alone in a ring, every request is answered, nothing is left.
    """
    chance = random.Random(seed)
    world = World(size, lambda: chance.random() * 0.01, **equipment)
    world.connect_all()
    world.loop.run(chance.random())
    for what, x, y, pause in steps:
        step(world, what, x, y)
        world.loop.run(pause / 1000)
        world.check()
    world.cut(mend=True)
    world.connect_all()
    world.loop.run(200)
    for tcp in world.connections:
        if all(tcp.open):
            assert len(set(in_ring(world, tcp))) == 1, "one end is alone in a ring"
        for side in (0, 1):
            answered = world.grant(tcp, side) or world.refusals(tcp, side)
            waits = (
                tcp.ends[side][0]
                .pairing.containers[tcp.ends[side][0].namespace(tcp.ends[side][1])]
                .waiting.get(tcp.ends[side][4])
            )
            if (
                tcp.requested[side]
                and tcp.requested[1 - side]
                and all(tcp.open)
                and waits is not None
            ):
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
            world.request(made, y % 2)
            if y % 3:
                world.request(made, 1 - y % 2)
        case "request" if tcp is not None:
            world.request(tcp, y % 2)
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
            world.cut(mend=what == "mend")
        case "cut rdma":
            world.cut_rdma = True
        case "unplug":
            a.unplug()
        case "plug in":
            a.open()
            world.hello_again(a)
        case "relay":
            world.kill_relay(a)
        case "router":
            world.restart_router(a)
        case "leave" if tcp is not None:
            remote = world.remote(tcp, y % 2)
            if remote is not None:
                tcp.ends[y % 2][0].remotes.leave(remote.number)
        case "wait":
            world.loop.run(y / 10)
