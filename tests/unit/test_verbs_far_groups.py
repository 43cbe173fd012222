"""Multicast groups between two hosts: who is told of whose members, and what has limits."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

import pytest

from dataplane.errors import WrongMessage
from dataplane.router import (
    peer_wire,
    verbs_datagrams,
    verbs_far_groups,
    verbs_groups,
    verbs_told_groups,
)
from dataplane.router.reasons import Reason
from dataplane.router.verbs_far_groups import AGAIN, HOLD, MOST_AGAIN
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsGrant, VerbsKind
from tests.unit.remote_world import World, started
from tests.unit.test_verbs_far_datagrams import FarUd, end, raw
from tests.unit.ud_world import GROUP

OTHER: Any = IPv4Address("239.1.2.4")
Ends = tuple[FarUd, FarUd]


@pytest.fixture
def world() -> World:
    return started()


@pytest.fixture
def ends(world: World) -> Ends:
    return FarUd.on(world.hosts[0]), FarUd.on(world.hosts[1])


def led(number: int, *, on: bool = True, request: int = 0) -> VerbsDatagrams:
    """What a sender to the group is told of a slot; 0: of all."""
    return VerbsDatagrams(VerbsKind.GROUP, request, 0, 0, 0, on, number, GROUP)


def reached(world: World, sender: FarUd, seconds: float = 1) -> VerbsGrant:
    """The slot of which a sender hears, and nothing else."""
    world.loop.run(seconds)
    grant, told = sender.read()
    assert isinstance(grant, VerbsGrant)
    assert told == led(grant.number)
    return grant


def paired(world: World, sender: FarUd, member: FarUd) -> VerbsGrant:
    """Let a member join and a sender send: the sender's slot, which is the first that it hears
    of.
    """
    member.join()
    sender.send_to(5)
    world.loop.run(1)
    grant, *_ = sender.read()
    assert isinstance(grant, VerbsGrant)
    return grant


def clean(world: World) -> None:
    """When all processes are gone nothing is left."""
    end(world)
    for host in world.hosts:
        groups = host.remotes.verbs.groups
        assert not any(
            (
                groups.members,
                groups._of_host,
                groups.asked,
                groups._senders,
                groups.paths,
                groups._paths_of,
                groups.pairs,
                groups.path_count,
                groups._held,
                groups.told.of_group,
                groups.told.of_host,
                groups.told._untold,
                host.pairing.groups.groups,
            )
        )


@pytest.mark.parametrize("sends", [0, 1])
def test_a_group(world: World, ends: Ends, sends: int) -> None:
    """Who sends to a group gets the slots of members on other hosts before its first datagram goes,
    and those of later ones; members that leave are forgotten.
    """
    one, other = ends[sends], ends[1 - sends]
    other.join()
    one.send_to(5)
    assert one.read() == []
    world.loop.run(1)
    grant, told, all_of_them = one.read()
    assert isinstance(grant, VerbsGrant)
    assert (grant.peer_gid, grant.peer_qpn, grant.request) == (other.address, other.qpn, 0)
    assert (told, all_of_them) == (led(grant.number), led(0, request=5))
    assert other.grant().peer_gid == one.address
    later = FarUd.on(other.host, 2)
    later.join()
    second = reached(world, one)
    assert second.peer_gid == later.address
    later.join(on=False)
    world.loop.run(1)
    assert one.read() == [led(second.number, on=False)]
    later.join()
    world.loop.run(1)
    assert one.read() == [led(second.number)]
    clean(world)


def test_both_send(world: World, ends: Ends) -> None:
    """Two members that send to each other have one slot."""
    for request, each in enumerate(ends, 5):
        each.join()
        each.send_to(request)
    world.loop.run(1)
    numbers = []
    for request, each in enumerate(ends, 5):
        grant, told, all_of_them = each.read()
        assert isinstance(grant, VerbsGrant)
        assert (told, all_of_them) == (led(grant.number), led(0, request=request))
        numbers.append(grant.number)
    assert len(ends[0].host.remotes.verbs.datagrams.slots) == 1
    clean(world)


def test_only_senders_ask(world: World, ends: Ends) -> None:
    """A host is told of members only while its processes send to the group."""
    one, other = ends
    told = other.host.remotes.verbs.groups.told
    other.join()
    assert not told.of_group
    one.send_to(5)
    world.loop.run(1)
    assert list(told.of_group) == [("n1", GROUP)]
    more = FarUd.forked(one)
    more.send_to(6)
    assert [type(each) for each in more.read()] == []
    world.loop.run(1)
    assert more.read()[-1] == led(0, request=6)
    one.send_to(7, on=False)
    world.loop.run(1)
    assert told.of_group
    more.takes(on=False)
    world.loop.run(1)
    assert not told.of_group
    clean(world)


def test_a_host_without_groups() -> None:
    """A host of an earlier version is asked nothing and told nothing; who sends goes on at once."""
    world = started(verbs_groups=(0,))
    one, other = FarUd.on(world.hosts[0]), FarUd.on(world.hosts[1])
    other.join()
    one.join()
    one.send_to(5)
    assert one.read() == [led(0, request=5)]
    world.loop.run(1)
    assert not one.host.remotes.verbs.groups.asked
    assert not other.host.remotes.verbs.groups.told.of_group


def test_a_host_that_forgets_groups(world: World, ends: Ends) -> None:
    """If a host comes back with an earlier version its members are forgotten."""
    one, other = ends
    other.join()
    one.send_to(5)
    world.loop.run(1)
    assert one.host.remotes.verbs.groups.members
    world.verbs_groups = (0,)
    world.lose(*world.hosts)
    assert one.host.remotes.verbs.groups.members
    world.connect_all()
    world.loop.run(1)
    assert not one.host.remotes.verbs.groups.members


def test_queue_pairs_of_a_member(world: World, ends: Ends) -> None:
    """A process stays a member if its first queue pair leaves, without a new slot."""
    one, other = ends
    other.takes(1)
    other.join(pair=0)
    other.join(pair=1)
    one.send_to(5)
    world.loop.run(1)
    one.read()
    other.takes(0, on=False)
    world.loop.run(1)
    assert one.read() == []
    assert list(one.host.remotes.verbs.groups.members["n1", GROUP].values()) == [other.qpn + 1]
    other.takes(1, on=False)
    world.loop.run(1)
    told = one.read()
    assert isinstance(told[0], VerbsDatagrams)
    assert not told[0].on
    clean(world)


def test_a_member_that_dies(world: World, ends: Ends) -> None:
    """A member's end is told, and one that takes its place gets a slot of its own."""
    one, other = ends
    grant = paired(world, one, other)
    world.kill(other.host, other.container, child=False)
    world.loop.run(1)
    assert one.read() == [led(grant.number, on=False)]
    assert one.lost(grant)
    one.give_back(grant)
    FarUd.on(other.host).join()
    reached(world, one)
    clean(world)


