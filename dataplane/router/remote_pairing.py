"""What the registry of this host's connections needs of the one for connections to other hosts.

`remote.py` implements it. Without `remote.py` there are no other hosts: `NoRemotePairing`.
"""

from __future__ import annotations

from typing import Protocol

from dataplane.router.arenas import Arena
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.pair_requests import PairRequest
from dataplane.router.queue_pairs import FarDatagrams, QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.remote_events import Transport
from dataplane.router.seams import LentFile


class RemotePairing(Protocol):
    """Pairs ends of this host with ends of other hosts. Connections have the relay's numbers."""

    def why_not(self, network: KnownNetwork) -> Reason | None:
        """Why no connection of a network can get a path to another host; None: some may."""

    def why_waiting(self, request: PairRequest) -> Reason:
        """Why a request for a connection to another host waits."""

    def transport(self, connection: int) -> Transport:
        """The transport of a connection."""

    def why_stalled(self, connection: int) -> Reason | None:
        """Why a connection carries nothing, for now or for good; None: it does."""

    def pair(self, request: PairRequest, network: KnownNetwork) -> None:
        """Take a request whose other end is on another host.

        `Pairing.grant` or `Pairing.refuse` is called for it at any time from now on, also at once.
        """

    def cancel(self, request: PairRequest) -> None:
        """A request doesn't wait any more: its process has taken it back, or has ended."""

    def connect(self, queue_pair: QueuePairRecord | FarDatagrams) -> None:
        """Take a queue pair whose peer is on another host.

        `VerbsPairing.grant_remote` or `VerbsPairing.forbid` is called for it at any time from now
        on, also at once.
        """

    def withdraw(self, queue_pair: QueuePairRecord | FarDatagrams) -> None:
        """A queue pair without a slot doesn't wait any more."""

    def released(self, connection: int) -> None:
        """No process of this host has the end any more."""

    def orphaned(self, connection: int) -> None:
        """The end's process has hung up. Processes that share its socket may still use it."""

    def leave(self, connection: int) -> None:
        """Bring the connection back to TCP."""

    def bell_made(self, arena: int, index: int, descriptor: int) -> None:
        """A process has a bell, and `descriptor` rings it. It stays the caller's."""

    def arena_made(self, arena: Arena, bell: int) -> None:
        """There is a new arena. `bell`, the receiving end of the relay's bell 0, is the
        callee's.
        """

    def arena_closed(self, arena: Arena) -> None:
        """Nothing is in the arena any more."""

    def lend_file(self, file: LentFile) -> None:
        """Give the relay a file for registered memory. Its descriptor stays the caller's."""

    def end_file(self, number: int) -> None:
        """Nobody uses a file any more that the relay has. `DirectMemory.returned` follows."""


class NoRemotePairing:
    """There are no other hosts, so `pair` is never called."""

    def why_not(self, network: KnownNetwork) -> Reason | None:
        return Reason.NO_ENDPOINT if network.foreign else Reason.REMOTE

    def why_waiting(self, request: PairRequest) -> Reason:
        return Reason.REMOTE

    def transport(self, connection: int) -> Transport:
        return Transport.RDMA

    def why_stalled(self, connection: int) -> Reason | None:
        return Reason.BROKEN

    def pair(self, request: PairRequest, network: KnownNetwork) -> None:
        pass

    def cancel(self, request: PairRequest) -> None:
        pass

    def connect(self, queue_pair: QueuePairRecord | FarDatagrams) -> None:
        pass

    def withdraw(self, queue_pair: QueuePairRecord | FarDatagrams) -> None:
        pass

    def released(self, connection: int) -> None:
        pass

    def orphaned(self, connection: int) -> None:
        pass

    def leave(self, connection: int) -> None:
        pass

    def bell_made(self, arena: int, index: int, descriptor: int) -> None:
        pass

    def arena_made(self, arena: Arena, bell: int) -> None:
        pass

    def arena_closed(self, arena: Arena) -> None:
        pass

    def lend_file(self, file: LentFile) -> None:
        pass

    def end_file(self, number: int) -> None:
        pass
