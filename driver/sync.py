"""The sync loop: what Docker knows about peers and services, brought into the kernel, after the answers.

One thread. Each pass asks the engine for every network that has endpoints here: peers become the flood list, services
become VIP tables in the containers' namespaces. If the engine can't be asked, everything stays as it was: the last
known peers and tasks are better than none. A new sandbox gets the last known tables at once, before the next pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import structlog

from driver.driver import Driver
from driver.errors import EngineError, FreeFlowError, KernelError
from driver.model import Endpoint, EngineView, Network, NetworkView, Service, VipTable
from driver.ports import Balancer, Directory, TaskResolver

log = structlog.get_logger()

COLLECT_EVERY: Final = 30.0
ENGINE_EVERY: Final = 30.0
SANDBOX_RETRY: Final = 0.05
SANDBOX_PATIENCE: Final = 30.0
"""Seconds for which a sandbox that isn't there yet is looked for at short intervals: engines up to 27 make it after Join."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    """What the loop knows of a network. `view` is the last good one, `seen` when (clock), `error` why not newer."""

    view: NetworkView | None = None
    table: VipTable = field(default_factory=dict)
    seen: float | None = None
    error: str | None = None


def own_tasks(network: Network, addresses: Iterable[IPv4Address]) -> tuple[IPv4Address, ...]:
    """Of these addresses those that belong to the network, sorted."""
    pools = [subnet.pool for subnet in network.subnets]
    return tuple(sorted({a for a in addresses if not pools or any(a in pool for pool in pools)}))


