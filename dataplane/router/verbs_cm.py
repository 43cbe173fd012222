"""Connections of rdma_cm between processes of this host: who asks, who listens, and what they say.

The library decides what a connection is: its messages are those of InfiniBand's connection manager
(drivers/infiniband/core/cm.c). The router decides whom a message is for, and that only the two ends
of a connection have a say in it. It answers in place of an end that is gone. Queue pairs are paired
in `verbs_pairing.py`, whether they have such a connection or not. There is no I/O but that of
`seams.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from dataplane.errors import WrongMessage
from dataplane.router.arenas import RELAY
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.verbs_connection_table import ConnectionTable
from dataplane.router.verbs_connections import (
    CmConnection,
    CmStage,
    ConnectionSide,
    FarEnds,
    NoFarEnds,
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
SETTLES: Final = 5.0
"""Seconds within which the processes of an earlier router tell this one of their listeners."""
LATE: Final = 120.0
"""Seconds without a word until a request, or a connection that one end has left, is forgotten. Who
asks repeats its request for 64 seconds."""


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
        self.far: FarEnds = NoFarEnds()
        self.ports = VerbsPorts(secret)
        self.table = ConnectionTable(secret())
        self._since = registry.clock()
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
            else:
                self.say(connection, side, message)

    def _find(self, process_id: int, message: VerbsConnection) -> CmConnection | None:
        if message.connection:
            return self.table.by_number.get((process_id, message.connection))
        return self.table.asking.get((process_id, message.id))

    def _answer_unknown(self, process_id: int, message: VerbsConnection) -> None:
        """The other end is gone, or was of an earlier router."""
        if message.step is Step.DISCONNECT:
            self._registry.outbox.send(process_id, replace(message, step=Step.DISCONNECTED))
        elif message.step in (Step.REPLY, Step.READY):
            self._refuse(process_id, message.id, Reason.NOT_FOUND, message.connection)

    def say(self, connection: CmConnection, side: int, message: VerbsConnection) -> None:
        """One end says something to the other one."""
        own = connection.sides[side]
        again = message.step in own.said
        if not connection.may_say(side, message.step):
            return
        if again and not self._has_room(connection, 1 - side):
            return
        own.said.add(message.step)
        if message.step is Step.REPLY:
            own.id = own.id or message.id
            self.counts.replied += not again
        if len(connection.sides) == 2:
            self.tell(connection, 1 - side, message)
        if message.step is Step.REPLY:
            self.table.answered(connection, CmStage.REPLIED)
        elif message.step is Step.READY:
            self.table.answered(connection, CmStage.READY)
        elif message.step is Step.DISCONNECT:
            self.table.since.setdefault(connection, self._registry.clock())
        else:
            self.counts.rejected += message.step is Step.REJECT
            self.table.forget(connection)

    def _has_room(self, connection: CmConnection, side: int) -> bool:
        """Whether one end, if it is there, can be told what it has been told before."""
        if side >= len(connection.sides):
            return False
        end = connection.sides[side]
        if end.host is not None:
            return self.far.has_room(end.host)
        return self._registry.outbox.has_room(end.process)

    def tell(
        self, connection: CmConnection, side: int, message: VerbsConnection, number: int = 0
    ) -> None:
        """Tell one end of a connection what the other one says, or would say."""
        end = connection.sides[side]
        if end.host is not None:
            self.far.tell(connection, side, message)
            return
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
        known = self.table.asking.get((opened.id, message.id))
        if known is not None:
            self.repeat(known)
            return
        asked = self._admit(opened, message)
        if isinstance(asked, Reason):
            self._refuse(opened.id, message.id, asked)
        elif asked is None:
            self.counts.rejected += 1
            self._registry.outbox.send(opened.id, nobody(message))
        else:
            self._request(opened, message, *asked)

    def repeat(self, known: CmConnection) -> None:
        """Pass a request on again."""
        if known.stage is CmStage.ASKED and self._has_room(known, 1):
            self.table.repeated(known, self._registry.clock())
            self.tell(known, 1, known.request, known.listener)

    def _admit(
        self, opened: VerbsProcess, message: VerbsConnection
    ) -> tuple[KnownNetwork, ConnectionSide, BoundId | None] | Reason | None:
        """Who gets a request, and the listener on this host; None: nobody listens."""
        gid, peer_gid = opened.device.gid(message.gid_index), message.peer_gid
        if not message.id or message.connection:
            raise WrongMessage("a request with a connection's number, or without an id")
        if gid is None or peer_gid is None:
            return Reason.FOREIGN
        network = self._registry.knowledge.network_of(opened.namespace, gid)
        assert network is not None
        targets = network.everywhere.get(peer_gid, (peer_gid,))
        if not any(target in network or target in network.owners for target in targets):
            return Reason.FOREIGN
        if self._asks_too_much(opened):
            return Reason.LIMIT
        found = self.listener(network, targets, message, opened.namespace)
        if isinstance(found, Reason):
            return found
        if found is not None:
            listener, target = found
            return (
                network,
                ConnectionSide(listener.process, listener.namespace, target, 0),
                listener,
            )
        elsewhere = [target for target in targets if target not in network.owners]
        if not elsewhere:
            return None
        target = elsewhere[message.id % len(elsewhere)]
        host = self.far.host_of(network, target)
        if isinstance(host, Reason):
            return host
        if not self.far.has_room(host):
            # Whoever asks, takes it back and asks again fills no session, which all use.
            return Reason.LIMIT
        return network, ConnectionSide(RELAY, RELAY, target, 0, host), None

    def _asks_too_much(self, opened: VerbsProcess) -> bool:
        return self.table.asked_by[opened.namespace] >= 2 * self._registry.limits.queue_pairs

    def listener(
        self,
        network: KnownNetwork,
        targets: Iterable[IPAddress],
        message: VerbsConnection,
        container: int | IPAddress,
    ) -> tuple[BoundId, IPAddress] | Reason | None:
        """Who gets a request, by which of some addresses; None: nobody on this host listens.

        `container`: what asks. LIMIT: it has to ask later.
        """
        found = [
            (listener, target)
            for target in targets
            if target in network.owners
            and (listener := self._listener(network.owners[target], message, target)) is not None
        ]
        if not found:
            return Reason.LIMIT if self._listeners_may_return() else None
        waiting = found[message.id % len(found)][0].waiting
        if (
            waiting.total() >= UNANSWERED
            or waiting[container] >= UNANSWERED // 2
            or not self._registry.outbox.has_room(found[message.id % len(found)][0].process)
        ):
            return Reason.LIMIT
        return found[message.id % len(found)]

    def _listeners_may_return(self) -> bool:
        """Whether this router has taken over from another one just now."""
        if self._registry.clock() >= self._since + SETTLES:
            return False
        return any(opened.device.wanted for opened in self._processes.values())

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
        asked: ConnectionSide,
        listener: BoundId | None,
    ) -> None:
        gid = opened.device.gid(message.gid_index)
        assert gid is not None
        asker = ConnectionSide(opened.id, opened.namespace, gid, message.id)
        self.begin(network.id, asker, asked, message, listener)

    def begin(
        self,
        network: str,
        asker: ConnectionSide,
        asked: ConnectionSide,
        message: VerbsConnection,
        listener: BoundId | None,
        far_number: int | None = None,
    ) -> None:
        """Pass a new request on. `far_number`: of the other host, if that asks."""
        number = self.table.number(asker.process, asked.process)
        far_number = number if far_number is None else far_number
        connection = CmConnection(number, network, [asker, asked], message, far_number=far_number)
        if listener is not None:
            connection.listener, connection.waiting = listener.id, listener.waiting
            listener.waiting[asker.container] += 1
        self.table.add(connection, self._registry.clock())
        self.counts.asked += 1
        self.tell(connection, 1, message, connection.listener)

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
        half = self.table.halves.get(key)
        taken = self.table.by_number.get((opened.id, message.connection), half)
        if half is not None and taken is half and half.is_other_half(own, network):
            self.table.join(half, own)
            if half.left:
                self.tell(half, 1, plain(Step.DISCONNECT))
        elif taken is not None or not message.connection:
            self._refuse(opened.id, message.id, Reason.NOT_FOUND, message.connection)
        elif self._asks_too_much(opened):
            self._refuse(opened.id, message.id, Reason.LIMIT, message.connection)
        else:
            half = CmConnection(
                message.connection, network.id, [own], message, stage=CmStage.READY, half=key
            )
            self.table.add(half, self._registry.clock())

    # --- the end

    def replace_snapshot(self) -> None:
        """End what the new snapshot doesn't allow."""
        for connection in self.table:
            self.review(connection)

    def review(self, connection: CmConnection) -> None:
        """End a connection if it isn't allowed any more."""
        for side in connection.sides:
            reason = self._why_not(connection, side)
            if reason is not None:
                self.table.forget(connection)
                self._forbid(connection, reason)
                return

    def _why_not(self, connection: CmConnection, side: ConnectionSide) -> Reason | None:
        if side.host is not None:
            has = self.far.has(side.host, connection.network, side.gid)
            return None if has else Reason.FOREIGN
        network = self._registry.knowledge.network_of(side.namespace, side.gid)
        if network is None or network.id != connection.network:
            return Reason.FOREIGN
        return None if network.verbs else Reason.OFF

    def _forbid(self, connection: CmConnection, reason: Reason) -> None:
        for side, end in enumerate(connection.sides):
            if end.host is None:
                self._refuse(end.process, end.id, reason, connection.number)
            else:
                self.say_last_word(connection, side)

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router: the other ends are told."""
        self.ports.gone(process_id)
        for connection in list(self.table.of_process.get(process_id, ())):
            for side, end in enumerate(connection.sides):
                if end.process != process_id:
                    self.say_last_word(connection, side)
            self.table.forget(connection)

    def sweep(self) -> None:
        """End what has come to nothing."""
        now = self._registry.clock()
        since, returned = self.table.since, self.table.returned
        while since and next(iter(since.values())) <= now - LATE:
            connection = next(iter(since))
            if connection.stage is CmStage.ASKED:
                self.say_last_word(connection, 1)
            self.table.forget(connection)
        while returned and next(iter(returned.values())) <= now - RETURN:
            connection = next(iter(returned))
            self.say_last_word(connection, 0)
            self.table.forget(connection)

    def say_last_word(self, connection: CmConnection, side: int) -> None:
        """Tell one end what it is to know of the other one, which is gone."""
        step, reject = connection.last_word(side)
        self.tell(connection, side, plain(step, reject))

    def _refuse(self, process_id: int, number: int, reason: Reason, connection: int = 0) -> None:
        self.counts.refused[reason] += 1
        refuse = VerbsRefuse(VerbsKind.CONNECTION, connection, number, reason)
        self._registry.outbox.send(process_id, refuse)