def test_a_slot_that_ends(world: World, ends: Ends) -> None:
    """A slot that a process gives back is had again, later each time if it does so at once."""
    one, other = ends
    grant = paired(world, one, other)
    for pause in (AGAIN, 2 * AGAIN, 4 * AGAIN):
        theirs = other.grant()
        one.give_back(grant)
        other.give_back(theirs)
        assert one.read() == [led(grant.number, on=False)]
        world.loop.run(pause * 0.9)
        assert one.read() == []
        grant = reached(world, one)
    world.loop.run(MOST_AGAIN)
    one.give_back(grant)
    one.read()
    reached(world, one, AGAIN + 0.5)
    other.read()
    clean(world)


def test_no_path(world: World, ends: Ends) -> None:
    """Without a link a sender's first datagram waits for a moment; the member's slot comes when
    there is one.
    """
    one, other = ends
    world.cut()
    world.break_link(*world.hosts)
    other.join()
    one.send_to(5)
    world.loop.run(HOLD - 0.1)
    assert one.read() == []
    world.loop.run(0.2)
    assert one.read() == [led(0, request=5)]
    world.cut(mend=True)
    reached(world, one, 60)
    clean(world)


def test_no_session(world: World, ends: Ends) -> None:
    """Who sends without a session goes on at once, and hears of members when there is one. A lost
    session changes no path, and what has changed meanwhile is told after it.
    """
    one, other = ends
    world.lose(*world.hosts)
    other.join()
    one.send_to(5)
    assert one.read() == [led(0, request=5)]
    world.connect_all()
    grant = reached(world, one)
    world.lose(*world.hosts)
    world.loop.run(1)
    assert one.read() == []
    other.join(on=False)
    FarUd.on(other.host, 2).join()
    world.connect_all()
    world.loop.run(1)
    told = one.read()
    assert told[0] == led(grant.number, on=False)
    assert isinstance(told[1], VerbsGrant)
    clean(world)


def test_a_session_with_much_to_send(world: World, ends: Ends) -> None:
    """While much waits to be sent to a host it is neither asked nor told; then it is."""
    one, other = ends
    way = one.host.number, other.host.number
    world.crowded.add(way)
    one.send_to(5)
    assert one.read() == [led(0, request=5)]
    other.join()
    world.loop.run(1)
    assert not other.host.remotes.verbs.groups.told.of_group
    world.ease(one.host, other.host)
    reached(world, one)
    world.crowded.add(way[::-1])
    other.join(on=False)
    FarUd.on(other.host, 2).join()
    world.loop.run(1)
    assert one.read() == []
    world.ease(other.host, one.host)
    world.loop.run(1)
    assert [type(each) for each in one.read()] == [VerbsDatagrams, VerbsGrant, VerbsDatagrams]
    world.crowded.add(way)
    one.send_to(6, on=False)
    world.loop.run(1)
    world.crowded.clear()
    other.join()
    world.loop.run(1)
    assert not other.host.remotes.verbs.groups.told.of_group
    clean(world)


