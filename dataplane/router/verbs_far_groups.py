"""Multicast groups whose members are on other hosts: those to which processes of this host send.

While a process sends to a group, the routers of the hosts that share the network are asked for the
group's members. Each member's process gets a slot with each process that sends, as if that had sent
it a datagram (`verbs_far_datagrams.py`). So it is the sender that repeats a datagram, once for each
slot, and no router, relay or other host does. What a path to a member costs grows only with what
both containers do, and has limits.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop, Timer
from dataplane.router.peer_wire import VerbsGroupAsk, VerbsGroupMembers, ip_of
from dataplane.router.queue_pairs import FarDatagrams, FarName
from dataplane.router.reasons import Reason
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.tally import add
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_far_datagrams import FarDatagramSlots
from dataplane.router.verbs_groups import SOUGHT, GroupName, Groups, GroupSender, MemberName
from dataplane.router.verbs_told_groups import ToldGroups

MEMBERS: Final = 65536
"""Of one host, in all groups."""
OF_GROUP: Final = 1024
"""Members of one group on one host."""
PAIRS: Final = 16384
"""Members of the groups that the processes of a container send to, one for each sender."""
PATHS: Final = 2048
"""Processes of other hosts to which the processes of a container send through groups."""
HOLD: Final = 2.0
"""Seconds for which a process's first datagram to a group waits for members on other hosts."""
AGAIN: Final = 1.0
MOST_AGAIN: Final = 60.0
"""Seconds until a slot that could not be had is asked for again; doubled each time."""


class FarMember(NamedTuple):
    """A process of another host that has joined a group."""

    host: IPAddress
    gid: IPAddress
    qpn_first: int


@dataclass(slots=True, eq=False)
class GroupPath:
    """What leads from a process to one of another host: the slot of both, or that it is wanted."""

    name: FarName
    namespace: int
    senders: dict[GroupSender, FarMember] = field(default_factory=dict)
    """The groups for which it is used, each by its sender in the process."""
    record: FarDatagrams | None = None
    """It waits, or has a slot."""
    settled: bool = False
    """It has had a slot, or was refused one."""
    since: float = 0.0
    """When it was tried last."""
    pause: float = AGAIN
    timer: Timer | None = None
    """Until it is tried again."""

    @property
    def slot(self) -> int:
        """The number of its slot; 0: it has none."""
        has = self.record is not None and self.record.place is not None
        return self.record.slot_number if has and self.record is not None else 0


