"""The driver's values. They are frozen: a change is a new value, stored before it is promised."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Final

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
IPInterface = IPv4Interface | IPv6Interface

FORMAT: Final = 1
"""Version of the rules that all hosts of a network share (VXLAN, derived addresses), fixed when the
network is allocated."""
ENCRYPTED_FORMAT: Final = 2
"""The same of encrypted networks: hosts of an earlier version refuse them."""


@dataclass(frozen=True, slots=True)
class Subnet:
    """An address pool of a network, with the gateway address that Docker reserved in it."""

    pool: IPNetwork
    gateway: IPInterface | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A network, the same on every host of the Swarm.

    `mtu` is that of the containers' interfaces, in bytes. IPv6 addresses are derived from
    `prefix6`. `port` is the VXLAN UDP port on the underlay. `overlay` is false where there are no
    other hosts (SCOPE=local). `encrypted`: what leaves the host is encrypted, or isn't sent.
    """

    id: str
    vni: int
    port: int
    mtu: int
    prefix6: IPv6Network
    subnets: tuple[Subnet, ...] = ()
    ipv6: bool = False
    internal: bool = False
    acceleration: bool = True
    overlay: bool = True
    encrypted: bool = False
    format: int = FORMAT
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One container's attachment to one network.

    `sandbox_key` is Docker's path of the namespace, after Join. `engine_ipv6` is the IPv6 address
    that the engine chose, where that isn't unique: in the container `ipv6` replaces it.
    """

    id: str
    network_id: str
    mac: str
    ipv4: IPv4Interface | None = None
    ipv6: IPv6Interface | None = None
    sandbox_key: str | None = None
    created: float = 0.0
    engine_ipv6: IPv6Interface | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A host that shares a network. `name` is its ID in the gossip, not its host name."""

    name: str
    address: IPAddress


@dataclass(frozen=True, slots=True)
class EncryptedPeer:
    """A host that shares an encrypted network, and the public keys of its two WireGuard devices.

    `node` is the ID in its certificate; inner addresses are derived from it. `slot` is the device
    by which it sends, `port` the UDP port of the first one.
    """

    node: str
    address: IPAddress
    keys: tuple[str, str]
    slot: int
    port: int


@dataclass(frozen=True, slots=True)
class Task:
    """A task of a service on a network, as in Docker's gossip."""

    name: str
    address: IPv4Address
    endpoint_id: str


@dataclass(frozen=True, slots=True)
class Service:
    """A service on a network; `vip` is None with `--endpoint-mode dnsrr`."""

    name: str
    vip: IPv4Address | None
    tasks: tuple[Task, ...]


@dataclass(frozen=True, slots=True)
class LocalContainer:
    """A container of this host on a network, as the engine lists it.

    `mac`, `ipv6` and `sandbox_key` serve to restore an endpoint whose row is lost.
    """

    id: str
    name: str
    endpoint_id: str
    address: IPv4Interface | None
    mac: str | None = None
    ipv6: IPv6Interface | None = None
    sandbox_key: str | None = None


@dataclass(frozen=True, slots=True)
class NetworkView:
    """A network as the engine of this host lists it.

    `scope` is the engine's: "swarm" for networks that Swarm distributes to the hosts. `others` are
    addresses of containers, on any host, that belong to no service. `options`, `subnets`, `ipv6`
    and `internal` serve to restore a network whose row is lost; `labels` are the user's. `ingress`:
    it is the Swarm's own, for published ports. `configuration` is the name of the network of this
    host from which the engine takes options, subnets and labels (--config-from).
    """

    id: str
    name: str
    driver: str
    peers: tuple[Peer, ...] = ()
    services: tuple[Service, ...] = ()
    others: frozenset[IPv4Address] = frozenset()
    containers: tuple[LocalContainer, ...] = ()
    scope: str = ""
    options: dict[str, str] = field(default_factory=dict)
    subnets: tuple[Subnet, ...] = ()
    ipv6: bool = False
    internal: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    ingress: bool = False
    configuration: str = ""


@dataclass(frozen=True, slots=True)
class EngineView:
    """The engine's description of itself. Only managers know the `hostnames` of the Swarm's
    nodes."""

    version: str
    hostname: str
    root: str
    swarm: bool
    node_id: str
    node_address: IPAddress | None
    manager: bool
    hostnames: dict[IPAddress, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ArpFrame:
    """An ARP frame on a network, given by its short ID (see `names.short`)."""

    network: str
    sender: IPv4Address
    target: IPv4Address

    @property
    def is_announcement(self) -> bool:
        """Whether it tells where an address is, rather than asks (RFC 5227, section 3)."""
        return self.sender == self.target


VipTable = dict[IPv4Address, tuple[IPv4Address, ...]]
"""VIP → addresses of the tasks that take new connections, sorted; empty: a service without
tasks."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of a VIP's tasks get one container's new connections, where not all do in turn.

    Those in `local` while there are any; or, if `client` is the container's address, one task by
    its hash (see `balance.py`).
    """

    local: frozenset[IPv4Address] = frozenset()
    client: IPv4Address | None = None


Choices = dict[IPv4Address, Choice]
"""By VIP."""
