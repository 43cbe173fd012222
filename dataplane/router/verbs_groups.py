"""Multicast groups of verbs on this host: who has joined them, and who sends to them.

A datagram to a group goes by the slots of those that have joined, one for each process. A process
that sends to a group is told of these slots, at once and as processes join and leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.verbs_datagrams import Datagrams, DatagramSlot
from dataplane.router.verbs_pairing import VerbsProcess
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsKind

GROUPS: Final = 1024
"""Groups of one process: each that a queue pair has joined, or that it sends to from a GID."""

AT_ONCE: Final = 500
"""Slots that are tried again at a tick."""
AGAIN: Final = 1.0
"""Seconds until a slot that could not be had is asked for again."""

GroupName = tuple[str, IPAddress]
"""A network, and the group's GID."""
GroupUse = tuple[GroupName, int | IPAddress]
"""That a queue pair has joined a group, or that its process sends to it from a GID."""


@dataclass(slots=True, eq=False)
class GroupMember:
    """A process that has joined a group."""

    name: GroupName
    opened: VerbsProcess
    gid: IPAddress
    """With which it joined."""
    queue_pairs: set[int] = field(default_factory=set)


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


class Groups:
    """All groups."""

    def __init__(self, registry: Registry, datagrams: Datagrams) -> None:
        self._registry = registry
        self._datagrams = datagrams
        datagrams.ended = self._slot_ended
        self.groups: dict[GroupName, Group] = {}
        self._uses: dict[int, dict[GroupUse, None]] = {}
        """By process."""
        self._due: dict[tuple[GroupSender, GroupMember], float] = {}
        """Those that could not get a slot, or lost it: when to try again; the earliest first."""

    # --- members

    def join(self, process_id: int, message: VerbsDatagrams) -> None:
        """A queue pair joins a group or leaves it.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        use = self._use(process_id, message, message.qpn)
        if use is None:
            return
        name, _ = use
        if not message.on:
            self._leave(process_id, use)
            return
        opened = self._datagrams.opened(process_id)
        group = self.groups.setdefault(name, Group())
        member = group.members.get(process_id)
        if member is None:
            gid = opened.device.gid(message.gid_index)
            assert gid is not None
            member = group.members[process_id] = GroupMember(name, opened, gid)
        member.queue_pairs.add(message.qpn)
        for sender in group.senders.values():
            self._tell(sender, member)

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
            network = self._registry.knowledge.network_of(opened.namespace, gid)
            assert network is not None
            use = (network.id, mgid), of
            if not message.on or use in of_process or len(of_process) < GROUPS:
                if message.on:
                    self._uses.setdefault(process_id, {})[use] = None
                return use
            reason = Reason.LIMIT
        self._datagrams.refuse(process_id, message, reason)
        return None

    def _leave(self, process_id: int, use: GroupUse) -> None:
        """End what a process has begun, if it has."""
        of_process = self._uses.get(process_id, {})
        if use not in of_process:
            return
        del of_process[use]
        if not of_process:
            del self._uses[process_id]
        name, of = use
        group = self.groups[name]
        if isinstance(of, int):
            member = group.members[process_id]
            member.queue_pairs.remove(of)
            if not member.queue_pairs:
                del group.members[process_id]
                for sender in group.senders.values():
                    self._untell(sender, member)
        else:
            sender = group.senders.pop((process_id, of))
            for member in group.members.values():
                self._due.pop((sender, member), None)
        if not group.members and not group.senders:
            del self.groups[name]

    # --- senders

    def send_to(self, process_id: int, message: VerbsDatagrams) -> None:
        """A process sends to a group from one of its GIDs, or sends no more.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        opened = self._datagrams.opened(process_id)
        use = self._use(process_id, message, opened.device.gid(message.gid_index))
        if use is None:
            return
        name, gid = use
        if not message.on:
            self._leave(process_id, use)
            return
        assert not isinstance(gid, int)
        group = self.groups.setdefault(name, Group())
        key = process_id, gid
        sender = group.senders.setdefault(key, GroupSender(name, opened, gid))
        sender.told.clear()
        for member in group.members.values():
            self._tell(sender, member, message.request)
        self._say(sender, 0, True, message.request)

    def _tell(self, sender: GroupSender, member: GroupMember, request: int = 0) -> None:
        """Tell a sender of the slot by which it reaches a member; later, if there is none now."""
        if sender.opened is member.opened:
            return
        if not self._registry.outbox.has_room(sender.opened.id):
            found: DatagramSlot | Reason = Reason.LIMIT
        else:
            found = self._datagrams.slot(sender.opened, sender.gid, member.opened, member.gid, 0)
        if isinstance(found, Reason):
            self._due[sender, member] = self._registry.clock() + AGAIN
        elif sender.told.get(member.opened.id) != found.number:
            sender.told[member.opened.id] = found.number
            self._say(sender, found.number, True, request)

    def _untell(self, sender: GroupSender, member: GroupMember) -> None:
        self._due.pop((sender, member), None)
        number = sender.told.pop(member.opened.id, None)
        if number is not None:
            self._say(sender, number, False)

    def _say(self, sender: GroupSender, number: int, on: bool, request: int = 0) -> None:
        index = sender.opened.device.index_of(sender.gid) or 0
        message = VerbsDatagrams(VerbsKind.GROUP, request, 0, index, 0, on, number, sender.name[1])
        self._registry.outbox.send(sender.opened.id, message)

    # --- the end

    def _slot_ended(self, slot: DatagramSlot) -> None:
        """Its processes were told. Those that are still in a group get another one later."""
        for end, other in (slot.ends, slot.ends[::-1]):
            for name, gid in self._uses.get(end.process, ()):
                if gid != end.gid:
                    continue
                group = self.groups[name]
                sender = group.senders[end.process, end.gid]
                if sender.told.get(other.process) == slot.number:
                    del sender.told[other.process]
                    member = group.members[other.process]
                    self._due[sender, member] = self._registry.clock() + AGAIN

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

    def _may_stay(self, process_id: int, use: GroupUse) -> bool:
        (network_id, mgid), of = use
        opened = self._datagrams.opened(process_id)
        group = self.groups[network_id, mgid]
        gid = group.members[process_id].gid if isinstance(of, int) else of
        network = self._registry.knowledge.network_of(opened.namespace, gid)
        return network is not None and network.id == network_id and network.verbs

    def sweep(self) -> None:
        """Try again what could not be done."""
        now = self._registry.clock()
        for pair, due in list(islice(self._due.items(), AT_ONCE)):
            if due > now:
                return
            del self._due[pair]
            self._tell(*pair)
