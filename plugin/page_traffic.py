"""The edges of the page's map: connections between two nodes by one path, summed up.

A connection whose two ends are both reported, by one host or by two, counts once. An end that leads
to a VIP belongs to the task that has the other end, if that is reported.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from plugin.page_view import UNNAMED, MapView, container_key
from plugin.rates import MeasuredTraffic, Rates
from plugin.traffic_names import NamedTraffic, TrafficReport

EDGES: Final = 1000
"""The most edges, those with the most bytes first."""


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """Connections between two nodes by one path. Rates are per second; null: not known yet."""

    a: str
    """Keys of the map's nodes."""
    b: str
    path: str
    connections: int
    to_b: float | None
    """Bytes."""
    to_a: float | None
    messages: float | None
    """Null, too, if nobody counts them."""
    retransmits: float | None
    round_trip_ms: float | None
    """TCP's, the longest; null: not measured."""
    reasons: dict[str, int] = {}
    """Connections by the word of their reason."""
    networks: list[str] = []
    example: str = ""
    """The addresses of one of the connections."""


class PathTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Of all connections by one path, those that are no edges included."""

    connections: int
    bytes: float
    """Per second."""


class TrafficView(msgspec.Struct, frozen=True, kw_only=True):
    """What connections carry now."""

    interval: float
    """Seconds over which rates were measured; 0: there are none yet."""
    edges: list[Edge]
    paths: dict[str, PathTotal]
    reasons: dict[str, str]
    """Sentences, by word."""
    router_cpu: float | None = None
    """Percent of one processor; null: not known."""
    relay_cpu: float | None = None
    left_out: int = 0
    """Edges that are not listed because there are too many."""
    error: str = ""
    """Why connections are not known."""


@dataclass(slots=True)
class _Sum:
    """Of one edge."""

    ends: list[NamedTraffic] = field(default_factory=list)
    to_b: float | None = None
    to_a: float | None = None
    messages: float | None = 0.0
    retransmits: float | None = None

    def add(self, end: NamedTraffic, rates: Rates | None, *, from_a: bool) -> None:
        self.ends.append(end)
        if rates is None:
            return
        sent, came = rates.bytes_out, rates.bytes_in
        to_b, to_a = (sent, came) if from_a else (came, sent)
        self.to_b = (self.to_b or 0.0) + to_b
        self.to_a = (self.to_a or 0.0) + to_a
        self.retransmits = (self.retransmits or 0.0) + rates.retransmits
        known = self.messages is not None and rates.messages is not None
        self.messages = (self.messages or 0.0) + (rates.messages or 0.0) if known else None

    @property
    def bytes(self) -> float:
        return (self.to_b or 0.0) + (self.to_a or 0.0)


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """What one host has reported, and what was measured since its report before."""

    host: str
    measured: MeasuredTraffic
    report: TrafficReport


@dataclass(frozen=True, slots=True, eq=False)
class _ReportedEnd:
    """One end of a connection, and the host that reports it."""

    host: str
    connection: NamedTraffic
    rates: Rates | None


class _NodeKeys:
    """The nodes of a map by the names that reports have."""

    def __init__(self, nodes: MapView) -> None:
        self._known = {each.key for each in nodes.containers}
        self._known |= {each.key for each in nodes.services}
        self._by_host = {(each.host, each.name): each.key for each in nodes.containers}

    def own(self, end: _ReportedEnd) -> str:
        """Of the end's own container."""
        return self._container(end.host, end.connection.container)

    def peer(self, end: _ReportedEnd) -> str:
        """Of what the end names as its peer."""
        one = end.connection
        if _leads_to_vip(one):
            key = f"service/{one.network}/{one.peer}"
            return key if key in self._known else UNNAMED
        return self._container(one.host, one.peer)

    def _container(self, host: str, name: str) -> str:
        task = container_key(name, host, task=True)
        return self._by_host.get((host, name)) or (task if task in self._known else UNNAMED)


