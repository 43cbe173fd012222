"""The page's data for all browsers together: asked for once in an interval, however many watch.

Nothing is asked for while nobody watches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from driver.errors import FreeFlowError
from plugin.page_traffic import TrafficView, traffic_view
from plugin.page_view import MapView, map_view
from plugin.printable import shown_all
from plugin.rates import measure
from plugin.status import Status
from plugin.traffic_names import AddressBook, TrafficReport

INTERVAL: Final = 2.0
"""Seconds between two reports of traffic."""
MAP_AGE: Final = 5.0
"""Seconds for which a map holds: it costs more than traffic, and changes less."""
_STALE: Final = 10.0
"""Seconds after which a report is too old to measure rates since then."""


class PageViews(Protocol):
    """What is shown, now. Each may raise FreeFlowError."""

    def map_now(self) -> MapView: ...

    def traffic_now(self, nodes: MapView) -> TrafficView:
        """The edges between the nodes of this map; rates are those since the last call."""
        ...


@dataclass(slots=True, eq=False)
class PageSource:
    """The views of one host, and where their data comes from; each may raise FreeFlowError."""

    status: Callable[[], Status]
    addresses: Callable[[], AddressBook]
    traffic: Callable[[], TrafficReport]
    _before: TrafficReport | None = None

    def map_now(self) -> MapView:
        return map_view(shown_all(self.status()), shown_all(self.addresses()))

    def traffic_now(self, nodes: MapView) -> TrafficView:
        try:
            report = shown_all(self.traffic())
        except FreeFlowError as error:
            self._before = None
            return TrafficView(interval=0.0, edges=[], paths={}, reasons={}, error=str(error))
        before, self._before = _usable(self._before, report), report
        interval = 0.0 if before is None else report.read - before.read
        return traffic_view(measure(report, before), report, nodes, interval)


def _usable(before: TrafficReport | None, report: TrafficReport) -> TrafficReport | None:
    """The report before, if rates can be measured since then."""
    fits = before is not None and 0 < report.read - before.read < _STALE
    return before if fits else None


@dataclass(frozen=True, slots=True)
class PageData:
    """What browsers get, as JSON. A map that is equal has the same number."""

    map_number: int
    map: bytes
    traffic: bytes


@dataclass(slots=True, eq=False)
class PageFeed:
    """Call `latest` from any thread. Raises FreeFlowError while there is no status."""

    source: PageViews
    clock: Callable[[], float] = time.monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _map: MapView | None = None
    _map_made: float = 0.0
    _map_number: int = 0
    _map_text: bytes = b""
    _data: PageData | None = None
    _error: FreeFlowError | None = None
    _made: float = 0.0

    def latest(self) -> PageData:
        """The data of this interval."""
        with self._lock:
            now = self.clock()
            if (self._data is None and self._error is None) or now - self._made >= INTERVAL:
                self._refresh(now)
            if self._error is not None:
                raise self._error
            assert self._data is not None
            return self._data

    def _refresh(self, now: float) -> None:
        self._made, self._error = now, None
        try:
            nodes = self._refreshed_map(now)
            traffic = msgspec.json.encode(self.source.traffic_now(nodes))
            self._data = PageData(self._map_number, self._map_text, traffic)
        except FreeFlowError as error:
            # For all that ask in this interval: each try may take as long as a time-out.
            self._data, self._error = None, error
            # The one that failed may have taken long.
            self._made = self.clock()

    def _refreshed_map(self, now: float) -> MapView:
        if self._map is None or now - self._map_made >= MAP_AGE:
            self._map = self.source.map_now()
            self._map_made = now
            text = msgspec.json.encode(self._map)
            if text != self._map_text:
                self._map_text = text
                self._map_number += 1
        return self._map
