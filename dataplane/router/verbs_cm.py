"""Connections of rdma_cm between processes of this host: who asks, who listens, and what they say.

The library decides what a connection is: its messages are those of InfiniBand's connection manager
(drivers/infiniband/core/cm.c). The router decides whom a message is for, and that only the two ends
of a connection have a say in it. It answers in place of an end that is gone. Queue pairs are paired
in `verbs_pairing.py`, whether they have such a connection or not. There is no I/O but that of
`seams.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from dataplane.errors import WrongMessage
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.verbs_connections import (
    CmConnection,
    CmStage,
    ConnectionSide,
    HalfKey,
    nobody,
    plain,
)
from dataplane.router.verbs_pairing import RETURN, VerbsProcess, opened_by
from dataplane.router.verbs_ports import ALL_IPV4, ALL_IPV6, SPACES, BoundId, VerbsPorts
from dataplane.router.verbs_wire import (
    Step,
    VerbsConnection,
    VerbsEnd,
    VerbsKind,
    VerbsListen,
    VerbsRefuse,
)

PORTS: Final = 16384
"""Ids of one container that are bound to a port."""
UNANSWERED: Final = 1024
"""Requests that one listener has not answered; half of them of one container."""
LATE: Final = 120.0
"""Seconds without a word until a request, or a connection that one end has left, is forgotten. Who
asks repeats its request for 64 seconds."""
_LAST: Final = 0xFFFFFFFF


@dataclass(slots=True)
class CmCounts:
    """Counts since the start."""

    asked: int = 0
    replied: int = 0
    rejected: int = 0
    refused: Counter[Reason] = field(default_factory=Counter)


class VerbsConnections:
    """The listeners and connections of this host's processes."""

    def __init__(
        self,
        registry: Registry,
        processes: Mapping[int, VerbsProcess],
        secret: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._processes = processes
        self.ports = VerbsPorts(secret)
        # Connections of an earlier router may be resumed: none of its numbers should come again.
        self._next = secret()
        self.by_number: dict[tuple[int, int], CmConnection] = {}
        """By process and the router's number."""
        self.of_process: dict[int, dict[CmConnection, None]] = {}
        self._asking: dict[tuple[int, int], CmConnection] = {}
        """By the process that asks, and its id."""
        self.asked_by: Counter[int] = Counter()
        """Connections by the namespace that asked for them."""
        self._halves: dict[HalfKey, CmConnection] = {}
        """Those of an earlier router with one side so far, by number and namespaces."""
        self._since: dict[CmConnection, float] = {}
        """Those that end after LATE, by the time from which on; the oldest first."""
        self._returned: dict[CmConnection, float] = {}
        """The same for `_halves`, after RETURN."""
        self.counts = CmCounts()

    # --- ports

    def listen(self, process_id: int, message: VerbsListen) -> None:
        """Bind an id to a port.

        Raises:
            WrongMessage: the process has not sent V_OPEN, or the message is none for a router.
        """
        opened = opened_by(self._processes, process_id)
        if message.kind is not VerbsKind.LISTEN or not message.id:
            raise WrongMessage(f"V_{message.kind.name} of id {message.id}")
        bound = self._bind(opened, message)
        if isinstance(bound, Reason):
            refuse = VerbsRefuse(VerbsKind.LISTEN, 0, message.id, bound)
            self._registry.outbox.send(process_id, refuse)
            return
        answer = replace(message, kind=VerbsKind.LISTENING, port=bound.port)
        self._registry.outbox.send(process_id, answer)

    def _bind(self, opened: VerbsProcess, message: VerbsListen) -> BoundId | Reason:
        if not any(opened.device.gids):
            return Reason.OFF
        if message.gid not in (None, ALL_IPV4, ALL_IPV6, *opened.device.gids):
            return Reason.FOREIGN
        if message.space not in SPACES:
            return Reason.NOT_FOUND
        is_new = not self.ports.has(opened.id, message.id)
        if is_new and self.ports.of_container[opened.namespace] >= PORTS:
            return Reason.LIMIT
        return self.ports.bind(opened.id, opened.namespace, message) or Reason.SHARED

    def listen_end(self, process_id: int, message: VerbsEnd) -> None:
        """An id has no port any more; requests that it has been told of stay.

        Raises:
            WrongMessage: the process has not sent V_OPEN.
        """
        self.ports.end(opened_by(self._processes, process_id).id, message.number)

    # --- what the ends of connections say

    def step(self, process_id: int, message: VerbsConnection) -> None:
        """Pass a step of a connection on to its other end, if it is one that may come now.

        Raises:
            WrongMessage: the process has not sent V_OPEN, or a request has a connection's number.
        """
        opened = opened_by(self._processes, process_id)
        if message.step in (Step.REQUEST, Step.RESOLVE):
            self._ask(opened, message)
        elif message.step is Step.RESUME:
            self._resume(opened, message)
        else:
            connection = self._find(process_id, message)
            side = None if connection is None else connection.side_of(process_id, message.id)
            if connection is None or side is None:
                self._answer_unknown(process_id, message)
            elif connection.may_say(side, message.step):
                self._say(connection, side, message)

    def _find(self, process_id: int, message: VerbsConnection) -> CmConnection | None:
        if message.connection:
            return self.by_number.get((process_id, message.connection))
        return self._asking.get((process_id, message.id))

    def _answer_unknown(self, process_id: int, message: VerbsConnection) -> None:
        """The other end is gone, or was of an earlier router."""
        if message.step is Step.DISCONNECT:
            self._registry.outbox.send(process_id, replace(message, step=Step.DISCONNECTED))
        elif message.step in (Step.REPLY, Step.READY):
            self._refuse(process_id, message.id, Reason.NOT_FOUND, message.connection)

    def _say(self, connection: CmConnection, side: int, message: VerbsConnection) -> None:
        own = connection.sides[side]
        again = message.step in own.said
        if again and not self._has_room(connection, 1 - side):
            return
        own.said.add(message.step)
        if message.step is Step.REPLY:
            own.id = own.id or message.id
            self.counts.replied += not again
        if len(connection.sides) == 2:
            self._tell(connection, 1 - side, message)
        if message.step in (Step.REPLY, Step.READY):
            stage = CmStage.REPLIED if message.step is Step.REPLY else CmStage.READY
            connection.stage = max(connection.stage, stage)
            self._answered(connection)
        elif message.step is Step.DISCONNECT:
            self._since.setdefault(connection, self._registry.clock())
        else:
            self.counts.rejected += message.step is Step.REJECT
            self._forget(connection)

    def _has_room(self, connection: CmConnection, side: int) -> bool:
        """Whether one end, if it is there, can be told what it has been told before."""
        if side >= len(connection.sides):
            return False
        return self._registry.outbox.has_room(connection.sides[side].process)

    def _tell(
        self, connection: CmConnection, side: int, message: VerbsConnection, number: int = 0
    ) -> None:
        """Tell one end of a connection what the other one says, or would say."""
        end = connection.sides[side]
        index = self._processes[end.process].device.index_of(end.gid)
        told = replace(
            message,
            id=number or end.id,
            connection=connection.number,
            gid_index=index or 0,
            peer_gid=connection.peer_gid(side),
        )
        self._registry.outbox.send(end.process, told)

    # --- requests

    def _ask(self, opened: VerbsProcess, message: VerbsConnection) -> None:
        """Pass a request on to who listens; one that was not answered may be repeated."""
        known = self._asking.get((opened.id, message.id))
        if known is not None:
            if known.stage is CmStage.ASKED and self._has_room(known, 1):
                del self._since[known]
                self._since[known] = self._registry.clock()
                self._tell(known, 1, known.request, known.listener)
            return
        asked = self._admit(opened, message)
        if isinstance(asked, Reason):
            self._refuse(opened.id, message.id, asked)
        elif asked is None:
            self.counts.rejected += 1
            self._registry.outbox.send(opened.id, nobody(message))
        else:
            self._request(opened, message, *asked)

    def _admit(
        self, opened: VerbsProcess, message: VerbsConnection
    ) -> tuple[KnownNetwork, BoundId, IPAddress] | Reason | None:
        """Who gets a request, and by which address; None: nobody listens."""
        gid, peer_gid = opened.device.gid(message.gid_index), message.peer_gid
        if not message.id or message.connection:
            raise WrongMessage("a request with a connection's number, or without an id")
        if gid is None or peer_gid is None:
            return Reason.FOREIGN
        network = self._registry.knowledge.network_of(opened.namespace, gid)
        assert network is not None
        local = _targets(network, peer_gid)
        if isinstance(local, Reason):
            return local
        if self._asks_too_much(opened):
            return Reason.LIMIT
        found = [
            (listener, target)
            for target in local
            if (listener := self._listener(network.owners[target], message, target)) is not None
        ]
        if not found:
            return None
        listener, target = found[self._next % len(found)]
        waiting = listener.waiting
        if (
            waiting.total() >= UNANSWERED
            or waiting[opened.namespace] >= UNANSWERED // 2
            or not self._registry.outbox.has_room(listener.process)
        ):
            return Reason.LIMIT
        return network, listener, target

    def _asks_too_much(self, opened: VerbsProcess) -> bool:
        return self.asked_by[opened.namespace] >= 2 * self._registry.limits.queue_pairs

    def _listener(self, namespace: int, message: VerbsConnection, gid: IPAddress) -> BoundId | None:
        listener = self.ports.listener(namespace, message.space, message.port, gid)
        if listener is None or self._processes[listener.process].device.index_of(gid) is None:
            return None
        return listener

    def _request(
        self,
        opened: VerbsProcess,
        message: VerbsConnection,
        network: KnownNetwork,
        listener: BoundId,
        target: IPAddress,
    ) -> None:
        gid = opened.device.gid(message.gid_index)
        assert gid is not None
        connection = CmConnection(
            self._number(opened.id, listener.process),
            network.id,
            [
                ConnectionSide(opened.id, opened.namespace, gid, message.id),
                ConnectionSide(listener.process, listener.namespace, target, 0),
            ],
            message,
            listener.id,
            waiting=listener.waiting,
        )
        listener.waiting[opened.namespace] += 1
        self._asking[opened.id, message.id] = connection
        self._add(connection)
        self._since[connection] = self._registry.clock()
        self.counts.asked += 1
        self._tell(connection, 1, message, listener.id)

    def _number(self, *processes: int) -> int:
        """A number that none of these processes' connections has."""
        while True:
            self._next = self._next % _LAST + 1
            if not any((process, self._next) in self.by_number for process in processes):
                return self._next

    # --- connections of an earlier router

    def _resume(self, opened: VerbsProcess, message: VerbsConnection) -> None:
        """A process still has a connection; so has the process at its other end, or soon."""
        gid, peer_gid = opened.device.gid(message.gid_index), message.peer_gid
        network = gid and self._registry.knowledge.network_of(opened.namespace, gid)
        peer = network.owners.get(peer_gid) if network and peer_gid else None
        if not gid or not network or peer is None:
            self._refuse(opened.id, message.id, Reason.FOREIGN, message.connection)
            return
        own = ConnectionSide(opened.id, opened.namespace, gid, message.id)
        key = message.connection, frozenset((opened.namespace, peer))
        half = self._halves.get(key)
        taken = self.by_number.get((opened.id, message.connection), half)
        if half is not None and taken is half and half.is_other_half(own, network):
            self._join(half, own)
        elif taken is not None or not message.connection:
            self._refuse(opened.id, message.id, Reason.NOT_FOUND, message.connection)
        elif self._asks_too_much(opened):
            self._refuse(opened.id, message.id, Reason.LIMIT, message.connection)
        else:
            half = CmConnection(
                message.connection, network.id, [own], message, stage=CmStage.READY, half=key
            )
            self._halves[key] = half
            self._returned[half] = self._registry.clock()
            self._add(half)

    def _join(self, half: CmConnection, own: ConnectionSide) -> None:
        assert half.half is not None
        del self._halves[half.half], self._returned[half]
        half.half = None
        half.sides.append(own)
        self._add_side(half, own)
        if half.left:
            self._tell(half, 1, plain(Step.DISCONNECT))

    # --- the end

    def replace_snapshot(self) -> None:
        """End what the new snapshot doesn't allow."""
        knowledge = self._registry.knowledge
        for connection in {each: None for of in self.of_process.values() for each in of}:
            for side in connection.sides:
                network = knowledge.network_of(side.namespace, side.gid)
                reason = Reason.FOREIGN
                if network is not None and network.id == connection.network:
                    reason = Reason.NONE if network.verbs else Reason.OFF
                if reason is not Reason.NONE:
                    self._forbid(connection, reason)
                    break

    def _forbid(self, connection: CmConnection, reason: Reason) -> None:
        self._forget(connection)
        for side in connection.sides:
            self._refuse(side.process, side.id, reason, connection.number)

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router: the other ends are told."""
        self.ports.gone(process_id)
        for connection in list(self.of_process.get(process_id, ())):
            for side, end in enumerate(connection.sides):
                if end.process != process_id:
                    self._say_last_word(connection, side)
            self._forget(connection)

    def sweep(self) -> None:
        """End what has come to nothing."""
        now = self._registry.clock()
        while self._since and next(iter(self._since.values())) <= now - LATE:
            connection = next(iter(self._since))
            if connection.stage is CmStage.ASKED:
                self._say_last_word(connection, 1)
            self._forget(connection)
        while self._returned and next(iter(self._returned.values())) <= now - RETURN:
            connection = next(iter(self._returned))
            self._say_last_word(connection, 0)
            self._forget(connection)

    def _say_last_word(self, connection: CmConnection, side: int) -> None:
        """Tell one end what it is to know of the other one, which is gone."""
        step, reject = connection.last_word(side)
        self._tell(connection, side, plain(step, reject))

    def _add(self, connection: CmConnection) -> None:
        self.asked_by[connection.sides[0].namespace] += 1
        for side in connection.sides:
            self._add_side(connection, side)

    def _add_side(self, connection: CmConnection, side: ConnectionSide) -> None:
        self.by_number[side.process, connection.number] = connection
        self.of_process.setdefault(side.process, {})[connection] = None

    def _answered(self, connection: CmConnection) -> None:
        """It is no request any more that its listener hasn't answered."""
        if connection.waiting is not None:
            connection.waiting[connection.sides[0].namespace] -= 1
            connection.waiting = None
            del self._since[connection]

    def _forget(self, connection: CmConnection) -> None:
        self._answered(connection)
        first = connection.sides[0]
        self.asked_by[first.namespace] -= 1
        if not self.asked_by[first.namespace]:
            del self.asked_by[first.namespace]
        if self._asking.get((first.process, first.id)) is connection:
            del self._asking[first.process, first.id]
        for side in connection.sides:
            self.by_number.pop((side.process, connection.number), None)
            of_process = self.of_process.get(side.process, {})
            of_process.pop(connection, None)
            if not of_process:
                self.of_process.pop(side.process, None)
        if connection.half is not None:
            del self._halves[connection.half], self._returned[connection]
        self._since.pop(connection, None)

    def _refuse(self, process_id: int, number: int, reason: Reason, connection: int = 0) -> None:
        self.counts.refused[reason] += 1
        refuse = VerbsRefuse(VerbsKind.CONNECTION, connection, number, reason)
        self._registry.outbox.send(process_id, refuse)


def _targets(network: KnownNetwork, address: IPAddress) -> list[IPAddress] | Reason:
    """The containers of this host that an address leads to: tasks, if it is a service's."""
    if address in network.everywhere:
        return list(network.tasks.get(address, ())) or Reason.REMOTE
    if address in network.owners:
        return [address]
    return Reason.REMOTE if address in network else Reason.FOREIGN
