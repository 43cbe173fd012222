"""Slots for datagrams: one for what two processes send each other, and groups of processes."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from dataplane.control import Limits
from dataplane.errors import WrongMessage
from dataplane.router import verbs_datagrams, verbs_groups, verbs_messages
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_wire import (
    SlotKind,
    VerbsDatagrams,
    VerbsGrant,
    VerbsKind,
    VerbsRefuse,
)
from tests.unit.ud_world import GROUP, UdModel, clean
from tests.unit.verbs_world import VerbsWorld, gid, moved

A, B, C = (gid(f"10.0.4.{number}") for number in (1, 2, 3))


def refused(request: int, number: int, reason: Reason) -> VerbsRefuse:
    return VerbsRefuse(VerbsKind.DATAGRAM_PEER, request, number, reason)


def over(number: int, reason: Reason = Reason.PEER_CLOSED) -> VerbsRefuse:
    return VerbsRefuse(VerbsKind.GRANT, 0, number, reason)


def led(grant: VerbsGrant, *, on: bool = True, request: int = 0) -> VerbsDatagrams:
    """What a sender to the group is told of a slot."""
    return VerbsDatagrams(VerbsKind.GROUP, request, 0, 0, 0, on, grant.number, GROUP)


def no_more(request: int) -> VerbsDatagrams:
    return VerbsDatagrams(VerbsKind.GROUP, request, 0, 0, 0, True, 0, GROUP)


@pytest.fixture
def world() -> VerbsWorld:
    return VerbsWorld()


# --- slots


def test_one_slot_for_two_processes(world: VerbsWorld) -> None:
    """Both processes are granted one slot, whichever asks, once for all their numbers."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2, (0, 1))
    one.ask(5, B, other.qpn)
    grant, theirs = one.grant(), other.grant()
    assert (grant.arena, grant.slot, grant.number) == (theirs.arena, theirs.slot, theirs.number)
    assert {grant.side, theirs.side} == {0, 1}
    assert (grant.request, theirs.request) == (5, 0)
    assert (grant.peer_gid, theirs.peer_gid) == (B, A)
    assert (grant.peer_qpn, theirs.peer_qpn) == (other.qpn, one.qpn)
    assert (grant.qpn, grant.peer_count, grant.slot_kind) == (0, RANGE, SlotKind.DATAGRAMS)
    one.ask(6, B, other.qpn + 1)
    other.ask(7, A, one.qpn)
    assert one.read() == other.read() == []
    one.ask(8, gid("fd00::2"), other.qpn)
    assert one.grant().number != grant.number
    clean(world)


@pytest.mark.parametrize(
    ("to", "peer", "index", "reason"),
    [
        (None, 0, 0, Reason.FOREIGN),
        (gid("10.9.9.9"), 0, 0, Reason.FOREIGN),
        (gid("10.0.5.1"), 0, 0, Reason.FOREIGN),
        (gid("10.0.4.77"), 0, 0, Reason.REMOTE),
        (B, 0, 9, Reason.FOREIGN),
        (B, 1, 0, Reason.NOT_FOUND),
        (C, 0, 0, Reason.NOT_FOUND),
        (B, 1 << 31, 0, Reason.NOT_FOUND),
    ],
)
def test_nobody_there(
    world: VerbsWorld, to: IPAddress | None, peer: int, index: int, reason: Reason
) -> None:
    """Datagrams go to queue pairs that take some, in containers of the same network."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    one.ask(5, to, other.qpn + peer, index)
    assert one.read() == [refused(5, other.qpn + peer, reason)]
    assert other.read() == []
    clean(world)


def test_who_may_ask(world: VerbsWorld) -> None:
    """Only a queue pair of the process that takes datagrams asks, and not for its own process."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    one.takes(on=False)
    one.ask(5, B, other.qpn)
    assert one.read() == [refused(5, other.qpn, Reason.NOT_FOUND)]
    one.takes()
    one.ask(6, A, one.qpn)
    assert one.read() == [refused(6, one.qpn, Reason.SHARED)]
    one.takes(RANGE)
    assert one.read() == [VerbsRefuse(VerbsKind.DATAGRAMS, 0, one.qpn + RANGE, Reason.NOT_FOUND)]
    one.takes(77, on=False)
    with pytest.raises(WrongMessage):
        UdModel(world, world.process(1), 4096).takes()
    clean(world)


