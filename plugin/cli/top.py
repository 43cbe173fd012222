"""`freeflow top`: connections, or groups of them, by what they carry per second.

`rates.py` measures, this module groups, filters, sorts and formats, `top_screen.py` draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from plugin.cli.table import amount, bar, table
from plugin.cli.terminal import shown_all
from plugin.rates import MeasuredConnection, MeasuredTraffic, Rates, measure
from plugin.traffic_names import TrafficReport

BY: Final = ("connection", "container", "service", "host", "path")
SORTS: Final = ("bytes", "in", "out", "messages", "retransmits", "rtt", "relay", "name")
NONE: Final = "-"


class TopRow(msgspec.Struct, frozen=True, kw_only=True):
    """A connection, or a group of ends of connections. Rates are per second."""

    name: str
    """The container's; or the group's, `-` for those that belong to none."""
    ends: int = 1
    bytes_in: float | None
    """Null: not known yet."""
    bytes_out: float | None
    messages_in: float | None
    """Null: not known yet, or nobody counts them."""
    messages_out: float | None
    retransmits: float | None
    round_trip_ms: float | None = None
    """TCP's, of a connection; null: not measured."""
    relay_cpu: float | None = None
    """Percent of one processor that the relay works for a container."""
    paths: dict[str, int] = {}
    """Ends by path."""
    service: str = ""
    """This and the rest: of a connection."""
    local: str = ""
    remote: str = ""
    peer: str = ""
    peer_service: str = ""
    host: str = ""
    network: str = ""
    path: str = ""
    reason: str | None = None
    age: float | None = None

    @property
    def bytes(self) -> float:
        """In both directions."""
        return (self.bytes_in or 0.0) + (self.bytes_out or 0.0)

    @property
    def messages(self) -> float:
        """In both directions."""
        return (self.messages_in or 0.0) + (self.messages_out or 0.0)


class TopReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `freeflow top --once --json` prints."""

    by: str
    sort: str
    interval: float
    """Seconds between the two reports that were compared."""
    router_cpu: float | None
    """Percent of one processor; null: not known."""
    relay_cpu: float | None
    rows: tuple[TopRow, ...]
    reasons: dict[str, str]


@dataclass(slots=True)
class TopView:
    """What is shown, and in which order."""

    by: str = BY[0]
    sort: str = SORTS[0]
    reverse: bool = False
    filter: str = ""
    """Only connections with this in one of their texts, whatever its case."""


@dataclass(slots=True)
class Top:
    """Compares each report with the one before."""

    view: TopView = field(default_factory=TopView)
    _before: TrafficReport | None = None
    _last: TrafficReport | None = None

    def add(self, report: TrafficReport) -> None:
        """The router's newest report. Texts are made harmless here."""
        self._before, self._last = self._last, shown_all(report)

    def report(self) -> TopReport | None:
        """The present view; None before the first report."""
        now, before = self._last, self._before
        if now is None:
            return None
        measured = measure(now, before)
        return TopReport(
            by=self.view.by,
            sort=self.view.sort,
            interval=0.0 if before is None else now.read - before.read,
            router_cpu=_percent(measured.router),
            relay_cpu=_percent(measured.relay),
            rows=tuple(rows(measured, self.view, now.networks)),
            reasons=now.reasons,
        )


def rows(measured: MeasuredTraffic, view: TopView, networks: dict[str, str]) -> list[TopRow]:
    """The rows of a view, in its order."""
    wanted = view.filter.lower()
    chosen = [each for each in measured.connections if wanted in _texts(each, networks).lower()]
    if view.by == BY[0]:
        found = [_single(each, networks) for each in chosen]
    else:
        found = _groups(chosen, view.by, measured.relay_by_container)
    # By name first: rows that are equal otherwise keep their places.
    found.sort(key=lambda row: (row.name, row.local, row.remote))
    if view.sort != "name":
        found.sort(key=_ORDERS[view.sort], reverse=True)
    return found[::-1] if view.reverse else found


_ORDERS: Final[dict[str, Callable[[TopRow], float]]] = {
    "bytes": lambda row: row.bytes,
    "in": lambda row: row.bytes_in or 0.0,
    "out": lambda row: row.bytes_out or 0.0,
    "messages": lambda row: row.messages,
    "retransmits": lambda row: row.retransmits or 0.0,
    "rtt": lambda row: row.round_trip_ms or 0.0,
    "relay": lambda row: row.relay_cpu or 0.0,
}


def _texts(each: MeasuredConnection, networks: dict[str, str]) -> str:
    one = each.connection
    network = networks.get(one.network, "")
    return "\n".join(
        (
            one.container,
            one.service,
            one.local,
            one.remote,
            one.peer,
            one.peer_service,
            one.host,
            network,
            one.path,
            one.reason or "",
        )
    )


