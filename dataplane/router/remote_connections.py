"""Ends of connections to other hosts: makes events of what happens, and executes the actions of
`remote_end.py`.

A connection has a number, which is the relay's and is never used twice. Its memory is used again
only after its process has released the slot and the relay has dropped it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from dataplane.errors import KernelRefused
from dataplane.router import layout, peer_wire, relay_wire, remote_end
from dataplane.router.arenas import Arena, SlotEnd
from dataplane.router.library_wire import IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Loop, Timer
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import RelayKind
from dataplane.router.remote_events import (
    TIMED,
    Action,
    Do,
    Drop,
    EndState,
    Event,
    On,
    Phase,
    RefuseRequest,
    Tell,
    Transport,
)
from dataplane.router.remote_hosts import PeerSessions, RemoteHost
from dataplane.router.remote_matches import (
    LocalUser,
    Match,
    RemoteUser,
    RemoteUsers,
    reason_of,
)
from dataplane.router.remote_room import RemoteRoom
from dataplane.router.seams import ArenaMemory

log = structlog.get_logger()

STEP: Final = 10.0
"""Seconds in one phase, while the relay or the peer has to answer."""
ORPHAN_LEAST: Final = 0.05
ORPHAN_MOST: Final = 2.0
"""Seconds between two checks whether a process still has the socket of one that has hung up."""
_PER_SLOT: Final = layout.SIDES * layout.PAGE
_REMEMBERED: Final = 65536


@dataclass(slots=True, eq=False)
class RemoteConnection:
    """One end, here, of a connection to another host."""

    number: int
    host: RemoteHost
    leads: bool
    offer: int
    users: RemoteUsers[Any]
    user: LocalUser
    end: SlotEnd
    arena: Arena
    slot: int
    state: EndState = field(default_factory=EndState)
    peer_process: int = 0
    """Leader: the follower's number of the process at the other end."""
    timer: Timer | None = None

    @property
    def bytes(self) -> int:
        """The memory that is registered for it with the RDMA device."""
        if self.state.transport is not Transport.RDMA:
            return 0
        return layout.SIDES * self.arena.ring + _PER_SLOT


@dataclass(slots=True)
class ConnectionCounts:
    """Since the start."""

    granted: int = 0
    broken: int = 0
    left: int = 0
    """Went back to TCP."""


@dataclass(slots=True, eq=False)
class _HostConnections:
    connections: dict[int, RemoteConnection] = field(default_factory=dict)
    taken: dict[int, RemoteConnection] = field(default_factory=dict)
    """Leader: by the offer of the follower, until they are dropped."""
    broken: dict[int, None] = field(default_factory=dict)
    """Leader: offers whose connection was granted here and then reset. A follower that has not
    heard of it must not go back to TCP."""


Trace = Callable[[RemoteConnection, EndState, Event, tuple[Action, ...]], None]
"""Connection with its new state, state before, event, actions that follow."""


def log_invalid(
    connection: RemoteConnection, before: EndState, event: Event, _: tuple[Action, ...]
) -> None:
    """Note that somebody doesn't keep to the protocol."""
    rule = remote_end.rule_for(before.phase, event.on)
    if isinstance(rule, remote_end.Invalid):
        log.debug(
            "invalid event ignored",
            connection=connection.number,
            peer=str(connection.host.address),
            phase=before.phase.value,
            received=event.on.name.lower(),
            reason=rule.why,
        )


def note_left(connections: Iterable[RemoteConnection], reason: Reason | None) -> None:
    """Note why a host brings connections back to TCP."""
    for one in connections:
        slot = one.arena.slots.get(one.slot)
        if slot is not None and slot.connection == one.number:
            slot.why_left = reason or Reason.NONE


Reported = relay_wire.Offered | relay_wire.RelayOutcome | relay_wire.Number


def transport_of(connection: RemoteConnection | None) -> Transport:
    """The transport of a connection; of one that is over, any."""
    return Transport.RDMA if connection is None else connection.state.transport


