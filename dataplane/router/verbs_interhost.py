"""What there is of verbs between hosts, besides the queue pairs themselves: connections of rdma_cm
and slots for datagrams.
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
    VerbsPeerMessage,
    VerbsStep,
)
from dataplane.router.reasons import Reason
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.verbs_far import FarConnections
from dataplane.router.verbs_far_datagrams import FarDatagramSlots


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

    def reassign(self, host: RemoteHost) -> None:
        """A host claims other addresses than before."""
        self.connections.reassign(host)
        self.datagrams.replace_snapshot()