class FarGroups:
    """See the module. `FarMembers` of `verbs_groups.py`."""

    def __init__(
        self,
        groups: Groups,
        slots: FarDatagramSlots,
        loop: Loop,
        sessions: PeerSessions,
        hosts: RemoteHosts,
    ) -> None:
        self._groups = groups
        self._registry = groups.registry
        self._slots = slots
        self._loop = loop
        self._sessions = sessions
        self._hosts = hosts
        self.told = ToldGroups(groups.groups, sessions, hosts, lambda: groups.registry.knowledge)
        self.members: defaultdict[GroupName, dict[FarMember, int]] = defaultdict(dict)
        """Of groups to which processes of this host send, and the number of a queue pair."""
        self._of_host: Counter[IPAddress] = Counter()
        """Members by host."""
        self.asked: defaultdict[IPAddress, dict[GroupName, bool]] = defaultdict(dict)
        """What a host was asked for, and whether it has answered."""
        self._senders: dict[GroupName, dict[GroupSender, None]] = {}
        self.paths: dict[FarName, GroupPath] = {}
        self._paths_of: dict[GroupSender, dict[FarMember, GroupPath]] = {}
        self.pairs: Counter[int] = Counter()
        """Senders and members that have a path, by the senders' namespace."""
        self.path_count: Counter[int] = Counter()
        """The same of paths."""
        self._held: dict[GroupSender, tuple[int, Timer]] = {}
        """Processes whose first datagram waits: their request."""
        slots.came, slots.ended = self._came, self._ended
        groups.far = self

    # --- senders (`FarMembers`)

    def change(self, name: GroupName, here: list[MemberName], gone: list[MemberName]) -> int:
        """The members of a group on this host have changed. As how many messages that counts."""
        return self.told.change(name, here, gone)

    def begin(self, sender: GroupSender) -> int:
        """A process sends to a group. As how many messages that counts."""
        self._senders.setdefault(sender.name, {})[sender] = None
        self._paths_of[sender] = {}
        count = self._ask_all(sender.name)
        for member in list(self.members.get(sender.name, ())):
            count += self._join(sender, member)
        return count

    def hold(self, sender: GroupSender, request: int) -> bool:
        """Whether a request waits until there are paths to the members, or a moment is over."""
        if self._is_complete(sender):
            return False
        timer = self._loop.after(HOLD, lambda: self._let_go(sender))
        self._held[sender] = request, timer
        return True

    def end(self, sender: GroupSender) -> None:
        """A process sends no more to a group."""
        held = self._held.pop(sender, None)
        if held is not None:
            held[1].cancel()
        for member in list(self._paths_of[sender]):
            self._part(sender, member)
        del self._paths_of[sender]
        senders = self._senders[sender.name]
        del senders[sender]
        if senders:
            return
        del self._senders[sender.name]
        for address in list(self.asked):
            if sender.name in self.asked[address]:
                self._forget(address, sender.name)
                self._ask(address, sender.name, on=False)

    def _is_complete(self, sender: GroupSender) -> bool:
        return all(of_host.get(sender.name, True) for of_host in self.asked.values()) and all(
            path.settled for path in self._paths_of[sender].values()
        )

    def _check(self, sender: GroupSender) -> None:
        if sender in self._held and self._is_complete(sender):
            self._let_go(sender)

    def _let_go(self, sender: GroupSender) -> None:
        request, timer = self._held.pop(sender)
        timer.cancel()
        self._groups.say(sender, 0, True, request)

    # --- what other hosts are asked

    def _ask_all(self, name: GroupName) -> int:
        """Ask all hosts that can be asked, and were not. How many."""
        count = 0
        for host in self._hosts:
            if (
                name not in self.asked.get(host.address, ())
                and host.hello is not None
                and host.hello.verbs_groups
                and self._hosts.shares(host, name[0])
                and self._ask(host.address, name, on=True)
            ):
                self.asked[host.address][name] = False
                count += 1
        return count

    def _ask(self, address: IPAddress, name: GroupName, *, on: bool) -> bool:
        network, group = name
        return not self._sessions.congested(address) and self._sessions.send(
            address, VerbsGroupAsk(network, str(group), on)
        )

    def review(self) -> None:
        """There is a session, or it has room again, or there is a new snapshot."""
        for address, of_host in list(self.asked.items()):
            host = self._hosts.get(address)
            for name in list(of_host):
                if host is None or not self._hosts.shares(host, name[0]):
                    self._forget(address, name)
        for name in self._senders:
            self._ask_all(name)

    def replace_snapshot(self) -> None:
        """There is a new snapshot."""
        self.told.tell_rest()
        self.review()

    def session_up(self, host: RemoteHost) -> None:
        """A host answers with all members that it has now, unless it knows nothing of groups."""
        if host.hello is None or not host.hello.verbs_groups:
            self.forget(host)
        self.review()

    def session_down(self, host: RemoteHost) -> None:
        """Members stay as they are: their slots do, too."""
        self.told.session_down(host.address)
        names = self.asked.pop(host.address, {})
        self._check_all(names)

    def forget(self, host: RemoteHost) -> None:
        """A host is gone."""
        self.told.session_down(host.address)
        names = self.asked.pop(host.address, {})
        for name in list(self.members):
            self._forget(host.address, name)
        self._check_all(names)

    def _forget(self, address: IPAddress, name: GroupName) -> None:
        """A host has no members of a group, as far as is known."""
        of_host = self.asked.get(address, {})
        of_host.pop(name, None)
        if not of_host:
            self.asked.pop(address, None)
        for member in [each for each in self.members.get(name, ()) if each.host == address]:
            self._leave(name, member)
        self._check_all((name,))

    def _check_all(self, names: Iterable[GroupName]) -> None:
        for name in names:
            for sender in list(self._senders.get(name, ())):
                self._check(sender)

    # --- what other hosts say

    def take(self, host: RemoteHost, message: VerbsGroupMembers) -> None:
        """A host has members of a group.

        Raises:
            WrongMessage: an address is invalid.
        """
        name = message.network, ip_of(message.group)
        here = [(ip_of(gid), qpn) for gid, qpn in message.here]
        gone = [(ip_of(gid), qpn) for gid, qpn in message.gone]
        asked = self.asked.get(host.address, {})
        if name not in asked:
            # It wasn't told because of its session.
            self._ask(host.address, name, on=False)
            return
        members = self.members.get(name, {})
        known = [each for each in members if each.host == host.address]
        if message.all:
            now = {_member(host.address, *each) for each in here}
            gone = [(each.gid, members[each]) for each in known if each not in now]
        for gid, qpn in here:
            self._enter(name, _member(host.address, gid, qpn), qpn)
        for gid, qpn in gone:
            member = _member(host.address, gid, qpn)
            # Another queue pair of it may be in the group by now.
            if self.members.get(name, {}).get(member) == qpn:
                self._leave(name, member)
        asked[name] = asked[name] or message.all
        self._check_all((name,))

    def _enter(self, name: GroupName, member: FarMember, qpn: int) -> None:
        members = self.members[name]
        is_new = member not in members
        if is_new:
            of_group = sum(each.host == member.host for each in members)
            if of_group >= OF_GROUP or self._of_host[member.host] >= MEMBERS:
                self._groups.count_refused(Reason.LIMIT)
                return
            self._of_host[member.host] += 1
        members[member] = qpn
        if is_new:
            for sender in list(self._senders[name]):
                self._join(sender, member)

    def _leave(self, name: GroupName, member: FarMember) -> None:
        members = self.members[name]
        del members[member]
        add(self._of_host, member.host, -1)
        if not members:
            del self.members[name]
        for sender in list(self._senders.get(name, ())):
            slot = self._part(sender, member)
            if slot and self._registry.outbox.has_room(sender.opened.id):
                # Who doesn't hear of it sends in vain to a process that isn't in the group.
                self._groups.say(sender, slot, False)

    # --- paths

    def _join(self, sender: GroupSender, member: FarMember) -> int:
        """A sender is to reach a member. As how many messages that counts."""
        namespace = sender.opened.namespace
        first = sender.opened.device.qpn_first or 0
        name = sender.name[0], sender.gid, first, member.gid, member.qpn_first
        path = self.paths.get(name)
        if self.pairs[namespace] >= PAIRS or (path is None and self.path_count[namespace] >= PATHS):
            self._groups.count_refused(Reason.LIMIT)
            return 1
        is_new = path is None
        if path is None:
            path = self.paths[name] = GroupPath(name, namespace)
            self.path_count[namespace] += 1
        path.senders[sender] = member
        self._paths_of[sender][member] = path
        self.pairs[namespace] += 1
        if is_new:
            self._try(path)
            return SOUGHT
        if path.slot:
            self._tell(path, sender)
        return 1

    def _part(self, sender: GroupSender, member: FarMember) -> int:
        """A sender isn't to reach a member any more. The number of the slot that it knows."""
        path = self._paths_of[sender].pop(member, None)
        if path is None:
            return 0
        del path.senders[sender]
        add(self.pairs, path.namespace, -1)
        if not path.senders:
            self._stop_timer(path)
            del self.paths[path.name]
            add(self.path_count, path.namespace, -1)
        return path.slot

    def _try(self, path: GroupPath) -> None:
        sender, member = next(iter(path.senders.items()))
        knowledge = self._registry.knowledge
        network = knowledge.network_of(path.namespace, sender.gid)
        path.since = self._loop.now()
        found: FarDatagrams | Reason = Reason.FOREIGN
        if network is not None and network.id == sender.name[0]:
            qpn = self.members[sender.name][member]
            peer = member.host, member.gid, qpn
            found = self._slots.of_group(sender.opened, sender.gid, network, peer)
        if isinstance(found, Reason):
            self._try_later(path)
            return
        path.record = found
        if found.place is not None:
            self._use(path)

    def _came(self, record: FarDatagrams) -> None:
        path = self.paths.get(record.name)
        if path is not None:
            path.record = record
            self._use(path)

    def _use(self, path: GroupPath) -> None:
        """A path has its slot."""
        self._stop_timer(path)
        for sender in list(path.senders):
            self._tell(path, sender)
        self._settle(path)

    def _tell(self, path: GroupPath, sender: GroupSender) -> None:
        if self._registry.outbox.has_room(sender.opened.id):
            self._groups.say(sender, path.slot, True)
        elif path.timer is None:
            path.timer = self._loop.after(AGAIN, lambda: self._again(path))

    def _ended(self, record: FarDatagrams) -> None:
        path = self.paths.get(record.name)
        if path is None or path.record is not record:
            return
        path.record = None
        for sender in path.senders if path.settled else ():
            if self._registry.outbox.has_room(sender.opened.id):
                self._groups.say(sender, record.slot_number, False)
        self._try_later(path)

    def _try_later(self, path: GroupPath) -> None:
        now = self._loop.now()
        if now - path.since > MOST_AGAIN:
            path.pause = AGAIN
        self._stop_timer(path)
        path.timer = self._loop.after(path.pause, lambda: self._again(path))
        path.pause = min(2 * path.pause, MOST_AGAIN)
        self._settle(path)

    def _again(self, path: GroupPath) -> None:
        path.timer = None
        if path.record is None:
            self._try(path)
        elif path.slot:
            self._use(path)

    def _settle(self, path: GroupPath) -> None:
        path.settled = True
        for sender in list(path.senders):
            self._check(sender)

    @staticmethod
    def _stop_timer(path: GroupPath) -> None:
        if path.timer is not None:
            path.timer.cancel()
            path.timer = None


def _member(host: IPAddress, gid: IPAddress, qpn: int) -> FarMember:
    return FarMember(host, gid, qpn // RANGE * RANGE)
