"""What each connection has carried, with names: of services, of peers, and of the peers' hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import msgspec

from dataplane.control import ConnectionTraffic, TrafficFacts
from driver import allocate
from driver.driver import Driver
from driver.model import IPAddress, Network
from driver.other_networks import OtherNetwork
from driver.vip_table import NetworkState
from plugin.facts import KernelFacts, SyncFacts
from plugin.paths import PathLabels


class NamedTraffic(ConnectionTraffic, frozen=True, kw_only=True):
    """One end of a connection, what it has carried, and who is at both ends. Empty: not known."""

    service: str = ""
    """Of its container."""
    peer: str = ""
    """The container or task at the remote address, or the service if the address is a VIP."""
    peer_service: str = ""
    host: str = ""
    """Where the peer runs: the host's name, or its address if this host doesn't know the name."""


class TrafficReport(msgspec.Struct, frozen=True, kw_only=True):
    """All connections of this host; other fields are those of `dataplane.control.TrafficFacts`."""

    connections: tuple[NamedTraffic, ...]
    reasons: dict[str, str]
    read: float
    router_cpu: float
    relay_cpu: float | None = None
    containers_relay_cpu: dict[int, float] = {}
    host: str = ""
    """This host's name."""
    networks: dict[str, str] = {}
    """Names of networks, by ID."""


class AddressOwner(msgspec.Struct, frozen=True, kw_only=True):
    """Who has an address of a network. Empty: not known."""

    name: str
    """The container's or task's, or the service's if the address is its VIP."""
    service: str = ""
    host: str = ""
    """As in `NamedTraffic`."""
    vip: bool = False


class AddressBook(msgspec.Struct, frozen=True, kw_only=True):
    """Who has which address, of all hosts: by the network's ID, then by address."""

    networks: dict[str, dict[str, AddressOwner]]


@dataclass(frozen=True, slots=True)
class _Party:
    """Who has an address."""

    name: str = ""
    service: str = ""
    host: str = ""


class _OtherDirectory:
    """Who has which address of a network of another driver: containers of this host alone."""

    def __init__(self, network: OtherNetwork, host: str) -> None:
        self._parties = {
            str(address): _Party(endpoint.container, "", host)
            for endpoint in network.endpoints
            for address in endpoint.addresses
        }

    def who(self, end: str) -> _Party:
        """As that of `_Directory`."""
        return self._parties.get(end.rpartition(":")[0].strip("[]"), _Party())

    def owners(self) -> dict[str, AddressOwner]:
        """As those of `_Directory`, IPv6 included."""
        return {
            address: AddressOwner(name=party.name, host=party.host)
            for address, party in self._parties.items()
        }


class _Directory:
    """Who has which address of a network."""

    def __init__(self, network: Network, state: NetworkState | None) -> None:
        self._network = network
        self._state = state
        self._parties: dict[str, _Party] = {}
        self._names: dict[IPAddress, tuple[str, str]] = {}
        """Names of containers or tasks, or of services that have a VIP; and of services."""
        self.hosts: dict[IPAddress, str] = {}
        """Of this host's addresses."""
        self.learned: Mapping[str, str] = {}
        """Other hosts, by the MAC addresses behind them."""
        view = None if state is None else state.view
        for container in () if view is None else view.containers:
            if container.address is not None:
                self._names[container.address.ip] = container.name, ""
        for service in () if view is None else view.services:
            for task in service.tasks:
                known, _ = self._names.get(task.address, ("", ""))
                self._names[task.address] = known or task.name, service.name
            if service.vip is not None:
                self._names[service.vip] = service.name, service.name

    def who(self, end: str) -> _Party:
        """Who has the address of one end of a connection, ADDRESS:PORT."""
        text = end.rpartition(":")[0].strip("[]")
        if text not in self._parties:
            self._parties[text] = self._find(ip_address(text))
        return self._parties[text]

    def owners(self) -> dict[str, AddressOwner]:
        """Of all IPv4 addresses that this host knows on the network."""
        view = None if self._state is None else self._state.view
        vips = {service.vip for service in (() if view is None else view.services)}
        found = {}
        for address in self._names:
            party = self._find(address)
            found[str(address)] = AddressOwner(
                name=party.name, service=party.service, host=party.host, vip=address in vips
            )
        return found

    def _find(self, address: IPAddress) -> _Party:
        if isinstance(address, IPv6Address):
            if address not in self._network.prefix6:
                return _Party()
            address = IPv4Address(int(address) & 0xFFFFFFFF)
        name, service = self._names.get(address, ("", ""))
        tasks = self._state.table.get(address, ()) if self._state is not None else ()
        hosts = {self._host(each) for each in tasks or (address,)}
        return _Party(name, service, hosts.pop() if len(hosts) == 1 else "")

    def _host(self, address: IPv4Address) -> str:
        return self.hosts.get(address) or self.learned.get(allocate.mac_for(address), "")


@dataclass(slots=True, eq=False)
class TrafficNames:
    """Adds names to the router's list. `others`: accelerated networks of other drivers."""

    driver: Driver
    kernel: KernelFacts
    syncer: SyncFacts
    others: Callable[[], Sequence[OtherNetwork]] = tuple

    def report(self, found: TrafficFacts) -> TrafficReport:
        """The router's list with names, and with the paths of packets as in `PathLabels`."""
        found = PathLabels(self.driver, self.kernel, self.syncer).connections(found)
        networks = {connection.network for connection in found.connections}
        engine, _ = self.syncer.engine()
        host = "" if engine is None else engine.hostname
        others = {network.view.id: network for network in self.others()}
        known: dict[str, _Directory | _OtherDirectory] = {
            number: _OtherDirectory(others[number], host) for number in networks & others.keys()
        }
        for network in self.driver.store.networks():
            if network.id in networks:
                known[network.id] = self._directory(network)

        def named(connection: ConnectionTraffic) -> NamedTraffic:
            directory = known.get(connection.network)
            own = _Party() if directory is None else directory.who(connection.local)
            peer = _Party() if directory is None else directory.who(connection.remote)
            return NamedTraffic(
                **msgspec.structs.asdict(connection),
                service=own.service,
                peer=peer.name,
                peer_service=peer.service,
                host=peer.host,
            )

        fields = msgspec.structs.asdict(found)
        fields["connections"] = tuple(map(named, found.connections))
        names = {number: network.view.name for number, network in others.items()}
        names.update(
            (number, state.view.name) for number, state in self.syncer.state().items() if state.view
        )
        return TrafficReport(**fields, host=host, networks=names)

    def addresses(self) -> AddressBook:
        """Who has which address of the accelerated networks of this host."""
        engine, _ = self.syncer.engine()
        host = "" if engine is None else engine.hostname
        found = {
            network.view.id: _OtherDirectory(network, host).owners() for network in self.others()
        }
        for network in self.driver.store.networks():
            found[network.id] = self._directory(network).owners()
        return AddressBook(networks=found)

    def _directory(self, network: Network) -> _Directory:
        made = _Directory(network, self.syncer.state().get(network.id))
        engine, _ = self.syncer.engine()
        names = engine.hostnames if engine else {}
        for endpoint in self.driver.store.endpoints(network.id):
            if endpoint.ipv4 is not None:
                made.hosts[endpoint.ipv4.ip] = engine.hostname if engine else ""
        made.learned = {
            mac: names.get(peer, str(peer)) for mac, peer in self.kernel.learned(network.id).items()
        }
        return made
