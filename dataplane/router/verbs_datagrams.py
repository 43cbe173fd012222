"""Datagrams of verbs between processes of this host: who takes some, and by which slot they go.

A slot carries all that two processes send from one GID to another, whichever of their queue pairs
it is for. Only one of them asks for it: so others cost a process slots and descriptors that it has
not asked for, and there are limits of that. There is no I/O but that of `seams.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from dataplane.errors import KernelRefused
from dataplane.router.arena_table import ArenaTable
from dataplane.router.arenas import Arena, EndKey
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.queue_pairs import FarDatagrams
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.seams import ArenaMemory
from dataplane.router.slot_grants import SlotGrants
from dataplane.router.tally import add
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_pairing import VerbsProcess, opened_by
from dataplane.router.verbs_wire import (
    SlotKind,
    VerbsDatagrams,
    VerbsGrant,
    VerbsKind,
    VerbsRefuse,
)

BETWEEN: Final = 1024
"""Slots for datagrams between two containers."""
UNASKED: Final = 128
"""Slots for datagrams that the processes of one container ask of one process, or that one gets
because it sends to groups in which they are.
"""
OTHERS: Final = 7 * UNASKED
"""The same of all containers: a library has places for 1024 (dataplane/verbs/datagram_peers.h), and
some are left for those that its own program asks for."""


@dataclass(slots=True, eq=False)
class DatagramEnd:
    """A process's end of a slot for datagrams."""

    process: int
    namespace: int
    gid: IPAddress
    slot_number: int = 0
    key: EndKey = 0
    """See `SlotEnd`."""
    slot: DatagramSlot | None = None
    """None: it has ended. The process is to release its place."""
    place: tuple[Arena, int, int] | None = None
    """Arena, slot and side."""


@dataclass(slots=True, eq=False)
class DatagramSlot:
    """A slot for the datagrams of two processes."""

    number: int
    network: str
    ends: tuple[DatagramEnd, DatagramEnd]
    """By side."""
    imposed: tuple[tuple[int, int], ...]
    """A namespace, and the process that has the slot because of it: the one that didn't ask; of a
    group also the one that sends to it, because of the members of another container.
    """


class FarSlots(Protocol):
    """Slots for datagrams to and from other hosts."""

    def ask(
        self, opened: VerbsProcess, gid: IPAddress, network: KnownNetwork, message: VerbsDatagrams
    ) -> Reason | None:
        """Ask for a slot to a queue pair of another host, unless there is one; or why not."""

    def release(self, process_id: int, record: FarDatagrams) -> None:
        """A process has released its end of a slot."""

    def end_all(self, process_id: int) -> None:
        """No queue pair of a process takes datagrams any more."""

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router."""

    def replace_snapshot(self) -> None:
        """End what the new snapshot doesn't allow."""


class NoFarSlots:
    """There are no other hosts."""

    def ask(
        self, opened: VerbsProcess, gid: IPAddress, network: KnownNetwork, message: VerbsDatagrams
    ) -> Reason | None:
        return Reason.REMOTE

    def release(self, process_id: int, record: FarDatagrams) -> None:
        pass

    def end_all(self, process_id: int) -> None:
        pass

    def gone(self, process_id: int) -> None:
        pass

    def replace_snapshot(self) -> None:
        pass


Whom = int | tuple[str, IPAddress]
"""A container: its namespace on this host; or a network and its GID there, on another one."""
SlotName = tuple[str, tuple[int, IPAddress], tuple[int, IPAddress]]
"""A network, and both ends' process and GID; the older process comes first."""