class Syncer:
    """The loop. `clock` in seconds, any origin; `sandboxes` is where Docker's sandboxes are visible to us."""

    def __init__(
        self,
        driver: Driver,
        directory: Directory,
        resolver: TaskResolver,
        balancer: Balancer,
        *,
        sandboxes: Path,
        interval: float,
        clock: Callable[[], float],
        collect: Callable[[], object] = lambda: None,
        engine_seen: Callable[[EngineView], None] = lambda view: None,
    ) -> None:
        self._driver = driver
        self._directory = directory
        self._resolver = resolver
        self._balancer = balancer
        self._sandboxes = sandboxes
        self._interval = interval
        self._clock = clock
        self._collect = collect
        self._engine_seen = engine_seen
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._states: dict[str, NetworkState] = {}
        self._awaited: dict[str, float] = {}
        self._engine: EngineView | None = None
        self._engine_error: str | None = None
        self._engine_due = 0.0
        self._collect_due = 0.0
        self._thread: threading.Thread | None = None

    # --- what others see

    def wake(self) -> None:
        """Make a pass soon."""
        self._wake.set()

    def state(self) -> dict[str, NetworkState]:
        """By network ID."""
        return dict(self._states)

    def engine(self) -> tuple[EngineView | None, str | None]:
        """The last view of the engine, and why there is no newer one."""
        return self._engine, self._engine_error

    def sandbox(self, endpoint: Endpoint) -> Path | None:
        """Where the endpoint's namespace is, seen from here. Docker's path is the host's; ours has the same last part."""
        if not endpoint.sandbox_key:
            return None
        return self._sandboxes / Path(endpoint.sandbox_key).name

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """A sandbox is about to come: give it the last known VIPs, as soon as it is there."""
        self._awaited[endpoint.id] = self._clock() + SANDBOX_PATIENCE
        self._wake.set()

    # --- the loop

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        next_pass = self._clock()
        while not self._stop.is_set():
            woken = self._wake.is_set()
            self._wake.clear()
            try:
                self._serve_awaited()
                if woken or self._clock() >= next_pass:
                    self.once()
                    next_pass = self._clock() + self._interval
            except Exception:
                # The loop must outlive whatever one pass meets; the next pass starts from facts again.
                log.exception("sync pass failed")
                next_pass = self._clock() + self._interval
            pause = next_pass - self._clock()
            if self._awaited:
                pause = min(pause, SANDBOX_RETRY)
            self._wake.wait(max(pause, 0.01))

    def _serve_awaited(self) -> None:
        if not self._awaited:
            return
        now = self._clock()
        endpoints = {endpoint.id: endpoint for endpoint in self._driver.store.endpoints()}
        tables = self._tables(endpoints.values())
        for endpoint_id, deadline in list(self._awaited.items()):
            endpoint = endpoints.get(endpoint_id)
            path = self.sandbox(endpoint) if endpoint is not None else None
            if path is None or now > deadline or self._apply(path, tables[path]):
                self._awaited.pop(endpoint_id, None)

    def once(self) -> None:
        """One pass over everything."""
        now = self._clock()
        if now >= self._engine_due or self._engine_error:
            self._look_at_engine()
            self._engine_due = now + ENGINE_EVERY
        endpoints: dict[str, list[Endpoint]] = {}
        for endpoint in self._driver.store.endpoints():
            endpoints.setdefault(endpoint.network_id, []).append(endpoint)
        for network in self._driver.store.networks():
            if network.id in endpoints:
                self._look_at(network, endpoints[network.id])
        for gone in set(self._states) - set(endpoints):
            del self._states[gone]
        everybody = [endpoint for group in endpoints.values() for endpoint in group]
        for path, table in self._tables(everybody).items():
            self._apply(path, table)
        if now >= self._collect_due and self._engine_error is None:
            self._collect_due = now + COLLECT_EVERY
            try:
                self._collect()
            except FreeFlowError as error:
                log.info("collection put off", reason=str(error))

    def _look_at_engine(self) -> None:
        try:
            self._engine = self._directory.engine()
        except EngineError as error:
            if self._engine_error is None:
                log.info("the engine does not answer", reason=str(error))
            self._engine_error = str(error)
        else:
            if self._engine_error is not None:
                log.info("the engine answers again")
            self._engine_error = None
            self._engine_seen(self._engine)

    def _look_at(self, network: Network, endpoints: list[Endpoint]) -> None:
        before = self._states.get(network.id, NetworkState())
        try:
            view = self._directory.network(network.id)
            if view is None:
                raise EngineError("the engine does not know this network yet")
            self._set_peers(network, view, endpoints)
            table = self._table(network, view, endpoints, before.table)
        except FreeFlowError as error:
            if before.error is None:
                log.info("network not synced", network=network.id, reason=str(error))
            self._states[network.id] = replace(before, error=str(error))
            return
        self._states[network.id] = NetworkState(view, table, self._clock(), None)

    def _set_peers(self, network: Network, view: NetworkView, endpoints: list[Endpoint]) -> None:
        if not network.overlay:
            return
        own = {self._driver.self_address()}
        if self._engine is not None:
            own.add(self._engine.node_address)
        peers = frozenset(peer.address for peer in view.peers) - own
        if self._driver.kernel.set_peers(network.id, peers):
            self._driver.kernel.announce(network.id, endpoints)

    # --- VIPs

    def _table(
        self, network: Network, view: NetworkView, endpoints: list[Endpoint], before: VipTable
    ) -> VipTable:
        askers = [
            path
            for endpoint in endpoints
            if (path := self.sandbox(endpoint)) is not None and path.exists()
        ]
        table: VipTable = {}
        for service in view.services:
            if service.vip is not None:
                table[service.vip] = self._tasks(network, view, service, askers)
        # A VIP whose tasks all left vanishes from the engine's view while clients still hold its address: it refuses.
        # When the service itself is gone nobody resolves it, and the entry goes with the sandbox.
        return table

    def _tasks(
        self, network: Network, view: NetworkView, service: Service, askers: list[Path]
    ) -> tuple[IPv4Address, ...]:
        listed = [task.address for task in service.tasks]
        for asker in askers[:3]:
            answer = self._resolver.tasks(asker, service.name, view.name)
            if answer is not None:
                return own_tasks(network, [a for a in answer if isinstance(a, IPv4Address)])
        return own_tasks(network, listed)

    def _tables(self, endpoints: Iterable[Endpoint]) -> dict[Path, VipTable]:
        """The VIPs of each sandbox: those of all networks that it is on."""
        tables: dict[Path, VipTable] = {}
        for endpoint in endpoints:
            path = self.sandbox(endpoint)
            if path is not None:
                state = self._states.get(endpoint.network_id, NetworkState())
                tables.setdefault(path, {}).update(state.table)
        return tables

    def _apply(self, path: Path, table: VipTable) -> bool:
        try:
            return self._balancer.apply(path, table)
        except KernelError as error:
            log.error("VIPs not applied", sandbox=str(path), reason=str(error))
            return True
