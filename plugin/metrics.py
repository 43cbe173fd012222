"""Prometheus metrics, made from the same `Status` that the command shows.

`METRICS` is the one list of them; exporter, documentation and Grafana board are made from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.registry import Collector

from dataplane.control import RdmaFacts, RelayFacts, VerbsFacts
from plugin.bounded_server import WSGI, BoundedServer
from plugin.deaths import PARTS
from plugin.status import NetworkStatus, RouterStatus, Status, relay_cpu, without_session

log = structlog.get_logger()

LINK_STATES: Final = ("up", "being made", "down", "over the session")
LINK_TRANSPORTS: Final = ("rdma", "relay")
Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric. `kind` is counter or gauge; `samples` gives the values of a status."""

    kind: str
    name: str
    help: str
    samples: Callable[[Status], Iterable[Sample]]
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The last part of the name, by Prometheus's rule: seconds or bytes; empty: neither."""
        last = self.name.rpartition("_")[2]
        return last if last in ("seconds", "bytes") else ""


_gauge = partial(MetricSpec, "gauge")
_counter = partial(MetricSpec, "counter")


def _value(value: Callable[[Status], float]) -> Callable[[Status], Iterable[Sample]]:
    """The samples of a metric without labels."""
    return lambda status: [((), float(value(status)))]


def _titled(status: Status) -> list[tuple[str, NetworkStatus]]:
    """Networks by unique labels: Prometheus rejects all samples if two have the same labels."""
    names = Counter(network.name for network in status.networks)
    return [
        (
            network.name
            if network.name and names[network.name] == 1
            else f"{network.name} {network.id[:12]}".lstrip(),
            network,
        )
        for network in status.networks
    ]


def _setting(name: str, unit: float = 1.0) -> Callable[[Status], Iterable[Sample]]:
    """A setting as a number, times `unit`; nothing where the status lacks it."""
    return lambda status: (
        [((), float(status.settings[name]) * unit)] if name in status.settings else []
    )


def _per_network(value: Callable[[NetworkStatus], float]) -> Callable[[Status], Iterable[Sample]]:
    return lambda status: [((title,), value(network)) for title, network in _titled(status)]


def _synced(status: Status) -> Iterable[Sample]:
    return [((title,), n.synced) for title, n in _titled(status) if n.synced is not None]


def _deaths(status: Status) -> list[Sample]:
    counts = dict.fromkeys(PARTS, 0) | {part.part: part.deaths for part in status.parts}
    return [((part,), float(count)) for part, count in counts.items()]


def _router(status: Status) -> RouterStatus:
    return status.router or RouterStatus(up=False)


def _verbs(status: Status) -> VerbsFacts:
    return _router(status).verbs


def _relay(status: Status) -> RelayFacts:
    return _router(status).relay or RelayFacts(on=False)


def _relay_cpu(status: Status) -> list[Sample]:
    return [((name,), seconds) for name, seconds in sorted(relay_cpu(_router(status)).items())]


def _container_queue_pairs(status: Status) -> list[Sample]:
    counts: Counter[str] = Counter()
    for share in _router(status).containers:
        if share.queue_pairs:
            counts[share.container or str(share.namespace)] += share.queue_pairs
    return [((name,), float(count)) for name, count in sorted(counts.items())]


def _links(status: Status) -> list[Sample]:
    hosts = _rdma(status).hosts
    return [
        (
            (state, transport),
            float(sum((host.link, host.transport) == (state, transport) for host in hosts)),
        )
        for state in LINK_STATES
        for transport in LINK_TRANSPORTS
    ]


def _rdma(status: Status) -> RdmaFacts:
    return _router(status).rdma or RdmaFacts(on=False)


def _paths(status: Status) -> Iterable[Sample]:
    titles = {network.id: title for title, network in _titled(status)}
    return [
        ((titles[entry.network], entry.path, entry.reason), float(entry.count))
        for entry in _router(status).paths
        if entry.network in titles
    ]


def _moves(status: Status) -> list[Sample]:
    """Those that were not done went through rings, or their queue pair had ended."""
    relay = _rdma(status).relay
    names = {"done": "moves", "refused": "moves_refused", "lost": "moves_lost"}
    return [((outcome,), float(relay.get(name, 0))) for outcome, name in names.items()]


def _reasons(counts: Mapping[str, int]) -> Iterable[Sample]:
    return [((word,), float(count)) for word, count in sorted(counts.items())]