def test_a_slot_that_is_released(world: VerbsWorld) -> None:
    """If a process returns its end the other one is told that it has too many, and not that it has
    ended. The next datagram gets a new slot while the old one is still there.
    """
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    one.ask(5, B, other.qpn)
    grant, theirs = one.grant(), other.grant()
    one.give_back(grant)
    one.give_back(grant)
    assert one.read() == []
    assert other.read() == [over(grant.number, Reason.LIMIT)]
    one.ask(6, B, other.qpn)
    assert one.grant().number != grant.number
    assert other.grant().request == 0
    other.give_back(theirs)
    assert one.read() == other.read() == []
    clean(world)


def test_death(world: VerbsWorld) -> None:
    """If a process dies, or has no queue pair that takes datagrams any more, its peers are told."""
    one, other, third = (UdModel.open(world, number) for number in (1, 2, 3))
    other.takes(1)
    one.ask(5, B, other.qpn)
    third.ask(6, B, other.qpn)
    first, second = one.grant(), third.grant()
    other.read()
    other.takes(1, on=False)
    assert one.read() == []
    one.kill()
    assert other.read() == [over(first.number)]
    other.takes(0, on=False)
    assert third.read() == other.read() == [over(second.number)]
    third.ask(7, B, other.qpn)
    assert third.read() == [refused(7, other.qpn, Reason.NOT_FOUND)]
    clean(world)


def test_a_child_has_none_of_its_parents_slots(world: VerbsWorld) -> None:
    """Another process of the container, which knows a slot's token, can't release it."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    one.ask(5, B, other.qpn)
    grant = one.grant()
    other.read()
    UdModel.open(world, 1).give_back(grant)
    assert other.read() == []
    assert len(world.pairing.datagrams.slots) == 1
    clean(world)


def test_leaving_the_network(world: VerbsWorld) -> None:
    """If a container leaves the network both ends are told, and nothing they write arrives."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    one.ask(5, B, other.qpn)
    grant, _ = one.grant(), other.read()
    world.pairing.replace_snapshot(moved(world, e2=()))
    assert one.read() == other.read() == [over(grant.number, Reason.FOREIGN)]
    assert [slot for _, slot in world.memory.severed] == [grant.slot]
    clean(world)


