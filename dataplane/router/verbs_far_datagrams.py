"""Slots for datagrams between processes of two hosts.

The process that asks names a queue pair of another host. Its router asks the other one, which knows
the process that has it. From then on both have something like a queue pair that waits for its peer,
and `verbs_remote.py` pairs them. The first of a process's numbers stands for the process. There is
no I/O except through the interfaces that the constructor takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from dataplane.router.arenas import Arena
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop
from dataplane.router.peer_wire import VerbsDatagramAsk, VerbsDatagramNone, ip_of
from dataplane.router.queue_pairs import FarDatagrams, FarName
from dataplane.router.reasons import Reason
from dataplane.router.remote_hosts import PeerSessions, RemoteHost
from dataplane.router.remote_matches import reason_of
from dataplane.router.verbs_connections import FarEnds
from dataplane.router.verbs_datagrams import Datagrams
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_pairing import VerbsProcess
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsKind, VerbsQueuePair, VerbsRefuse

UD: Final = 4
"""Of enum ibv_qp_type (infiniband/verbs.h)."""
PATIENCE: Final = 5.0
"""Seconds until a process is told to ask again for a slot that has not come about."""
OF_PROCESS: Final = 1024
"""Slots of one process for datagrams to and from other hosts."""


class FarDatagramSlots:
    """See the module. It owns `FarDatagrams`, which `RemoteQueuePairs` pairs."""

    def __init__(
        self, datagrams: Datagrams, loop: Loop, sessions: PeerSessions, ends: FarEnds
    ) -> None:
        self._datagrams = datagrams
        self._registry = datagrams.registry
        self._loop = loop
        self._sessions = sessions
        self._ends = ends
        self.slots: dict[FarName, FarDatagrams] = {}
        """Those that wait or have a slot, and have not ended."""
        self.of_process: dict[int, dict[FarDatagrams, None]] = {}
        """The same, and those that have ended and are to be released."""
        self.came: Callable[[FarDatagrams], None] = lambda _: None
        """Called after a process was told of a slot."""
        self.ended: Callable[[FarDatagrams], None] = lambda _: None
        """Called after a slot has ended, or has come to nothing."""
        datagrams.far = self

    # --- what processes of this host ask

    def ask(
        self, opened: VerbsProcess, gid: IPAddress, network: KnownNetwork, message: VerbsDatagrams
    ) -> Reason | None:
        """Ask for a slot to a queue pair of another host, unless there is one; or why not."""
        assert message.gid is not None
        host = self._ends.host_of(network, message.gid)
        if isinstance(host, Reason):
            return host
        peer_first = message.peer_qpn // RANGE * RANGE
        known = self.slots.get(
            (network.id, gid, opened.device.qpn_first or 0, message.gid, peer_first)
        )
        if known is not None:
            if known.place is None and known.asked is None:
                # The other one has asked. Now this one is to be told, too, if nothing comes of it.
                self._count(known, -1)
                known.asked = message
            return None
        made = self._request(opened, gid, network, (host, message.gid, message.peer_qpn), message)
        return made if isinstance(made, Reason) else None

    def of_group(
        self,
        opened: VerbsProcess,
        gid: IPAddress,
        network: KnownNetwork,
        peer: tuple[IPAddress, IPAddress, int],
    ) -> FarDatagrams | Reason:
        """The slot, which there is or will be, from a process that sends to a group to a member of
        it: its host, GID and QPN. Or why there is none.
        """
        host, peer_gid, peer_qpn = peer
        found = self._ends.host_of(network, peer_gid)
        if isinstance(found, Reason) or found != host:
            return found if isinstance(found, Reason) else Reason.FOREIGN
        peer_first = peer_qpn // RANGE * RANGE
        name = network.id, gid, opened.device.qpn_first or 0, peer_gid, peer_first
        known = self.slots.get(name)
        if known is not None:
            return known
        if self._datagrams.bears_all((network.id, peer_gid), opened.id):
            return Reason.LIMIT
        return self._request(opened, gid, network, peer, None)

    def _request(
        self,
        opened: VerbsProcess,
        gid: IPAddress,
        network: KnownNetwork,
        peer: tuple[IPAddress, IPAddress, int],
        asked: VerbsDatagrams | None,
    ) -> FarDatagrams | Reason:
        """Ask a host for a slot to a queue pair of a GID of it."""
        host, peer_gid, peer_qpn = peer
        if not self._ends.has_room(host):
            # Whoever asks again and again fills no session, which all containers use.
            return Reason.LIMIT
        peer_first = peer_qpn // RANGE * RANGE
        made = self._make(opened, gid, network.id, peer_gid, peer_first, host, asked)
        if not isinstance(made, Reason):
            self._sessions.send(
                host,
                VerbsDatagramAsk(network.id, str(gid), made.message.qpn, str(peer_gid), peer_qpn),
            )
            self._registry.remote.connect(made)
        return made

    def _make(
        self,
        opened: VerbsProcess,
        gid: IPAddress,
        network: str,
        peer_gid: IPAddress,
        peer_first: int,
        host: IPAddress,
        asked: VerbsDatagrams | None,
    ) -> FarDatagrams | Reason:
        """A new end, which waits."""
        first = opened.device.qpn_first or 0
        made = FarDatagrams(
            opened.id,
            opened.namespace,
            network,
            gid,
            peer_gid,
            VerbsQueuePair(0, first, peer_first, 0, UD, False, peer_gid),
            self._datagrams.next_number(),
            host,
            asked,
        )
        of_process = self.of_process.get(opened.id, {})
        if len(of_process) >= OF_PROCESS or self._registry.is_full(opened.namespace):
            return Reason.LIMIT
        self.slots[made.name] = made
        self.of_process.setdefault(opened.id, {})[made] = None
        self._count(made, 1)
        made.timer = self._loop.after(PATIENCE, lambda: self.forbid(made, Reason.LIMIT))
        return made

    # --- what other hosts ask

    def asked(self, host: RemoteHost, message: VerbsDatagramAsk) -> None:
        """A process of another host asks for a slot to one of this host.

        Raises:
            WrongMessage: a GID is invalid.
        """
        gid, peer_gid = ip_of(message.gid), ip_of(message.peer_gid)
        network = self._registry.knowledge.networks.get(message.network)
        if network is None or not self._ends.has(host.address, network.id, gid):
            return
        process = self._datagrams.open_at.get((network.owners.get(peer_gid, 0), message.peer_qpn))
        if process is None:
            self._refuse_host(host, message, Reason.NOT_FOUND)
            return
        opened = self._datagrams.opened(process)
        known = self.slots.get(
            (network.id, peer_gid, opened.device.qpn_first or 0, gid, message.qpn)
        )
        if known is not None and known.place is None:
            # Both have asked.
            return
        if known is not None:
            # Its other end has gone, or the host would not ask.
            self._end(known, Reason.PEER_CLOSED)
        if self._datagrams.bears_all((network.id, gid), process) or not (
            self._registry.outbox.has_room(process)
        ):
            self._refuse_host(host, message, Reason.LIMIT)
            return
        made = self._make(opened, peer_gid, network.id, gid, message.qpn, host.address, None)
        if isinstance(made, Reason):
            self._refuse_host(host, message, made)
        else:
            self._registry.remote.connect(made)

    def _refuse_host(self, host: RemoteHost, message: VerbsDatagramAsk, reason: Reason) -> None:
        refused = VerbsDatagramNone(
            message.network, message.gid, message.qpn, message.peer_gid, message.peer_qpn, reason
        )
        self._sessions.send(host.address, refused)

    def refused(self, host: RemoteHost, message: VerbsDatagramNone) -> None:
        """Another host has nobody for what a process has asked.

        Raises:
            WrongMessage: a GID is invalid.
        """
        peer_first = message.peer_qpn // RANGE * RANGE
        gid, peer_gid = ip_of(message.gid), ip_of(message.peer_gid)
        waiting = self.slots.get((message.network, gid, message.qpn, peer_gid, peer_first))
        if waiting is not None and waiting.host == host.address:
            self.forbid(waiting, reason_of(message.reason))

    # --- slots (`QueuePairOwner`)

    def has(self, record: FarDatagrams) -> bool:
        """Whether its process still wants it."""
        return self.slots.get(record.name) is record

    def reserve(self, record: FarDatagrams, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot whose other side is the relay. Its process is not told yet.

        Raises:
            KernelRefused: there is no memory for it.
        """
        return self._datagrams.grants.take_remote(record, ring, connection)

    def grant_remote(self, record: FarDatagrams, arena: Arena, slot: int) -> None:
        """Tell a process that it may use the slot that was taken for it."""
        self._stop_timer(record)
        record.place = arena, slot, 0
        self._datagrams.arena_table.hold(record, arena, slot, 0)
        request = 0 if record.asked is None else record.asked.request
        message = self._datagrams.grant_of(
            record, request, record.peer_gid, record.message.peer_qpn
        )
        self._datagrams.grants.hand_out_remote(arena, message)
        self.came(record)

    def forbid(self, record: FarDatagrams, reason: Reason) -> None:
        """An end that waits gets no slot; one that has a slot keeps it."""
        if record.place is not None or not self.has(record):
            return
        self._forget(record)
        self._registry.remote.withdraw(record)
        if record.asked is not None:
            self._datagrams.refuse(record.process, record.asked, reason)

    # --- the end

    def release(self, process_id: int, record: FarDatagrams) -> None:
        """A process has released its end of a slot. It has to be its own: children have none of
        their parent's.
        """
        if record.process == process_id:
            self._release(record)

    def _release(self, record: FarDatagrams) -> None:
        assert record.place is not None
        (arena, slot, side), record.place = record.place, None
        self._forget(record)
        self._datagrams.arena_table.release(arena, slot, side)
        self._datagrams.arena_table.close_if_done(arena)

    def _end(self, record: FarDatagrams, reason: Reason) -> None:
        """A slot is not used any more. Its process releases it when it has been told."""
        del self.slots[record.name]
        if reason is not Reason.PEER_CLOSED:
            assert record.place is not None
            arena, slot, _ = record.place
            self._registry.remote.leave(arena.slots[slot].connection)
        refuse = VerbsRefuse(VerbsKind.GRANT, 0, record.slot_number, reason)
        self._registry.outbox.send(record.process, refuse)
        self.ended(record)

    def _forget(self, record: FarDatagrams) -> None:
        self._stop_timer(record)
        is_new = self.has(record)
        if is_new:
            del self.slots[record.name]
        of_process = self.of_process[record.process]
        del of_process[record]
        if not of_process:
            del self.of_process[record.process]
        self._count(record, -1)
        if is_new:
            self.ended(record)

    def _count(self, record: FarDatagrams, more: int) -> None:
        if record.asked is None:
            self._datagrams.impose((record.network, record.peer_gid), record.process, more)

    def _stop_timer(self, record: FarDatagrams) -> None:
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None

    def end_all(self, process_id: int) -> None:
        """No queue pair of a process takes datagrams any more."""
        for record in self._live(process_id):
            if record.place is None:
                self.forbid(record, Reason.NOT_FOUND)
            else:
                self._end(record, Reason.PEER_CLOSED)

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router."""
        for record in list(self.of_process.get(process_id, ())):
            if record.place is None:
                self.forbid(record, Reason.NOT_FOUND)
            else:
                self._release(record)

    def replace_snapshot(self) -> None:
        """End what the new snapshot doesn't allow."""
        for record in list(self.slots.values()):
            reason = self._why_not(record)
            if reason is None:
                continue
            if record.place is None:
                self.forbid(record, reason)
            else:
                self._end(record, reason)

    def _why_not(self, record: FarDatagrams) -> Reason | None:
        network = self._registry.knowledge.network_of(record.namespace, record.gid)
        if network is None or network.id != record.network:
            return Reason.FOREIGN
        if not network.verbs:
            return Reason.OFF
        has = self._ends.has(record.host, record.network, record.peer_gid)
        return None if has else Reason.FOREIGN

    def _live(self, process_id: int) -> Iterator[FarDatagrams]:
        return iter([each for each in self.of_process.get(process_id, ()) if self.has(each)])
