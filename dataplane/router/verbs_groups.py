"""Multicast groups of verbs: who of this host has joined them, and who sends to them.

A datagram to a group goes by the slots of those that have joined, one for each process. A process
that sends to a group is told of these slots, at once and as processes join and leave. Those to
processes of other hosts are `verbs_far_groups.py`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Protocol

from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.tally import add
from dataplane.router.verbs_datagrams import BETWEEN, UNASKED, Datagrams, DatagramSlot
from dataplane.router.verbs_pairing import VerbsProcess
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsKind

GROUPS: Final = 1024
"""Groups of one process: each that a queue pair has joined, or that it sends to from a GID."""
OF_CONTAINER: Final = 16384
"""The same of all processes of a container."""
SENDERS: Final = UNASKED
"""Senders of one container to one group: no member gets slots for more of them."""
SOUGHT: Final = 5
"""A member whose slot is new to a sender counts as so many messages of who has made it so. One that
is known, or can't be reached, counts as one."""

AT_ONCE: Final = 500
"""Slots that are tried again at a tick."""
AGAIN: Final = 1.0
"""Seconds until a slot that could not be had is asked for again."""

GroupName = tuple[str, IPAddress]
"""A network, and the group's GID."""
GroupUse = tuple[GroupName, int | IPAddress]
"""That a queue pair has joined a group, or that its process sends to it from a GID."""


MemberName = tuple[IPAddress, int]
"""A member as other hosts know it: a GID, and the number of a queue pair that is in the group."""


@dataclass(slots=True, eq=False)
class GroupMember:
    """A process that has joined a group."""

    name: GroupName
    opened: VerbsProcess
    gid: IPAddress
    """With which it joined."""
    queue_pairs: dict[int, None] = field(default_factory=dict)

    @property
    def name_elsewhere(self) -> MemberName:
        """By its oldest queue pair in the group."""
        return self.gid, next(iter(self.queue_pairs))


@dataclass(slots=True, eq=False)
class GroupSender:
    """A process that sends to a group, from one of its GIDs."""

    name: GroupName
    opened: VerbsProcess
    gid: IPAddress
    told: dict[int, int] = field(default_factory=dict)
    """The slots that it knows, by the process that they lead to."""


@dataclass(slots=True, eq=False)
class Group:
    """A group of one network."""

    members: dict[int, GroupMember] = field(default_factory=dict)
    """By process."""
    senders: dict[tuple[int, IPAddress], GroupSender] = field(default_factory=dict)
    """By process and GID."""
    senders_of: Counter[int] = field(default_factory=Counter)
    """By namespace."""


class FarMembers(Protocol):
    """The members of groups on other hosts, and what other hosts know of those on this one."""

    def change(self, name: GroupName, here: list[MemberName], gone: list[MemberName]) -> int:
        """The members of a group on this host have changed. As how many messages that counts."""

    def begin(self, sender: GroupSender) -> int:
        """A process sends to a group. As how many messages that counts."""

    def hold(self, sender: GroupSender, request: int) -> bool:
        """Whether a request is answered later."""

    def end(self, sender: GroupSender) -> None:
        """A process sends no more to a group."""

    def replace_snapshot(self) -> None:
        """There is a new snapshot."""


class NoFarMembers:
    """There are no other hosts."""

    def change(self, name: GroupName, here: list[MemberName], gone: list[MemberName]) -> int:
        return 0

    def begin(self, sender: GroupSender) -> int:
        return 0

    def hold(self, sender: GroupSender, request: int) -> bool:
        return False

    def end(self, sender: GroupSender) -> None:
        pass

    def replace_snapshot(self) -> None:
        pass


class GroupRetries:
    """Senders and members that could not get a slot, or lost it: when to try again."""

    def __init__(self) -> None:
        self._due: dict[tuple[GroupSender, GroupMember], float] = {}
        """The earliest first."""
        self.between: Counter[frozenset[int]] = Counter()
        """By the two containers."""

    def __len__(self) -> int:
        return len(self._due)

    def __iter__(self) -> Iterator[tuple[GroupSender, GroupMember]]:
        return iter(self._due)

    def add(self, sender: GroupSender, member: GroupMember, due: float) -> bool:
        """Try again then; `due` never falls. False: the two containers have too many of these."""
        between = _containers(sender, member)
        if self.between[between] >= BETWEEN:
            return False
        self.between[between] += 1
        self._due[sender, member] = due
        return True

    def drop(self, sender: GroupSender, member: GroupMember) -> None:
        """Don't try again."""
        if self._due.pop((sender, member), None) is not None:
            add(self.between, _containers(sender, member), -1)

    def take(self, now: float, most: int) -> Iterator[tuple[GroupSender, GroupMember]]:
        """Those that are due by now, so many at most; each is not to be tried again."""
        for (sender, member), due in list(islice(self._due.items(), most)):
            if due > now:
                return
            self.drop(sender, member)
            yield sender, member


