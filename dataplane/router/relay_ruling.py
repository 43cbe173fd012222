"""Joins the parts that rule the relays' TCP with the connections that they rule.

relay_rule.py     who enters, who leaves, and for how long: pure
relay_sampler.py  the counters of waiting connections
relay_gate.py     requests wait until they may enter
relay_use.py      connections leave that are not worth it
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

from dataplane.router import cpu_quota, peer_wire
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.relay_gate import RelayGate
from dataplane.router.relay_rule import Pair, Pauses
from dataplane.router.relay_sampler import RelaySampler
from dataplane.router.relay_use import RelayUse
from dataplane.router.relay_wire import CONNECTION, QUEUE_PAIR
from dataplane.router.remote import Remotes
from dataplane.router.remote_connections import RemoteConnection, note_left
from dataplane.router.remote_events import LIVE, Event, On, Transport
from dataplane.router.remote_hosts import RemoteHost
from dataplane.router.remote_requests import RemoteRequest
from dataplane.router.seams import SocketTable


class Ruled:
    """A `GateOwner` and a `UseOwner`."""

    def __init__(self, pairing: Pairing, remotes: Remotes[Any]) -> None:
        self._pairing = pairing
        self._remotes = remotes

    def over_relay(self) -> Iterable[RemoteConnection]:
        return self._over_relay(CONNECTION)

    def queue_pairs(self) -> Iterable[RemoteConnection]:
        return self._over_relay(QUEUE_PAIR)

    def _over_relay(self, kind: int) -> list[RemoteConnection]:
        return [
            one
            for one in self._remotes.connections
            if one.users.kind == kind
            and one.state.transport is Transport.RELAY
            and one.state.phase in LIVE
            and not one.state.leaving
        ]

    def share(self, arena: int, part: int) -> None:
        self._remotes.share(arena, part)

    def relayed(self) -> Mapping[Pair, int]:
        return Counter(
            Pair(one.end.process, one.host.address, one.peer_process)
            for one in self.over_relay()
            if one.leads
        )

    def enter(self, requests: Iterable[RemoteRequest]) -> None:
        self._remotes.enter(requests)

    def offloads(self, peer: IPAddress) -> bool:
        host = self._remotes.hosts.get(peer)
        hello = None if host is None else host.hello
        return self._pairing.knowledge.offload and (hello is None or hello.tunnel_offload)

    def tell(self, peer: IPAddress, message: peer_wire.Message) -> None:
        host = self._remotes.hosts.get(peer)
        if host is not None and host.hello is not None and host.hello.relay:
            self._remotes.sessions.send(peer, message)

    def link_number(self, peer: IPAddress) -> int:
        return self._remotes.links.link(peer).number

    def leave_relay(self, connections: Iterable[RemoteConnection], reason: Reason) -> None:
        by_host: defaultdict[RemoteHost, list[RemoteConnection]] = defaultdict(list)
        for connection in connections:
            by_host[connection.host].append(connection)
        for host, some in by_host.items():
            note_left(some, reason)
            theirs = [one.state.peer_number for one in some if one.state.peer_number]
            for at in range(0, len(theirs), peer_wire.MAX_WAITS):
                part = tuple(theirs[at : at + peer_wire.MAX_WAITS])
                self.tell(host.address, peer_wire.Leaves(reason, part))
            for one in some:
                self._remotes.connections.step(one, Event(On.LEAVE_PATH, reason=reason))


class RelayRuling:
    """Made before the `Remotes`, which take `gate` as their `EntryRule`, and joined with them."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sockets: SocketTable,
        quota: Callable[[int], float | None] = cpu_quota.of,
    ) -> None:
        self._pairing = pairing
        self._loop = loop
        self._pauses = Pauses()
        self.use = RelayUse(pairing, loop, self._pauses, quota)
        sampler = RelaySampler(loop, sockets)
        self.gate = RelayGate(pairing, loop, sampler, self._pauses, lambda: self.use.rates)
        self._remotes: Remotes[Any] | None = None
        self._ruled: Ruled | None = None
        self._paused: Mapping[Hashable, Reason] = {}
        """Who might not enter at the last tick."""

    def join(self, remotes: Remotes[Any]) -> None:
        """The connections that are ruled."""
        self._remotes = remotes
        self.use.owner = self._ruled = Ruled(self._pairing, remotes)

    def tick(self) -> None:
        """About once a second."""
        if self._remotes is None or self._ruled is None:
            return
        self.gate.tick(self._ruled)
        paused = self._pauses.running(self._loop.now())
        if paused != self._paused:
            # Only then: there may be many offers.
            self._remotes.requests.offer_again()
        self._paused = paused
        self._pauses.tidy(self._loop.now(), self._is_alive)

    def _is_alive(self, who: Hashable) -> bool:
        """Whether a pause can concern somebody: a container, or a process and a host."""
        if isinstance(who, tuple):
            return who[0] in self._pairing.processes
        return who in self._pairing.containers
