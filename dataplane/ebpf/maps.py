"""The loaded programs, and their maps as Python sees them.

Maps are pinned. So programs that an earlier process attached and those of this process share them,
with learned addresses and counters. Each layout has maps of its own, in a folder of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from dataplane.ebpf import map_layout
from dataplane.ebpf.libbpf import Map, Object, pinned
from dataplane.ebpf.map_layout import LAYOUT, Count, FastPathSettings, FdbEntry, PeerRoute, Port
from dataplane.ebpf.probe import PROGRAMS, KernelSupport
from dataplane.errors import KernelRefused

NAMES: Final = ("settings", "ports", "places", "networks", "peers", "counts")
_ZERO: Final = map_layout.INDEX.pack(0)


@dataclass(frozen=True, slots=True)
class Maps:
    """Methods make a few system calls, are safe from any thread, and may raise KernelRefused."""

    settings: Map
    ports: Map
    places: Map
    networks: Map
    peers: Map
    counts: Map

    # --- settings

    def decide(self, value: FastPathSettings) -> None:
        self.settings.put(_ZERO, value.pack())

    def current(self) -> FastPathSettings:
        return FastPathSettings.unpack(self.settings.get(_ZERO) or bytes(map_layout.SETTINGS.size))

    # --- links of this host

    def slots(self) -> dict[int, int]:
        """Ifindex of each container's link to its slot in `counts`."""
        slots = {
            map_layout.INDEX.unpack(key)[0]: map_layout.unpack_slot(value)
            for key, value in self.ports.items()
        }
        return {index: slot for index, slot in slots.items() if slot}

    def take_slot(self, taken: set[int]) -> int:
        """A free slot of `counts`, set to zero."""
        slot = next((one for one in range(1, map_layout.SLOTS) if one not in taken), 0)
        if not slot:
            raise KernelRefused(
                f"no counters are left: the fast path has {map_layout.SLOTS - 1} of them"
            )
        self.counts.put(map_layout.INDEX.pack(slot), bytes(self.counts.value_size))
        return slot

    def put_port(self, index: int, port: Port) -> None:
        """A container's link."""
        self.ports.put(map_layout.INDEX.pack(index), port.pack())

    def put_vxlan(self, index: int, net: int) -> None:
        self.ports.put(map_layout.INDEX.pack(index), map_layout.pack_vxlan(net))

    def drop_port(self, index: int) -> None:
        self.ports.delete(map_layout.INDEX.pack(index))

    def port_indexes(self) -> set[int]:
        return {map_layout.INDEX.unpack(key)[0] for key in self.ports.keys()}  # noqa: SIM118

    def count(self, index: int) -> Count | None:
        port = self.ports.get(map_layout.INDEX.pack(index))
        slot = 0 if port is None else map_layout.unpack_slot(port)
        value = self.counts.get(map_layout.INDEX.pack(slot)) if slot else None
        return None if value is None else Count.unpack(value)

    # --- where addresses are

    def put_fdb_entry(self, net: int, mac: str, entry: FdbEntry) -> None:
        self.places.put(map_layout.pack_fdb_key(net, mac), entry.pack())

    def fdb_entry(self, net: int, mac: str) -> FdbEntry | None:
        value = self.places.get(map_layout.pack_fdb_key(net, mac))
        return None if value is None else FdbEntry.unpack(value)

    def drop_fdb_entry(self, net: int, mac: str) -> None:
        self.places.delete(map_layout.pack_fdb_key(net, mac))

    def fdb_entries(self) -> Iterator[tuple[int, str, FdbEntry]]:
        """Network, MAC address, where it is."""
        for key, value in self.places.items():
            yield *map_layout.unpack_fdb_key(key), FdbEntry.unpack(value)

    def fdb_used(self) -> int:
        return len(self.places.keys())

    def make_room(self) -> None:
        """Drop the remote addresses that were not seen for longest: an eighth of all."""
        remote = [
            (entry.seen, net, mac) for net, mac, entry in self.fdb_entries() if not entry.index
        ]
        remote.sort()
        for _, net, mac in remote[: self.places.capacity // 8]:
            self.drop_fdb_entry(net, mac)

    # --- networks and their peers

    def put_network(self, vni: int, udp_port: int, net: int) -> None:
        self.networks.put(map_layout.pack_network_key(vni, udp_port), map_layout.INDEX.pack(net))

    def all_networks(self) -> list[tuple[bytes, int]]:
        """Packed keys and the networks that they stand for."""
        return [(key, map_layout.INDEX.unpack(value)[0]) for key, value in self.networks.items()]

    def put_peer(self, net: int, address: IPv4Address, route: PeerRoute) -> None:
        self.peers.put(map_layout.pack_peer_key(net, address), route.pack())

    def drop_peer(self, net: int, address: IPv4Address) -> None:
        self.peers.delete(map_layout.pack_peer_key(net, address))

    def all_peers(self) -> dict[tuple[int, IPv4Address], PeerRoute]:
        return {
            map_layout.unpack_peer_key(key): PeerRoute.unpack(value)
            for key, value in self.peers.items()
        }

    # --- all of it

    def networks_but(self, alive: set[int]) -> set[int]:
        """The networks in any map, without those that are alive."""
        present = {net for _, net in self.all_networks()} | {net for net, _ in self.all_peers()}
        present |= {map_layout.unpack_fdb_key(key)[0] for key in self.places.keys()}  # noqa: SIM118
        return present - alive

    def forget_networks(self, gone: set[int]) -> None:
        """Drop all entries of these networks."""
        for key, net in self.all_networks():
            if net in gone:
                self.networks.delete(key)
        for net, address in self.all_peers():
            if net in gone:
                self.drop_peer(net, address)
        for net, mac, _ in self.fdb_entries():
            if net in gone:
                self.drop_fdb_entry(net, mac)

    def forget_ports(self, alive: set[int]) -> None:
        """Drop all entries of links that do not exist any more."""
        for index in self.port_indexes() - alive:
            self.drop_port(index)
        for net, mac, entry in self.fdb_entries():
            if entry.index and entry.index not in alive:
                self.drop_fdb_entry(net, mac)

    def forget_silent(self, since: int) -> None:
        """Drop remote addresses that were not seen since `since`, in ns of CLOCK_MONOTONIC."""
        for net, mac, entry in self.fdb_entries():
            if not entry.index and entry.seen < since:
                self.drop_fdb_entry(net, mac)

    def clear(self) -> None:
        """Turn the fast path off: empty all maps but the counters."""
        self.settings.put(_ZERO, bytes(map_layout.SETTINGS.size))
        for table in (self.ports, self.places, self.networks, self.peers):
            for key in table.keys():  # noqa: SIM118
                table.delete(key)

    def close(self) -> None:
        for name in NAMES:
            getattr(self, name).close()


class Programs:
    """The object, loaded with the maps that are pinned in `pins`; absent ones are pinned there.

    Raises:
        KernelRefused: the kernel refused a program or a map. Nothing was attached.
    """

    def __init__(self, path: Path, pins: Path, support: KernelSupport) -> None:
        self.support = support
        folder = pins / f"v{LAYOUT}"
        folder.mkdir(parents=True, exist_ok=True)
        self._object = Object(path)
        try:
            usable = [
                name
                for stage in support.stages
                for name in PROGRAMS[stage]
                if name not in support.refused
            ]
            self._object.only(*usable)
            new = [name for name in NAMES if not self._reuse(name, folder / name)]
            self._object.load()
            for name in new:
                made = self._object.map(name)
                made.pin(folder / name)
                made.close()
            self.maps = Maps(*(self._object.map(name) for name in NAMES))
            _unpin_others(pins, folder)
        except BaseException:
            self._object.close()
            raise

    def _reuse(self, name: str, pin: Path) -> bool:
        descriptor = pinned(pin)
        if descriptor is None:
            return False
        try:
            if self._object.reuse(name, descriptor):
                return True
        finally:
            os.close(descriptor)
        # Another build made it, with another size. Its programs use it until they are replaced.
        pin.unlink()
        return False

    def descriptor(self, name: str) -> int:
        """A program's descriptor; it stays this object's."""
        return self._object.program(name)

    def close(self) -> None:
        """Close all descriptors. Attached programs stay attached."""
        self.maps.close()
        self._object.close()


def _unpin_others(pins: Path, own: Path) -> None:
    """Unpin maps of other layouts. The kernel frees each with the last program that uses it."""
    for folder in pins.glob("v*"):
        if folder != own:
            for pin in folder.iterdir():
                pin.unlink()
            folder.rmdir()
