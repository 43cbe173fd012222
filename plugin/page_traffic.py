"""The edges of the page's map: connections between two nodes by one path, summed up.

A connection between two containers of this host has two ends, and counts once. An end that leads to
a VIP belongs to the task that has the other end, if that is on this host.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import msgspec

from plugin.page_view import UNNAMED, MapView, owner_key
from plugin.rates import MeasuredConnection, MeasuredTraffic, Rates
from plugin.traffic_names import AddressOwner, NamedTraffic, TrafficReport

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


def traffic_view(
    measured: MeasuredTraffic, report: TrafficReport, nodes: MapView, interval: float
) -> TrafficView:
    """The edges between the nodes of this map."""
    known = {each.key for each in nodes.containers} | {each.key for each in nodes.services}
    sums: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    counts: Counter[str] = Counter()
    rates: dict[str, float] = defaultdict(float)
    for each, peer in _once(measured.connections):
        one = each.connection
        ends = (_own_key(one), _peer_key(one) if peer is None else _own_key(peer))
        own, other = (key if key in known else UNNAMED for key in ends)
        a, b = sorted((own, other))
        sums[a, b, one.path].add(one, each.rates, from_a=own == a)
        counts[one.path] += 1
        rates[one.path] += 0.0 if each.rates is None else each.rates.bytes
    order = sorted(sums, key=lambda key: (-sums[key].bytes, key))
    return TrafficView(
        interval=round(interval, 3),
        edges=[_edge(key, sums[key], report.networks) for key in order[:EDGES]],
        paths={
            path: PathTotal(connections=count, bytes=rates[path])
            for path, count in sorted(counts.items())
        },
        reasons=report.reasons,
        router_cpu=_percent(measured.router),
        relay_cpu=_percent(measured.relay),
        left_out=max(0, len(order) - EDGES),
    )


def _once(
    ends: Iterable[MeasuredConnection],
) -> Iterator[tuple[MeasuredConnection, NamedTraffic | None]]:
    """One end of each connection, and its other end if that is on this host, too."""
    found = list(ends)
    by_addresses = {
        (each.connection.network, each.connection.local, each.connection.remote): each
        for each in found
    }
    by_vip: dict[tuple[str, str, str], list[MeasuredConnection]] = defaultdict(list)
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
        if peer is None or peer is each:
            yield each, None
            continue
        done.add(id(peer))
        # The rates of a new connection may be known at one end only.
        best, other = (each, peer) if each.rates is not None else (peer, each)
        yield best, other.connection


def _leads_to_vip(end: NamedTraffic) -> bool:
    return end.peer == end.peer_service != ""


def _own_key(end: NamedTraffic) -> str:
    return f"container/{end.container}" if end.container else UNNAMED


def _peer_key(end: NamedTraffic) -> str:
    owner = AddressOwner(name=end.peer, service=end.peer_service, vip=_leads_to_vip(end))
    return owner_key(end.network, owner)


def _edge(key: tuple[str, str, str], total: _Sum, networks: dict[str, str]) -> Edge:
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