def traffic_view(
    measured: MeasuredTraffic, report: TrafficReport, nodes: MapView, interval: float
) -> TrafficView:
    """The edges between the nodes of this map, of one host."""
    return joint_traffic([HostTraffic(nodes.host, measured, report)], nodes, interval)


def joint_traffic(hosts: Sequence[HostTraffic], nodes: MapView, interval: float) -> TrafficView:
    """The edges between the nodes of this map, of all hosts that have reported. The processors are
    those of the first.
    """
    keys = _NodeKeys(nodes)
    names: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for host in reversed(hosts):
        names.update(host.report.networks)
        reasons.update(host.report.reasons)
    sums: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    counts: Counter[str] = Counter()
    rates: dict[str, float] = defaultdict(float)
    ends = [
        _ReportedEnd(host.host, each.connection, each.rates)
        for host in hosts
        for each in host.measured.connections
    ]
    for end, peer in _once(ends):
        own, other = keys.own(end), keys.peer(end) if peer is None else keys.own(peer)
        one = end.connection
        a, b = sorted((own, other))
        sums[a, b, one.path].add(one, end.rates, from_a=own == a)
        counts[one.path] += 1
        rates[one.path] += 0.0 if end.rates is None else end.rates.bytes
    order = sorted(sums, key=lambda key: (-sums[key].bytes, key))
    first = hosts[0].measured if hosts else None
    return TrafficView(
        interval=round(interval, 3),
        edges=[_edge(key, sums[key], names) for key in order[:EDGES]],
        paths={
            path: PathTotal(connections=count, bytes=rates[path])
            for path, count in sorted(counts.items())
        },
        reasons=reasons,
        router_cpu=None if first is None else _percent(first.router),
        relay_cpu=None if first is None else _percent(first.relay),
        left_out=max(0, len(order) - EDGES),
    )


def _once(ends: Iterable[_ReportedEnd]) -> Iterator[tuple[_ReportedEnd, _ReportedEnd | None]]:
    """One end of each connection, and its other end if that is reported, too."""
    found = list(ends)
    by_addresses = {
        (each.connection.network, each.connection.local, each.connection.remote): each
        for each in found
    }
    by_vip: dict[tuple[str, str, str], list[_ReportedEnd]] = defaultdict(list)
    for each in found:
        one = each.connection
        if _leads_to_vip(one):
            by_vip[one.network, one.local, one.peer_service].append(each)
    done: set[int] = set()
    # Ends that lead to a VIP come last: they may be the other ends of those before.
    for each in sorted(found, key=lambda each: _leads_to_vip(each.connection)):
        if id(each) in done:
            continue
        one = each.connection
        peer = by_addresses.get((one.network, one.remote, one.local))
        clients = by_vip.get((one.network, one.remote, one.service))
        if peer is None and clients and not _leads_to_vip(one):
            peer = clients.pop()
        if peer is None or peer is each or id(peer) in done:
            yield each, None
            continue
        done.add(id(peer))
        # The rates of a new connection may be known at one end only.
        yield (each, peer) if each.rates is not None else (peer, each)


def _leads_to_vip(end: NamedTraffic) -> bool:
    return end.peer == end.peer_service != ""


def _edge(key: tuple[str, str, str], total: _Sum, networks: Mapping[str, str]) -> Edge:
    a, b, path = key
    first = total.ends[0]
    times = [end.tcp.round_trip for end in total.ends if end.tcp is not None]
    return Edge(
        a=a,
        b=b,
        path=path,
        connections=len(total.ends),
        to_b=total.to_b,
        to_a=total.to_a,
        messages=None if total.to_b is None else total.messages,
        retransmits=total.retransmits,
        round_trip_ms=max(times) / 1000 if any(times) else None,
        reasons=dict(Counter(end.reason for end in total.ends if end.reason).most_common()),
        networks=sorted({networks.get(end.network, end.network[:12]) for end in total.ends}),
        example=f"{first.local} – {first.remote}",
    )


def _percent(part: float | None) -> float | None:
    return None if part is None else round(100 * part, 1)
