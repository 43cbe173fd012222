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

RING_MOST = 128 << 30
"""Bytes per second that one ring can carry at most: more than a core copies from its cache."""


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
    queue_pairs: int = 4096
    """Queue pairs of verbs that are connected, or wait for their peer."""
    direct_memory: int = 1 << 30
    """Bytes of registered memory that peers on this host can map."""


class RelayRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which connections to other hosts go over the relays' TCP connections; docs/relay.md."""

    busy: int = 200
    """Messages per second from which a connection is busy."""
    connections: int = 15
    """Busy connections, in the harmonic mean of the two processes. Measured: with 8 the relay takes
    as much processor time as the fast path and twice as long; with 16 it is as fast, for half."""
    messages: int = 5000
    """Per second, of two processes with each other."""
    bulk: int = 16 << 10
    """Bytes of a message, on average, from which a connection carries bulk data,"""
    bulk_rate: int = 1 << 20
    """if it carries so many bytes per second."""
    batch: int = 3
    """Connections per wake-up, and blocks per message between relays: with fewer of both,
    connections go back to TCP."""
    pause: int = 60
    """Seconds until they may come again, doubled each time,"""
    pause_most: int = 3600
    """up to this."""
    cpu: int = 100
    """Percent of one processor that the relay may use for one container."""


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
    relay_spin: int = 50
    """Microseconds for which the relay lets others run before it sleeps, on hosts with two cores or
    more. Where it has an RDMA device too, it spins as libraries do."""
    relay_rule: RelayRule = RelayRule()
    relay: bool = True
    """Whether connections to other hosts may go over the relays' TCP connections."""
    relay_ring: int = 1 << 20
    """As `remote_ring`, for these."""
    relay_encryption: str = "messages"
    """What the relay encrypts on them: messages (all but bulk data), all, or off."""
    verbs: bool = True
    """Whether containers have a device of verbs."""
    zero_copy: bool = False
    """Whether RDMA devices write between registered memory, on networks with `verbs_direct`."""


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


ANY_DEVICE = "*"
"""In place of a bridge's name: nobody knows what a driver has in the host's namespace."""


class NetworkFact(msgspec.Struct, frozen=True, kw_only=True):
    """A network that has endpoints on this host."""

    id: str
    name: str = ""
    acceleration: bool = True
    rdma: bool = True
    relay: bool = True
    verbs: bool = True
    verbs_direct: bool = False
    """Whether peers on one host may map each other's registered memory."""
    subnets: tuple[str, ...] = ()
    vips: dict[str, tuple[str, ...]] = {}
    """VIP to the addresses of its tasks, on all hosts."""
    rule: Rule | None = None
    """If it differs from the host's."""
    peers: tuple[str, ...] = ()
    """Addresses of the other hosts that share it."""
    encrypted: bool = False
    """Whether what leaves the host is encrypted, or isn't sent."""
    kind: str = "overlay"
    """The path of its connections over TCP: overlay, or another driver's name."""
    foreign: bool = False
    """Whether it is another driver's: connections are paired after more proofs."""
    bridge: str = ""
    """Of such a network, the bridge in the host's own namespace that carries it; empty: nothing
    there does; `ANY_DEVICE`: unknown."""
    trusted: bool = False
    """The user vouches that nothing keeps its containers apart."""
    balanced: tuple[str, ...] = ()
    """Of such a network, addresses behind which its driver chooses a service's task."""


class EncryptionKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The public keys of this host's WireGuard devices, for peers on encrypted networks."""

    keys: tuple[str, str]
    proofs: tuple[str, str]
    """Of each key, that it belongs to this node."""
    slot: int
    """The device by which this host sends."""
    port: int
    """UDP port of the first device; that of the second is the next one."""


class RouterSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="learn"):
    """Everything that the driver knows. It replaces the snapshot before."""

    endpoints: tuple[EndpointFact, ...] = ()
    networks: tuple[NetworkFact, ...] = ()
    settings: RouterSettings = RouterSettings()
    underlay: str = ""
    """This host's address on the underlay, if that is known."""
    tunnel_offload: bool | None = None
    """Whether the underlay's device segments UDP tunnels; None: unknown."""
    encryption: EncryptionKeys | None = None
    """None: no container here is on an encrypted network."""
    expected: tuple[str, ...] = ()
    """Subnets in which containers may have addresses that `endpoints` lacks for now."""


class LivenessRequest(msgspec.Struct, frozen=True, tag="life"):
    """Does the router answer at all?"""


class StatisticsRequest(msgspec.Struct, frozen=True, tag="statistics"):
    """Requests the router's counters."""


class ConnectionsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="connections"):
    """Requests the connections of one namespace, or of all."""

    namespace: int | None = None


class VerbsRequest(msgspec.Struct, frozen=True, kw_only=True, tag="verbs"):
    """Requests the devices and queue pairs of verbs of one namespace, or of all."""

    namespace: int | None = None


class TrafficRequest(msgspec.Struct, frozen=True, kw_only=True, tag="traffic"):
    """Requests what the connections of one namespace, or of all, have carried."""

    namespace: int | None = None


