"""The driver's snapshot of networks, endpoints and settings, indexed so that each query is one
look-up.

Each snapshot is complete and replaces the one before. While the driver is down, the last one holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from operator import attrgetter
from pathlib import Path
from typing import Final

from dataplane.control import RouterSettings, RouterSnapshot, Rule
from dataplane.errors import DataplaneError
from dataplane.router.library_wire import IPAddress
from dataplane.router.remote_events import Transport

_RULE_FIELDS: Final = tuple(Rule.__struct_fields__)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A container's network namespace, by its inode."""

    namespace: int
    path: Path
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class KnownNetwork:
    """A network, with its endpoints on this host and its services."""

    id: str
    accelerated: bool
    subnets: tuple[IPv4Network | IPv6Network, ...]
    rule: Rule
    owners: dict[IPAddress, int] = field(default_factory=dict)
    """Addresses of this host's endpoints, to their namespaces."""
    tasks: dict[IPAddress, tuple[IPAddress, ...]] = field(default_factory=dict)
    """VIP to the addresses of its tasks on this host."""
    vips: dict[IPAddress, tuple[IPAddress, ...]] = field(default_factory=dict)
    """Address of a task on this host, to the VIPs of its services."""
    rdma: bool = True
    relay: bool = True
    verbs: bool = True
    """Whether it carries queue pairs of verbs."""
    verbs_direct: bool = False
    """Whether their peers may map registered memory."""
    peers: frozenset[IPAddress] = frozenset()
    """The other hosts that share the network."""
    encrypted: bool = False
    """Whether what leaves the host is encrypted, or isn't sent."""
    everywhere: dict[IPAddress, tuple[IPAddress, ...]] = field(default_factory=dict)
    """VIP to the addresses of its tasks on all hosts."""
    leading: dict[IPAddress, tuple[IPAddress, ...]] = field(default_factory=dict)
    """Address of a task on any host, to the VIPs of its services."""
    own: tuple[str, ...] = ()
    """The addresses of `owners` as text, sorted: what peers are told."""
    kind: str = "overlay"
    """The path of connections over TCP."""
    foreign: bool = False
    """Whether it is another driver's."""
    bridge: str = ""
    """As in `NetworkFact`, as is `trusted`."""
    trusted: bool = False
    balanced: frozenset[IPAddress] = frozenset()
    """Addresses behind which another driver chooses a service's task."""

    def may_use(self, transport: Transport) -> bool:
        """Whether connections to other hosts may use a transport."""
        allowed = self.rdma if transport is Transport.RDMA else self.relay
        return self.accelerated and allowed

    def __contains__(self, address: IPAddress) -> bool:
        return any(address in subnet for subnet in self.subnets)


