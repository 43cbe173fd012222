"""Pairs the two ends of connections: the messages of processes, and what becomes of requests.

Each end of a connection sends a request to its own host's router. The router matches two requests
by their addresses; if the other end is on another host, `remote.py` does, behind the interface of
`remote_pairing.py`. Which requests may be paired is in `admission.py`.

There is no I/O except through the interfaces in `seams.py`. No request costs more than a look-up,
or one look-up per task of a service on this host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from msgspec.structs import asdict

from dataplane.control import Limits
from dataplane.errors import KernelRefused, WrongMessage
from dataplane.router import layout
from dataplane.router.admission import Admission, why_not
from dataplane.router.arena_table import ArenaTable
from dataplane.router.arenas import RELAY_SIDE, Arena, ConnectionEnd
from dataplane.router.bells import Bells
from dataplane.router.knowledge import Knowledge, KnownNetwork
from dataplane.router.library_wire import (
    PROTOCOL_VERSION,
    Bell,
    Fetch,
    Grant,
    Hello,
    Note,
    Release,
    Request,
    Welcome,
)
from dataplane.router.pair_requests import PairRequest
from dataplane.router.queue_pairs import FarDatagrams, QueuePairRecord
from dataplane.router.reasons import STATUS_ONLY, Reason, told
from dataplane.router.registry import ProcessRecord, Registry
from dataplane.router.remote_pairing import RemotePairing
from dataplane.router.request_table import RequestTable
from dataplane.router.seams import ArenaMemory, Outbox, SocketTable
from dataplane.router.slot_grants import SlotGrants
from dataplane.router.verbs_cm import VerbsConnections
from dataplane.router.verbs_datagrams import DatagramEnd, Datagrams
from dataplane.router.verbs_groups import Groups
from dataplane.router.verbs_memory import DirectMemory
from dataplane.router.verbs_pairing import VerbsPairing
from dataplane.router.verbs_wire import VERBS_VERSION

EARLY: Final = 64
"""Requests per process that are kept until its container is known."""
_TOLD: Final = frozenset(reason.value for reason in Reason if reason < STATUS_ONLY)
"""Reasons that a process may note."""


class Pairing:
    """The registry of this host's connections. One thread uses it."""

    def __init__(
        self,
        outbox: Outbox,
        sockets: SocketTable,
        memory: ArenaMemory,
        *,
        clock: Callable[[], float],
        secret: Callable[[], int],
    ) -> None:
        self._outbox = outbox
        self._clock = clock
        self._registry = Registry(outbox, clock)
        self._admission = Admission(self._registry, sockets)
        self.requests = RequestTable(self._registry, sockets)
        self._bells = Bells(self._registry, memory)
        self.arena_table = ArenaTable(self._registry, self._bells, sockets, memory, secret)
        self._slots = SlotGrants(self._registry, self.arena_table, self._bells)
        self.verbs = VerbsPairing(self._registry, self.arena_table, self._slots, memory, secret)
        self.verbs_connections = VerbsConnections(self._registry, self.verbs.processes, secret)
        self.datagrams = Datagrams(
            self._registry, self.verbs.processes, self.arena_table, self._slots, memory
        )
        self.groups = Groups(self._registry, self.datagrams)
        self.direct_memory = DirectMemory(self._registry, self.verbs.processes, memory, secret)
        self.processes = self._registry.processes
        self.containers = self._registry.containers
        self.arenas = self.arena_table.arenas
        self.counts = self._registry.counts

    @property
    def knowledge(self) -> Knowledge:
        """The driver's snapshot."""
        return self._registry.knowledge

    @property
    def limits(self) -> Limits:
        """What one container may have."""
        return self._registry.limits

    @property
    def remote(self) -> RemotePairing:
        """What pairs ends of this host with ends of others."""
        return self._registry.remote

    def use_remote(self, remote: RemotePairing) -> None:
        """Hand over requests whose other end is on another host."""
        self._registry.remote = remote

    # --- processes and the snapshot

    def connected(self, process_id: int, namespace: int, pid: int) -> bool:
        """A process has connected; false if its container has too many."""
        return self._registry.add(process_id, namespace, pid)

    def hello(self, process_id: int, message: Hello) -> None:
        """Answer with the settings; later, if the container isn't known yet.

        A library of another version is told to stay on TCP: its container was started with the
        library of another plugin.

        Raises:
            WrongMessage: a second HELLO.
        """
        process = self.processes[process_id]
        if process.build is not None:
            raise WrongMessage("a second HELLO")
        versions = (message.version, message.layout_version)
        process.other_version = versions != (PROTOCOL_VERSION, layout.VERSION)
        process.build = message.build
        if self.knowledge.is_endpoint(process.namespace):
            self._welcome(process)

    def welcome_late(self, process_id: int) -> None:
        """Welcome a process whose container is still unknown."""
        process = self.processes.get(process_id)
        if process is not None and process.build is not None and process.welcome is None:
            self._welcome(process)

    def _welcome(self, process: ProcessRecord) -> None:
        rule = self.knowledge.rule(process.namespace)
        welcome = Welcome(
            version=PROTOCOL_VERSION,
            layout_version=layout.VERSION,
            enabled=self.knowledge.enabled(process.namespace) and not process.other_version,
            verbs=VERBS_VERSION,
            **asdict(rule),
        )
        if welcome != process.welcome:
            process.welcome = welcome
            self._outbox.send(process.id, welcome)
        early, process.early = process.early, []
        for request in early:
            self.request(process.id, request)

    def replace_snapshot(self, knowledge: Knowledge) -> None:
        """Apply a new snapshot to processes, requests and connections."""
        before, self._registry.knowledge = self.knowledge, knowledge
        if before.accelerated - knowledge.accelerated or before.remote - knowledge.remote:
            self.arena_table.leave_networks()
        for process in list(self.processes.values()):
            if process.build is None:
                continue
            if process.welcome is not None or knowledge.is_endpoint(process.namespace):
                self._welcome(process)
        for waiting in self.requests:
            network = knowledge.network_of(waiting.namespace, waiting.message.local.ip)
            if network is None or network.id != waiting.network or not network.accelerated:
                self.refuse(waiting, why_not(network, before.networks.get(waiting.network)))
        self.verbs.replace_snapshot()
        self.verbs_connections.replace_snapshot()
        self.groups.replace_snapshot()
        self.datagrams.replace_snapshot()

    def gone(self, process_id: int) -> None:
        """A process has closed its connection: it has ended, or sent something invalid."""
        self.verbs_connections.gone(process_id)
        self.groups.gone(process_id)
        self.datagrams.gone(process_id)
        self.direct_memory.gone(process_id)
        self.verbs.gone(process_id)
        process = self._registry.remove(process_id)
        for waiting in list(process.waiting.values()):
            self.requests.remove(waiting)
        self.arena_table.process_gone(process)
        if process.namespace in self.containers:
            self._registry.forget_if_unused(process.namespace)

    # --- requests

    def request(self, process_id: int, request: Request) -> None:
        """Match a request, let it wait, or refuse it.

        Raises:
            WrongMessage: the process has not sent HELLO.
        """
        process = self.processes[process_id]
        if process.build is None:
            raise WrongMessage("REQUEST before HELLO")
        if process.other_version:
            self._registry.refuse(process_id, request, Reason.OFF)
            return
        if process.welcome is None and len(process.early) < EARLY:
            process.early.append(request)
            return
        admitted = self._admission.admit(process, request)
        if isinstance(admitted, Reason):
            self._registry.refuse(process_id, request, admitted)
            return
        network, server = admitted
        waiting = PairRequest(
            process_id,
            process.namespace,
            request,
            network.id,
            self._clock(),
            is_remote=(server or request.remote).ip not in network.owners,
            server=server,
        )
        self.requests.add(waiting)
        if waiting.is_remote:
            self.remote.pair(waiting, network)
        else:
            self._match(waiting, network)

    def _match(self, waiting: PairRequest, network: KnownNetwork) -> None:
        """Grant a request and its partner, if there is one that can only be the other end."""
        partners = list(self.requests.partners(waiting, network))
        if not partners:
            return
        if len(partners) > 1 or not self._admission.is_sure(waiting, partners[0], network):
            for request in (waiting, *partners):
                request.ambiguous = True
            return
        partner = partners[0]
        why = self._admission.why_apart(network, waiting, partner)
        if why is not None:
            self.refuse(waiting, why)
            self.refuse(partner, why)
            return
        ends = Counter((waiting.namespace, partner.namespace))
        if self._registry.share_too_much(waiting.namespace, partner.namespace) or any(
            self._registry.is_full(namespace, more) for namespace, more in ends.items()
        ):
            self.refuse(waiting, Reason.LIMIT)
            self.refuse(partner, Reason.LIMIT)
            return
        self._grant(waiting, partner)

    def refuse(self, waiting: PairRequest, reason: Reason) -> None:
        """End a request's wait: the connection stays on TCP."""
        self.requests.remove(waiting)
        if waiting.process in self.processes:
            self._registry.refuse(waiting.process, waiting.message, reason)

    # --- grants

    def _grant(self, one: PairRequest, other: PairRequest) -> None:
        """Give both ends of a connection a slot of their processes' arena."""
        self.requests.remove(one)
        self.requests.remove(other)
        if other.process < one.process:
            one, other = other, one
        try:
            arena, slot = self._slots.take(_end(one), _end(other))
        except KernelRefused:
            for end in (one, other):
                self._registry.refuse(end.process, end.message, Reason.MEMORY)
            return
        self.arena_table.check_later(arena, slot)
        self.counts.granted += 1
        self._slots.hand_out(arena, _message(one, arena, slot, 0), _message(other, arena, slot, 1))

    # --- connections to other hosts, for `remote.py`

    def is_full(self, namespace: int) -> bool:
        """Whether a container has as many connections in shared memory as it may."""
        return self._registry.is_full(namespace)

    def why_apart(self, waiting: PairRequest) -> Reason | None:
        """Why the end may not be what another host takes it for; None: it is."""
        network = self.knowledge.network_of(waiting.namespace, waiting.message.local.ip)
        if network is None or network.id != waiting.network:
            return Reason.NO_ENDPOINT
        return self._admission.why_apart(network, waiting)

    def reserve(self, waiting: PairRequest, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot for a connection to another host. Its process is not told yet.

        Raises:
            KernelRefused: there is no memory for it.
        """
        return self._slots.take_remote(_end(waiting), ring, connection)

    def grant(self, waiting: PairRequest, arena: Arena, slot: int) -> None:
        """Tell a process that it may use the slot that was taken for it."""
        waiting.is_remote = False
        self.requests.remove(waiting)
        self.counts.granted += 1
        self.arena_table.hold(_end(waiting), arena, slot, 0)
        self.arena_table.check_later(arena, slot)
        self._slots.hand_out_remote(arena, _message(waiting, arena, slot, 0))

    def release_end(self, arena: Arena, slot: int, side: int) -> None:
        """A side is done with a slot."""
        if slot in arena.slots:
            self.arena_table.release(arena, slot, side)
        self.arena_table.close_if_done(arena)

    def retire_remote(self) -> None:
        """The relay has ended: no connection gets a slot of an arena that it had mapped."""
        self.arena_table.retire_remote()

    def close_relay_bells(self, arena: Arena) -> None:
        """The relay that had this arena has ended: its bells can't be rung any more."""
        self._bells.close_side(arena.sides[RELAY_SIDE])

    # --- other messages of processes

    def release(self, process_id: int, message: Release) -> None:
        """A side is done with a slot. An unknown slot is fine: the router may have been restarted.

        Raises:
            WrongMessage: the token isn't that of a side of the arena.
        """
        arena = self.arenas.get(message.arena)
        if arena is None:
            return
        side = self.arena_table.side_of(process_id, arena, message.token)
        slot = arena.slots.get(message.slot)
        if (
            slot is None
            or (arena.ring and side == RELAY_SIDE)
            or slot.incarnation != message.incarnation
        ):
            return
        match slot.ends[side]:
            case None:
                pass
            case QueuePairRecord() as queue_pair:
                self.verbs.release(process_id, queue_pair)
            case DatagramEnd() as end:
                self.datagrams.release(process_id, end)
            case FarDatagrams() as end:
                self.datagrams.far.release(process_id, end)
            case _:
                self.release_end(arena, message.slot, side)

    def bell(self, process_id: int, message: Bell) -> None:
        """Make a bell, in place of one that had its index.

        Raises:
            WrongMessage: no such index, or the token isn't that of the side.
        """
        arena = self._arena_of_bell(process_id, message, 0)
        self._bells.answer(process_id, message, arena)

    def fetch(self, process_id: int, message: Fetch) -> None:
        """Ring a bell of the other side, and hand it out.

        Raises:
            WrongMessage: no such index, or the token isn't that of the bell's other side.
        """
        arena = self._arena_of_bell(process_id, message, 1)
        self._bells.fetch(process_id, message, arena)

    def _arena_of_bell(self, process_id: int, message: Bell | Fetch, across: int) -> Arena | None:
        """The arena, if it is known. `across`: 1 if the bell has to be one of the other side."""
        kind = type(message).__name__.upper()
        if message.index >= layout.BELLS:
            raise WrongMessage(f"{kind} {message.index}", cause=f"a side has {layout.BELLS} bells")
        arena = self.arenas.get(message.arena)
        if arena is None:
            return None
        side = self.arena_table.side_of(process_id, arena, message.token)
        if message.side != side ^ across:
            raise WrongMessage(f"arena {arena.id}: {kind} of side {message.side} by side {side}")
        return arena

    def note(self, process_id: int, message: Note) -> None:
        """Note why a connection stays on TCP, or that it has ended: its request doesn't wait.

        Raises:
            WrongMessage: no such reason.
        """
        if message.reason not in _TOLD:
            raise WrongMessage(f"NOTE of unknown reason {message.reason}")
        process = self.processes[process_id]
        container = self.containers[process.namespace]
        waiting = container.waiting.get(message.cookie)
        if waiting is not None:
            self.requests.remove(waiting)
        self.counts.noted[message.reason] += 1
        known, _ = container.notes.get(message.cookie, (Reason.NONE, 0.0))
        if message.reason == Reason.NONE:
            container.notes.pop(message.cookie, None)
        elif message.reason != told(Reason(known)):
            # Otherwise it repeats what it was told, and the note says more.
            self._registry.note(process, message.cookie, message.reason)

    # --- time

    def weigh(self) -> None:
        """Measure the memory that each container's arenas use. About once a second."""
        self.arena_table.weigh()

    def sweep(self, most: int) -> None:
        """Check requests and slots that are due: those whose sockets are gone go too."""
        now = self._clock()
        self.requests.sweep(now, most)
        self.arena_table.sweep(now, most)
        self.verbs.sweep()
        self.verbs_connections.sweep()
        self.groups.sweep()


def _end(waiting: PairRequest) -> ConnectionEnd:
    request = waiting.message
    return ConnectionEnd(
        waiting.process,
        waiting.namespace,
        request.cookie,
        waiting.network,
        request.local,
        request.remote,
    )


def _message(waiting: PairRequest, arena: Arena, slot: int, side: int) -> Grant:
    return Grant(
        connection=waiting.message.connection,
        cookie=waiting.message.cookie,
        arena=arena.id,
        incarnation=arena.slots[slot].incarnation,
        token=arena.sides[side].token,
        side=side,
        slot=slot,
    )