def why_stalled(connection: RemoteConnection | None, links: Links) -> Reason | None:
    """Why a connection that was granted carries nothing, for now or for good; None: it does."""
    if connection is None or connection.state.phase is Phase.DROPPING:
        return Reason.BROKEN
    if connection.state.received:
        return Reason.BROKEN if connection.state.sent else Reason.PEER_CLOSED
    return None if links.is_up(connection.host.address) else Reason.NO_LINK


def event_of(message: Reported) -> Event | None:
    """What it means for a connection that the relay reports something; None: nothing."""
    match message:
        case relay_wire.Offered(error=0):
            return Event(On.PLACED, place=message.words)
        case relay_wire.Offered():
            log.warning("relay refused a slot", reason=message.text, error=message.error)
            return Event(On.PLACE_FAILED)
        case relay_wire.RelayOutcome(error=0):
            return Event(On.PAIRED)
        case relay_wire.RelayOutcome():
            log.warning("relay can't pair a connection", reason=message.text)
            return Event(On.PAIR_FAILED)
        case relay_wire.Number(kind=RelayKind.ENDED | RelayKind.FINISHED, state=relay_wire.BROKEN):
            return Event(On.PATH_BROKEN)
        case relay_wire.Number():
            on = _REPORTS.get(message.kind)
            return None if on is None else Event(on)


_REPORTS: Final[Mapping[int, On]] = {
    RelayKind.DROPPED: On.DROPPED,
    RelayKind.LEFT: On.PATH_LEFT,
    RelayKind.ENDED: On.ALL_RECEIVED,
    RelayKind.FINISHED: On.ALL_SENT,
}


