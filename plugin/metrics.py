"""Prometheus metrics, made from the same `Status` that the command shows.

`METRICS` is the one list of them; exporter, documentation and Grafana board are made from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from wsgiref.simple_server import WSGIServer

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

from dataplane.control import RdmaFacts
from plugin.deaths import PARTS
from plugin.status import NetworkStatus, RouterStatus, Status

log = structlog.get_logger()

LINK_STATES: Final = ("up", "being made", "down", "over the session")
Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric. `kind` is counter or gauge; `samples` gives the values of a status, in `unit`."""

    name: str
    kind: str
    help: str
    unit: str
    labels: tuple[str, ...]
    samples: Callable[[Status], Iterable[Sample]]


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


def _per_network(value: Callable[[NetworkStatus], float]) -> Callable[[Status], Iterable[Sample]]:
    return lambda status: [((title,), value(network)) for title, network in _titled(status)]


def _synced(status: Status) -> Iterable[Sample]:
    return [((title,), n.synced) for title, n in _titled(status) if n.synced is not None]


def _deaths(status: Status) -> list[Sample]:
    counts = dict.fromkeys(PARTS, 0) | {part.part: part.deaths for part in status.parts}
    return [((part,), float(count)) for part, count in counts.items()]


def _router(status: Status) -> RouterStatus:
    return status.router or RouterStatus(up=False)


def _rdma(status: Status) -> RdmaFacts:
    return _router(status).rdma or RdmaFacts(on=False)


def _paths(status: Status) -> Iterable[Sample]:
    titles = {network.id: title for title, network in _titled(status)}
    return [
        ((titles[entry.network], entry.path, entry.reason), float(entry.count))
        for entry in _router(status).paths
        if entry.network in titles
    ]


def _reasons(counts: Mapping[str, int]) -> Iterable[Sample]:
    return [((word,), float(count)) for word, count in sorted(counts.items())]


