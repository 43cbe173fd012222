"""The status of this host as one value: `/admin/status` answers it, `freeflow` shows it.

`freeflow status --json` prints it field by field: a field may be added, but never renamed or given
another unit.
"""

from __future__ import annotations

import msgspec

from dataplane.control import PathCount, PeerFact, RdmaFacts, RelayFacts, RouterCounts
from driver.errors import FreeFlowError


class Finding(msgspec.Struct, frozen=True):
    """A problem. `severity` is error (something doesn't work) or warning (something may not work).

    `remedy` is the next step: a command to type, where there is one.
    """

    severity: str
    what: str
    cause: str
    remedy: str

    @classmethod
    def of(cls, severity: str, what: str, error: FreeFlowError, remedy: str = "") -> Finding:
        """A problem whose cause is an error; `remedy` takes the place of a missing one."""
        return cls(severity, what, error.reason, error.remedy or remedy or "freeflow doctor")


def explanation(error: FreeFlowError) -> dict[str, str]:
    """An error as JSON: the whole text, and its parts."""
    return {
        "error": str(error),
        "what": error.what,
        "cause": error.cause,
        "remedy": error.remedy,
    }


class EndpointStatus(msgspec.Struct, frozen=True):
    id: str
    container: str
    ipv4: str
    ipv6: str
    mac: str
    joined: bool
    rx_bytes: int = 0
    tx_bytes: int = 0
    spoofed: int = 0


class PeerStatus(msgspec.Struct, frozen=True):
    """A host of a network. `name` is empty if unknown: only managers know other hosts' names."""

    name: str
    address: str
    own: bool = False


class ServiceStatus(msgspec.Struct, frozen=True):
    """A service of a network. `vip` is empty with `dnsrr`. `tasks` take new connections.

    `by_list`: Docker's DNS doesn't tell which tasks do, since its answer is too large or doesn't
    come; `tasks` are those that the engine lists.

    `balance` of the VIP is even, local or source. `here` are the tasks that new connections of this
    host's containers get, `why` these; with `source`, `clients` has the task of each container.
    """

    name: str
    vip: str
    tasks: list[str]
    by_list: bool = False
    balance: str = "even"
    here: list[str] = []
    clients: dict[str, str] = {}
    why: str = ""


class NetworkStatus(msgspec.Struct, frozen=True):
    """A network of this host. `path` is its packets': overlay or overlay+ebpf.

    `synced`: seconds since peers and services were last read; null: not yet. `rx_bytes`, `tx_bytes`
    and `spoofed` are sums over all its endpoints on this host, past ones included, and only grow.
    """

    id: str
    name: str
    vni: int
    port: int
    mtu: int
    prefix6: str
    subnets: list[str]
    internal: bool
    ipv6: bool
    path: str
    acceleration: bool
    endpoints: list[EndpointStatus]
    peers: list[PeerStatus]
    services: list[ServiceStatus]
    synced: float | None = None
    error: str = ""
    rx_bytes: int = 0
    tx_bytes: int = 0
    spoofed: int = 0
    verbs: bool = True
    """Whether containers have a device of verbs on it, unless `VERBS` is off."""
    encrypted: bool = False
    """Whether what leaves the host is encrypted, or isn't sent."""


class OtherNetworkStatus(msgspec.Struct, frozen=True):
    """A network of another driver that asks for acceleration. `containers` of this host have
    these addresses there.

    `reason`: why it isn't accelerated; empty: it is.
    """

    id: str
    name: str
    driver: str
    reason: str = ""
    subnets: list[str] = []
    between_hosts: bool = False
    """Whether connections to other hosts may move too."""
    containers: dict[str, list[str]] = {}


class RouterStatus(RouterCounts, frozen=True, kw_only=True):
    """The router of accelerated connections, as it describes itself; `up`: whether it answers.

    `paths` are the ends of connections of this host's containers. Words of reasons are those of
    `freeflow connections`. `rdma` and `relay` are null if the router doesn't answer.
    """

    up: bool = False
    paths: tuple[PathCount, ...] = ()
    rdma: RdmaFacts | None = None
    relay: RelayFacts | None = None