def test_a_router_that_is_restarted(world: World, ends: Ends) -> None:
    """A new router of a host tells of the members that it has then."""
    one, other = ends
    grant = paired(world, one, other)
    world.restart_router(world.hosts[1])
    world.connect_all()
    world.loop.run(1)
    assert led(grant.number, on=False) in one.read()
    one.give_back(grant)
    FarUd.on(world.hosts[1]).join()
    reached(world, one, 5)
    clean(world)


def test_members_of_a_container_have_limits(
    world: World, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender gets so many slots because of another container, and a container has so many paths
    and pairs of senders and members.
    """
    one, other = ends
    monkeypatch.setattr(verbs_datagrams, "UNASKED", 2)
    members = [other, *(FarUd.forked(other) for _ in range(3))]
    for member in members:
        member.join()
    one.send_to(5)
    world.loop.run(1)
    assert len([each for each in one.read() if isinstance(each, VerbsGrant)]) == 2
    monkeypatch.setattr(verbs_datagrams, "UNASKED", 99)
    one.send_to(6, on=False)
    monkeypatch.setattr(verbs_far_groups, "PATHS", 3)
    more = FarUd.forked(one)
    refused = one.host.pairing.datagrams.refused[Reason.LIMIT]
    more.send_to(7)
    world.loop.run(1)
    assert len([each for each in more.read() if isinstance(each, VerbsGrant)]) == 3
    assert one.host.pairing.datagrams.refused[Reason.LIMIT] == refused + 1
    monkeypatch.setattr(verbs_far_groups, "PAIRS", 4)
    for member in members:
        member.join(OTHER)
    more.send_to(8, OTHER)
    world.loop.run(1)
    assert sum(one.host.remotes.verbs.groups.pairs.values()) == 4
    clean(world)


def test_what_a_request_costs(world: World, ends: Ends) -> None:
    """Who sends to a group, or joins one, counts for each host that hears of it."""
    one, other = ends

    def say(end_of: FarUd, kind: VerbsKind, on: bool) -> int:
        message = VerbsDatagrams(kind, 5, end_of.qpn, 0, 0, on, 0, GROUP)
        groups = end_of.host.pairing.groups
        if kind is VerbsKind.GROUP:
            return groups.join(end_of.process, message)
        return groups.send_to(end_of.process, message)

    assert say(other, VerbsKind.GROUP, on=True) == 0
    assert say(one, VerbsKind.DATAGRAM_PEER, on=True) == 1
    world.loop.run(1)
    assert say(other, VerbsKind.GROUP, on=False) == 1
    assert say(other, VerbsKind.GROUP, on=True) == 1
    world.loop.run(1)
    assert say(FarUd.forked(one), VerbsKind.DATAGRAM_PEER, on=True) == verbs_groups.SOUGHT


# --- hostile hosts


def test_claims_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host has members only of groups that it was asked for, with its own GIDs, and so many; it
    asks for so many groups.
    """
    world = started(3)
    one, other, third = (FarUd.on(host) for host in world.hosts)
    groups = one.host.remotes.verbs.groups

    def members(*names: tuple[str, int], group: object = GROUP) -> peer_wire.VerbsGroupMembers:
        return peer_wire.VerbsGroupMembers("n1", str(group), names, (), False)

    raw(world, other.host, one.host, members((str(other.address), other.qpn)))
    assert not groups.members
    one.send_to(5)
    world.loop.run(1)
    one.read()
    raw(world, other.host, one.host, members((str(third.address), third.qpn)))
    assert one.read() == third.read() == []
    with pytest.raises(WrongMessage):
        raw(world, other.host, one.host, members(("what", 1)))
    monkeypatch.setattr(verbs_far_groups, "OF_GROUP", 2)
    raw(world, other.host, one.host, members(*((str(other.address), i << 12) for i in range(9))))
    assert len(groups.members["n1", GROUP]) == 2
    gone = peer_wire.VerbsGroupMembers("n1", str(GROUP), (), ((str(other.address), 77),), False)
    raw(world, third.host, one.host, gone)
    assert len(groups.members["n1", GROUP]) == 2
    monkeypatch.setattr(verbs_told_groups, "ASKED", 1)
    for group in (OTHER, IPv4Address("239.1.2.5")):
        ask = peer_wire.VerbsGroupAsk("n1", str(group), True)
        one.host.remotes.message(other.host.address, ask)
    assert len(groups.told.of_host[other.host.address]) == 1
    with pytest.raises(WrongMessage):
        raw(world, other.host, one.host, peer_wire.VerbsGroupAsk("n1", "10.0.0.1", True))
