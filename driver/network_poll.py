"""Polls one network: engine and DNS in, flood list and VIP table out.

The engine lists peers and, when asked for them, services; Docker's DNS tells which tasks take
connections. If the engine doesn't answer, everything stays as it was: the last known peers and
tasks are better than none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path

import structlog

from driver import options
from driver.balance import balances
from driver.dns_tasks import DnsTasks
from driver.driver import Driver
from driver.errors import EngineError, FreeFlowError, NotFound
from driver.flood_list import FloodLists, Reach
from driver.model import Endpoint, EngineView, Network, NetworkView
from driver.ports import Directory, TaskResolver
from driver.sync_state import SyncState
from driver.vip_table import NetworkState, next_state, unknown, unlisted

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class EngineWatch:
    """The engine's last view of itself, and why there is no newer one."""

    directory: Directory
    state: SyncState
    seen: Callable[[EngineView], None]
    view: EngineView | None = None
    error: str | None = None

    def poll(self) -> None:
        answered = False
        try:
            view = self.directory.engine()
            answered = True
            if self.error is not None:
                log.info("the engine answers again", version=view.version)
            self.view, self.error = view, None
            self.seen(view)
        except EngineError as error:
            if self.error is None:
                log.warning("the engine does not answer, all stays as it is", reason=str(error))
            self.error = str(error)
        finally:
            with self.state.lock:
                self.state.schedule.engine_polled(self.state.clock(), answered=answered)


class NetworkPoll:
    """Polls a network at a time, each network in one thread at a time.

    `wake_loop` makes the sync loop check its schedule; `changed` is called after a new state;
    `reach`: see `FloodLists`.
    """

    def __init__(
        self,
        state: SyncState,
        driver: Driver,
        directory: Directory,
        resolver: TaskResolver,
        engine: EngineWatch,
        wake_loop: Callable[[], None],
        changed: Callable[[], None],
        reach: Reach,
    ) -> None:
        self._state = state
        self._driver = driver
        self._directory = directory
        self._engine = engine
        self._wake_loop = wake_loop
        self._changed = changed
        self._dns_tasks = DnsTasks(resolver, state.clock)
        self._flood_lists = FloodLists(driver.kernel, state.clock, reach)
        self._failing: set[str] = set()
        """Networks whose failure has been logged."""

    def forget(self, network_id: str) -> None:
        """The network has no endpoints here any more."""
        self._flood_lists.forget(network_id)
        self._dns_tasks.forget(network_id)
        self._failing.discard(network_id)

    def poll(self, network_id: str) -> None:
        """Poll a network, and publish its new state."""
        state = self._state
        with state.lock:
            network = state.networks.get(network_id)
            endpoints = state.endpoints.get(network_id, ())
            before = state.states.get(network_id, NetworkState())
        try:
            if network is not None:
                self._poll(network, endpoints, before)
                if network_id in self._failing:
                    self._failing.discard(network_id)
                    log.info("network synced again", network=network_id)
        except FreeFlowError as error:
            self._failed(network_id, before, error)
        finally:
            with state.lock:
                state.schedule.network_polled(network_id)
            if state.schedule.dirty:
                self._wake_loop()

    def _failed(self, network_id: str, before: NetworkState, error: FreeFlowError) -> None:
        state = self._state
        silent = self._engine.error is not None or network_id in self._failing
        if isinstance(error, EngineError) and before.error is None:
            # If the whole engine is down, that is logged once for all networks.
            with state.lock:
                state.schedule.poll_engine_by(state.clock())
            silent = True
        if not silent:
            self._failing.add(network_id)
            log.warning("network not synced", network=network_id, reason=str(error))
        with state.lock:
            if network_id in state.schedule.networks():
                known = state.states.get(network_id, before)
                state.states[network_id] = replace(known, error=str(error))

    def _poll(
        self, network: Network, endpoints: tuple[Endpoint, ...], before: NetworkState
    ) -> None:
        list_services = self._may_list(network.id) or before.view is None
        view = self._view(network.id, before, services=list_services)
        if before.view is None and self._state.only_young(network.id):
            # Better all tasks at once than the right ones a little later.
            before = self._publish(network, view, {}, before)
            self._wake_loop()
        decision = self._dns_tasks.ask(view, before, self._owners(network.id, endpoints, view))
        if _differs_from_list(network, view, decision.tasks, before) and self._may_list(
            network.id, early=True
        ):
            view = self._view(network.id, before, services=True)
            decision = self._dns_tasks.ask(view, before, self._owners(network.id, endpoints, view))
        self._publish(network, view, decision.tasks, before, decision.by_list)
        own = {
            self._driver.self_address(),
            self._engine.view.node_address if self._engine.view else None,
        }
        self._flood_lists.set(network, view, endpoints, {item for item in own if item is not None})
        self._flood_lists.announce_tasks(network, view, before.view, endpoints)

    def _may_list(self, network_id: str, *, early: bool = False) -> bool:
        with self._state.lock:
            return self._state.schedule.may_list(network_id, self._state.clock(), early=early)

    def _view(self, network_id: str, before: NetworkState, *, services: bool) -> NetworkView:
        view = self._directory.network(network_id, services=services)
        if view is None:
            raise NotFound(
                f"network {network_id}",
                cause="the engine does not know it yet, or any more",
                remedy="nothing changes until it does",
            )
        known = before.view
        if services or known is None:
            return view
        if view.peers != known.peers or view.containers != known.containers:
            with self._state.lock:
                self._state.schedule.hint(network_id, self._state.clock())
            self._wake_loop()
        return replace(view, services=known.services, others=known.others)

    def _owners(
        self, network_id: str, endpoints: tuple[Endpoint, ...], view: NetworkView
    ) -> dict[Path, str]:
        """The sandboxes on a network, each with its owner: a service, or the sandbox itself."""
        services = {
            task.endpoint_id: service.name for service in view.services for task in service.tasks
        }
        owners = {path: f"sandbox {path}" for path in self._state.on_network(network_id)}
        for endpoint in endpoints:
            path = self._state.sandbox(endpoint)
            if path in owners and endpoint.id in services:
                owners[path] = f"service {services[endpoint.id]}"
        return owners

    def _publish(
        self,
        network: Network,
        view: NetworkView,
        answers: Mapping[str, frozenset[IPv4Address]],
        before: NetworkState,
        by_list: frozenset[str] = frozenset(),
    ) -> NetworkState:
        shared, now = self._state, self._state.clock()
        state = next_state(network, view, answers, before, now, by_list)
        option, labels = options.balance(network.options), shared.labels
        found = balances(option, labels or {}, view, state.table, by_list)
        state = replace(state, balances=found, labelled=labels is not None)
        new_rules = (
            state.table is not before.table
            or found != before.balances
            or state.labelled != before.labelled
        )
        changed = new_rules or view != before.view
        with shared.lock:
            if network.id not in shared.schedule.networks():
                return state
            shared.states[network.id] = state
            if by_list:
                shared.schedule.list_often(network.id)
            if new_rules or before.seen is None:
                shared.schedule.dirty |= set(shared.on_network(network.id))
            if changed:
                shared.schedule.network_changed(network.id, now)
        if changed:
            self._changed()
        return state


def _differs_from_list(
    network: Network,
    view: NetworkView,
    answers: Mapping[str, frozenset[IPv4Address]],
    before: NetworkState,
) -> bool:
    """Whether DNS newly names tasks that aren't listed, or no longer knows a listed service."""
    return bool(
        unlisted(network, view, answers) - before.unlisted
        or unknown(view, answers) - before.unknown
    )
