"""The messages between the driver and the router: one line of JSON each, on a socket of root.

The driver sends the complete current state (`RouterSnapshot`, never a difference) and requests for
information. The router replies to each with one line.
"""

from __future__ import annotations

import msgspec

DEFAULT_RING_LIMIT = 4 << 20
DEFAULT_SESSION_PORT = 4799
OWNED = 2500
"""The most addresses of this host that another host is told: as many as fit into a message if all
are of the longest."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """When a connection is upgraded, and how it waits; `struct welcome` in `library/protocol.h`."""

    operations: int = 4
    """After so many reads and writes,"""
    age: int = 10_000
    """and microseconds since the connection began, which most short connections don't reach,"""
    bytes: int = 0
    """and bytes in both directions;"""
    bulk: int = 1 << 20
    """or after so many bytes alone."""
    spin: int = 50
    """Microseconds of spinning before a sleep."""
    ring_limit: int = DEFAULT_RING_LIMIT
    """Bytes of a ring that may be used."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one container."""

    processes: int = 2048
    waiting: int = 16384
    """Requests that wait for the other end of their connection."""
    connections: int = 16384
    """Connections in shared memory."""
    asks: int = 5000
    """Requests per second."""
    messages: int = 25000
    """Messages per second. A container that sends more waits, and nobody else."""
    bells: int = 16384
    memory: int = 1 << 30
    """Bytes of shared memory that are in use, not only reserved."""


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a host."""

    acceleration: bool = True
    rule: Rule = Rule()
    limits: Limits = Limits()
    rdma: bool = True
    """Whether connections to other hosts may be upgraded to RDMA."""
    session_port: int = DEFAULT_SESSION_PORT
    """TCP port of sessions between routers."""
    session_key: str = ""
    """A secret that the hosts share, where there are no certificates of a Swarm."""
    remote_ring: int = 256 << 10
    """Bytes of a ring (one direction) of a connection to another host; a power of two."""
    remote_memory: int = 1 << 30
    """Bytes registered with the RDMA device, for all connections together."""


class EndpointFact(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint on this host."""

    id: str
    network: str
    addresses: tuple[str, ...]
    namespace: int
    """Inode of the container's network namespace."""
    path: str = ""
    """A path of that namespace, in the router's mount namespace."""
    container: str = ""
    """The container's name, if that is known."""


class NetworkFact(msgspec.Struct, frozen=True, kw_only=True):
    """A network that has endpoints on this host."""

    id: str
    name: str = ""
    acceleration: bool = True
    rdma: bool = True
    subnets: tuple[str, ...] = ()
    vips: dict[str, tuple[str, ...]] = {}
    """VIP to the addresses of its tasks, on all hosts."""
    rule: Rule | None = None
    """If it differs from the host's."""
    peers: tuple[str, ...] = ()
    """Addresses of the other hosts that share it."""


class RouterSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="learn"):
    """Everything that the driver knows. It replaces the snapshot before."""

    endpoints: tuple[EndpointFact, ...] = ()
    networks: tuple[NetworkFact, ...] = ()
    settings: RouterSettings = RouterSettings()
    underlay: str = ""
    """This host's address on the underlay, if that is known."""


class LivenessRequest(msgspec.Struct, frozen=True, tag="life"):
    """Does the router answer at all?"""


class StatisticsRequest(msgspec.Struct, frozen=True, tag="statistics"):
    """Requests the router's counters."""


class ConnectionsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="connections"):
    """Requests the connections of one namespace, or of all."""

    namespace: int | None = None


class PathsRequest(msgspec.Struct, frozen=True, tag="paths"):
    """Requests the number of connections on each path, and why."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The snapshot is in force."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The request can't be fulfilled."""

    message: str


class ContainerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one container."""

    namespace: int
    container: str
    processes: int = 0
    waiting: int = 0
    shm: int = 0
    bells: int = 0
    memory: int = 0
    builds: dict[str, int] = {}
    """Processes, by the build ID of their library."""


class DeviceFact(msgspec.Struct, frozen=True, kw_only=True):
    """The RDMA device that is in use."""

    name: str
    port: int
    gid_index: int
    gid: str
    kind: str
    """RoCE v2 or InfiniBand."""
    mtu: int


class PeerFact(msgspec.Struct, frozen=True, kw_only=True):
    """Another host that shares a network with this one."""

    address: str
    node: str = ""
    session: bool = False
    reason: str = ""
    """Why there is no session."""
    rdma: bool = False
    """Whether it has an RDMA device."""
    data_path: str = ""
    link: str = "none"
    """none, being made, up, down, or over the session."""
    link_reason: str = ""
    connections: int = 0


class RdmaFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Connections to other hosts. Counts since the start, unless they say now."""

    on: bool = True
    device: DeviceFact | None = None
    why: str = ""
    """Why no connection of this host can use RDMA; "" if one can."""
    looked: tuple[str, ...] = ()
    """Devices that are not used, and why."""
    sessions: str = ""
    """Why there are no sessions at all; "" if there may be."""
    node: str = ""
    peers: tuple[PeerFact, ...] = ()
    connections: int = 0
    """Now."""
    registered: int = 0
    """Bytes of memory, now."""
    granted: int = 0
    broken: int = 0
    """Connections that were reset because bytes could not be delivered."""
    left: int = 0
    """Connections that fell back to TCP."""
    refused: dict[str, int] = {}
    """By the reason's word."""
    relay: dict[str, int] = {}
    """The relay's own counters, by name."""
    relay_starts: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True, tag="statistics"):
    """Counts since the router's start, unless they say now."""

    uptime: float
    learned: bool
    """Whether the driver has sent a snapshot."""
    processes: int
    """Now."""
    waiting: int
    """Now."""
    shm: int
    """Connections with a slot now; the two ends on one host count as one."""
    arenas: int
    """Now."""
    memory: int
    """Bytes of shared memory in use now."""
    granted: int
    refused: dict[str, int]
    """By the reason's word."""
    noted: dict[str, int]
    """By the reason's word."""
    wrong_messages: int
    dropped: int
    """Clients that did not read their answers."""
    containers: tuple[ContainerCounts, ...] = ()
    rdma: RdmaFacts = RdmaFacts()


class ConnectionFact(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a TCP connection in a container on a freeflow network."""

    namespace: int
    container: str
    network: str
    local: str
    remote: str
    path: str
    """overlay, shm or rdma."""
    reason: str | None = None
    """The reason's word, if the path is overlay."""
    age: float | None = None
    """Seconds on shm or rdma, or since the request."""


class Connections(msgspec.Struct, frozen=True, kw_only=True, tag="connections"):
    """Answer to ConnectionsRequest."""

    connections: tuple[ConnectionFact, ...]
    reasons: dict[str, str]
    """Word to sentence, of the reasons that appear."""


class PathCount(msgspec.Struct, frozen=True, kw_only=True):
    """The number of connections' ends in this host's containers, by network, path and reason."""

    network: str
    path: str
    reason: str | None
    count: int


class PathCounts(msgspec.Struct, frozen=True, kw_only=True, tag="paths"):
    """Answer to PathsRequest."""

    paths: tuple[PathCount, ...]


ControlRequest = (
    RouterSnapshot | LivenessRequest | StatisticsRequest | ConnectionsRequest | PathsRequest
)
ControlReply = Done | Failed | Statistics | Connections | PathCounts