def _containers(sender: GroupSender, member: GroupMember) -> frozenset[int]:
    return frozenset((sender.opened.namespace, member.opened.namespace))


class Groups:
    """All groups."""

    def __init__(self, registry: Registry, datagrams: Datagrams) -> None:
        self.registry = registry
        self._datagrams = datagrams
        datagrams.ended = self._slot_ended
        self.far: FarMembers = NoFarMembers()
        self.groups: dict[GroupName, Group] = {}
        self._uses: dict[int, dict[GroupUse, None]] = {}
        """By process."""
        self._of_container: Counter[int] = Counter()
        """The same by namespace."""
        self._due = GroupRetries()
        self._told_of: dict[int, dict[GroupSender, int]] = {}
        """Who was told of a slot, by its number, and the process that it leads to."""

    # --- members

    def join(self, process_id: int, message: VerbsDatagrams) -> int:
        """A queue pair joins a group or leaves it. As how many messages that counts.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        use = self._use(process_id, message, message.qpn)
        if use is None:
            return 0
        name, _ = use
        if not message.on:
            return self._leave(process_id, use)
        opened = self._datagrams.opened(process_id)
        group = self.groups.setdefault(name, Group())
        member = group.members.get(process_id)
        if member is None:
            gid = opened.device.gid(message.gid_index)
            assert gid is not None
            member = group.members[process_id] = GroupMember(name, opened, gid)
        is_new = not member.queue_pairs
        member.queue_pairs[message.qpn] = None
        count = sum(self._tell(sender, member) for sender in group.senders.values())
        return count + (self.far.change(name, [member.name_elsewhere], []) if is_new else 0)

    def _use(
        self, process_id: int, message: VerbsDatagrams, of: int | IPAddress | None
    ) -> GroupUse | None:
        """What a process wants to begin or end; None: it is refused."""
        opened = self._datagrams.opened(process_id)
        gid, mgid = opened.device.gid(message.gid_index), message.gid
        of_process = self._uses.get(process_id, {})
        reason = Reason.NONE
        if gid is None or of is None or mgid is None or not mgid.is_multicast:
            reason = Reason.FOREIGN
        elif not self._datagrams.takes(process_id, message.qpn):
            reason = Reason.NOT_FOUND
        else:
            network = self.registry.knowledge.network_of(opened.namespace, gid)
            assert network is not None
            use = (network.id, mgid), of
            if not message.on or use in of_process:
                return use
            if not self._is_too_much(opened, use):
                self._uses.setdefault(process_id, {})[use] = None
                self._of_container[opened.namespace] += 1
                return use
            reason = Reason.LIMIT
        self._datagrams.refuse(process_id, message, reason)
        return None

    def _is_too_much(self, opened: VerbsProcess, use: GroupUse) -> bool:
        name, of = use
        group = self.groups.get(name)
        return (
            len(self._uses.get(opened.id, ())) >= GROUPS
            or self._of_container[opened.namespace] >= OF_CONTAINER
            or (
                not isinstance(of, int)
                and group is not None
                and group.senders_of[opened.namespace] >= SENDERS
            )
        )

    def _leave(self, process_id: int, use: GroupUse) -> int:
        """End what a process has begun, if it has. As how many messages that counts."""
        of_process = self._uses.get(process_id, {})
        if use not in of_process:
            return 0
        del of_process[use]
        if not of_process:
            del self._uses[process_id]
        namespace = self._datagrams.opened(process_id).namespace
        add(self._of_container, namespace, -1)
        name, of = use
        group = self.groups[name]
        others = 0
        if isinstance(of, int):
            member = group.members[process_id]
            before = member.name_elsewhere
            del member.queue_pairs[of]
            if not member.queue_pairs:
                del group.members[process_id]
                others = len(group.senders) + self.far.change(name, [], [before])
                for sender in group.senders.values():
                    self._untell(sender, member)
            elif member.name_elsewhere != before:
                others = self.far.change(name, [member.name_elsewhere], [before])
        else:
            sender = group.senders.pop((process_id, of))
            add(group.senders_of, namespace, -1)
            self._forget_told(sender)
            self.far.end(sender)
            others = len(group.members)
            for member in group.members.values():
                self._due.drop(sender, member)
        if not group.members and not group.senders:
            del self.groups[name]
        return others

    # --- senders

    def send_to(self, process_id: int, message: VerbsDatagrams) -> int:
        """A process sends to a group from one of its GIDs, or sends no more. As how many messages
        that counts.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        opened = self._datagrams.opened(process_id)
        use = self._use(process_id, message, opened.device.gid(message.gid_index))
        if use is None:
            return 0
        name, gid = use
        if not message.on:
            return self._leave(process_id, use)
        assert not isinstance(gid, int)
        group = self.groups.setdefault(name, Group())
        key = process_id, gid
        sender = group.senders.get(key)
        if sender is None:
            sender = group.senders[key] = GroupSender(name, opened, gid)
            group.senders_of[opened.namespace] += 1
        else:
            self._forget_told(sender)
            self.far.end(sender)
        count = sum(self._tell(sender, each, message.request) for each in group.members.values())
        count += self.far.begin(sender)
        if not self.far.hold(sender, message.request):
            self.say(sender, 0, True, message.request)
        return count

    def _tell(self, sender: GroupSender, member: GroupMember, request: int = 0) -> int:
        """Tell a sender of the slot by which it reaches a member; later, if there is none now. As
        how many messages that counts.
        """
        if sender.opened is member.opened:
            return 0
        if not self.registry.outbox.has_room(sender.opened.id):
            found: DatagramSlot | Reason = Reason.LIMIT
        else:
            found = self._datagrams.slot(
                sender.opened, sender.gid, member.opened, member.gid, 0, of_group=True
            )
        process = member.opened.id
        self._due.drop(sender, member)
        if isinstance(found, Reason):
            self._try_again(sender, member, found)
        elif sender.told.get(process) != found.number:
            sender.told[process] = found.number
            self._told_of.setdefault(found.number, {})[sender] = process
            self.say(sender, found.number, True, request)
            return SOUGHT
        return 1

    def _try_again(self, sender: GroupSender, member: GroupMember, reason: Reason) -> None:
        """A moment later, unless the two containers have too many of these: then not at all."""
        if not self._due.add(sender, member, self.registry.clock() + AGAIN):
            self.count_refused(reason)

    def _untell(self, sender: GroupSender, member: GroupMember) -> None:
        self._due.drop(sender, member)
        number = sender.told.pop(member.opened.id, None)
        if number is not None:
            self._forget_slot(sender, number)
            # Who doesn't hear of it sends in vain to a process that isn't in the group.
            if self.registry.outbox.has_room(sender.opened.id):
                self.say(sender, number, False)

    def _forget_told(self, sender: GroupSender) -> None:
        for number in sender.told.values():
            self._forget_slot(sender, number)
        sender.told.clear()

    def _forget_slot(self, sender: GroupSender, number: int) -> None:
        senders = self._told_of[number]
        del senders[sender]
        if not senders:
            del self._told_of[number]

    def say(self, sender: GroupSender, number: int, on: bool, request: int = 0) -> None:
        """Tell a sender of a slot to its group; `number` 0: it was told of all there are."""
        index = sender.opened.device.index_of(sender.gid) or 0
        message = VerbsDatagrams(VerbsKind.GROUP, request, 0, index, 0, on, number, sender.name[1])
        self.registry.outbox.send(sender.opened.id, message)

    def count_refused(self, reason: Reason) -> None:
        """A sender gets no slot to a member."""
        self._datagrams.refused[reason] += 1

    # --- the end

    def _slot_ended(self, slot: DatagramSlot) -> None:
        """Its processes were told. Those that are still in a group get another one later."""
        for sender, process in self._told_of.pop(slot.number, {}).items():
            del sender.told[process]
            # Or it would keep the numbers of all that there ever were.
            if self.registry.outbox.has_room(sender.opened.id):
                self.say(sender, slot.number, False)
            self._try_again(sender, self.groups[sender.name].members[process], Reason.LIMIT)

    def closed(self, process_id: int, qpn: int) -> None:
        """A queue pair takes no datagrams any more: it leaves its groups."""
        for use in list(self._uses.get(process_id, ())):
            if use[1] == qpn or not self._datagrams.open_of.get(process_id):
                self._leave(process_id, use)

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router."""
        for use in list(self._uses.get(process_id, ())):
            self._leave(process_id, use)

    def replace_snapshot(self) -> None:
        """End what the new snapshot doesn't allow."""
        for process_id, of_process in list(self._uses.items()):
            for use in list(of_process):
                if not self._may_stay(process_id, use):
                    self._leave(process_id, use)
        self.far.replace_snapshot()

    def _may_stay(self, process_id: int, use: GroupUse) -> bool:
        (network_id, mgid), of = use
        opened = self._datagrams.opened(process_id)
        group = self.groups[network_id, mgid]
        gid = group.members[process_id].gid if isinstance(of, int) else of
        network = self.registry.knowledge.network_of(opened.namespace, gid)
        return network is not None and network.id == network_id and network.verbs

    def sweep(self) -> None:
        """Try again what could not be done."""
        for sender, member in self._due.take(self.registry.clock(), AT_ONCE):
            self._tell(sender, member)
