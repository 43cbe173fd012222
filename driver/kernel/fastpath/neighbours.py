"""Peers and the addresses behind them: the maps of peers and of FDB entries, and the kernel's FDB.

All methods are called under the upkeep lock (see `fastpath.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

import structlog

from dataplane.ebpf import Maps, PeerRoute
from dataplane.errors import KernelRefused
from driver.errors import FreeFlowError
from driver.kernel import fdb, tc_ingress, underlay_routes
from driver.kernel.fastpath.endpoints import Endpoints
from driver.kernel.netlink import Sockets
from driver.kernel.underlay import Underlay
from driver.model import IPAddress

log = structlog.get_logger()

IDLE: Final = 60.0
"""Seconds after which an address that sent nothing is looked up on the kernel path again."""
FORGET: Final = 600.0
"""Seconds after which it is dropped."""
ROUTES_EVERY: Final = 10.0
"""Seconds after which routes to peers are read again, even if the kernel reports no change."""
CLEAN_EVERY: Final = 10.0


class FullTables:
    """Which maps have no room left, and what they lack; a change is logged once."""

    def __init__(self) -> None:
        self._lacking: dict[str, str] = {}

    def note(self, table: str, left_out: str) -> None:
        """`left_out` is what didn't fit; empty: everything did."""
        if not left_out:
            self._lacking.pop(table, None)
        elif self._lacking.get(table) != left_out:
            self._lacking[table] = left_out
            log.warning("a table of the fast path is full", table=table, left_out=left_out)

    def lines(self) -> list[str]:
        return [f"{table}: {left_out}" for table, left_out in sorted(self._lacking.items())]


@dataclass(slots=True, eq=False)
class Neighbours:
    """Which peers the programs encapsulate for, and where addresses on other hosts are.

    `host` are sockets of the host's namespace, `overlay` those of the overlay namespace.
    """

    maps: Maps
    endpoints: Endpoints
    host: Sockets
    overlay: Sockets
    changes: underlay_routes.RouteChanges
    underlay: Callable[[], Underlay]
    full: FullTables
    _due: float = 0.0
    routes: dict[tuple[int, IPv4Address], PeerRoute] = field(init=False)
    """Content of the map of peers: network and peer, and how the underlay reaches it."""
    unreachable: dict[IPAddress, str] = field(default_factory=dict)
    """Peers for which the programs can't encapsulate, and why."""

    def __post_init__(self) -> None:
        self.routes = self.maps.all_peers()

    def refresh_soon(self) -> None:
        """Read the routes at the next refresh."""
        self._due = 0.0

    def are_due(self, now: float) -> bool:
        """Whether routes have to be read again; the caller then calls `write`."""
        new_network, changed = self.endpoints.take_new_network(), bool(self.changes)
        if new_network or now >= self._due:
            # Another process may have changed the map.
            self.routes = self.maps.all_peers()
        elif not changed:
            return False
        self._due = now + ROUTES_EVERY
        return True

    def write(self) -> None:
        """Write the present route of each peer to the map of peers."""
        members = self.endpoints.peers_by_bridge()
        try:
            local = self.underlay().address
        except FreeFlowError:
            members, local = [], None
        wanted = {peer for _, peers in members for peer in peers}
        read = underlay_routes.find(self.host, sorted(wanted, key=str), local)
        self.unreachable = read.refused
        routes = {
            (bridge, peer): read.found[peer]
            for bridge, peers in members
            for peer in peers
            if isinstance(peer, IPv4Address) and peer in read.found
        }
        # Old entries first: they make room for new ones.
        for key in self.routes.keys() - routes.keys():
            self.maps.drop_peer(*key)
            del self.routes[key]
        left_out, why = 0, ""
        for key, way in routes.items():
            if self.routes.get(key) == way:
                continue
            try:
                self.maps.put_peer(*key, way)
                self.routes[key] = way
            except KernelRefused as error:
                left_out, why = left_out + 1, str(error)
        self.full.note("peers", f"{left_out} peers of networks: {why}" if left_out else "")

    def forget_networks(self, bridges: set[int]) -> None:
        """Forget the peers of networks whose map entries are gone."""
        for key in [key for key in self.routes if key[0] in bridges]:
            del self.routes[key]

    def forget_strangers(self, bridge: int, peers: frozenset[IPAddress]) -> None:
        """Forget the addresses of a network that were behind hosts that are no peers.

        If such a host becomes a peer again, its former addresses may be elsewhere.
        """
        for net, mac, entry in self.maps.fdb_entries():
            remote = not entry.index and not entry.peer.is_unspecified
            if net == bridge and remote and entry.peer not in peers:
                self.maps.drop_fdb_entry(net, mac)

    def refresh_bridges(self) -> None:
        """Renew the FDB entries of addresses whose packets bridge and VXLAN device don't see.

        Without them, packets that take the kernel path would be flooded. An entry that leads to a
        host that is no peer any more isn't renewed: the address may be on another host by now.
        """
        now = time.monotonic_ns()
        members = dict(self.endpoints.peers_by_bridge())
        live: dict[int, dict[str, IPAddress]] = {}
        for bridge, mac, entry in self.maps.fdb_entries():
            if entry.index or now - entry.seen >= IDLE * 1e9:
                continue
            if entry.peer in members.get(bridge, ()) or entry.peer.is_unspecified:
                live.setdefault(bridge, {})[mac] = entry.peer
        for local in self.endpoints.networks().values():
            if local.vxlan and local.bridge in live:
                fdb.remember(self.overlay, local.vxlan, live[local.bridge])

    def close(self) -> None:
        self.changes.close()


@dataclass(slots=True, eq=False)
class Cleaner:
    """Drops map entries of links and networks that are gone, and of addresses that are silent."""

    maps: Maps
    endpoints: Endpoints
    neighbours: Neighbours
    overlay: Sockets
    hooks: tc_ingress.Hooks
    full: FullTables
    due: float = 0.0

    def clean(self, now: float) -> None:
        self.due = now + CLEAN_EVERY
        alive = {link.index for link in self.overlay.links()}
        for index in self.hooks.devices() - alive:
            self.hooks.detach(index)
        # Links that came after the listing stay.
        alive |= self.endpoints.links()
        bridges = self.endpoints.bridges() & alive
        self.maps.forget_ports(alive)
        self.maps.forget_silent(time.monotonic_ns() - int(FORGET * 1e9))
        self.endpoints.free_slots(alive)
        self.drop_networks_except(bridges)
        is_full = self.maps.fdb_used() >= self.maps.places.capacity
        self.full.note("places", "addresses of containers elsewhere" if is_full else "")

    def drop_networks_except(self, bridges: set[int]) -> None:
        """Drop the entries of all other networks."""
        # There may be very many entries. They are searched without the endpoints' lock, so a
        # network that has come meanwhile is taken out afterwards.
        stale = self.maps.networks_but(bridges) - self.endpoints.bridges()
        if stale:
            self.maps.forget_networks(stale)
        self.neighbours.forget_networks(stale)
