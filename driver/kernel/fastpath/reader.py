"""What status, ping and metrics read from the fast path. Nothing here waits for the upkeep lock."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dataplane.ebpf import NOWHERE, Maps
from driver.kernel.fastpath.endpoints import Endpoints
from driver.kernel.fastpath.neighbours import IDLE, FullTables
from driver.kernel.fastpath.tunnel import Tunnel
from driver.kernel.netlink import Sockets
from driver.model import IPAddress


@dataclass(frozen=True, slots=True)
class Stage:
    """Which stage runs on this host (empty: none), and why no higher one does.

    `devices` are the host's devices with a program; `networks` those whose packets may take the
    fast path, by short ID; `full`: what didn't fit into the maps and takes the kernel path.
    """

    stage: str = ""
    reason: str = ""
    devices: tuple[str, ...] = ()
    networks: frozenset[str] = frozenset()
    full: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FastPathReader:
    """The fast path of one overlay namespace, read from its parts. `host`: the host's sockets."""

    maps: Maps
    why_not: dict[str, str]
    """Why the kernel can't run a stage."""
    endpoints: Endpoints
    tunnel: Tunnel
    full: FullTables
    host: Sockets

    def stage(self) -> Stage:
        reason, attached = self.tunnel.reason, set(self.tunnel.attached)
        refused = self.endpoints.refused()
        full = tuple(self.full.lines() + [refused] * bool(refused))
        devices = tuple(sorted(link.name for link in self.host.links() if link.index in attached))
        networks = frozenset(self.endpoints.networks())
        if not reason:
            return Stage("tunnel", "", devices, networks, full)
        for stage in ("receive", "same-host"):
            if stage not in self.why_not:
                return Stage(stage, reason, devices, networks, full)
        return Stage("", reason)

    def learned(self, network_id: str) -> dict[str, IPAddress]:
        """MAC address → the peer behind it, of addresses that sent something lately."""
        local = self.endpoints.network(network_id)
        if local is None:
            return {}
        now = time.monotonic_ns()
        return {
            mac: entry.peer
            for bridge, mac, entry in self.maps.fdb_entries()
            if bridge == local.bridge
            and not entry.index
            and now - entry.seen < IDLE * 1e9
            and entry.peer != NOWHERE
        }

    def carries(self, network_id: str, mac: str) -> bool:
        """Whether packets from this host's containers to a MAC address take the fast path now."""
        local = self.endpoints.network(network_id)
        if local is None:
            return False
        entry = self.maps.fdb_entry(local.bridge, mac.lower())
        if entry is None or entry.index:
            return entry is not None
        fresh = time.monotonic_ns() - entry.seen < IDLE * 1e9
        return fresh and not self.tunnel.reason and entry.peer in self.endpoints.peers(network_id)
