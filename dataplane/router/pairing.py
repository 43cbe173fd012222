"""Who is paired with whom: asks, arenas, slots, bells, and what each container may have.

The two ends of one connection ask, each for itself, and are matched by their addresses; if one is on another host, by
`remote.py` behind the seam `away.py`. A client that connects to a VIP sees another address than its server does. Only the
connection tracking of the client's own namespace says which task such a connection leads to. A socket in a task's namespace
proves nothing: the task's root can make one with any addresses. Without that answer the connection stays on TCP. One source
port may also serve two connections, one to a task and one to its VIP: then the kernel can't say which is which, and both
stay on TCP.

No I/O but through the three seams. No request costs more than a look-up, or one per task of a service on this host.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from dataplane.control import Limits
from dataplane.errors import KernelRefused, WrongMessage
from dataplane.router import layout
from dataplane.router.agenda import Agenda
from dataplane.router.arenas import Arena, ConnectionEnd, Side
from dataplane.router.away import RELAY, Away, Nowhere
from dataplane.router.knowledge import Knowledge, Network
from dataplane.router.library_wire import (
    PROTOCOL_VERSION,
    Address,
    Bell,
    Fetch,
    Grant,
    Hear,
    Hello,
    IPAddress,
    Note,
    Refuse,
    Release,
    Request,
    Ring,
    Welcome,
)
from dataplane.router.limits import Bucket
from dataplane.router.pair_requests import Key, PairRequest
from dataplane.router.reasons import STATUS_ONLY, Reason
from dataplane.router.seams import ArenaMemory, Outbox, SocketTable

RELAY_SIDE: Final = 1
"""Of a remote arena."""
NOTES: Final = 16384
"""Per container: the oldest are forgotten."""
EARLY: Final = 64
"""Asks per process that are kept until its container is known."""
ASK_AGE: Final = 5.0
"""Seconds after which it is looked whether the socket of a waiting ask still lives."""
SLOT_AGE: Final = 30.0
"""The same for the sockets of a slot. Two looks that find neither free it, whatever its processes say."""
RARELY: Final = 300.0
"""Seconds between two such looks at most."""
_TOLD: Final = frozenset(reason.value for reason in Reason if reason < STATUS_ONLY)


@dataclass(slots=True, eq=False)
class Process:
    """One connection to the router."""

    id: int
    namespace: int
    pid: int
    build: str | None = None
    """None until HELLO."""
    welcome: Welcome | None = None
    other_version: bool = False
    """Its library is older or newer than this router."""
    early: list[Request] = field(default_factory=list)
    """Asks from before it was welcomed."""
    waiting: dict[int, PairRequest] = field(default_factory=dict)
    """By cookie."""
    arenas: dict[int, Arena] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Container:
    """What one network namespace has."""

    namespace: int
    asks: Bucket
    processes: dict[int, Process] = field(default_factory=dict)
    waiting: dict[int, PairRequest] = field(default_factory=dict)
    """By cookie."""
    ends: dict[int, tuple[Arena, int, int]] = field(default_factory=dict)
    """Cookie to arena, slot and side."""
    notes: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Cookie to reason and when."""
    sides: int = 0
    """Of arenas. While it has one it is kept, with or without processes."""
    bells: int = 0
    memory: Counter[int] = field(default_factory=Counter)
    """Bytes of arenas, by the namespace at their other side."""

    def holds(self, most: int) -> int:
        """Bytes of arenas. Of what it shares with one other container half of the limit counts at most."""
        return sum(
            used if other == self.namespace else min(used, most // 2)
            for other, used in self.memory.items()
        )


@dataclass(slots=True)
class PairingCounts:
    """Since the start."""

    granted: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    noted: Counter[int] = field(default_factory=Counter)


class Pairing:
    """The registry. One thread uses it."""

    def __init__(
        self,
        post: Outbox,
        kernel: SocketTable,
        memory: ArenaMemory,
        *,
        clock: Callable[[], float],
        secret: Callable[[], int],
    ) -> None:
        self._post = post
        self._kernel = kernel
        self._memory = memory
        self._clock = clock
        self._secret = secret
        self.knowledge = Knowledge()
        self.processes: dict[int, Process] = {}
        self.containers: dict[int, Container] = {}
        self.arenas: dict[int, Arena] = {}
        self.counts = PairingCounts()
        self.away: Away = Nowhere()
        self._waiting: dict[Key, PairRequest] = {}
        self._pairs: dict[tuple[int, int], dict[int, Arena]] = {}
        """Arenas of two processes that have a free slot."""
        # Processes may still have arenas of a router before this one: no number of theirs comes again.
        self._ids = itertools.count(secret() >> 2)
        self._incarnations = itertools.count(1)
        self._sweep_asks: Agenda[PairRequest] = Agenda(ASK_AGE, RARELY)
        self._sweep_slots: Agenda[tuple[Arena, int, int]] = Agenda(SLOT_AGE, RARELY)

    # --- processes

    @property
    def limits(self) -> Limits:
        """What is set."""
        return self.knowledge.settings.limits

    def connected(self, process_id: int, namespace: int, pid: int) -> bool:
        """A process has connected; false if its container has too many."""
        container = self.containers.get(namespace)
        if container is None:
            bucket = Bucket.full(self.limits.asks, self._clock())
            container = self.containers[namespace] = Container(namespace, bucket)
        elif len(container.processes) >= self.limits.processes:
            return False
        process = Process(process_id, namespace, pid)
        self.processes[process_id] = container.processes[process_id] = process
        return True

    def hello(self, process_id: int, message: Hello) -> None:
        """Answer with the settings, or later: a container that just came may not be known yet.

        A library of another version hears that it is to stay on TCP: its container was started with that of another plugin.

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
        """Its namespace is still no endpoint's: say so."""
        process = self.processes.get(process_id)
        if process is not None and process.build is not None and process.welcome is None:
            self._welcome(process)

    def _welcome(self, process: Process) -> None:
        rule = self.knowledge.rule(process.namespace)
        welcome = Welcome(
            version=PROTOCOL_VERSION,
            layout_version=layout.VERSION,
            enabled=self.knowledge.enabled(process.namespace) and not process.other_version,
            operations=rule.operations,
            age=rule.age,
            bytes=rule.bytes,
            bulk=rule.bulk,
            spin=rule.spin,
            ring_limit=rule.ring_limit,
        )
        if welcome != process.welcome:
            process.welcome = welcome
            self._post.send(process.id, welcome)
        early, process.early = process.early, []
        for request in early:
            self.request(process.id, request)

    def replace_snapshot(self, knowledge: Knowledge) -> None:
        """The driver knows something new: tell those whom it concerns."""
        before, self.knowledge = self.knowledge, knowledge
        if before.accelerated - knowledge.accelerated or before.remote - knowledge.remote:
            self._part()
        for process in list(self.processes.values()):
            if process.build is None:
                continue
            if process.welcome is not None or knowledge.is_endpoint(process.namespace):
                self._welcome(process)
        for waiting in list(self._waiting.values()):
            network = knowledge.network_of(waiting.namespace, waiting.request.local.ip)
            if network is None or network.id != waiting.network or not network.accelerated:
                self._forget(waiting)
                self._refuse(waiting.process, waiting.request, _why_not(network))

    def _part(self) -> None:
        """Connections whose containers aren't on an accelerated network any more go on over TCP, where that leads."""
        for arena in self.arenas.values():
            for number, slot in arena.slots.items():
                if slot.left or all(
                    end is None
                    or end.namespace == RELAY
                    or (end.namespace, end.local.ip) in self._kept(arena)
                    for end in slot.ends
                ):
                    continue
                slot.left = True
                if arena.ring:
                    self.away.part(slot.connection)
                else:
                    self._memory.leave(arena.memory, number)

    def _kept(self, arena: Arena) -> frozenset[tuple[int, IPAddress]]:
        return self.knowledge.remote if arena.ring else self.knowledge.accelerated

    def gone(self, process_id: int) -> None:
        """A process has closed its connection: it has ended, or done something wrong."""
        process = self.processes.pop(process_id)
        container = self.containers[process.namespace]
        del container.processes[process_id]
        for waiting in list(process.waiting.values()):
            self._forget(waiting)
        for arena in list(process.arenas.values()):
            if process_id in arena.pair:
                self._pairs.pop(arena.pair, None)
            for number, side in enumerate(arena.sides):
                side.members.discard(process_id)
                if not side.members and arena.ring:
                    if number != RELAY_SIDE:
                        self._orphan(arena)
                elif not side.members:
                    # Its children may go on with the connections without a word to us: no page goes back.
                    arena.orphaned = True
                    for slot in list(arena.slots):
                        self._release(arena, slot, number)
            self._close_if_done(arena)
        self._tidy(container)

    def _orphan(self, arena: Arena) -> None:
        """Who shares the sockets of a process that has hung up goes on with the connection on the other host."""
        arena.orphaned = True
        for number, slot in list(arena.slots.items()):
            if slot.ends[RELAY_SIDE] is None:
                self._release(arena, number, 0)
            elif slot.ends[0] is not None:
                self.away.orphaned(slot.connection)

    def _tidy(self, container: Container) -> None:
        if not container.processes and not container.sides:
            self.containers.pop(container.namespace, None)

    # --- asks

    def request(self, process_id: int, request: Request) -> None:
        """Match an ask, let it wait, or refuse it."""
        process = self.processes[process_id]
        if process.build is None:
            raise WrongMessage("REQUEST before HELLO")
        if process.other_version:
            self._refuse(process_id, request, Reason.OFF)
            return
        if process.welcome is None and len(process.early) < EARLY:
            process.early.append(request)
            return
        container = self.containers[process.namespace]
        found = self._admit(process, container, request)
        if isinstance(found, Reason):
            self._refuse(process_id, request, found)
            return
        network, server = found
        away = (server or request.remote).ip not in network.owners
        self._replace(container, (network.id, request.local, request.remote), request.cookie)
        waiting = PairRequest(
            process_id,
            process.namespace,
            request,
            network.id,
            self._clock(),
            is_remote=away,
            server=server,
        )
        self._wait(process, container, waiting)
        if away:
            self.away.wait(waiting, network)
        else:
            self._match(waiting, network)

    def _admit(
        self, process: Process, container: Container, request: Request
    ) -> tuple[Network, Address | None] | Reason:
        """The network in which the connection may be upgraded, and where a VIP's connection leads; or why not."""
        network = self.knowledge.network_of(process.namespace, request.local.ip)
        if network is None or not network.accelerated:
            return _why_not(network)
        if not container.asks.take(self._clock(), self.limits.asks):
            return Reason.LIMIT
        # First of all: the later answers would tell a process about addresses that it has no connection with.
        if not self._kernel.is_open(
            process.namespace, request.local, request.remote, request.cookie
        ):
            return Reason.NOT_FOUND
        peer = request.remote.ip
        if peer not in network.everywhere and peer not in network.owners and peer not in network:
            return Reason.FOREIGN
        server = None
        if peer in network.everywhere:
            server = self._behind_vip(process.namespace, request, network)
            if server is None:
                return Reason.UNTRACKED
            peer = server.ip
        if peer not in network.owners and (reason := self.away.why_not(network)) is not None:
            return reason
        # Whether there is room for a connection is looked at when both ends have asked, so that both are told.
        if len(container.waiting) >= self.limits.waiting:
            return Reason.LIMIT
        if request.cookie in container.ends:
            return Reason.SHARED
        return network, server

    def _behind_vip(self, namespace: int, request: Request, network: Network) -> Address | None:
        """Which task's address a client's connection to a VIP leads to, by the client's own connection tracking."""
        found = self._kernel.translated(namespace, request.local, request.remote)
        if found is None:
            return None
        server, client = found
        is_task = (
            server.ip in network.everywhere[request.remote.ip]
            and server.port == request.remote.port
        )
        return server if is_task and client == request.local else None

    def is_full(self, namespace: int) -> bool:
        """Whether a container has as many connections in shared memory as it may."""
        return self._is_full(self.containers[namespace], 1)

    def _is_full(self, container: Container, more: int) -> bool:
        """Whether so many more connections in shared memory are too many."""
        limits = self.limits
        return (
            len(container.ends) + more > limits.connections
            or container.holds(limits.memory) >= limits.memory
        )

    def _share_is_used(self, one: int, other: int) -> bool:
        """Whether two containers share as much memory as two may: half of what each may have."""
        return one != other and self.containers[one].memory[other] >= self.limits.memory // 2

    def _clients(self, request: Request, network: Network) -> list[Address]:
        """What, of all that leads to this server, its client's socket can be connected to."""
        leading = [request.local]
        leading += [
            Address(vip, request.local.port) for vip in network.vips.get(request.local.ip, ())
        ]
        namespace = network.owners[request.remote.ip]
        return [
            remote for remote in leading if self._kernel.exists(namespace, request.remote, remote)
        ]

    def _partners(self, waiting: PairRequest, network: Network) -> Iterator[PairRequest]:
        """Asks that fit."""
        local, peer = waiting.request.local, waiting.peer
        seen_as = [local, *(Address(vip, local.port) for vip in network.vips.get(local.ip, ()))]
        for remote in seen_as:
            partner = self._waiting.get((network.id, peer, remote))
            if partner is not None and partner is not waiting and partner.peer == local:
                yield partner

    def _match(self, waiting: PairRequest, network: Network) -> None:
        partners = list(self._partners(waiting, network))
        if not partners:
            return
        if len(partners) > 1 or not self._is_sure(waiting, partners[0], network):
            for each in (waiting, *partners):
                each.ambiguous = True
            return
        partner = partners[0]
        ends = Counter((waiting.namespace, partner.namespace))
        if self._share_is_used(waiting.namespace, partner.namespace) or any(
            self._is_full(self.containers[each], more) for each, more in ends.items()
        ):
            for each in (waiting, partner):
                self._forget(each)
                self._refuse(each.process, each.request, Reason.LIMIT)
            return
        self._grant(waiting, partner)

    def _is_sure(self, one: PairRequest, other: PairRequest, network: Network) -> bool:
        """Whether two asks can only be the two ends of one connection."""
        return all(
            server.request.local.ip not in network.vips
            or server.request.remote.ip not in network.owners
            or len(self._clients(server.request, network)) <= 1
            for server in (one, other)
        )

    def _replace(self, container: Container, key: Key, cookie: int) -> None:
        """An ask stands in place of older ones of the same socket, or of one that had its addresses before."""
        for old in (container.waiting.get(cookie), self._waiting.get(key)):
            if old is not None:
                self._forget(old)

    def _wait(self, process: Process, container: Container, waiting: PairRequest) -> None:
        self._waiting[waiting.key] = waiting
        process.waiting[waiting.request.cookie] = waiting
        container.waiting[waiting.request.cookie] = waiting
        self._sweep_asks.add(waiting, waiting.since)

    def _forget(self, waiting: PairRequest) -> None:
        cookie = waiting.request.cookie
        self._sweep_asks.forget(waiting)
        process = self.processes.get(waiting.process)
        if process is not None and process.waiting.get(cookie) is waiting:
            del process.waiting[cookie]
        container = self.containers.get(waiting.namespace)
        if container is not None and container.waiting.get(cookie) is waiting:
            del container.waiting[cookie]
        if self._waiting.get(waiting.key) is waiting:
            del self._waiting[waiting.key]
        if waiting.is_remote:
            self.away.forgotten(waiting)

    def refuse(self, waiting: PairRequest, reason: Reason) -> None:
        """An ask that waited for another host doesn't any more."""
        self._forget(waiting)
        if waiting.process in self.processes:
            self._refuse(waiting.process, waiting.request, reason)

    def _refuse(self, process_id: int, request: Request, reason: Reason) -> None:
        self.counts.refused[reason] += 1
        self._remember(self.processes[process_id], request.cookie, reason)
        told = reason if reason < STATUS_ONLY else Reason.REMOTE
        self._post.send(process_id, Refuse(request.connection, request.cookie, told))

    def _remember(self, process: Process, cookie: int, reason: int) -> None:
        notes = self.containers[process.namespace].notes
        notes.pop(cookie, None)
        notes[cookie] = (reason, self._clock())
        if len(notes) > NOTES:
            del notes[next(iter(notes))]

    # --- grants

    def _grant(self, one: PairRequest, other: PairRequest) -> None:
        self._forget(one)
        self._forget(other)
        if other.process < one.process:
            one, other = other, one
        incarnation = next(self._incarnations)
        try:
            arena = self._arena(one, other)
            self._memory.prepare(arena.memory, arena.free[-1], incarnation)
        except KernelRefused:
            self._refuse(one.process, one.request, Reason.MEMORY)
            self._refuse(other.process, other.request, Reason.MEMORY)
            return
        ends = (_end(one), _end(other))
        slot = arena.take(incarnation, self._clock(), ends)
        if not arena.free:
            self._withdraw(arena)
        self._sweep_slots.add((arena, slot, incarnation), self._clock())
        self.counts.granted += 1
        for side, waiting in enumerate((one, other)):
            self._hold(waiting, arena, slot, side)
            arena.sides[side].members.add(waiting.process)
            self.processes[waiting.process].arenas[arena.id] = arena
        for side, waiting in enumerate((one, other)):
            self._say_grant(waiting, arena, slot, side)
        if not arena.rung:
            arena.rung = True
            for side, waiting in enumerate((other, one)):
                self._hand_out(arena, side, waiting.process)

    def _hold(self, waiting: PairRequest, arena: Arena, slot: int, side: int) -> None:
        container = self.containers[waiting.namespace]
        container.ends[waiting.request.cookie] = (arena, slot, side)
        container.notes.pop(waiting.request.cookie, None)

    def _say_grant(self, waiting: PairRequest, arena: Arena, slot: int, side: int) -> None:
        grant = Grant(
            connection=waiting.request.connection,
            cookie=waiting.request.cookie,
            arena=arena.id,
            incarnation=arena.slots[slot].incarnation,
            token=arena.sides[side].token,
            side=side,
            slot=slot,
        )
        # With the memory each time: a process unmaps an arena with its last connection, and says so a moment later.
        of_side = arena.sides[side]
        bells = () if of_side.hears is None else (of_side.hears,)
        self._post.send(waiting.process, grant, arena.memory, *bells)
        self._deaf_now(of_side)

    def _deaf_now(self, side: Side) -> None:
        """The end that hears bell 0 is its process's alone from now on."""
        if side.hears is not None:
            self._memory.close_hearing(side.hears)
            side.hears = None

    def _hand_out(self, arena: Arena, side: int, process: int) -> None:
        """Give a process what rings bell 0 of a side, once. Nobody has it before the router has closed the other end."""
        descriptor = arena.sides[side].bells.get(0)
        if descriptor is not None:
            self._post.send(process, Ring(0, arena.id, side), descriptor)

    # --- what `remote.py` does here

    def place(self, waiting: PairRequest, ring: int, connection: int) -> tuple[Arena, int]:
        """A slot for a connection to another host, whose process doesn't hear of it yet.

        Raises:
            KernelRefused: there is no memory for it.
        """
        pair = (waiting.process, -ring)
        of_pair = self._pairs.get(pair)
        arena = next(reversed(of_pair.values())) if of_pair else self._remote_arena(waiting, ring)
        incarnation = next(self._incarnations)
        self._memory.prepare(arena.memory, arena.free[-1], incarnation)
        relay = ConnectionEnd(
            RELAY, RELAY, 0, waiting.network, waiting.request.local, waiting.request.remote
        )
        slot = arena.take(incarnation, self._clock(), (_end(waiting), relay))
        arena.slots[slot].connection = connection
        if not arena.free:
            self._withdraw(arena)
        arena.sides[0].members.add(waiting.process)
        self.processes[waiting.process].arenas[arena.id] = arena
        return arena, slot

    def grant(self, waiting: PairRequest, arena: Arena, slot: int) -> None:
        """Its process may use the slot."""
        waiting.is_remote = False
        self._forget(waiting)
        self.counts.granted += 1
        self._hold(waiting, arena, slot, 0)
        self._sweep_slots.add((arena, slot, arena.slots[slot].incarnation), self._clock())
        self._say_grant(waiting, arena, slot, 0)
        if not arena.rung:
            arena.rung = True
            self._hand_out(arena, RELAY_SIDE, waiting.process)

    def end(self, arena: Arena, slot: int, side: int) -> None:
        """A side of a remote arena is done with a slot."""
        if slot in arena.slots:
            self._release(arena, slot, side)
        self._close_if_done(arena)

    def retire_remote(self) -> None:
        """The relay has ended: what it had mapped is for no connection any more."""
        for arena in [each for each in self.arenas.values() if each.ring]:
            arena.retired = True
            self._withdraw(arena)
            self._close_if_done(arena)

    def deafen(self, arena: Arena) -> None:
        """The relay that had this arena is gone: its bells can't be rung any more."""
        side = arena.sides[RELAY_SIDE]
        for descriptor in side.bells.values():
            self._close_bell(side, descriptor)
        side.bells.clear()

    def _remote_arena(self, waiting: PairRequest, ring: int) -> Arena:
        """A new arena of a process and the relay. Raises KernelRefused."""
        sides = (Side(self._secret(), waiting.namespace), Side(self._secret(), RELAY))
        memory = self._memory.make(ring, True)
        try:
            hears, rings = self._memory.make_bell()
        except KernelRefused:
            self._memory.close(memory)
            raise
        arena = Arena(next(self._ids), memory, (waiting.process, -ring), sides, ring=ring)
        if RELAY not in self.containers:
            self.containers[RELAY] = Container(RELAY, Bucket.full(0, self._clock()))
        self.arenas[arena.id] = arena
        for side in sides:
            self.containers[side.namespace].sides += 1
        self._pairs.setdefault(arena.pair, {})[arena.id] = arena
        self.containers[RELAY].bells += 1
        sides[RELAY_SIDE].bells[0] = rings
        self.away.opened(arena, hears)
        sides[0].hears = self._make_bell(sides[0], 0)
        if sides[0].hears is not None:
            self.away.bell(arena.id, 0, sides[0].bells[0])
        return arena

    def _arena(self, one: PairRequest, other: PairRequest) -> Arena:
        """The arena of two processes that has a free slot. Raises KernelRefused."""
        pair = (one.process, other.process)
        of_pair = self._pairs.get(pair)
        if of_pair:
            return next(reversed(of_pair.values()))
        sides = (Side(self._secret(), one.namespace), Side(self._secret(), other.namespace))
        arena = Arena(next(self._ids), self._memory.make(), pair, sides)
        self.arenas[arena.id] = arena
        for side in sides:
            self.containers[side.namespace].sides += 1
            side.hears = self._make_bell(side, 0)
        self._pairs.setdefault(pair, {})[arena.id] = arena
        return arena

    def release(self, process_id: int, message: Release) -> None:
        """A side is done with a slot. Unknown is fine: the router may have started anew.

        Raises:
            WrongMessage: the token isn't that of a side of the arena.
        """
        arena = self.arenas.get(message.arena)
        if arena is None:
            return
        side = self._speaks(process_id, arena, message.token)
        slot = arena.slots.get(message.slot)
        if (
            slot is None
            or (arena.ring and side == RELAY_SIDE)
            or slot.incarnation != message.incarnation
            or slot.ends[side] is None
        ):
            return
        self._release(arena, message.slot, side)
        self._close_if_done(arena)

    def _speaks(self, process_id: int, arena: Arena, token: int) -> int:
        """The side for which a process may speak; from now on it is one of it."""
        process = self.processes[process_id]
        side = arena.side_of(token, process.namespace)
        if side is None:
            raise WrongMessage(f"arena {arena.id}: the token is of neither side in this container")
        if process_id not in arena.sides[side].members:
            arena.sides[side].members.add(process_id)
            process.arenas[arena.id] = arena
        return side

    def _release(self, arena: Arena, number: int, side: int) -> None:
        slot = arena.slots[number]
        end, free = arena.release(number, side)
        if free:
            self._sweep_slots.forget((arena, number, slot.incarnation))
        if arena.retired:
            self._withdraw(arena)
        elif free and all(each in self.processes or each < 0 for each in arena.pair):
            self._pairs.setdefault(arena.pair, {})[arena.id] = arena
        if end is not None and end.namespace != RELAY:
            ends = self.containers[end.namespace].ends
            if ends.get(end.cookie) == (arena, number, side):
                del ends[end.cookie]
            if arena.ring:
                self.away.released(slot.connection)
        if free and not arena.orphaned:
            self._memory.reclaim(arena.memory, number)

    def _withdraw(self, arena: Arena) -> None:
        """No connection gets a slot of it, for now or for ever."""
        of_pair = self._pairs.get(arena.pair, {})
        of_pair.pop(arena.id, None)
        if not of_pair:
            self._pairs.pop(arena.pair, None)

    def _close_if_done(self, arena: Arena) -> None:
        if not arena.done or arena.id not in self.arenas:
            return
        del self.arenas[arena.id]
        self._withdraw(arena)
        for side in arena.sides:
            self._deaf_now(side)
        for side, descriptor in arena.bells():
            self._close_bell(side, descriptor)
        if arena.ring:
            self.away.closed(arena)
        self._account(arena, 0)
        self._memory.close(arena.memory)
        for side in arena.sides:
            for member in side.members:
                self.processes[member].arenas.pop(arena.id, None)
            container = self.containers[side.namespace]
            container.sides -= 1
            self._tidy(container)

    # --- bells

    def _make_bell(self, side: Side, index: int) -> int | None:
        """A new bell of a side: its hearing end; None if there is none to be had."""
        container = self.containers[side.namespace]
        if container.bells >= self.limits.bells:
            return None
        try:
            hears, side.bells[index] = self._memory.make_bell()
        except KernelRefused:
            return None
        container.bells += 1
        return hears

    def bell(self, process_id: int, message: Bell) -> None:
        """Make a bell, in place of one that had its index.

        Raises:
            WrongMessage: no such index, or the token isn't that of the side.
        """
        if message.index >= layout.BELLS:
            raise WrongMessage(f"BELL {message.index}; a side has {layout.BELLS}")
        answer = Hear(message.index, message.arena, message.side)
        arena = self.arenas.get(message.arena)
        if arena is None:
            self._post.send(process_id, answer)
            return
        number = self._speaks(process_id, arena, message.token)
        if message.side != number:
            raise WrongMessage(f"arena {arena.id}: BELL of side {message.side} by side {number}")
        side = arena.sides[number]
        old = side.bells.pop(message.index, None)
        if old is not None:
            self._close_bell(side, old)
        hears = self._make_bell(side, message.index)
        if hears is None:
            self._post.send(process_id, answer)
            return
        self._post.send(process_id, answer, hears)
        self._memory.close_hearing(hears)
        if arena.ring:
            self.away.bell(arena.id, message.index, side.bells[message.index])

    def fetch(self, process_id: int, message: Fetch) -> None:
        """Ring a bell of the other side, and hand it out. Its owner waits with no bell that isn't known here.

        Raises:
            WrongMessage: no such index, or the token isn't that of the bell's other side.
        """
        if message.index >= layout.BELLS:
            raise WrongMessage(f"FETCH {message.index}; a side has {layout.BELLS}")
        answer = Ring(message.index, message.arena, message.side)
        arena = self.arenas.get(message.arena)
        if arena is None:
            self._post.send(process_id, answer)
            return
        speaks = self._speaks(process_id, arena, message.token)
        if message.side != 1 - speaks:
            raise WrongMessage(f"arena {arena.id}: FETCH of side {message.side} by side {speaks}")
        descriptor = arena.sides[message.side].bells.get(message.index)
        if descriptor is None:
            self._post.send(process_id, answer)
            return
        self._memory.ring(descriptor)
        self._post.send(process_id, answer, descriptor)

    def _close_bell(self, side: Side, descriptor: int) -> None:
        self._memory.close_bell(descriptor)
        self.containers[side.namespace].bells -= 1

    # --- notes and time

    def note(self, process_id: int, message: Note) -> None:
        """Why a connection stays on TCP, or that it has ended: it doesn't wait any more.

        Raises:
            WrongMessage: no such reason.
        """
        if message.reason not in _TOLD:
            raise WrongMessage(f"NOTE of unknown reason {message.reason}")
        process = self.processes[process_id]
        container = self.containers[process.namespace]
        waiting = container.waiting.get(message.cookie)
        if waiting is not None:
            self._forget(waiting)
        self.counts.noted[message.reason] += 1
        if message.reason == Reason.NONE:
            container.notes.pop(message.cookie, None)
        else:
            self._remember(process, message.cookie, message.reason)

    def weigh(self) -> None:
        """See how much memory each container's arenas use. About once a second."""
        for arena in self.arenas.values():
            used = self._memory.used(arena.memory)
            self._account(arena, used if arena.ring else min(used, _needed(arena)))

    def _account(self, arena: Arena, used: int) -> None:
        """Both containers bear it; an arena within one counts once."""
        namespaces = [side.namespace for side in arena.sides]
        for namespace, other in {(namespaces[0], namespaces[1]), (namespaces[1], namespaces[0])}:
            memory = self.containers[namespace].memory
            memory[other] += used - arena.used
            if not memory[other]:
                del memory[other]
        arena.used = used

    def sweep(self, most: int) -> None:
        """Look at asks and slots that are due: those whose sockets are gone, without a word, go too."""
        now = self._clock()
        self._sweep_asks.look(now, most, self._still_waits)
        self._sweep_slots.look(now, most, self._still_used)

    def _still_waits(self, waiting: PairRequest) -> bool:
        if self._waiting.get(waiting.key) is not waiting:
            return False
        request = waiting.request
        if self._kernel.is_open(waiting.namespace, request.local, request.remote, request.cookie):
            return True
        self._forget(waiting)
        return False

    def _still_used(self, slot_of: tuple[Arena, int, int]) -> bool:
        arena, number, incarnation = slot_of
        slot = arena.slots.get(number)
        if slot is None or slot.incarnation != incarnation:
            return False
        if any(
            end is not None
            and end.namespace != RELAY
            and self._kernel.exists(end.namespace, end.local, end.remote)
            for end in slot.ends
        ):
            slot.lost = False
            return True
        if not slot.lost:
            # A reset may have ended both while there is something to read.
            slot.lost = True
            return True
        # The relay's side ends by its own word.
        for side in range(1 if arena.ring else layout.SIDES):
            if number in arena.slots:
                self._release(arena, number, side)
        self._close_if_done(arena)
        return False


def _end(waiting: PairRequest) -> ConnectionEnd:
    request = waiting.request
    return ConnectionEnd(
        waiting.process,
        waiting.namespace,
        request.cookie,
        waiting.network,
        request.local,
        request.remote,
    )


def _needed(arena: Arena) -> int:
    """Bytes that its slots in use and all headers can need. What a side writes elsewhere is in the books of its own cgroup alone."""
    return layout.BULK_OFFSET + len(arena.slots) * layout.SIDES * layout.RING_SIZE


def _why_not(network: Network | None) -> Reason:
    return Reason.FOREIGN if network is None else Reason.OFF
