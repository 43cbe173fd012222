"""What there is of verbs between hosts, besides the queue pairs themselves: connections of
rdma_cm, slots for datagrams, and multicast groups.
"""

from __future__ import annotations

from collections.abc import Callable

from dataplane.router.knowledge import KnownNetwork
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.peer_wire import (
    VerbsAlive,
    VerbsDatagramAsk,
    VerbsDatagramNone,
    VerbsGroupAsk,
    VerbsGroupMembers,
    VerbsPeerMessage,
    VerbsStep,
)
from dataplane.router.reasons import Reason
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.verbs_far import FarConnections
from dataplane.router.verbs_far_datagrams import FarDatagramSlots
from dataplane.router.verbs_far_groups import FarGroups


class VerbsInterHost:
    """Hands over what sessions report."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sessions: PeerSessions,
        hosts: RemoteHosts,
        why_not: Callable[[KnownNetwork], Reason | None],
    ) -> None:
        """`why_not`: why nothing of a network can get to another host; None: some may."""
        self.connections = FarConnections(
            pairing.verbs_connections, sessions, hosts, lambda: pairing.knowledge, why_not
        )
        self.datagrams = FarDatagramSlots(pairing.datagrams, loop, sessions, self.connections)
        self.groups = FarGroups(pairing.groups, self.datagrams, loop, sessions, hosts)

    def message(self, host: RemoteHost, message: VerbsPeerMessage) -> None:
        """A host says something about verbs.

        Raises:
            WrongMessage: it may not say that.
        """
        match message:
            case VerbsStep():
                self.connections.take(host, message)
            case VerbsAlive():
                self.connections.alive(host, message)
            case VerbsDatagramAsk():
                self.datagrams.asked(host, message)
            case VerbsDatagramNone():
                self.datagrams.refused(host, message)
            case VerbsGroupAsk():
                self.groups.told.asked(host, message)
            case VerbsGroupMembers():
                self.groups.take(host, message)

    def session_up(self, host: RemoteHost) -> None:
        """There is a session."""
        self.connections.session_up(host)
        self.groups.session_up(host)

    def session_down(self, host: RemoteHost) -> None:
        """There is no session."""
        self.groups.session_down(host)

    def end_all(self, host: RemoteHost) -> None:
        """A host is gone."""
        self.connections.end_all(host)
        self.groups.forget(host)

    def eased(self, host: RemoteHost) -> None:
        """The session has room again."""
        self.groups.told.tell_rest()
        self.groups.review()

    def greeted(self, host: RemoteHost) -> None:
        """A host has said something else of itself."""
        self.groups.review()

    def reassign(self, host: RemoteHost) -> None:
        """A host claims other addresses than before."""
        self.connections.reassign(host)
        self.datagrams.replace_snapshot()