class FastPathStatus(msgspec.Struct, frozen=True):
    """The eBPF fast path. `stage`: same-host, receive or tunnel, each with those before it, or
    empty: off.

    `reason`: why no higher stage runs. `devices` of the host have a program of ours.
    """

    stage: str
    reason: str = ""
    devices: list[str] = []


class GuardStatus(msgspec.Struct, frozen=True):
    """UDP `ports` of the overlay that accept packets from peers only.

    `reason`: why other ports accept them from any address. `strangers`: addresses that sent to the
    ports lately and belong to no peer.
    """

    ports: list[int] = []
    reason: str = ""
    strangers: list[str] = []


class PartStatus(msgspec.Struct, frozen=True):
    """A part of the plugin that has died: worker, router, or thread (`name` is the thread's).

    `deaths` since the plugin's start, `recent` ones in the last ten minutes, `ago`: seconds since
    the last one.
    """

    part: str
    deaths: int
    recent: int
    ago: float
    name: str = ""


class EncryptedPeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A host that shares an encrypted network.

    `control`: what encrypts what the hosts' routers say to each other, `data` what encrypts the
    containers' packets; empty: nothing passes, and `reason` says why. `handshake`: seconds since
    WireGuard's last one; null: there was none. `received` and `sent` are bytes, since the peer's
    key is known.
    """

    address: str
    name: str = ""
    node: str = ""
    inner: str = ""
    control: str = ""
    data: str = ""
    handshake: float | None = None
    received: int = 0
    sent: int = 0
    reason: str = ""
    silent: list[int] = []
    """UDP ports of the host with which there was no handshake lately, though there should be."""


class EncryptionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The encryption of this host's encrypted networks.

    `slot`: the device by which it sends. `port`: UDP port of the first device, that of the second
    is the next one. `rotated`: seconds since the key that it sends with came into use. `error`: why
    keys or peers are not up to date.
    """

    by: str = "wireguard"
    slot: int = 0
    port: int = 0
    rotated: float = 0.0
    error: str = ""
    peers: list[EncryptedPeerStatus] = []


class HostStatus(msgspec.Struct, frozen=True):
    """This host. `engine` is empty while the engine doesn't answer."""

    hostname: str
    engine: str
    swarm: bool
    manager: bool
    node_id: str
    address: str
    underlay: str
    underlay_mtu: int
    kernel: str
    tunnel_offload: bool | None = None
    """Whether the underlay's device segments UDP tunnels; None: unknown."""


def relay_cpu(router: RouterCounts) -> dict[str, float]:
    """Seconds of the processor that the relay has used, by container, where it has."""
    used: dict[str, float] = {}
    for one in router.containers:
        if one.relay_cpu:
            name = one.container or str(one.namespace)
            used[name] = used.get(name, 0.0) + one.relay_cpu
    return used


def without_session(router: RouterStatus) -> list[PeerFact]:
    """Other hosts whose routers should have a session with this host's, and have none.

    Without RDMA and relays there is no need for sessions.
    """
    rdma, relay = router.rdma, router.relay
    if rdma is None or relay is None or not (relay.on or (rdma.on and rdma.device)):
        return []
    return [host for host in rdma.hosts if not host.session]


class CallStatus(msgspec.Struct, frozen=True):
    """A call of Docker: totals since the start, percentiles of the last 1024 in milliseconds."""

    name: str
    count: int
    errors: int
    p50_ms: float
    p99_ms: float


class Status(msgspec.Struct, frozen=True):
    version: str
    healthy: bool
    uptime: float
    host: HostStatus
    settings: dict[str, str]
    networks: list[NetworkStatus]
    problems: list[Finding]
    calls: list[CallStatus]
    path_counts: dict[str, int] = {}
    router: RouterStatus | None = None
    fastpath: FastPathStatus | None = None
    guard: GuardStatus | None = None
    parts: list[PartStatus] = []
    other_networks: list[OtherNetworkStatus] = []
    encryption: EncryptionStatus | None = None
    """Null: no container of this host is on an encrypted network."""