class Knowledge:
    """One snapshot. Immutable. Without one: no networks, default settings."""

    def __init__(self, learned: RouterSnapshot | None = None) -> None:
        """
        Raises:
            DataplaneError: an address is invalid, or an endpoint's network is missing.
        """
        facts = learned or RouterSnapshot()
        self.learned = learned is not None
        self.settings: RouterSettings = facts.settings
        self.networks: dict[str, KnownNetwork] = {}
        self.sandboxes: dict[int, Sandbox] = {}
        self._local: dict[tuple[int, IPAddress], KnownNetwork] = {}
        self._of: defaultdict[int, list[KnownNetwork]] = defaultdict(list)
        self._expected: list[IPv4Network | IPv6Network] = []
        self.underlay: IPAddress | None = None
        self.encryption = facts.encryption
        self.offload = facts.tunnel_offload is not False
        """Whether the underlay's device segments UDP tunnels, as most do."""
        try:
            self._read(facts)
        except (ValueError, KeyError) as error:
            raise DataplaneError(
                "snapshot refused",
                cause=f"it is inconsistent ({error!r})",
                remedy="the last one holds; see freeflow bugreport",
            ) from error

    def _read(self, facts: RouterSnapshot) -> None:
        for fact in facts.networks:
            accelerated = fact.acceleration and facts.settings.acceleration
            self.networks[fact.id] = KnownNetwork(
                id=fact.id,
                accelerated=accelerated,
                subnets=tuple(ip_network(text) for text in fact.subnets),
                rule=fact.rule or facts.settings.rule,
                rdma=fact.rdma and facts.settings.rdma,
                relay=fact.relay and facts.settings.relay,
                verbs=accelerated and fact.verbs and facts.settings.verbs,
                verbs_direct=fact.verbs_direct,
                peers=frozenset(ip_address(text) for text in fact.peers),
                encrypted=fact.encrypted,
                kind=fact.kind,
                foreign=fact.foreign,
                bridge=fact.bridge,
                trusted=fact.trusted,
                balanced=frozenset(ip_address(text) for text in fact.balanced),
            )
        self._expected = [ip_network(text) for text in facts.expected]
        for known in self.networks.values():
            if known.foreign:
                self._expected += known.subnets
        self.underlay = ip_address(facts.underlay) if facts.underlay else None
        for endpoint in facts.endpoints:
            network = self.networks[endpoint.network]
            sandbox = Sandbox(
                endpoint.namespace, Path(endpoint.path), endpoint.container or endpoint.id[:12]
            )
            self.sandboxes[endpoint.namespace] = sandbox
            self._of[endpoint.namespace].append(network)
            for text in endpoint.addresses:
                address = ip_address(text)
                network.owners[address] = endpoint.namespace
                self._local[endpoint.namespace, address] = network
        for fact in facts.networks:
            self.networks[fact.id] = _with_vips(self.networks[fact.id], fact.vips)
        for key, network in self._local.items():
            self._local[key] = self.networks[network.id]
        for namespace, networks in self._of.items():
            self._of[namespace] = [self.networks[network.id] for network in networks]

    @cached_property
    def encrypted_peers(self) -> frozenset[IPAddress]:
        """The hosts that share an encrypted network."""
        return frozenset(
            peer
            for network in self.networks.values()
            if network.encrypted
            for peer in network.peers
        )

    @property
    def relay_encryption(self) -> str:
        """What this host's relay encrypts. On encrypted networks that is everything, and links are
        shared by all networks."""
        return "all" if self.encrypted_peers else self.settings.relay_encryption

    @cached_property
    def remote(self) -> frozenset[tuple[Transport, int, IPAddress]]:
        """The same as `accelerated`, with each transport that the network's connections to other
        hosts may use.
        """
        return frozenset(
            (transport, *key)
            for key, network in self._local.items()
            for transport in Transport
            if network.may_use(transport)
        )

    @cached_property
    def accelerated(self) -> frozenset[tuple[int, IPAddress]]:
        """Namespaces, each with an address that it has on an accelerated network."""
        return frozenset(key for key, network in self._local.items() if network.accelerated)

    @cached_property
    def gids(self) -> dict[int, tuple[IPAddress, ...]]:
        """The addresses of each namespace that can be GIDs of its device, IPv4 first."""
        found: defaultdict[int, list[IPAddress]] = defaultdict(list)
        for (namespace, address), network in self._local.items():
            if network.verbs:
                found[namespace].append(address)
        return {
            namespace: tuple(sorted(addresses, key=lambda each: (each.version, int(each))))
            for namespace, addresses in found.items()
        }

    @cached_property
    def direct(self) -> frozenset[int]:
        """Namespaces with a network on which peers may map registered memory."""
        return frozenset(
            namespace
            for (namespace, _), network in self._local.items()
            if network.verbs and network.verbs_direct
        )

    def network_of(self, namespace: int, address: IPAddress) -> KnownNetwork | None:
        """The network in which the container of this namespace has this address."""
        return self._local.get((namespace, address))

    def networks_of(self, namespace: int) -> list[KnownNetwork]:
        """The networks of a container."""
        return self._of.get(namespace, [])

    def is_endpoint(self, namespace: int) -> bool:
        """Whether a namespace is that of a container on a FreeFlow network."""
        return namespace in self.sandboxes

    def is_expected(self, namespace: int, address: IPAddress) -> bool:
        """Whether a container may have an address, on an accelerated network, that the driver has
        not told of yet.

        It tells of FreeFlow's own networks at once. What it says of those of other drivers, and
        everything after a router's start, comes late.
        """
        return not self.is_endpoint(namespace) or any(
            address in subnet for subnet in self._expected
        )

    def enabled(self, namespace: int) -> bool:
        """Whether a container is on an accelerated network."""
        return any(network.accelerated for network in self.networks_of(namespace))

    def rule(self, namespace: int) -> Rule:
        """When a container's connections are upgraded.

        If its networks have different rules, each threshold is the greatest, and the spin time and
        the ring limit are the smallest.
        """
        rules = [network.rule for network in self.networks_of(namespace) if network.accelerated]
        if len(set(rules)) <= 1:
            return rules[0] if rules else self.settings.rule
        most = {name: max(map(attrgetter(name), rules)) for name in _RULE_FIELDS}
        least = {name: min(map(attrgetter(name), rules)) for name in ("spin", "ring_limit")}
        return Rule(**{**most, **least})


def _with_vips(network: KnownNetwork, vips: Mapping[str, tuple[str, ...]]) -> KnownNetwork:
    tasks: dict[IPAddress, tuple[IPAddress, ...]] = {}
    leading: defaultdict[IPAddress, list[IPAddress]] = defaultdict(list)
    everywhere: dict[IPAddress, tuple[IPAddress, ...]] = {}
    for text, addresses in vips.items():
        vip = ip_address(text)
        every = [ip_address(address) for address in addresses]
        everywhere[vip] = tuple(every)
        tasks[vip] = tuple(address for address in every if address in network.owners)
        for address in every:
            leading[address].append(vip)
    return replace(
        network,
        tasks=tasks,
        vips={task: tuple(of) for task, of in leading.items() if task in network.owners},
        everywhere=everywhere,
        own=tuple(sorted(map(str, network.owners))),
        leading={task: tuple(of) for task, of in leading.items()},
    )