def test_limits(world: VerbsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container gets so many slots with one process that hasn't asked, and with one container;
    a process that doesn't read is asked for none.
    """
    monkeypatch.setattr(verbs_datagrams, "UNASKED", 2)
    monkeypatch.setattr(verbs_datagrams, "BETWEEN", 3)
    other, more = UdModel.open(world, 2), UdModel.open(world, 2)
    many = [UdModel.open(world, 1) for _ in range(3)]
    for each in many:
        each.ask(5, B, other.qpn)
    assert many[2].read() == [refused(5, other.qpn, Reason.LIMIT)]
    other.ask(6, A, many[2].qpn)
    many[2].read()
    many[0].read()
    many[0].ask(7, B, more.qpn)
    assert many[0].read() == [refused(7, more.qpn, Reason.LIMIT)]
    third = UdModel.open(world, 3)
    world.post.busy.add(other.process)
    third.ask(8, B, other.qpn)
    assert third.read() == [refused(8, other.qpn, Reason.LIMIT)]
    many[0].kill()
    world.post.busy.clear()
    many[2].ask(9, B, more.qpn)
    assert isinstance(many[2].read()[0], VerbsGrant)
    clean(world)


def test_a_full_container_and_no_memory() -> None:
    """A slot counts as a connection; without memory there is none."""
    world = VerbsWorld(Limits(connections=1))
    one, other, third = (UdModel.open(world, number) for number in (1, 2, 3))
    world.memory.refuses = True
    one.ask(5, B, other.qpn)
    assert one.read() == [refused(5, other.qpn, Reason.MEMORY)]
    world.memory.refuses = False
    one.ask(6, B, other.qpn)
    one.read()
    third.ask(7, B, other.qpn)
    assert third.read() == [refused(7, other.qpn, Reason.LIMIT)]
    clean(world)


# --- groups


def test_a_group(world: VerbsWorld) -> None:
    """Who sends to a group is told of the slots to those that have joined it, now and later."""
    one, other, third = (UdModel.open(world, number) for number in (1, 2, 3))
    other.join()
    one.send_to(5)
    grant, told, end = one.read()
    assert isinstance(grant, VerbsGrant)
    assert grant.peer_gid == B
    assert told == led(grant, request=5)
    assert end == no_more(5)
    third.join()
    later, told = one.read()
    assert isinstance(later, VerbsGrant)
    assert told == led(later)
    one.join()
    assert one.read() == []
    other.join(on=False)
    assert one.read() == [led(grant, on=False)]
    third.kill()
    assert one.read() == [led(later, on=False), over(later.number)]
    other.join()
    assert one.read() == [led(grant)]
    one.send_to(6, on=False)
    other.join(on=False)
    assert one.read() == []
    clean(world)


def test_a_slot_of_a_group_that_ends(world: VerbsWorld) -> None:
    """A member that releases its slot, or can't get one, gets another one a moment later."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    world.memory.refuses = True
    other.join()
    one.send_to(5)
    assert one.read() == [no_more(5)]
    world.memory.refuses = False
    world.pairing.sweep(100)
    assert one.read() == []
    world.now += 2
    world.pairing.sweep(100)
    grant, told = one.read()
    assert isinstance(grant, VerbsGrant)
    assert told == led(grant)
    other.give_back(other.grant())
    assert one.read() == [over(grant.number, Reason.LIMIT), led(grant, on=False)]
    world.now += 2
    world.pairing.sweep(100)
    again, told = one.read()
    assert isinstance(again, VerbsGrant)
    assert told == led(again)
    clean(world)


def test_queue_pairs_of_a_group(world: VerbsWorld) -> None:
    """A process is in a group as long as one of its queue pairs is."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2, (0, 1))
    other.join(pair=0)
    other.join(pair=1)
    one.send_to(5)
    one.read()
    other.join(pair=0, on=False)
    assert one.read() == []
    other.takes(1, on=False)
    heard = one.read()
    assert isinstance(heard[0], VerbsDatagrams)
    assert not heard[0].on
    one.takes(on=False)
    assert not world.pairing.groups.groups
    clean(world)


def test_groups_that_are_refused(world: VerbsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group has a multicast address; a process is in so many."""
    one = UdModel.open(world, 1)
    one.join(B)
    assert one.read() == [VerbsRefuse(VerbsKind.GROUP, 0, one.qpn, Reason.FOREIGN)]
    one.join(pair=3)
    assert one.read() == [VerbsRefuse(VerbsKind.GROUP, 0, one.qpn + 3, Reason.NOT_FOUND)]
    one.join(on=False)
    assert one.read() == []
    monkeypatch.setattr(verbs_groups, "GROUPS", 1)
    one.join()
    one.join()
    one.send_to(5)
    assert one.read() == [VerbsRefuse(VerbsKind.DATAGRAM_PEER, 5, 0, Reason.LIMIT)]
    clean(world)


def test_groups_of_networks(world: VerbsWorld) -> None:
    """A group is one of a network; a container that leaves the network leaves its groups."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    other.join()
    index = world.models[one.process].gids.index(gid("10.0.5.1"))
    one.say(VerbsDatagrams(VerbsKind.DATAGRAM_PEER, 5, one.qpn, index, 0, True, 0, GROUP))
    assert [type(each) for each in one.read()] == [VerbsDatagrams]
    one.send_to(6)
    one.read()
    world.pairing.replace_snapshot(moved(world, e2=()))
    told, ended = one.read()
    assert isinstance(told, VerbsDatagrams)
    assert not told.on
    assert isinstance(ended, VerbsRefuse)
    clean(world)


# --- groups of hostile containers


def test_senders_and_uses_have_limits(world: VerbsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of a container send to a group, and are in groups, only so often."""
    monkeypatch.setattr(verbs_groups, "SENDERS", 1)
    monkeypatch.setattr(verbs_groups, "OF_CONTAINER", 3)
    one, more, other = (UdModel.open(world, number) for number in (1, 1, 2))
    one.send_to(5)
    more.send_to(6)
    assert more.read() == [VerbsRefuse(VerbsKind.DATAGRAM_PEER, 6, 0, Reason.LIMIT)]
    one.send_to(7)
    assert one.read() == [no_more(5), no_more(7)]
    one.join()
    more.join()
    more.join(IPv4Address("239.1.2.4"))
    assert more.read()[1:] == [VerbsRefuse(VerbsKind.GROUP, 0, more.qpn, Reason.LIMIT)]
    other.send_to(8)
    assert [each for each in other.read() if each == no_more(8)]
    more.join(on=False)
    more.join(IPv4Address("239.1.2.4"))
    assert not [each for each in more.read() if isinstance(each, VerbsRefuse)]
    clean(world)


def test_slots_that_can_not_be_had_are_bounded(
    world: VerbsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two containers' senders and members that can't get a slot so many are tried again, however
    many there are.
    """
    monkeypatch.setattr(verbs_groups, "BETWEEN", 4)
    world.memory.refuses = True
    members = [UdModel.open(world, 2) for _ in range(4)]
    for number in range(4):
        UdModel.open(world, 1).send_to(number)
    for _ in range(3):
        for member in members:
            member.join()
    assert len(world.pairing.groups._due) == 4
    world.memory.refuses = False
    world.now += 2
    world.pairing.sweep(100)
    assert len(world.pairing.datagrams.slots) == 4
    clean(world)


def test_nobody_holds_up_those_who_wait_for_a_slot(world: VerbsWorld) -> None:
    """Whoever joins again and again waits for its slot anew, and nobody else does."""
    world.memory.refuses = True
    hostile, one, other = (UdModel.open(world, number) for number in (1, 2, 3))
    other.send_to(5)
    hostile.join()
    one.join()
    other.read()
    world.now += 0.6
    hostile.join()
    world.memory.refuses = False
    world.now += 0.6
    world.pairing.sweep(100)
    grant, told = other.read()
    assert isinstance(grant, VerbsGrant)
    assert grant.peer_gid == B
    assert told == led(grant)
    clean(world)


def test_members_of_a_container_leave_room_for_others(
    world: VerbsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends to a group gets only so many slots because of the members of another container."""
    monkeypatch.setattr(verbs_datagrams, "UNASKED", 2)
    one, third = UdModel.open(world, 1), UdModel.open(world, 3)
    for _ in range(4):
        UdModel.open(world, 2).join()
    third.join()
    one.send_to(5)
    granted = [each.peer_gid for each in one.read() if isinstance(each, VerbsGrant)]
    assert sorted(map(str, granted)) == [str(B), str(B), str(C)]
    clean(world)


def test_others_leave_room_for_what_a_process_asks_for(
    world: VerbsWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All containers together impose only so many slots on a process, which gets its own yet."""
    monkeypatch.setattr(verbs_datagrams, "OTHERS", 2)
    other = UdModel.open(world, 2)
    many = [UdModel.open(world, number) for number in (1, 3, 1, 3)]
    for each in many[:3]:
        each.ask(5, B, other.qpn)
    assert many[2].read() == [refused(5, other.qpn, Reason.LIMIT)]
    other.read()
    other.ask(6, C, many[3].qpn)
    assert other.grant().request == 6
    many[0].kill()
    many[2].ask(7, B, other.qpn)
    assert many[2].grant().request == 7
    clean(world)


def test_a_sender_that_does_not_read(world: VerbsWorld) -> None:
    """Members that join and leave fill no socket: its process hears of none until it reads."""
    one, other = UdModel.open(world, 1), UdModel.open(world, 2)
    other.join()
    one.send_to(5)
    grant, *_ = one.read()
    assert isinstance(grant, VerbsGrant)
    world.post.busy.add(one.process)
    for _ in range(3):
        other.join(on=False)
        other.join()
    other.join(on=False)
    assert one.read() == []
    world.post.busy.clear()
    other.join()
    assert one.read() == [led(grant)]
    clean(world)


def test_a_message_counts_as_much_as_it_costs(world: VerbsWorld) -> None:
    """Who joins a group, leaves it, or sends to it pays for each slot that is looked for."""
    senders = [UdModel.open(world, 1) for _ in range(3)]
    member = UdModel.open(world, 2)
    for sender in senders:
        sender.send_to(5)
    joins = VerbsDatagrams(VerbsKind.GROUP, 0, member.qpn, 0, 0, True, 0, GROUP)

    def cost(message: VerbsDatagrams, process: int) -> int:
        return verbs_messages.handle(world.pairing, process, message)

    first = cost(joins, member.process)
    assert first == verbs_messages.REQUEST + 3 * verbs_groups.SOUGHT
    assert cost(joins, member.process) == verbs_messages.REQUEST + 3
    sends = VerbsDatagrams(VerbsKind.DATAGRAM_PEER, 6, senders[0].qpn, 0, 0, True, 0, GROUP)
    assert cost(sends, senders[0].process) == verbs_messages.REQUEST + verbs_groups.SOUGHT
    leaves = VerbsDatagrams(VerbsKind.GROUP, 0, member.qpn, 0, 0, False, 0, GROUP)
    assert cost(leaves, member.process) == verbs_messages.REQUEST + 3
    clean(world)