class Datagrams:
    """The queue pairs that take datagrams, and the slots for them."""

    def __init__(
        self,
        registry: Registry,
        processes: Mapping[int, VerbsProcess],
        arena_table: ArenaTable,
        slots: SlotGrants,
        memory: ArenaMemory,
    ) -> None:
        self.registry = registry
        self._processes = processes
        self.arena_table = arena_table
        self.grants = slots
        self._memory = memory
        self._numbers = itertools.count(1)
        self.open_at: dict[tuple[int, int], int] = {}
        """Namespace and QPN of a queue pair that takes datagrams, to its process."""
        self.open_of: dict[int, set[int]] = {}
        """QPNs by process."""
        self.slots: dict[SlotName, DatagramSlot] = {}
        self.of_process: dict[int, dict[DatagramEnd, None]] = {}
        """Ends by process, until it has released them."""
        self.between: Counter[frozenset[int]] = Counter()
        """Slots by their two namespaces."""
        self.unasked: Counter[tuple[Whom, int]] = Counter()
        """Slots by a container, and the process that has them because of it."""
        self.others: Counter[int] = Counter()
        """The same by process."""
        self.refused: Counter[Reason] = Counter()
        self.far: FarSlots = NoFarSlots()
        self.ended: Callable[[DatagramSlot], None] = lambda _: None
        """Called after a slot has ended."""

    # --- queue pairs

    def opened(self, process_id: int) -> VerbsProcess:
        """A process that has a device.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        return opened_by(self._processes, process_id)

    def open(self, process_id: int, message: VerbsDatagrams) -> None:
        """A queue pair takes datagrams, or none any more.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        opened = self.opened(process_id)
        if not message.on:
            self._close(opened, message.qpn)
        elif not opened.device.owns(message.qpn):
            self.refuse(process_id, message, Reason.NOT_FOUND)
        else:
            self.open_at[opened.namespace, message.qpn] = process_id
            self.open_of.setdefault(process_id, set()).add(message.qpn)

    def _close(self, opened: VerbsProcess, qpn: int) -> None:
        """The last one's end ends the process's slots, too."""
        of_process = self.open_of.get(opened.id, set())
        if qpn not in of_process:
            return
        of_process.remove(qpn)
        del self.open_at[opened.namespace, qpn]
        if not of_process:
            del self.open_of[opened.id]
            self._end_all(opened.id)

    def takes(self, process_id: int, qpn: int) -> bool:
        """Whether a process has a queue pair that takes datagrams."""
        return qpn in self.open_of.get(process_id, ())

    def refuse(self, process_id: int, message: VerbsDatagrams, reason: Reason) -> None:
        """Tell a process that it does not get what it has asked for."""
        self.refused[reason] += 1
        number = message.peer_qpn if message.kind is VerbsKind.DATAGRAM_PEER else message.qpn
        refuse = VerbsRefuse(message.kind, message.request, number, reason)
        self.registry.outbox.send(process_id, refuse)

    # --- slots

    def ask(self, process_id: int, message: VerbsDatagrams) -> None:
        """Give a process a slot for its datagrams to another one; none if there is one already.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        opened = self.opened(process_id)
        found = self._find(opened, message)
        if found is None:
            return
        made = found if isinstance(found, Reason) else self.slot(opened, *found, message.request)
        if isinstance(made, Reason):
            self.refuse(process_id, message, made)

    def _find(
        self, opened: VerbsProcess, message: VerbsDatagrams
    ) -> tuple[IPAddress, VerbsProcess, IPAddress] | Reason | None:
        """The own GID, and the peer's process and GID. None: it is on another host."""
        gid, peer_gid = opened.device.gid(message.gid_index), message.gid
        if gid is None or peer_gid is None:
            return Reason.FOREIGN
        network = self.registry.knowledge.network_of(opened.namespace, gid)
        assert network is not None
        namespace = network.owners.get(peer_gid)
        if not self.takes(opened.id, message.qpn):
            return Reason.NOT_FOUND
        if namespace is None:
            if peer_gid not in network or peer_gid in network.everywhere:
                return Reason.FOREIGN
            return self.far.ask(opened, gid, network, message)
        peer = self.open_at.get((namespace, message.peer_qpn))
        if peer is None:
            return Reason.NOT_FOUND
        return gid, self._processes[peer], peer_gid

    def slot(
        self,
        opened: VerbsProcess,
        gid: IPAddress,
        peer: VerbsProcess,
        peer_gid: IPAddress,
        request: int,
        *,
        of_group: bool = False,
    ) -> DatagramSlot | Reason:
        """The slot from a GID of a process to one of another process; a new one if need be.

        `request`: what a new one's grant says to the process that asks. `of_group`: it sends to a
        group, and the other one has joined that.
        """
        network = self.registry.knowledge.network_of(opened.namespace, gid)
        assert network is not None
        if peer is opened:
            return Reason.SHARED
        asker = DatagramEnd(opened.id, opened.namespace, gid)
        asked = DatagramEnd(peer.id, peer.namespace, peer_gid)
        name = _name(network.id, asker, asked)
        if name in self.slots:
            return self.slots[name]
        imposed = [(asker.namespace, asked.process)]
        if of_group and asker.namespace != asked.namespace:
            imposed.append((asked.namespace, asker.process))
        if self._is_too_much(asker, asked, imposed):
            return Reason.LIMIT
        ends = (asker, asked) if asker.process < asked.process else (asked, asker)
        number = self.next_number()
        for side, end in enumerate(ends):
            end.slot_number, end.key = number, ("ud", 2 * number + side)
        try:
            arena, place = self.grants.take(*ends)
        except KernelRefused:
            return Reason.MEMORY
        made = DatagramSlot(number, network.id, ends, tuple(imposed))
        self.slots[name] = made
        self._count(made, 1)
        for side, end in enumerate(ends):
            end.slot, end.place = made, (arena, place, side)
            self.of_process.setdefault(end.process, {})[end] = None
        requests = [request if end is asker else 0 for end in ends]
        first, second = (
            self.grant_of(end, requests[side], peer.gid, self._first(peer.process))
            for side, (end, peer) in enumerate((ends, ends[::-1]))
        )
        self.grants.hand_out(arena, first, second)
        return made

    def _is_too_much(
        self, asker: DatagramEnd, asked: DatagramEnd, imposed: Sequence[tuple[int, int]]
    ) -> bool:
        registry = self.registry
        one, other = asker.namespace, asked.namespace
        ends = Counter((one, other))
        return (
            self.between[frozenset((one, other))] >= BETWEEN
            or any(self.bears_all(*each) for each in imposed)
            or not registry.outbox.has_room(asked.process)
            or registry.share_too_much(one, other)
            or any(registry.is_full(namespace, more) for namespace, more in ends.items())
        )

    def _count(self, slot: DatagramSlot, more: int) -> None:
        add(self.between, frozenset(end.namespace for end in slot.ends), more)
        for namespace, process in slot.imposed:
            self.impose(namespace, process, more)

    def bears_all(self, whom: Whom, process: int) -> bool:
        """Whether a process has all the slots that it is to have because of a container."""
        return self.unasked[whom, process] >= UNASKED or self.others[process] >= OTHERS

    def impose(self, whom: Whom, process: int, more: int) -> None:
        """A process has so many more slots because of a container."""
        add(self.unasked, (whom, process), more)
        add(self.others, process, more)

    def next_number(self) -> int:
        """The number of a new slot."""
        return next(self._numbers)

    def _first(self, process: int) -> int:
        return self._processes[process].device.qpn_first or 0

    def grant_of(
        self, end: DatagramEnd | FarDatagrams, request: int, peer_gid: IPAddress, peer_first: int
    ) -> VerbsGrant:
        """The grant for an end that has its place."""
        assert end.place is not None
        arena, place, side = end.place
        return VerbsGrant(
            request=request,
            qpn=0,
            peer_qpn=peer_first,
            slot_kind=SlotKind.DATAGRAMS,
            side=side,
            slot=place,
            gid_index=self._processes[end.process].device.index_of(end.gid) or 0,
            arena=arena.id,
            incarnation=arena.slots[place].incarnation,
            token=arena.sides[side].token,
            peer_gid=peer_gid,
            peer_count=RANGE,
            number=end.slot_number,
        )

    # --- the end

    def release(self, process_id: int, end: DatagramEnd) -> None:
        """A process has released its end of a slot. It has to be its own: children have none of
        their parent's.
        """
        if end.process == process_id:
            # Before it was told to, so it has as many slots as it may have, or no room for another.
            self._release(end, Reason.LIMIT)

    def _release(self, end: DatagramEnd, reason: Reason = Reason.PEER_CLOSED) -> None:
        if end.slot is not None:
            self._end(end.slot, reason, end)
        assert end.place is not None
        (arena, place, side), end.place = end.place, None
        of_process = self.of_process[end.process]
        del of_process[end]
        if not of_process:
            del self.of_process[end.process]
        self.arena_table.release(arena, place, side)
        self.arena_table.close_if_done(arena)

    def _end(self, slot: DatagramSlot, reason: Reason, knows: DatagramEnd | None = None) -> None:
        """A slot is not used any more. Each process releases its end when it has been told."""
        del self.slots[_name(slot.network, *slot.ends)]
        self._count(slot, -1)
        if knows is None and reason is not Reason.PEER_CLOSED:
            assert slot.ends[0].place is not None
            arena, place, _ = slot.ends[0].place
            self._memory.sever(arena.memory, place)
        for end in slot.ends:
            end.slot = None
            if end is not knows:
                refuse = VerbsRefuse(VerbsKind.GRANT, 0, slot.number, reason)
                self.registry.outbox.send(end.process, refuse)
        self.ended(slot)

    def _end_all(self, process_id: int) -> None:
        for end in list(self.of_process.get(process_id, ())):
            if end.slot is not None:
                self._end(end.slot, Reason.PEER_CLOSED)
        self.far.end_all(process_id)

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router."""
        for end in list(self.of_process.get(process_id, ())):
            self._release(end)
        self.far.gone(process_id)
        for qpn in self.open_of.pop(process_id, ()):
            del self.open_at[self._processes[process_id].namespace, qpn]

    def replace_snapshot(self) -> None:
        """End slots that the new snapshot doesn't allow."""
        self.far.replace_snapshot()
        knowledge = self.registry.knowledge
        for slot in list(self.slots.values()):
            networks = [knowledge.network_of(end.namespace, end.gid) for end in slot.ends]
            if any(network is None or network.id != slot.network for network in networks):
                self._end(slot, Reason.FOREIGN)
            elif not all(network is not None and network.verbs for network in networks):
                self._end(slot, Reason.OFF)


def _name(network: str, one: DatagramEnd, other: DatagramEnd) -> SlotName:
    if other.process < one.process:
        one, other = other, one
    return network, (one.process, one.gid), (other.process, other.gid)
