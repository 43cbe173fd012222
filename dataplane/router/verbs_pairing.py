"""Pairs queue pairs of verbs: those of two processes of this host, in containers on one network.

Each of two processes asks for the other's queue pair. When both have asked they get a slot of their
arena, as the ends of a connection do. There is no socket underneath: a queue pair has its slot
until its process says so or is gone, and the peer is told. There is no I/O but that of `seams.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from dataplane.errors import KernelRefused, WrongMessage
from dataplane.router.arena_table import ArenaTable
from dataplane.router.arenas import RELAY, Arena
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.queue_pairs import QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.remote_events import Transport
from dataplane.router.seams import ArenaMemory
from dataplane.router.slot_grants import SlotGrants
from dataplane.router.verbs_devices import DeviceView, QpnRanges
from dataplane.router.verbs_wire import (
    VERBS_VERSION,
    SlotKind,
    VerbsEnd,
    VerbsGrant,
    VerbsKind,
    VerbsOpen,
    VerbsQueuePair,
    VerbsRefuse,
    VerbsStatus,
)

_RELIABLE: Final = 2
"""IBV_QPT_RC."""
_NEVER: Final = frozenset({Reason.REMOTE, Reason.REMOTE_OFF})
"""Why no queue pair of a network can have a peer on another host. What else is missing may come."""
RETURN: Final = 60.0
"""Seconds within which a process tells a new router of its queue pairs; then it counts as gone."""

MOST_GROWTH: Final = 1 << 40
"""Operations, or bytes, that one message of a process adds at most: more than a second has."""
MOST_COUNTED: Final = (1 << 63) - 1


@dataclass(slots=True, eq=False)
class VerbsProcess:
    """A process that uses verbs."""

    id: int
    namespace: int
    device: DeviceView
    queue_pairs: dict[int, QueuePairRecord] = field(default_factory=dict)
    """By QPN."""


def opened_by(processes: Mapping[int, VerbsProcess], process_id: int) -> VerbsProcess:
    """A process that has sent V_OPEN.

    Raises:
        WrongMessage: it has not.
    """
    opened = processes.get(process_id)
    if opened is None:
        raise WrongMessage("a message of verbs before V_OPEN")
    return opened


@dataclass(slots=True)
class VerbsCounts:
    """Counts since the start."""

    paired: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)
    operations: int = 0
    bytes: int = 0

    def add(self, before: VerbsStatus | None, now: VerbsStatus) -> None:
        """Count what a queue pair has done between what its process said before and says now."""
        done = (0, 0) if before is None else (before.operations, before.bytes)
        self.operations = _sum(self.operations, now.operations - done[0])
        self.bytes = _sum(self.bytes, now.bytes - done[1])


class VerbsPairing:
    """The processes of this host that use verbs, and their queue pairs."""

    def __init__(
        self,
        registry: Registry,
        arena_table: ArenaTable,
        slots: SlotGrants,
        memory: ArenaMemory,
        secret: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._arena_table = arena_table
        self._slots = slots
        self._memory = memory
        self._secret = secret
        self.ranges: dict[int, QpnRanges] = {}
        """By namespace."""
        self.processes: dict[int, VerbsProcess] = {}
        self.queue_pairs: dict[tuple[int, int], QueuePairRecord] = {}
        """By namespace and QPN."""
        self.of_container: Counter[int] = Counter()
        """Queue pairs by namespace."""
        self._returned: dict[QueuePairRecord, float] = {}
        """Those of an earlier router whose peer has not been told of yet, with their time."""
        self.counts = VerbsCounts()

    # --- devices

    def open(self, process_id: int, message: VerbsOpen) -> None:
        """Tell a process of its device, now and whenever that changes.

        Raises:
            WrongMessage: it has sent no HELLO, or another V_OPEN.
        """
        process = self._registry.processes[process_id]
        if process.build is None:
            raise WrongMessage("V_OPEN before HELLO")
        if process_id in self.processes:
            raise WrongMessage("a second V_OPEN")
        of_version = message.version == VERBS_VERSION and not process.other_version
        opened = VerbsProcess(process_id, process.namespace, DeviceView(message.qpn_first))
        if of_version:
            self.processes[process_id] = opened
        self._tell(opened, of_version)

    def _tell(self, opened: VerbsProcess, has_device: bool = True) -> None:
        namespace = opened.namespace
        addresses = self._registry.knowledge.gids.get(namespace, ()) if has_device else ()
        if addresses and opened.device.qpn_first is None:
            if namespace not in self.ranges:
                self.ranges[namespace] = QpnRanges(self._secret())
            opened.device.qpn_first = self.ranges[namespace].take(opened.device.wanted)
        limits = self._registry.limits
        direct = limits.direct_memory if namespace in self._registry.knowledge.direct else 0
        for message in opened.device.update(addresses, limits.queue_pairs, direct):
            self._registry.outbox.send(opened.id, message)

    def replace_snapshot(self) -> None:
        """Tell processes of changed devices, and end what the new snapshot doesn't allow."""
        knowledge = self._registry.knowledge
        for opened in self.processes.values():
            self._tell(opened)
        for record in list(self.queue_pairs.values()):
            network = knowledge.network_of(record.namespace, record.gid)
            if network is None or network.id != record.network:
                self.forbid(record, Reason.FOREIGN)
            elif not network.verbs:
                self.forbid(record, Reason.OFF)
            elif network.owners.get(record.peer_gid, RELAY) != record.peer_namespace:
                self.forbid(record, Reason.PEER_CLOSED)
            elif record.is_remote and not self._may_stay_remote(record, network):
                self.forbid(record, Reason.REMOTE_OFF)
        used = {opened.namespace for opened in self.processes.values()}
        for namespace in self.ranges.keys() - used - knowledge.sandboxes.keys():
            del self.ranges[namespace]

    def _may_stay_remote(self, record: QueuePairRecord, network: KnownNetwork) -> bool:
        """Whether the network's queue pairs may have peers on other hosts, this way."""
        if record.place is None:
            return any(map(network.may_use, Transport))
        arena, slot, _ = record.place
        number, remote = arena.slots[slot].connection, self._registry.remote
        # Its process has been told that it is over.
        is_over = remote.why_stalled(number) in (Reason.BROKEN, Reason.PEER_CLOSED)
        return is_over or network.may_use(remote.transport(number))

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router: its queue pairs end with it."""
        opened = self.processes.get(process_id)
        if opened is None:
            return
        while opened.queue_pairs:
            self._remove(opened, next(iter(opened.queue_pairs.values())))
        del self.processes[process_id]
        if opened.device.qpn_first is not None:
            self.ranges[opened.namespace].give_back(opened.device.qpn_first)

    # --- queue pairs

    def connect(self, process_id: int, message: VerbsQueuePair) -> None:
        """Pair a queue pair, let it wait, or refuse it; in place of an earlier life of it.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        opened = opened_by(self.processes, process_id)
        old = opened.queue_pairs.get(message.qpn)
        if old is not None:
            self._remove(opened, old)
        record = self._admit(opened, message)
        if isinstance(record, Reason):
            self._refuse(process_id, message, record)
            return
        opened.queue_pairs[message.qpn] = self.queue_pairs[record.number] = record
        self.of_container[record.namespace] += 1
        partner = self.queue_pairs.get(record.peer_number)
        if record.is_remote:
            self._registry.remote.connect(record)
        elif partner is not None and partner.waits and partner.fits(record):
            self._pair(record, partner)
        elif message.paired:
            self._returned[record] = record.since

    def _admit(self, opened: VerbsProcess, message: VerbsQueuePair) -> QueuePairRecord | Reason:
        """The record of a queue pair, or why it is refused."""
        gid, peer_gid = opened.device.gid(message.gid_index), message.peer_gid
        if not opened.device.owns(message.qpn):
            return Reason.NOT_FOUND
        if gid is None or peer_gid is None:
            return Reason.FOREIGN
        network = self._registry.knowledge.network_of(opened.namespace, gid)
        assert network is not None
        peer_namespace = network.owners.get(peer_gid, RELAY)
        if peer_namespace == RELAY and (why := self._why_not(message, peer_gid, network)):
            return why
        if (peer_namespace, message.peer_qpn) == (opened.namespace, message.qpn):
            return Reason.NOT_FOUND
        if self.of_container[opened.namespace] >= self._registry.limits.queue_pairs:
            return Reason.LIMIT
        return QueuePairRecord(
            opened.id,
            opened.namespace,
            message,
            network.id,
            gid,
            peer_gid,
            peer_namespace,
            self._registry.clock(),
            is_remote=peer_namespace == RELAY,
            moving=peer_namespace == RELAY and self._may_move(message, network),
        )

    def _why_not(
        self, message: VerbsQueuePair, peer_gid: IPAddress, network: KnownNetwork
    ) -> Reason | None:
        """Why an address of no container of this host can't be that of a peer; None: it may."""
        if peer_gid not in network or peer_gid in network.everywhere:
            return Reason.FOREIGN
        if message.paired:
            # The relay ended with the router that has paired it.
            return Reason.PEER_CLOSED
        why = self._registry.remote.why_not(network)
        return why if why in _NEVER else None

    # --- queue pairs with a peer on another host, for `verbs_remote.py`

    def has(self, record: QueuePairRecord) -> bool:
        """Whether its process still has it."""
        return self.queue_pairs.get(record.number) is record

    def reserve(self, record: QueuePairRecord, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot whose other side is the relay. Its process is not told yet.

        Raises:
            KernelRefused: there is no memory for it.
        """
        return self._slots.take_remote(record, ring, connection)

    def grant_remote(self, record: QueuePairRecord, arena: Arena, slot: int) -> None:
        """Tell a process that it may use the slot that was taken for its queue pair."""
        record.place = (arena, slot, 0)
        self.counts.paired += 1
        self._arena_table.hold(record, arena, slot, 0)
        self._slots.hand_out_remote(arena, _message(record, record.peer_gid))

    def _pair(self, one: QueuePairRecord, other: QueuePairRecord) -> None:
        """Connect two queue pairs. Those of an earlier router have a slot of one of its arenas."""
        one.direct = other.direct = self._may_be_direct(one, other)
        if not one.message.paired and not self._grant(one, other):
            return
        one.peer, other.peer = other, one
        for record in (one, other):
            self._returned.pop(record, None)
        self.counts.paired += 1

    def _grant(self, one: QueuePairRecord, other: QueuePairRecord) -> bool:
        """Give two queue pairs a slot of their processes' arena; false: both are refused."""
        ends = Counter((one.namespace, other.namespace))
        if self._registry.share_too_much(one.namespace, other.namespace) or any(
            self._registry.is_full(namespace, more) for namespace, more in ends.items()
        ):
            return self._refuse_both(one, other, Reason.LIMIT)
        if other.process < one.process:
            one, other = other, one
        try:
            arena, slot = self._slots.take(one, other)
        except KernelRefused:
            return self._refuse_both(one, other, Reason.MEMORY)
        one.place, other.place = (arena, slot, 0), (arena, slot, 1)
        self._slots.hand_out(arena, _message(one, other.gid), _message(other, one.gid))
        return True

    def _may_be_direct(self, one: QueuePairRecord, other: QueuePairRecord) -> bool:
        """Whether two processes may map each other's memory. Only those with the same library may:
        an earlier one does not know the records for it.
        """
        network = self._registry.knowledge.networks[one.network]
        processes = self._registry.processes
        return network.verbs_direct and (
            processes[one.process].build == processes[other.process].build
        )

    def _may_move(self, message: VerbsQueuePair, network: KnownNetwork) -> bool:
        """Whether relays may move bytes between registered memory, if the libraries know that."""
        settings = self._registry.knowledge.settings
        return message.type == _RELIABLE and network.verbs_direct and settings.zero_copy

    def _refuse_both(self, one: QueuePairRecord, other: QueuePairRecord, reason: Reason) -> bool:
        self.forbid(one, reason)
        self.forbid(other, reason)
        return False

    def end(self, process_id: int, message: VerbsEnd) -> None:
        """A queue pair is reset or destroyed. An unknown one is fine: it may have been refused.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        opened = opened_by(self.processes, process_id)
        record = opened.queue_pairs.get(message.number)
        if record is not None:
            self._remove(opened, record)

    def release(self, process_id: int, record: QueuePairRecord) -> None:
        """A process has released a slot in which a queue pair is. It has to be its own: children
        have none of their parent's.
        """
        if record.process == process_id:
            self._remove(self.processes[process_id], record)

    def status(self, process_id: int, message: VerbsStatus) -> None:
        """Remember what a process says of a queue pair.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        record = opened_by(self.processes, process_id).queue_pairs.get(message.qpn)
        if record is None:
            return
        # An earlier router has counted what a queue pair did that it paired.
        if record.status is not None or not record.message.paired:
            self.counts.add(record.status, message)
        record.status = message

    def sweep(self) -> None:
        """Give up queue pairs of an earlier router whose peer has not come back."""
        last = self._registry.clock() - RETURN
        for record, since in list(self._returned.items()):
            if since > last:
                return
            del self._returned[record]
            self.forbid(record, Reason.PEER_CLOSED)

    def __iter__(self) -> Iterator[QueuePairRecord]:
        return iter(self.queue_pairs.values())

    # --- the end of queue pairs

    def _remove(self, opened: VerbsProcess, record: QueuePairRecord) -> None:
        """A queue pair has ended: its slot is released, and its peer is told."""
        del opened.queue_pairs[record.message.qpn], self.queue_pairs[record.number]
        self.of_container[record.namespace] -= 1
        if not self.of_container[record.namespace]:
            del self.of_container[record.namespace]
        self._returned.pop(record, None)
        peer, record.peer = record.peer, None
        if peer is not None:
            peer.peer = None
            self.forbid(peer, Reason.PEER_CLOSED)
        if record.place is not None:
            arena, slot, side = record.place
            self._arena_table.release(arena, slot, side)
            self._arena_table.close_if_done(arena)
        elif record.is_remote:
            self._registry.remote.withdraw(record)

    def forbid(self, record: QueuePairRecord, reason: Reason) -> None:
        """Tell a queue pair once that it has no peer, or has none any more.

        It keeps its slot until its process releases it. Nobody asks for it again.
        """
        if record.refused is not None:
            return
        record.refused = reason
        if record.place is None:
            self._remove(self.processes[record.process], record)
        elif record.is_remote:
            arena, slot, _ = record.place
            self._registry.remote.leave(arena.slots[slot].connection)
        elif reason is not Reason.PEER_CLOSED:
            arena, slot, _ = record.place
            self._memory.sever(arena.memory, slot)
        self._refuse(record.process, record.message, reason)

    def _refuse(self, process_id: int, message: VerbsQueuePair, reason: Reason) -> None:
        self.counts.refused[reason] += 1
        refuse = VerbsRefuse(VerbsKind.QUEUE_PAIR, message.request, message.qpn, reason)
        self._registry.outbox.send(process_id, refuse)


def _sum(total: int, growth: int) -> int:
    """A counter that only grows, whatever a process says, and fits a message."""
    return min(total + min(max(growth, 0), MOST_GROWTH), MOST_COUNTED)


def _message(record: QueuePairRecord, peer_gid: IPAddress) -> VerbsGrant:
    assert record.place is not None
    arena, slot, side = record.place
    return VerbsGrant(
        request=record.message.request,
        qpn=record.message.qpn,
        peer_qpn=record.message.peer_qpn,
        slot_kind=SlotKind.CONNECTED,
        side=side,
        slot=slot,
        gid_index=record.message.gid_index,
        arena=arena.id,
        incarnation=arena.slots[slot].incarnation,
        token=arena.sides[side].token,
        peer_gid=peer_gid,
        number=record.direct,
    )