class PathsRequest(msgspec.Struct, frozen=True, tag="paths"):
    """Requests the number of connections on each path, and why."""


class EncryptionRequest(msgspec.Struct, frozen=True, tag="encryption"):
    """Requests the public keys that peers have announced."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The snapshot is in force."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The request can't be fulfilled."""

    message: str


class PeerKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What a host with a session has announced. `node` is that of its certificate."""

    address: str
    node: str
    keys: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()
    slot: int = 0
    port: int = 0


class EncryptionFacts(msgspec.Struct, frozen=True, kw_only=True, tag="encryption"):
    """Answer to EncryptionRequest. `node` is this host's; "" without an identity."""

    node: str = ""
    peers: tuple[PeerKeys, ...] = ()


class ContainerCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one container."""

    namespace: int
    container: str
    processes: int = 0
    waiting: int = 0
    connections: int = 0
    """Ends of connections in shared memory."""
    queue_pairs: int = 0
    """Of verbs, connected or waiting."""
    bells: int = 0
    memory: int = 0
    relay_cpu: float = 0.0
    """Seconds of the processor that the relay has used for it."""
    builds: dict[str, int] = {}
    """Processes, by the build ID of their library."""


class PeerFact(msgspec.Struct, frozen=True, kw_only=True):
    """Another host that shares a network with this one."""

    address: str
    name: str = ""
    """The host's name; not known to the router, the plugin adds it."""
    node: str = ""
    session: bool = False
    reason: str = ""
    """Why there is no session."""
    rdma: bool = False
    """Whether it has an RDMA device."""
    relay: bool = False
    """Whether its relay speaks TCP."""
    data_path: str = ""
    link: str = "none"
    """none, being made, up, down, or over the session."""
    link_reason: str = ""
    transport: str = ""
    """Of the link: rdma or relay; empty: there is no link."""
    encryption: str = ""
    """What is encrypted on a link over TCP: messages, all, or off."""
    why_not_rdma: str = ""
    """Why the link is over TCP."""
    connections: int = 0


class RdmaFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Connections over RDMA, and the other hosts. Counts are since the router's start, unless they
    say now.
    """

    on: bool = True
    device: str = ""
    """The device that is used, as text; empty if none is."""
    why: str = ""
    """Why no connection of this host can use RDMA; empty if one can."""
    skipped: tuple[str, ...] = ()
    """Devices that aren't used, and why."""
    no_sessions: str = ""
    """Why there are no sessions with any host."""
    node: str = ""
    hosts: tuple[PeerFact, ...] = ()
    connections: int = 0
    """Now."""
    memory: int = 0
    """Bytes registered with the device, now."""
    granted: int = 0
    broken: int = 0
    """Ended as by a reset, since bytes could not be delivered."""
    left: int = 0
    """Moved back to TCP."""
    refused: dict[str, int] = {}
    """Requests for connections to other hosts, by reason's word."""
    relay: dict[str, int] = {}
    """The relay's own counters, of all transports."""


class RelayFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Connections over TCP between relays. Counts as in `RdmaFacts`."""

    on: bool = True
    why: str = ""
    """Why no connection of this host can go over TCP between relays; empty if one can."""
    encryption: str = ""
    """What this host's relay encrypts: messages, all, or off."""
    connections: int = 0
    granted: int = 0
    broken: int = 0
    left: int = 0


class VerbsFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Queue pairs of verbs. Counts as in `RdmaFacts`."""

    processes: int = 0
    """With a device, now."""
    queue_pairs: int = 0
    """Now; both of a pair on one host count."""
    waiting: int = 0
    """Those of them that wait for their peer."""
    paired: int = 0
    """Pairs."""
    refused: dict[str, int] = {}
    """Queue pairs that were refused, or told of the end of their peer, by reason's word."""
    operations: int = 0
    """That queue pairs have posted and that were executed, as their processes say."""
    bytes: int = 0
    """Of these operations."""
    direct_files: int = 0
    """Now: files for registered memory, which peers may map."""
    direct_bytes: int = 0
    """Of these files."""


class RouterCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the router's start, unless they say now."""

    uptime: float = 0.0
    learned: bool = False
    """Whether a snapshot has come."""
    processes: int = 0
    """Now."""
    waiting: int = 0
    """Now."""
    connections: int = 0
    """Connections with a slot now; both ends on one host count as one."""
    arenas: int = 0
    """Now."""
    memory: int = 0
    """Bytes of shared memory used now."""
    granted: int = 0
    refused: dict[str, int] = {}
    """By reason's word."""
    noted: dict[str, int] = {}
    """Notes of libraries, by reason's word."""
    wrong_messages: int = 0
    dropped: int = 0
    """Clients that didn't read their answers."""
    bugs: int = 0
    """Callbacks of the router that have ended by an exception."""
    verbs: VerbsFacts = VerbsFacts()
    containers: tuple[ContainerCounts, ...] = ()


class Statistics(RouterCounts, frozen=True, kw_only=True, tag="statistics"):
    """Answer to StatisticsRequest."""

    rdma: RdmaFacts = RdmaFacts()
    relay: RelayFacts = RelayFacts()


