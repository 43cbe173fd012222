"""The networks and containers of this host in the maps of the fast path.

Docker's calls run through here, so the lock is held for a few map entries only, never while the
kernel works on more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dataplane.ebpf import NOWHERE, Count, FdbEntry, Maps, Port
from dataplane.errors import KernelRefused
from driver import names, options
from driver.kernel.fastpath.attachments import Attachments
from driver.kernel.netlink import Sockets
from driver.model import Endpoint, IPAddress, Network

Peers = Mapping[str, frozenset[IPAddress]]
"""The peers of each network, by its short ID."""


@dataclass(frozen=True, slots=True)
class LocalNetwork:
    """A network with endpoints here. The index of its bridge is its key in all maps."""

    network: Network
    bridge: int
    vxlan: int
    """Index of its VXLAN device; 0: it has none whose packets the fast path may take. So only
    packets between containers of this host take it on encrypted networks."""


@dataclass(slots=True)
class LocalEndpoint:
    """A container's link, and the FDB entry of its MAC address."""

    bridge: int
    mac: str
    entry: FdbEntry


class Endpoints:
    """Map entries of this host's networks and endpoints, in one overlay namespace.

    `lock` guards all fields and the entries of local links; each method takes it. `receives`:
    whether the kernel can run the program of VXLAN devices. `peers` outlives an overlay namespace
    and is changed under the same lock.
    """

    def __init__(
        self,
        lock: threading.RLock,
        links: Sockets,
        maps: Maps,
        attachments: Attachments,
        peers: Peers,
        *,
        receives: bool,
    ) -> None:
        self._lock = lock
        self._links = links
        self._maps = maps
        self._attachments = attachments
        self._peers = peers
        self._receives = receives
        self._networks: dict[str, LocalNetwork] = {}
        self._endpoints: dict[str, LocalEndpoint] = {}
        self._slots = maps.slots()
        """The slot of each link in the map of counters, by its index."""
        self._refused: dict[str, str] = {}
        """Endpoints for which the maps had no room, and why."""
        self._has_new_network = False
        self._lost_network = False

    # --- changes, called by Docker's requests

    def add(self, network: Network, endpoint: Endpoint) -> None:
        """Write an endpoint whose link exists; its program is attached a moment later.

        Raises:
            KernelRefused: a map is full, most likely; the endpoint stays on the kernel path.
        """
        with self._lock:
            index = self._links.index(names.host_veth(endpoint.id))
            bridge = self._links.index(names.bridge(network.id))
            if index is None or bridge is None:
                return
            if not options.ebpf(network.options):
                self._exclude(network, index)
                return
            short = names.short(endpoint.id)
            try:
                self._write_network(network, bridge)
                self._write_endpoint(network, endpoint, bridge, index)
            except KernelRefused as error:
                self._refused[short] = str(error)
                self._maps.drop_port(index)
                raise
            self._refused.pop(short, None)
            self._attachments.attach(index, "ff_port")

    def _write_network(self, network: Network, bridge: int) -> None:
        short = names.short(network.id)
        vxlan = self._links.index(names.vxlan(network.id)) or 0
        before, now = self._networks.get(short), LocalNetwork(network, bridge, vxlan)
        if before == now:
            return
        if before is not None and before.bridge != bridge:
            self._lost_network = True
        if vxlan and self._receives:
            self._maps.put_vxlan(vxlan, bridge)
            self._attachments.attach(vxlan, "ff_vxlan")
        if network.overlay and not network.encrypted:
            self._maps.put_network(network.vni, network.port, bridge)
        self._networks[short] = now
        self._has_new_network = True

    def _write_endpoint(
        self, network: Network, endpoint: Endpoint, bridge: int, index: int
    ) -> None:
        ipv4 = endpoint.ipv4.ip if endpoint.ipv4 is not None else None
        ipv6 = endpoint.ipv6.ip if endpoint.ipv6 is not None else None
        slot = self._counter_slot(index)
        port = Port(bridge, network.vni, network.port, endpoint.mac, ipv4, ipv6, slot)
        self._maps.put_port(index, port)
        before = self._endpoints.get(names.short(endpoint.id))
        final = before is None or before.entry.final
        entry = FdbEntry(index, NOWHERE, 0, ipv4, ipv6, slot, final)
        try:
            self._maps.put_fdb_entry(bridge, endpoint.mac, entry)
        except KernelRefused:
            # A container of this host matters more than any address learned elsewhere.
            self._maps.make_room()
            self._maps.put_fdb_entry(bridge, endpoint.mac, entry)
        self._endpoints[names.short(endpoint.id)] = LocalEndpoint(bridge, endpoint.mac, entry)

    def _counter_slot(self, index: int) -> int:
        slot = self._slots.get(index)
        if slot is None:
            slot = self._maps.take_slot(set(self._slots.values()))
            self._slots[index] = slot
        return slot

    def _exclude(self, network: Network, index: int) -> None:
        """Drop the entries of a network with the option ebpf=off, which may have been on before."""
        vxlan = self._links.index(names.vxlan(network.id))
        for link in [index] if vxlan is None else [index, vxlan]:
            self._maps.drop_port(link)
            self._slots.pop(link, None)
            self._attachments.detach(link)
        if self._networks.pop(names.short(network.id), None) is None:
            return
        bridge = self._links.index(names.bridge(network.id))
        for short in [key for key, value in self._endpoints.items() if value.bridge == bridge]:
            local = self._endpoints.pop(short)
            self._maps.drop_port(local.entry.index)
            self._maps.drop_fdb_entry(local.bridge, local.mac)
        self._lost_network = True

    def remove(self, endpoint_id: str) -> None:
        """Drop an endpoint whose link is about to be deleted."""
        with self._lock:
            self._refused.pop(names.short(endpoint_id), None)
            local = self._endpoints.pop(names.short(endpoint_id), None)
            if local is None:
                return
            index = local.entry.index
            entry = self._maps.fdb_entry(local.bridge, local.mac)
            if entry is not None and entry.index == index:
                self._maps.drop_fdb_entry(local.bridge, local.mac)
            self._maps.drop_port(index)
            self._slots.pop(index, None)
            self._attachments.detach(index)

    def remove_network(self, network_id: str) -> None:
        """Drop a network whose links are about to be deleted."""
        with self._lock:
            local = self._networks.pop(names.short(network_id), None)
            if local is None:
                return
            self._maps.drop_port(local.vxlan)
            if local.vxlan:
                self._attachments.detach(local.vxlan)
            self._lost_network = True

    def set_forwards(self, endpoint_id: str, *, forwards: bool) -> bool:
        """Note whether a container forwards packets that are addressed to it; true if that is
        new."""
        with self._lock:
            local = self._endpoints.get(names.short(endpoint_id))
            if local is None or local.entry.final != forwards:
                return False
            local.entry = replace(local.entry, final=not forwards)
            self._maps.put_fdb_entry(local.bridge, local.mac, local.entry)
            return True

    # --- queries

    def knows(self, endpoint_id: str) -> bool:
        with self._lock:
            return names.short(endpoint_id) in self._endpoints

    def network(self, network_id: str) -> LocalNetwork | None:
        with self._lock:
            return self._networks.get(names.short(network_id))

    def networks(self) -> dict[str, LocalNetwork]:
        """By short ID."""
        with self._lock:
            return dict(self._networks)

    def peers(self, network_id: str) -> frozenset[IPAddress]:
        with self._lock:
            return self._peers.get(names.short(network_id), frozenset())

    def peers_by_bridge(self) -> list[tuple[int, frozenset[IPAddress]]]:
        """The peers of each network, with the network's key in the maps."""
        with self._lock:
            return [
                (local.bridge, self._peers.get(short, frozenset()))
                for short, local in self._networks.items()
            ]

    def bridges(self) -> set[int]:
        with self._lock:
            return {local.bridge for local in self._networks.values()}

    def links(self) -> set[int]:
        """Indexes of the containers' links."""
        with self._lock:
            return {local.entry.index for local in self._endpoints.values()}

    def counts(self) -> dict[str, Count]:
        """The counters of each endpoint, by the name of its link."""
        with self._lock:
            found = {
                names.HOST_VETH + short: self._maps.count(local.entry.index)
                for short, local in self._endpoints.items()
            }
        return {name: count for name, count in found.items() if count is not None}

    def refused(self) -> str:
        """What the maps have no room for; empty: nothing."""
        with self._lock:
            if not self._refused:
                return ""
            return f"{len(self._refused)} containers: {next(iter(self._refused.values()))}"

    # --- flags for the refresh of each second

    def take_new_network(self) -> bool:
        """Whether a network has come since the last call."""
        with self._lock:
            new, self._has_new_network = self._has_new_network, False
            return new

    def take_lost_network(self) -> bool:
        """Whether a network has gone, of which maps may hold entries, since the last call."""
        with self._lock:
            lost, self._lost_network = self._lost_network, False
            return lost

    def free_slots(self, alive: set[int]) -> None:
        """Free the counters of links that aren't in `alive`."""
        with self._lock:
            for index in self._slots.keys() - alive:
                del self._slots[index]
