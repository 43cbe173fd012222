"""Tells other hosts of the members that multicast groups have on this host.

Only a host whose processes send to a group asks for its members. It is told of all of them once,
and then of each change. While much waits to be sent to it, it is told nothing; then it is told of
all of them again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Final

from dataplane.errors import WrongMessage
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import IPAddress
from dataplane.router.peer_wire import MAX_MEMBERS, VerbsGroupAsk, VerbsGroupMembers, ip_of
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.verbs_groups import Group, GroupName, MemberName

ASKED: Final = 65536
"""Groups of which one host is told."""


class ToldGroups:
    """See the module."""

    def __init__(
        self,
        groups: dict[GroupName, Group],
        sessions: PeerSessions,
        hosts: RemoteHosts,
        knowledge: Callable[[], Knowledge],
    ) -> None:
        self._groups = groups
        self._sessions = sessions
        self._hosts = hosts
        self._knowledge = knowledge
        self.of_host: defaultdict[IPAddress, dict[GroupName, bool]] = defaultdict(dict)
        """What a host has asked for, and whether it was told."""
        self.of_group: dict[GroupName, dict[IPAddress, None]] = {}
        """The same hosts, by group."""
        self._untold: dict[tuple[IPAddress, GroupName], None] = {}

    def asked(self, host: RemoteHost, message: VerbsGroupAsk) -> None:
        """A host wants to be told of a group's members, or no more.

        Raises:
            WrongMessage: the group's address is invalid.
        """
        name = message.network, ip_of(message.group)
        if not name[1].is_multicast:
            raise WrongMessage(f"{message.group!r} is no multicast address")
        of_host = self.of_host[host.address]
        if not message.on:
            self._drop(host.address, name)
        elif name in of_host or len(of_host) < ASKED:
            of_host[name] = False
            self.of_group.setdefault(name, {})[host.address] = None
            self._tell_all(host.address, name)
        elif not self._sessions.congested(host.address):
            # It may send to those that it knows of.
            self._say(host.address, name, (), (), everything=True)

    def change(
        self, name: GroupName, here: Sequence[MemberName], gone: Sequence[MemberName]
    ) -> int:
        """The members of a group have changed. How many hosts are told."""
        count = 0
        for address in self.of_group.get(name, ()):
            if not self.of_host[address][name]:
                continue
            count += 1
            if self._may_tell(address, name):
                self._say(address, name, here, gone)
            else:
                self.of_host[address][name] = False
                self._untold[address, name] = None
        return count

    def tell_rest(self) -> None:
        """A session has room again, or there is a new snapshot."""
        for address, name in list(self._untold):
            self._tell_all(address, name)

    def session_down(self, address: IPAddress) -> None:
        """A host asks again when there is a session."""
        for name in list(self.of_host.get(address, ())):
            self._drop(address, name)

    def _drop(self, address: IPAddress, name: GroupName) -> None:
        of_host = self.of_host[address]
        if of_host.pop(name, None) is not None:
            del self.of_group[name][address]
            if not self.of_group[name]:
                del self.of_group[name]
        if not of_host:
            del self.of_host[address]
        self._untold.pop((address, name), None)

    def _tell_all(self, address: IPAddress, name: GroupName) -> None:
        may = self._may_tell(address, name)
        self.of_host[address][name] = may
        if not may:
            self._untold[address, name] = None
            return
        self._untold.pop((address, name), None)
        group = self._groups.get(name)
        members = () if group is None else group.members.values()
        here = [member.name_elsewhere for member in islice(members, MAX_MEMBERS)]
        self._say(address, name, here, (), everything=True)

    def _may_tell(self, address: IPAddress, name: GroupName) -> bool:
        host, network = self._hosts.get(address), self._knowledge().networks.get(name[0])
        return (
            host is not None
            and network is not None
            and network.verbs
            and self._hosts.shares(host, name[0])
            and not self._sessions.congested(address)
        )

    def _say(
        self,
        address: IPAddress,
        name: GroupName,
        here: Iterable[MemberName],
        gone: Iterable[MemberName],
        *,
        everything: bool = False,
    ) -> None:
        network, group = name
        texts = [tuple((str(gid), qpn) for gid, qpn in members) for members in (here, gone)]
        message = VerbsGroupMembers(network, str(group), texts[0], texts[1], everything)
        self._sessions.send(address, message)