def _rates(rates: Rates | None) -> dict[str, Any]:
    if rates is None:
        return dict.fromkeys(Rates.__struct_fields__)
    return msgspec.structs.asdict(rates)


def _single(each: MeasuredConnection, networks: dict[str, str]) -> TopRow:
    one = each.connection
    measured = None if one.tcp is None else one.tcp.round_trip
    return TopRow(
        name=one.container or str(one.namespace),
        **_rates(each.rates),
        round_trip_ms=measured / 1000 if measured else None,
        paths={one.path: 1},
        service=one.service,
        local=one.local,
        remote=one.remote,
        peer=one.peer,
        peer_service=one.peer_service,
        host=one.host,
        network=networks.get(one.network, one.network[:12]),
        path=one.path,
        reason=one.reason,
        age=one.age,
    )


def _groups(chosen: Iterable[MeasuredConnection], by: str, relay: dict[int, float]) -> list[TopRow]:
    members: dict[str, list[MeasuredConnection]] = {}
    for each in chosen:
        one = each.connection
        name = one.container or str(one.namespace) if by == BY[1] else getattr(one, by)
        members.setdefault(name or NONE, []).append(each)
    return [_group(name, some, relay if by == BY[1] else {}) for name, some in members.items()]


def _group(name: str, some: list[MeasuredConnection], relay: dict[int, float]) -> TopRow:
    known = [each.rates for each in some if each.rates is not None]
    total = Rates() if known else None
    for rates in known:
        assert total is not None
        total = total.plus(rates)
    used = [relay[each] for each in {each.connection.namespace for each in some} if each in relay]
    return TopRow(
        name=name,
        ends=len(some),
        **_rates(total),
        relay_cpu=_percent(sum(used)) if used else None,
        paths=dict(sorted(Counter(each.connection.path for each in some).items())),
    )


def _percent(part: float | None) -> float | None:
    return None if part is None else round(100 * part, 1)


# --- as text


def head(report: TopReport) -> str:
    """One line: how much there is, and what it costs."""
    ends = sum(row.ends for row in report.rows)
    paths: Counter[str] = Counter()
    for row in report.rows:
        paths.update(row.paths)
    count = ", ".join(f"{count} {path}" for path, count in sorted(paths.items()))
    return (
        f"{ends} end{'' if ends == 1 else 's'} of connections{f': {count}' if count else ''}; "
        f"processor: router {_share(report.router_cpu)}, relay {_share(report.relay_cpu)}"
    )


def show(report: TopReport, *, plain: bool = False) -> str:
    """The rows as a table, with a line of headings; empty without rows.

    Groups have bars, in ASCII if `plain`.
    """
    if report.by == BY[0]:
        heads = ("CONTAINER", "LOCAL", "REMOTE", "PEER", "PATH", *_HEADS, "RTT", "WHY")
        lines: Iterable[tuple[object, ...]] = (_connection_cells(row) for row in report.rows)
    else:
        relay = report.by == BY[1]
        heads = (
            *(report.by.upper(), "ENDS", *_HEADS),
            *(("RELAY",) if relay else ()),
            *(_OF_ALL, "PATHS"),
        )
        total = sum(row.bytes for row in report.rows) or 1.0
        lines = (
            _group_cells(row, relay, bar(row.bytes / total, len(_OF_ALL), plain=plain))
            for row in report.rows
        )
    return table(heads, lines, indent="")


_HEADS: Final = ("IN/s", "OUT/s", "MSG IN/s", "MSG OUT/s", "RETR/s")
_OF_ALL: Final = "OF ALL BYTES"
"""As wide as its bars."""


def _connection_cells(row: TopRow) -> tuple[object, ...]:
    peer = row.peer or NONE
    return (
        row.name,
        row.local,
        row.remote,
        f"{peer} on {row.host}" if row.host else peer,
        row.path,
        *_cells(row),
        NONE if row.round_trip_ms is None else f"{row.round_trip_ms:.2f} ms",
        row.reason or "",
    )


def _group_cells(row: TopRow, relay: bool, part: str) -> tuple[object, ...]:
    paths = ", ".join(f"{count} {path}" for path, count in row.paths.items())
    used = (_share(row.relay_cpu),) if relay else ()
    return (row.name, row.ends, *_cells(row), *used, part, paths)


def _cells(row: TopRow) -> tuple[str, ...]:
    sizes = (row.bytes_in, row.bytes_out)
    counts = (row.messages_in, row.messages_out, row.retransmits)
    return (
        *(NONE if size is None else amount(size) for size in sizes),
        *(NONE if count is None else f"{count:.0f}" for count in counts),
    )


def _share(percent: float | None) -> str:
    return NONE if percent is None else f"{percent:.1f} %"