def _encrypted_peers(status: Status) -> list[Sample]:
    peers = status.encryption.peers if status.encryption is not None else []
    encrypted = sum(bool(peer.data) for peer in peers)
    return [(("up",), float(encrypted)), (("down",), float(len(peers) - encrypted))]


def _handshakes(status: Status) -> list[Sample]:
    peers = status.encryption.peers if status.encryption is not None else []
    return [
        ((peer.name or peer.address,), peer.handshake)
        for peer in peers
        if peer.handshake is not None
    ]


METRICS: Final = (
    _gauge(
        "freeflow_build_info",
        "1, with the version as a label",
        lambda status: [((status.version,), 1.0)],
        ("version",),
    ),
    _gauge(
        "freeflow_uptime_seconds",
        "Time since the plugin started",
        _value(lambda status: status.uptime),
    ),
    _gauge(
        "freeflow_healthy",
        "1 if freeflow status finds no problem",
        _value(lambda status: status.healthy),
    ),
    _gauge(
        "freeflow_problems",
        "Problems that freeflow status finds, by severity",
        lambda status: [
            ((severity,), float(sum(p.severity == severity for p in status.problems)))
            for severity in ("error", "warning")
        ],
        ("severity",),
    ),
    _gauge(
        "freeflow_engine_up",
        "1 if the engine's API answered the last request",
        _value(lambda status: bool(status.host.engine)),
    ),
    _gauge(
        "freeflow_networks",
        "Networks known on this host",
        _value(lambda status: len(status.networks)),
    ),
    _gauge(
        "freeflow_endpoints",
        "Endpoints of this host, by network and path",
        lambda status: [((title, n.path), float(len(n.endpoints))) for title, n in _titled(status)],
        ("network", "path"),
    ),
    _gauge(
        "freeflow_peers",
        "Other hosts that share a network",
        _per_network(lambda network: sum(not peer.own for peer in network.peers)),
        ("network",),
    ),
    _gauge(
        "freeflow_services",
        "Services with a VIP on a network",
        _per_network(lambda network: sum(bool(service.vip) for service in network.services)),
        ("network",),
    ),
    _gauge(
        "freeflow_service_tasks",
        "Tasks that take new connections of a service's VIP",
        lambda status: [
            ((title, service.name), float(len(service.tasks)))
            for title, network in _titled(status)
            for service in network.services
            if service.vip
        ],
        ("network", "service"),
    ),
    _gauge(
        "freeflow_sync_age_seconds",
        "Time since a network's peers and services were last read",
        _synced,
        ("network",),
    ),
    _counter(
        "freeflow_receive_bytes",
        "Bytes that endpoints of this host received",
        _per_network(lambda network: network.rx_bytes),
        ("network",),
    ),
    _counter(
        "freeflow_transmit_bytes",
        "Bytes that endpoints of this host sent",
        _per_network(lambda network: network.tx_bytes),
        ("network",),
    ),
    _counter(
        "freeflow_spoofed_frames",
        "Frames dropped because their source wasn't the container's own",
        _per_network(lambda network: network.spoofed),
        ("network",),
    ),
    _gauge(
        "freeflow_fastpath",
        "1, with the stage of the eBPF fast path that runs as a label",
        lambda status: [((status.fastpath.stage or "off",), 1.0)] if status.fastpath else [],
        ("stage",),
    ),
    _gauge(
        "freeflow_encrypted_networks",
        "Networks known on this host that are encrypted between hosts",
        _value(lambda status: sum(network.encrypted for network in status.networks)),
    ),
    _gauge(
        "freeflow_encryption_peers",
        "Other hosts on encrypted networks; down: nothing is sent to them",
        _encrypted_peers,
        ("state",),
    ),
    _gauge(
        "freeflow_encryption_handshake_age_seconds",
        "Time since WireGuard's last handshake with another host",
        _handshakes,
        ("host",),
    ),
    _gauge(
        "freeflow_encryption_key_age_seconds",
        "Time for which this host has used its key",
        lambda status: [((), status.encryption.rotated)] if status.encryption is not None else [],
    ),
    _counter(
        "freeflow_deaths",
        "Deaths of parts of the plugin: its worker, the router, a thread",
        _deaths,
        ("part",),
    ),
    _gauge(
        "freeflow_router_up",
        "1 if the router of accelerated connections answers",
        _value(lambda status: _router(status).up),
    ),
    _gauge(
        "freeflow_connections",
        "Ends of TCP connections of this host's containers, by path and reason for overlay",
        _paths,
        ("network", "path", "reason"),
    ),
    _gauge(
        "freeflow_router_processes",
        "Processes that have loaded the library",
        _value(lambda status: _router(status).processes),
    ),
    _gauge(
        "freeflow_shared_memory_bytes",
        "Shared memory that connections use",
        _value(lambda status: _router(status).memory),
    ),
    _counter(
        "freeflow_upgrades",
        "Connections that moved to shared memory",
        _value(lambda status: _router(status).granted),
    ),
    _counter(
        "freeflow_refusals",
        "Connections that the router refused shared memory, by reason",
        lambda status: _reasons(_router(status).refused),
        ("reason",),
    ),
    _counter(
        "freeflow_retreats",
        "Connections that the library keeps on TCP or moved back to it, by reason",
        lambda status: _reasons(_router(status).noted),
        ("reason",),
    ),
    _counter(
        "freeflow_wrong_messages",
        "Messages to the router that the protocol doesn't have",
        _value(lambda status: _router(status).wrong_messages),
    ),
    _counter(
        "freeflow_bugs",
        "Bugs of the router that it has survived; its log has each",
        _value(lambda status: _router(status).bugs),
    ),
    _gauge(
        "freeflow_queue_pairs",
        "Queue pairs of verbs in containers of this host, by state",
        lambda status: [
            (("connected",), float(_verbs(status).queue_pairs - _verbs(status).waiting)),
            (("waiting",), float(_verbs(status).waiting)),
        ],
        ("state",),
    ),
    _gauge(
        "freeflow_queue_pairs_limit",
        "Queue pairs that one container may have (VERBS_QPS)",
        _setting("VERBS_QPS"),
    ),
    _gauge(
        "freeflow_container_queue_pairs",
        "Queue pairs of verbs, connected or waiting, by container",
        _container_queue_pairs,
        ("container",),
    ),
    _gauge(
        "freeflow_verbs_processes",
        "Processes that have a device of verbs",
        _value(lambda status: _verbs(status).processes),
    ),
    _counter(
        "freeflow_verbs_operations",
        "Operations of queue pairs that were executed, as their processes say",
        _value(lambda status: _verbs(status).operations),
    ),
    _counter(
        "freeflow_verbs_bytes",
        "Bytes of these operations",
        _value(lambda status: _verbs(status).bytes),
    ),
    _gauge(
        "freeflow_verbs_direct_bytes",
        "Bytes of registered memory that peers may map (verbs_direct)",
        _value(lambda status: _verbs(status).direct_bytes),
    ),
    _counter(
        "freeflow_verbs_moves",
        "WRITEs that RDMA devices were to move between registered memory (VERBS_ZERO_COPY), by outcome",
        _moves,
        ("outcome",),
    ),
    _counter(
        "freeflow_verbs_moved_bytes",
        "Bytes that they have moved, of processes on this host",
        _value(lambda status: _rdma(status).relay.get("bytes_moved", 0)),
    ),
    _counter(
        "freeflow_queue_pairs_paired",
        "Pairs of queue pairs that the router has connected",
        _value(lambda status: _verbs(status).paired),
    ),
    _counter(
        "freeflow_queue_pairs_refused",
        "Queue pairs that were refused, or told of the end of their peer, by reason",
        lambda status: _reasons(_verbs(status).refused),
        ("reason",),
    ),
    _gauge(
        "freeflow_rdma_up",
        "1 if connections of this host can use RDMA",
        _value(lambda status: bool(_rdma(status).device) and not _rdma(status).why),
    ),
    _gauge(
        "freeflow_sessions",
        "Other hosts whose router has a session with this host's",
        _value(lambda status: sum(host.session for host in _rdma(status).hosts)),
    ),
    _gauge(
        "freeflow_sessions_missing",
        "Other hosts whose router should have a session with this host's, and has none",
        _value(lambda status: len(without_session(_router(status)))),
    ),
    _gauge(
        "freeflow_links",
        "Links to other hosts' relays, by state and transport",
        _links,
        ("state", "transport"),
    ),
    _gauge(
        "freeflow_rdma_memory_bytes",
        "Memory registered with the RDMA device",
        _value(lambda status: _rdma(status).memory),
    ),
    _counter(
        "freeflow_rdma_upgrades",
        "Ends of connections that moved to RDMA",
        _value(lambda status: _rdma(status).granted),
    ),
    _counter(
        "freeflow_rdma_broken",
        "Ends of connections over RDMA that were reset because the other host became unreachable",
        _value(lambda status: _rdma(status).broken),
    ),
    _counter(
        "freeflow_rdma_returned",
        "Ends of connections that moved back from RDMA to TCP",
        _value(lambda status: _rdma(status).left),
    ),
    _counter(
        "freeflow_rdma_sent_bytes",
        "Bytes of connections that the relay sent, over RDMA and TCP",
        _value(lambda status: _rdma(status).relay.get("bytes_out", 0)),
    ),
    _counter(
        "freeflow_rdma_received_bytes",
        "Bytes of connections that the relay received, over RDMA and TCP",
        _value(lambda status: _rdma(status).relay.get("bytes_in", 0)),
    ),
    _gauge(
        "freeflow_relay_up",
        "1 if connections of this host can use TCP between relays",
        _value(lambda status: _relay(status).on and not _relay(status).why),
    ),
    _counter(
        "freeflow_relay_upgrades",
        "Ends of connections that moved to TCP between relays",
        _value(lambda status: _relay(status).granted),
    ),
    _counter(
        "freeflow_relay_cpu_seconds",
        "Time of the processor that the relay has used, by container",
        _relay_cpu,
        ("container",),
    ),
    _gauge(
        "freeflow_relay_cpu_limit",
        "Processors that the relay may use for one container (RELAY_CPU)",
        _setting("RELAY_CPU", 0.01),
    ),
    _counter(
        "freeflow_relay_broken",
        "Ends of connections over relays that were reset because the other host became unreachable",
        _value(lambda status: _relay(status).broken),
    ),
    _counter(
        "freeflow_relay_returned",
        "Ends of connections that moved back from TCP between relays to their own TCP",
        _value(lambda status: _relay(status).left),
    ),
    _counter(
        "freeflow_requests",
        "Calls of Docker",
        lambda status: [((item.name,), float(item.count)) for item in status.calls],
        ("call",),
    ),
    _counter(
        "freeflow_request_errors",
        "Calls of Docker that were answered with an error",
        lambda status: [((item.name,), float(item.errors)) for item in status.calls],
        ("call",),
    ),
    _gauge(
        "freeflow_request_seconds",
        "Duration of the last 1024 calls of Docker, by percentile",
        lambda status: [
            ((item.name, percentile), milliseconds / 1000)
            for item in status.calls
            for percentile, milliseconds in (("50", item.p50_ms), ("99", item.p99_ms))
        ],
        ("call", "percentile"),
    ),
)


