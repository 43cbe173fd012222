"""The path of packets that aren't in shared memory: kernel path or fast path (`overlay+ebpf`).

The router knows connections, the driver's `FastPath` knows packets; this module joins the two. A
connection is on the fast path if packets from this host to its peer's MAC address take it now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, TypeVar

import msgspec

from dataplane.control import ConnectionFact, Connections, PathCount, TrafficFacts
from driver import allocate
from driver.driver import Driver
from driver.model import IPAddress, Network
from plugin.facts import KernelFacts, SyncFacts

Listed = TypeVar("Listed", Connections, TrafficFacts)

OVERLAY: Final = "overlay"
FAST: Final = "overlay+ebpf"
ENCRYPTED_BY: Final = {OVERLAY: "wireguard", "relay": "aes-256-gcm", "rdma": "the devices"}
"""What encrypts the connections of an encrypted network to other hosts, by path."""
PATHS: Final = (OVERLAY, FAST, "shm", "rdma", "relay")
_ELSEWHERE: Final = ("remote", "foreign")
"""Words of reasons: the peer is on another host; it is on no FreeFlow network."""


@dataclass(slots=True, eq=False)
class PathLabels:
    """Tells which addresses are reached over the fast path."""

    driver: Driver
    kernel: KernelFacts
    syncer: SyncFacts

    def connections(self, found: Listed) -> Listed:
        """The router's list, with `overlay+ebpf` as the path of connections on the fast path."""
        networks = {network.id: network for network in self.driver.store.networks()}
        macs = self._macs()
        known: dict[tuple[str, str], bool] = {}

        def relabel(connection: ConnectionFact) -> ConnectionFact:
            network = networks.get(connection.network)
            if network is None:
                return connection
            address = ip_address(connection.remote.rpartition(":")[0].strip("[]"))
            if network.encrypted and (network.id, address) not in macs:
                encryption = ENCRYPTED_BY.get(connection.path, "")
                connection = msgspec.structs.replace(connection, encryption=encryption)
            if connection.path != OVERLAY:
                return connection
            key = (network.id, str(address))
            if key not in known:
                known[key] = self._reached(network, address, macs)
            return msgspec.structs.replace(connection, path=FAST) if known[key] else connection

        return msgspec.structs.replace(
            found, connections=tuple(relabel(connection) for connection in found.connections)
        )

    def _macs(self) -> dict[tuple[str, IPAddress], str]:
        """MAC addresses of this host's endpoints, by network and address."""
        return {
            (endpoint.network_id, item.ip): endpoint.mac
            for endpoint in self.driver.store.endpoints()
            for item in (endpoint.ipv4, endpoint.ipv6)
            if item is not None
        }

    def _reached(
        self, network: Network, address: IPAddress, macs: dict[tuple[str, IPAddress], str]
    ) -> bool:
        """Whether an address, or all tasks if it is a VIP, are reached over the fast path."""
        state = self.syncer.state().get(network.id)
        tasks: Iterable[IPAddress] = (address,)
        if state is not None and isinstance(address, IPv4Address):
            tasks = state.table.get(address) or (address,)
        return all(self._takes(network, task, macs) for task in tasks)

    def _takes(
        self, network: Network, address: IPAddress, macs: dict[tuple[str, IPAddress], str]
    ) -> bool:
        mac = macs.get((network.id, address))
        if mac is None:
            # MAC addresses on other hosts are derived, unless the user chose one: it isn't found.
            if isinstance(address, IPv6Address):
                if address not in network.prefix6:
                    return False
                address = IPv4Address(int(address) & 0xFFFFFFFF)
            mac = allocate.mac_for(address)
        return self.kernel.uses_fastpath(network.id, mac)


def relabel(counts: Iterable[PathCount], runs: Callable[[str, bool], bool]) -> list[PathCount]:
    """The router's counts, with `overlay+ebpf` as the path where the fast path runs.

    Counts have no addresses, so `runs(network, elsewhere)` decides: by network, and by whether the
    peer is on another host.
    """
    return [
        msgspec.structs.replace(entry, path=FAST)
        if entry.path == OVERLAY
        and entry.reason != _ELSEWHERE[1]
        and runs(entry.network, entry.reason == _ELSEWHERE[0])
        else entry
        for entry in counts
    ]