METRICS: Final = (
    MetricSpec(
        "freeflow_build_info",
        "gauge",
        "1, with the version as a label",
        "",
        ("version",),
        lambda status: [((status.version,), 1.0)],
    ),
    MetricSpec(
        "freeflow_uptime_seconds",
        "gauge",
        "Time since the plugin started",
        "s",
        (),
        lambda status: [((), status.uptime)],
    ),
    MetricSpec(
        "freeflow_healthy",
        "gauge",
        "1 if freeflow status finds no problem",
        "",
        (),
        lambda status: [((), float(status.healthy))],
    ),
    MetricSpec(
        "freeflow_problems",
        "gauge",
        "Problems that freeflow status finds, by severity",
        "",
        ("severity",),
        lambda status: [
            ((severity,), float(sum(p.severity == severity for p in status.problems)))
            for severity in ("error", "warning")
        ],
    ),
    MetricSpec(
        "freeflow_engine_up",
        "gauge",
        "1 if the engine's API answered the last request",
        "",
        (),
        lambda status: [((), float(bool(status.host.engine)))],
    ),
    MetricSpec(
        "freeflow_networks",
        "gauge",
        "Networks known on this host",
        "",
        (),
        lambda status: [((), float(len(status.networks)))],
    ),
    MetricSpec(
        "freeflow_endpoints",
        "gauge",
        "Endpoints of this host, by network and path",
        "",
        ("network", "path"),
        lambda status: [((title, n.path), float(len(n.endpoints))) for title, n in _titled(status)],
    ),
    MetricSpec(
        "freeflow_peers",
        "gauge",
        "Other hosts that share a network",
        "",
        ("network",),
        _per_network(lambda network: sum(not peer.own for peer in network.peers)),
    ),
    MetricSpec(
        "freeflow_services",
        "gauge",
        "Services with a VIP on a network",
        "",
        ("network",),
        _per_network(lambda network: sum(bool(service.vip) for service in network.services)),
    ),
    MetricSpec(
        "freeflow_service_tasks",
        "gauge",
        "Tasks that take new connections of a service's VIP",
        "",
        ("network", "service"),
        lambda status: [
            ((title, service.name), float(len(service.tasks)))
            for title, network in _titled(status)
            for service in network.services
            if service.vip
        ],
    ),
    MetricSpec(
        "freeflow_sync_age_seconds",
        "gauge",
        "Time since a network's peers and services were last read",
        "s",
        ("network",),
        _synced,
    ),
    MetricSpec(
        "freeflow_receive_bytes",
        "counter",
        "Bytes that endpoints of this host received",
        "bytes",
        ("network",),
        _per_network(lambda network: network.rx_bytes),
    ),
    MetricSpec(
        "freeflow_transmit_bytes",
        "counter",
        "Bytes that endpoints of this host sent",
        "bytes",
        ("network",),
        _per_network(lambda network: network.tx_bytes),
    ),
    MetricSpec(
        "freeflow_spoofed_frames",
        "counter",
        "Frames dropped because their source wasn't the container's own",
        "",
        ("network",),
        _per_network(lambda network: network.spoofed),
    ),
    MetricSpec(
        "freeflow_fastpath",
        "gauge",
        "1, with the stage of the eBPF fast path that runs as a label",
        "",
        ("stage",),
        lambda status: [((status.fastpath.stage or "off",), 1.0)] if status.fastpath else [],
    ),
    MetricSpec(
        "freeflow_deaths",
        "counter",
        "Deaths of parts of the plugin: its worker, the router, a thread",
        "",
        ("part",),
        _deaths,
    ),
    MetricSpec(
        "freeflow_router_up",
        "gauge",
        "1 if the router of accelerated connections answers",
        "",
        (),
        lambda status: [((), float(_router(status).up))],
    ),
    MetricSpec(
        "freeflow_connections",
        "gauge",
        "Ends of TCP connections of this host's containers, by path and reason for overlay",
        "",
        ("network", "path", "reason"),
        _paths,
    ),
    MetricSpec(
        "freeflow_router_processes",
        "gauge",
        "Processes that have loaded the library",
        "",
        (),
        lambda status: [((), float(_router(status).processes))],
    ),
    MetricSpec(
        "freeflow_shared_memory_bytes",
        "gauge",
        "Shared memory that connections use",
        "bytes",
        (),
        lambda status: [((), float(_router(status).memory))],
    ),
    MetricSpec(
        "freeflow_upgrades",
        "counter",
        "Connections that moved to shared memory",
        "",
        (),
        lambda status: [((), float(_router(status).granted))],
    ),
    MetricSpec(
        "freeflow_refusals",
        "counter",
        "Connections that the router refused shared memory, by reason",
        "",
        ("reason",),
        lambda status: _reasons(_router(status).refused),
    ),
    MetricSpec(
        "freeflow_retreats",
        "counter",
        "Connections that the library keeps on TCP or moved back to it, by reason",
        "",
        ("reason",),
        lambda status: _reasons(_router(status).noted),
    ),
    MetricSpec(
        "freeflow_wrong_messages",
        "counter",
        "Messages to the router that the protocol doesn't have",
        "",
        (),
        lambda status: [((), float(_router(status).wrong_messages))],
    ),
    MetricSpec(
        "freeflow_rdma_up",
        "gauge",
        "1 if connections of this host can use RDMA",
        "",
        (),
        lambda status: [((), float(bool(_rdma(status).device) and not _rdma(status).why))],
    ),
    MetricSpec(
        "freeflow_sessions",
        "gauge",
        "Other hosts whose router has a session with this host's",
        "",
        (),
        lambda status: [((), float(sum(host.session for host in _rdma(status).hosts)))],
    ),
    MetricSpec(
        "freeflow_links",
        "gauge",
        "Links to other hosts' RDMA devices, by state",
        "",
        ("state",),
        lambda status: [
            ((state,), float(sum(host.link == state for host in _rdma(status).hosts)))
            for state in LINK_STATES
        ],
    ),
    MetricSpec(
        "freeflow_rdma_memory_bytes",
        "gauge",
        "Memory registered with the RDMA device",
        "bytes",
        (),
        lambda status: [((), float(_rdma(status).memory))],
    ),
    MetricSpec(
        "freeflow_rdma_upgrades",
        "counter",
        "Ends of connections that moved to RDMA",
        "",
        (),
        lambda status: [((), float(_rdma(status).granted))],
    ),
    MetricSpec(
        "freeflow_rdma_broken",
        "counter",
        "Ends of connections that were reset because the other host became unreachable",
        "",
        (),
        lambda status: [((), float(_rdma(status).broken))],
    ),
    MetricSpec(
        "freeflow_rdma_returned",
        "counter",
        "Ends of connections that moved back from RDMA to TCP",
        "",
        (),
        lambda status: [((), float(_rdma(status).left))],
    ),
    MetricSpec(
        "freeflow_rdma_sent_bytes",
        "counter",
        "Bytes of connections that the relay sent",
        "bytes",
        (),
        lambda status: [((), float(_rdma(status).relay.get("bytes_out", 0)))],
    ),
    MetricSpec(
        "freeflow_rdma_received_bytes",
        "counter",
        "Bytes of connections that the relay received",
        "bytes",
        (),
        lambda status: [((), float(_rdma(status).relay.get("bytes_in", 0)))],
    ),
    MetricSpec(
        "freeflow_requests",
        "counter",
        "Calls of Docker",
        "",
        ("call",),
        lambda status: [((item.name,), float(item.count)) for item in status.calls],
    ),
    MetricSpec(
        "freeflow_request_errors",
        "counter",
        "Calls of Docker that were answered with an error",
        "",
        ("call",),
        lambda status: [((item.name,), float(item.errors)) for item in status.calls],
    ),
    MetricSpec(
        "freeflow_request_seconds",
        "gauge",
        "Duration of the last 1024 calls of Docker, by percentile",
        "s",
        ("call", "quantile"),
        lambda status: [
            ((item.name, quantile), milliseconds / 1000)
            for item in status.calls
            for quantile, milliseconds in (("0.5", item.p50_ms), ("0.99", item.p99_ms))
        ],
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
    """Serves the metrics on `address`; if that fails, the log says so and the plugin goes on."""

    def __init__(self, snapshot: Callable[[], Status], address: tuple[str, int]) -> None:
        self._snapshot = snapshot
        self._address = address
        self._server: WSGIServer | None = None

    def start(self) -> None:
        host, port = self._address
        try:
            self._server, _ = start_http_server(port, host, _registry(self._snapshot))
        except OSError as error:
            log.error("metrics are not served", address=f"{host}:{port}", reason=str(error))
        else:
            log.info("metrics are served", address=f"{host}:{port}")

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
