"""What the driver and the router say to each other: one line of JSON per message, on a socket for root alone.

The driver sends what is true now (`RouterSnapshot`, whole, never a difference) and asks; the router answers each with one line.
"""

from __future__ import annotations

import msgspec

DEFAULT_RING_LIMIT = 4 << 20
DEFAULT_SESSION_PORT = 4799
OWNED = 2500
"""Addresses of this host that another host is told: what a message can carry, were they all of the longest."""


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """When a connection is upgraded, and how it waits: see `struct welcome` in `library/protocol.h`."""

    operations: int = 4
    """Reads and writes,"""
    age: int = 10_000
    """and microseconds since it began: what most short connections don't live to,"""
    bytes: int = 0
    """and bytes in both directions;"""
    bulk: int = 1 << 20
    """or so many bytes, whatever the rest."""
    spin: int = 50
    """Microseconds."""
    ring_limit: int = DEFAULT_RING_LIMIT
    """Bytes of a ring that may be used."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one container may have."""

    processes: int = 2048
    waiting: int = 16384
    """Connections that asked and whose other end hasn't."""
    connections: int = 16384
    """Connections in shared memory."""
    asks: int = 5000
    """Per second."""
    messages: int = 25000
    """Per second; past it the container waits, and nobody else."""
    bells: int = 16384
    memory: int = 1 << 30
    """Bytes of shared memory that are really used."""


class RouterSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What can be set for a host."""

    acceleration: bool = True
    rule: Rule = Rule()
    limits: Limits = Limits()
    rdma: bool = True
    """Whether connections to other hosts may move to RDMA."""
    session_port: int = DEFAULT_SESSION_PORT
    """TCP port on which routers speak with each other."""
    session_key: str = ""
    """A secret that the hosts share, where there is no Swarm whose certificates they could use."""
    remote_ring: int = 256 << 10
    """Bytes of one direction of a connection to another host; a power of two."""
    remote_memory: int = 1 << 30
    """Bytes registered with the RDMA device, of all connections together."""


class EndpointFact(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint on this host."""

    id: str
    network: str
    addresses: tuple[str, ...]
    namespace: int
    """Inode of its container's network namespace."""
    path: str = ""
    """A path of that namespace, as the router sees it."""
    container: str = ""
    """What people call the container, if that is known."""


class NetworkFact(msgspec.Struct, frozen=True, kw_only=True):
    """A network that has endpoints on this host."""

    id: str
    name: str = ""
    acceleration: bool = True
    rdma: bool = True
    subnets: tuple[str, ...] = ()
    vips: dict[str, tuple[str, ...]] = {}
    """VIP to the addresses of its tasks, on whatever host."""
    rule: Rule | None = None
    """If it isn't the host's."""
    peers: tuple[str, ...] = ()
    """Addresses of the other hosts that share it."""


class RouterSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="learn"):
    """All that the driver knows, in place of what it said before."""

    endpoints: tuple[EndpointFact, ...] = ()
    networks: tuple[NetworkFact, ...] = ()
    settings: RouterSettings = RouterSettings()
    underlay: str = ""
    """This host's address on the underlay, if that is known."""


class LivenessRequest(msgspec.Struct, frozen=True, tag="life"):
    """Whether it answers at all."""


class StatisticsRequest(msgspec.Struct, frozen=True, tag="statistics"):
    """Counts."""


class ConnectionsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="connections"):
    """The list of connections; of one namespace, or all."""

    namespace: int | None = None


class PathsRequest(msgspec.Struct, frozen=True, tag="paths"):
    """How many connections take which path, and why."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The snapshot is in force."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """What was asked for can't be had."""

    message: str


class ContainerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """One container's share."""

    namespace: int
    container: str
    processes: int = 0
    waiting: int = 0
    shm: int = 0
    bells: int = 0
    memory: int = 0
    builds: dict[str, int] = {}
    """Processes by the build id of their library."""


class DeviceFact(msgspec.Struct, frozen=True, kw_only=True):
    """The RDMA device that is used."""

    name: str
    port: int
    gid_index: int
    gid: str
    kind: str
    """RoCE v2 or InfiniBand."""
    mtu: int


class PeerFact(msgspec.Struct, frozen=True, kw_only=True):
    """Another host that shares a network."""

    address: str
    node: str = ""
    session: bool = False
    reason: str = ""
    """Why there is no session."""
    rdma: bool = False
    """Whether it has a device."""
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
    """Why no connection of this host can use RDMA; empty if one can."""
    looked: tuple[str, ...] = ()
    """Devices that aren't used, and why."""
    sessions: str = ""
    """Why there are no sessions with any host."""
    node: str = ""
    peers: tuple[PeerFact, ...] = ()
    connections: int = 0
    """Now."""
    registered: int = 0
    """Bytes of memory, now."""
    granted: int = 0
    broken: int = 0
    """Ended as by a reset, since bytes could not be delivered."""
    left: int = 0
    """Went back to TCP."""
    refused: dict[str, int] = {}
    """By reason's word."""
    relay: dict[str, int] = {}
    """The relay's own counters."""
    relay_starts: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True, tag="statistics"):
    """Counts since the router's start, unless they say now."""

    uptime: float
    learned: bool
    """Whether a snapshot has come."""
    processes: int
    """Now."""
    waiting: int
    """Now."""
    shm: int
    """Connections with a slot now; both ends on one host count as one."""
    arenas: int
    """Now."""
    memory: int
    """Bytes of shared memory used now."""
    granted: int
    refused: dict[str, int]
    """By reason's word."""
    noted: dict[str, int]
    """By reason's word."""
    wrong_messages: int
    dropped: int
    """Clients that didn't take their answers."""
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
    """Word of the reason, if it is on overlay."""
    age: float | None = None
    """Seconds on shm or rdma, or since it asked."""


class Connections(msgspec.Struct, frozen=True, kw_only=True, tag="connections"):
    """Answer to ConnectionsRequest."""

    connections: tuple[ConnectionFact, ...]
    reasons: dict[str, str]
    """Word to sentence, of those that appear."""


class PathCount(msgspec.Struct, frozen=True, kw_only=True):
    """So many ends of connections in containers of this host."""

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