class _StatusCollector(Collector):
    def __init__(self, snapshot: Callable[[], Status]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterator[Metric]:
        # Names without taking stock: registering must not need a kernel.
        for spec in METRICS:
            yield _family(spec)

    def collect(self) -> Iterator[Metric]:
        status = self._snapshot()
        for spec in METRICS:
            family = _family(spec)
            for labels, value in spec.samples(status):
                family.add_metric(labels, value)
            yield family


def _family(spec: MetricSpec) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
    return kind(spec.name, spec.help, labels=spec.labels)


def _registry(snapshot: Callable[[], Status]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_StatusCollector(snapshot))
    return registry


def render(status: Status) -> bytes:
    """The metrics of one status, in Prometheus's text format."""
    return generate_latest(_registry(lambda: status))


class Exporter:
    """Serves the metrics on `address`, and the page at all other paths; if that fails, the log says
    so and the plugin goes on.
    """

    def __init__(
        self, snapshot: Callable[[], Status], address: tuple[str, int], page: WSGI | None = None
    ) -> None:
        self._metrics: WSGI = make_wsgi_app(_registry(snapshot))
        self._page = page or self._metrics
        self._address = address
        self._server: BoundedServer | None = None

    def start(self) -> None:
        host, port = self._address
        try:
            self._server = BoundedServer(self._address, self._answer)
        except OSError as error:
            log.error("metrics are not served", address=f"{host}:{port}", reason=str(error))
        else:
            self._server.start()
            log.info("metrics are served", address=f"{host}:{port}")

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        found = self._metrics if environ["PATH_INFO"] == "/metrics" else self._page
        return found(environ, start_response)