class ConnectionFact(msgspec.Struct, frozen=True, kw_only=True):
    """One end of a TCP connection in a container on a freeflow network."""

    namespace: int
    container: str
    network: str
    local: str
    remote: str
    path: str
    """shm, rdma, relay, or the kind of the network (overlay, bridge)."""
    reason: str | None = None
    """The reason's word, if the path is the network's kind."""
    age: float | None = None
    """Seconds on shm, rdma or relay, or since the request."""
    encryption: str = ""
    """Of an encrypted network's connections to other hosts, what encrypts them; not known to the
    router, the plugin adds it."""


class Connections(msgspec.Struct, frozen=True, kw_only=True, tag="connections"):
    """Answer to ConnectionsRequest."""

    connections: tuple[ConnectionFact, ...]
    reasons: dict[str, str]
    """Word to sentence, of the reasons that appear."""


class TcpTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel's TCP has carried of a connection since it began, seen from one end."""

    bytes_in: int
    bytes_out: int
    segments_in: int
    """Segments with data, modulo 2³²; so are `segments_out` and `retransmits`."""
    segments_out: int
    retransmits: int = 0
    """Segments that this end has sent again."""
    round_trip: int = 0
    """Microseconds, smoothed; 0: not measured."""


class RingTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What the rings of a slot have carried since it was granted, as their senders say."""

    incarnation: int
    """The slot's: with another one the numbers begin at 0."""
    bytes_in: int
    bytes_out: int
    messages_in: int | None = None
    """None: the sender does not count them. The relays don't."""
    messages_out: int | None = None


class ConnectionTraffic(ConnectionFact, frozen=True, kw_only=True):
    """One end of a connection, and what it has carried: the sum of `tcp` and `ring`."""

    cookie: int
    """The kernel's number of the socket. No other socket of the namespace has or will have it."""
    read: float
    """When the counters were read: seconds of the router's clock."""
    tcp: TcpTraffic | None = None
    """None: the kernel doesn't say."""
    ring: RingTraffic | None = None
    """None: the connection has no slot, or what the senders say is not possible."""


class TrafficFacts(msgspec.Struct, frozen=True, kw_only=True, tag="traffic"):
    """Answer to TrafficRequest. Processor times are in seconds since the process began."""

    connections: tuple[ConnectionTraffic, ...]
    reasons: dict[str, str]
    """As in `Connections`."""
    read: float
    """When the processor times were read: seconds of the router's clock."""
    router_cpu: float
    relay_cpu: float | None = None
    """None: no relay runs."""
    containers_relay_cpu: dict[int, float] = {}
    """What the relay has used for each container, by its namespace."""


class PathCount(msgspec.Struct, frozen=True):
    """The number of ends of connections in containers of this host that share path and reason.

    `path` is as in `ConnectionFact`; the plugin tells overlay+ebpf from overlay. `reason`: one
    word, why it is the network's kind.
    """

    network: str
    path: str
    reason: str
    count: int


class PathCounts(msgspec.Struct, frozen=True, kw_only=True, tag="paths"):
    """Answer to PathsRequest."""

    paths: tuple[PathCount, ...]


class VerbsDeviceFact(msgspec.Struct, frozen=True, kw_only=True):
    """The device of verbs that a process has."""

    namespace: int
    container: str
    pid: int
    guid: str
    """In hexadecimal."""
    gids: tuple[str, ...]
    """By index; empty: the container has left this network."""
    qpn_first: int
    """The first of the numbers of its queue pairs."""
    queue_pairs: int


class QueuePairFact(msgspec.Struct, frozen=True, kw_only=True):
    """A queue pair that is connected, or wants to be."""

    namespace: int
    container: str
    network: str
    pid: int
    type: str
    """RC, UC, or its number in verbs."""
    local: str
    qpn: int
    peer: str
    peer_qpn: int
    path: str
    """shm, rdma or relay; empty: it is not connected."""
    direct: str = ""
    """Direct memory. used: its process has mapped memory of the peer's by it; unused: it may, and
    has not; library: it may not, as the two processes were started with different libraries; empty:
    the network does not allow it, or it is not connected within this host."""
    reason: str | None = None
    """The reason's word, if it is not connected."""
    age: float
    """Seconds since its process asked for its peer."""
    operations: int = 0
    bytes: int = 0
    """As its process said last."""


class VerbsObjects(msgspec.Struct, frozen=True, kw_only=True, tag="verbs"):
    """Answer to VerbsRequest."""

    devices: tuple[VerbsDeviceFact, ...]
    queue_pairs: tuple[QueuePairFact, ...]
    reasons: dict[str, str]
    """Word to sentence, of the reasons that appear."""


ControlRequest = (
    RouterSnapshot
    | LivenessRequest
    | StatisticsRequest
    | ConnectionsRequest
    | VerbsRequest
    | TrafficRequest
    | PathsRequest
    | EncryptionRequest
)
ControlReply = (
    Done
    | Failed
    | Statistics
    | Connections
    | VerbsObjects
    | TrafficFacts
    | PathCounts
    | EncryptionFacts
)