class RemoteConnections:
    """See the module."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sessions: PeerSessions,
        tell_relay: Callable[..., None],
        users: Sequence[RemoteUsers[Any]],
        links: Links,
        memory: ArenaMemory,
        trace: Trace = log_invalid,
    ) -> None:
        self._pairing = pairing
        self._loop = loop
        self._sessions = sessions
        self._tell_relay = tell_relay
        self._users = users
        self._links = links
        self._memory = memory
        self._trace = trace
        self._connections: dict[int, RemoteConnection] = {}
        self._of: defaultdict[IPAddress, _HostConnections] = defaultdict(_HostConnections)
        self._numbers = itertools.count(1)
        self.counts = {transport: ConnectionCounts() for transport in Transport}
        self.room = RemoteRoom()
        self._actions: dict[Do, Callable[[RemoteConnection], None]] = {
            Do.MAKE_PLACE: self._make_place,
            Do.SEND_PLACE: self._send_place,
            Do.CHECK_SOCKET: self._check_socket,
            Do.PAIR: self._pair,
            Do.SEND_ACCEPT: self._send_accept,
            Do.SEND_PAIRED: self._send_paired,
            Do.GRANT: self._grant,
            Do.RESTART_TIMER: self._restart_timer,
            Do.KEEP_REQUEST: lambda connection: connection.users.retry(connection.user),
            Do.FREE_SIDE: self._free_side,
            Do.CLOSE: lambda connection: self._tell(RelayKind.CLOSE, connection),
            Do.LEAVE: lambda connection: self._tell(RelayKind.LEAVE, connection),
            Do.COUNT_BROKEN: self._count_broken,
            Do.COUNT_LEFT: self._count_left,
            Do.UNDO_GRANT: self._undo_grant,
            Do.SEVER: lambda connection: memory.sever(connection.arena.memory, connection.slot),
            Do.FORGET: self._forget,
        }

    def __iter__(self) -> Iterator[RemoteConnection]:
        return iter(list(self._connections.values()))

    def of(self, host: RemoteHost) -> list[RemoteConnection]:
        """The connections with a host."""
        return list(self._of[host.address].connections.values())

    def among(self, host: RemoteHost, numbers: Iterable[int]) -> list[RemoteConnection]:
        """Those with a host that have one of these numbers."""
        of_host = self._of[host.address].connections
        return [of_host[number] for number in numbers if number in of_host]

    def get(self, number: int) -> RemoteConnection | None:
        """The connection of a number; None: it is over."""
        return self._connections.get(number)

    def are_on_link(self, host: RemoteHost) -> bool:
        """Whether a connection with a host is not about to be dropped."""
        return any(one.state.phase is not Phase.DROPPING for one in self.of(host))

    # --- the start

    def begin(self, match: Match, event: Event) -> Reason | None:
        """Begin a connection for a matched request; or why not."""
        users, host, request, offer = match
        assert host.hello is not None
        settings = self._pairing.knowledge.settings
        if event.transport is Transport.RDMA:
            ring = min(host.hello.ring, settings.remote_ring)
            cost = layout.SIDES * ring + _PER_SLOT
        else:
            ring, cost = min(host.hello.relay_ring, settings.relay_ring), 0
        if ring < layout.REMOTE_RING_LEAST or ring & (ring - 1):
            return Reason.PEER_NO_RDMA
        namespace = request.local.namespace
        if not self.room.has(
            host.address, namespace, cost, settings.remote_memory
        ) or self._pairing.is_full(namespace):
            return Reason.LIMIT
        if (reason := users.why_not(request.local)) is not None:
            return reason
        number = next(self._numbers)
        try:
            arena, slot = users.reserve(request.local, ring, number)
        except KernelRefused:
            return Reason.MEMORY
        end = arena.slots[slot].ends[0]
        assert end is not None
        leads = event.on is On.LEAD
        state = EndState(transport=event.transport)
        connection = RemoteConnection(
            number,
            host,
            leads,
            offer,
            users,
            request.local,
            end,
            arena,
            slot,
            state,
            request.peer_process,
        )
        request.connection = number
        of_host = self._of[host.address]
        self._connections[number] = of_host.connections[number] = connection
        if leads:
            of_host.taken[offer] = connection
        self.room.add(host.address, namespace, connection.bytes)
        self.step(connection, event)
        return None

    # --- the state machine

    def step(self, connection: RemoteConnection, event: Event) -> None:
        """Something has happened to a connection."""
        before = connection.state
        connection.state, actions = remote_end.step(before, event)
        self._trace(connection, before, event, actions)
        if connection.state.phase is not before.phase:
            self._enter(connection)
        for action in actions:
            self._execute(connection, action)

    def step_number(self, number: int, event: Event, host: RemoteHost | None = None) -> None:
        """Something has happened to the connection of a number, if there is one with this host."""
        connection = self._connections.get(number)
        if connection is not None and host in (None, connection.host):
            self.step(connection, event)

    def step_all(self, host: RemoteHost | None, event: Event) -> None:
        """Something has happened to all connections with a host."""
        for connection in [] if host is None else self.of(host):
            self.step(connection, event)

    def _enter(self, connection: RemoteConnection) -> None:
        """A phase begins."""
        phase = connection.state.phase
        if phase in TIMED:
            self._restart_timer(connection)
        else:
            self._stop_timer(connection)
        if phase is Phase.DROPPING and connection.leads:
            taken = self._of[connection.host.address].taken
            if taken.get(connection.offer) is connection:
                del taken[connection.offer]

    def _restart_timer(self, connection: RemoteConnection) -> None:
        self._stop_timer(connection)
        connection.timer = self._loop.after(STEP, lambda: self._time_out(connection))

    def _stop_timer(self, connection: RemoteConnection) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None

    def _time_out(self, connection: RemoteConnection) -> None:
        if connection.state.phase is not Phase.UNCONFIRMED:
            log.warning(
                "pairing with another host takes too long; the connection stays on TCP",
                peer=str(connection.host.address),
                phase=connection.state.phase.value,
                seconds=STEP,
            )
        self.step(connection, Event(On.STEP_TIMEOUT))

    # --- actions

    def _execute(self, connection: RemoteConnection, action: Action) -> None:
        match action:
            case Do():
                self._actions[action](connection)
            case RefuseRequest():
                connection.users.fail(connection.user, action.reason)
            case Tell():
                self._give_up(connection, action)
            case Drop():
                state = relay_wire.BROKEN if action.broken else relay_wire.WHOLE
                self._tell(RelayKind.DROP, connection, state)

    def _tell(
        self, kind: RelayKind, connection: RemoteConnection, state: int = relay_wire.WHOLE
    ) -> None:
        self._tell_relay(relay_wire.Number(kind, connection.number, state))

    def _send(self, connection: RemoteConnection, message: peer_wire.Message) -> bool:
        return self._sessions.send(connection.host.address, message)

    def _make_place(self, connection: RemoteConnection) -> None:
        arena, slot = connection.arena, connection.slot
        link = self._links.link(connection.host.address).number
        incarnation = arena.slots[slot].incarnation
        user = connection.users.enter_relay(connection.user)
        self._tell_relay(
            relay_wire.RelaySlot(connection.number, link, slot, arena.id, incarnation, user)
        )

    def _send_place(self, connection: RemoteConnection) -> None:
        place = connection.state.place
        self._send(connection, peer_wire.Placement(connection.offer, connection.number, place))

    def _check_socket(self, connection: RemoteConnection) -> None:
        gone = connection.users.why_not(connection.user) is not None
        self.step(connection, Event(On.SOCKET_GONE if gone else On.SOCKET_OPEN))

    def _pair(self, connection: RemoteConnection) -> None:
        state = connection.state
        self._tell_relay(
            relay_wire.RelayAccept(
                RelayKind.PAIR, connection.number, state.peer_number, state.peer_place
            )
        )

    def _send_accept(self, connection: RemoteConnection) -> None:
        place = connection.state.place
        message = peer_wire.PeerAccept(connection.offer, connection.number, place)
        sent = self._send(connection, message)
        self.step(connection, Event(On.ACCEPT_SENT) if sent else Event(On.ACCEPT_UNSENT))

    def _send_paired(self, connection: RemoteConnection) -> None:
        self._send(connection, peer_wire.Paired(connection.state.peer_number))

    def _grant(self, connection: RemoteConnection) -> None:
        self.counts[connection.state.transport].granted += 1
        connection.users.grant(connection.user, connection.arena, connection.slot)

    def _free_side(self, connection: RemoteConnection) -> None:
        slot = connection.arena.slots.get(connection.slot)
        if (
            slot is not None
            and slot.connection == connection.number
            and slot.ends[0] is connection.end
        ):
            self._pairing.release_end(connection.arena, connection.slot, 0)

    def _give_up(self, connection: RemoteConnection, told: Tell) -> None:
        if connection.host.hello is None:
            return
        if connection.state.peer_number:
            self._send(connection, peer_wire.PeerDrop(connection.state.peer_number, told.dropped))
        elif told.declined is not None:
            self._send(connection, peer_wire.Decline(connection.offer, told.declined))

    def _count_left(self, connection: RemoteConnection) -> None:
        self.counts[connection.state.transport].left += 1

    def _count_broken(self, connection: RemoteConnection) -> None:
        self.counts[connection.state.transport].broken += not connection.state.closed
        if connection.leads:
            broken = self._of[connection.host.address].broken
            broken[connection.offer] = None
            if len(broken) > _REMEMBERED:
                del broken[next(iter(broken))]

    def _undo_grant(self, connection: RemoteConnection) -> None:
        if connection.users.kind == relay_wire.QUEUE_PAIR:
            self._memory.sever(connection.arena.memory, connection.slot)
        else:
            self._memory.finish(connection.arena.memory, connection.slot)
        self._wake(connection.arena)

    def _wake(self, arena: Arena) -> None:
        """Have the process of an arena check all of its slots."""
        self._memory.alarm(arena.memory)
        for descriptor in arena.sides[0].bells.values():
            self._memory.ring(descriptor)

    def _forget(self, connection: RemoteConnection) -> None:
        del self._connections[connection.number]
        host = connection.host.address
        self.room.remove(host, connection.user.namespace, connection.bytes)
        of_host = self._of[host]
        del of_host.connections[connection.number]
        self._pairing.release_end(connection.arena, connection.slot, 1)
        if not of_host.connections:
            self._links.emptied(host)

    # --- what the relay reports

    def relay_reported(self, message: Reported) -> None:
        """The relay has answered, or a connection has ended."""
        event = event_of(message)
        if event is not None:
            self.step_number(message.number, event)

    def relay_died(self) -> list[Arena]:
        """The relay has ended: reset all live ends. Their arenas, which the relay had."""
        dying = list(self)
        arenas = {connection.arena.id: connection.arena for connection in dying}
        for connection in dying:
            self.step(connection, Event(On.RELAY_DIED))
        for arena in arenas.values():
            self._wake(arena)
        return list(arenas.values())

    def all_dropped(self) -> None:
        """The relay that had the connections is gone."""
        for connection in self:
            self.step(connection, Event(On.DROPPED))

    # --- what the peer's router reports

    def _offered(self, host: RemoteHost, offer: int) -> tuple[RemoteUsers[Any], RemoteUser | None]:
        """Follower: the request that was offered under a number, and where it waits."""
        for users in self._users:
            request = users.offered(host, offer)
            if request is not None:
                return users, request
        return self._users[0], None

    def placed(self, host: RemoteHost, message: peer_wire.Placement) -> None:
        """Follower: the leader has taken an offer."""
        users, request = self._offered(host, message.offer)
        reason: Reason | None = Reason.NOT_FOUND
        if request is not None and not request.connection:
            reason = Reason.NO_LINK
            if self._links.is_up(host.address):
                event = Event(
                    On.FOLLOW,
                    self._links.link(host.address).transport,
                    peer_number=message.connection,
                    place=message.place,
                )
                reason = self.begin(Match(users, host, request, message.offer), event)
        if reason is not None:
            self._sessions.send(host.address, peer_wire.PeerDrop(message.connection, reason))
            if request is not None and not request.connection:
                users.refuse(request, reason)

    def accepted(self, host: RemoteHost, message: peer_wire.PeerAccept) -> None:
        """Leader: the follower has granted its end."""
        of_host = self._of[host.address]
        connection = of_host.taken.get(message.offer)
        if connection is None:
            reason = Reason.BROKEN if message.offer in of_host.broken else Reason.NOT_FOUND
            self._sessions.send(host.address, peer_wire.PeerDrop(message.connection, reason))
        else:
            self.step(
                connection, Event(On.ACCEPTED, peer_number=message.connection, place=message.place)
            )

    def has_taken(self, host: RemoteHost, offer: int) -> bool:
        """Leader: whether a connection was begun for an offer of the follower."""
        return offer in self._of[host.address].taken

    def withdrawn(self, host: RemoteHost, offer: int) -> None:
        """Leader: the follower takes an offer back."""
        connection = self._of[host.address].taken.get(offer)
        if connection is not None:
            self.step(connection, Event(On.WITHDRAWN))

    def declined(self, host: RemoteHost, message: peer_wire.Decline) -> None:
        """Follower: the leader doesn't take an offer."""
        users, request = self._offered(host, message.offer)
        if request is not None and not request.connection:
            users.refuse(request, reason_of(message.reason))
            return
        for connection in self.of(host):
            if connection.offer == message.offer and not connection.leads:
                self.step(connection, Event(On.DECLINED))

    def dropped(self, host: RemoteHost, message: peer_wire.PeerDrop) -> None:
        """The peer has given up a connection."""
        self.step_number(
            message.connection, Event(On.PEER_DROPPED, reason=reason_of(message.reason)), host
        )

    def forget_broken(self, host: RemoteHost) -> None:
        """The peer's router was restarted: its offers of before are void."""
        self._of[host.address].broken.clear()

    def forget(self, host: RemoteHost) -> None:
        """No network is shared with the host any more, and no connection is left."""
        self._of.pop(host.address, None)

    # --- processes that have hung up

    def orphaned(self, number: int) -> None:
        """Wait until no process has the socket of an end any more."""
        connection = self._connections.get(number)
        if connection is not None:
            self._check_orphan(connection, ORPHAN_LEAST)

    def _check_orphan(self, connection: RemoteConnection, pause: float) -> None:
        if connection.users.is_held(connection.end):
            later = min(pause * 2, ORPHAN_MOST)
            self._loop.after(pause, lambda: self._check_orphan(connection, later))
        else:
            self._free_side(connection)
