"""The sync loop: what Docker knows about peers and services, brought into the kernel, after the answers.

Each network with endpoints here is looked at every interval: its peers become the flood list, its services become the VIP
tables of the containers on it. Docker's DNS says at each look which tasks take connections; the list of services is read
again when something hints that it has changed (`refresh_budget.py`, `hints.py`). Invariants:

- If the engine can't be asked, everything stays as it was: the last known peers and tasks are better than none.
- One network is never looked at twice at a time, and a slow one doesn't delay others: looks run in a small pool.
- A new sandbox gets the last known tables as soon as it is there, without a question to anybody. Since Docker 28 that is
  inside Join; up to 27 the loop waits for the mount, which comes just before the container's program runs.

What costs nothing is done often, what costs something only when it is due: an unchanged answer isn't parsed, an unchanged
flood list or table isn't written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import structlog

from driver.bell import Bell
from driver.dns_tasks import DnsTasks
from driver.driver import Driver
from driver.errors import EngineError, FreeFlowError, KernelError, NotFound
from driver.flood_list import REPAIR_EVERY, FloodLists
from driver.model import Endpoint, EngineView, Network, NetworkView, VipTable
from driver.ports import Balancer, Directory, TaskResolver
from driver.refresh_budget import LARGE_BEAT, RefreshBudget
from driver.vip_table import NetworkState, next_state, unknown, unlisted

__all__ = ["NetworkState", "Syncer"]

log = structlog.get_logger()

LOOKERS: Final = 4
"""Threads that wait for the engine."""
WRITERS: Final = 8
"""Threads that write VIP rules: enough for many namespaces while each waits some 20 ms for the kernel's grace period."""
WRITE_GAP: Final = 0.5
"""Seconds between two changes of a sandbox's rules, so that a rolling update's come together. A task has 2 s from leaving DNS to
its stop signal."""
WRITE_BURST: Final = 4
"""So many come at once before."""
COLLECT_EVERY: Final = 30.0
COLLECT_SOON: Final = 5.0
"""After a change, which may be that Docker wants a network that we have lost."""
ENGINE_EVERY: Final = 30.0
GAP: Final = 0.1
"""Least seconds between two looks at the same thing, whatever happens."""
EAGER_FOR: Final = 3.0
"""Seconds after a Join in which its network is looked at every `GAP`: much changes then."""
QUIET_AFTER: Final = 30.0
QUIET_INTERVAL: Final = 1.0
"""Interval of a network that hasn't changed for `QUIET_AFTER`. A task has 2 s from leaving DNS to its stop signal."""
SANDBOX_RETRY: Final = 0.05
SANDBOX_PATIENCE: Final = 30.0
SETTLE: Final = 10.0
"""Seconds after the start in which containers that were there before keep their rules until all their networks are known."""


@dataclass(slots=True)
class _Schedule:
    """When a network is looked at."""

    due: float
    budget: RefreshBudget
    started: float = float("-inf")
    busy: bool = False
    eager_until: float = float("-inf")
    changed: float = float("-inf")

    def hurry(self, now: float) -> None:
        self.due = min(self.due, max(now, self.started + GAP))


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
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._driver = driver
        self._directory = directory
        self._dns_tasks = DnsTasks(resolver, clock)
        self._flood_lists = FloodLists(driver.kernel, clock)
        self._balancer = balancer
        self._sandboxes = sandboxes
        self._interval = interval
        self._clock = clock
        self._collect = collect
        self._engine_seen = engine_seen
        self._changed = changed

        # Guards all below. Nothing is asked or written while it is held.
        self._lock = threading.RLock()
        self._started = clock()
        self._woken = True
        self._roster_read = float("-inf")
        self._networks: dict[str, Network] = {}
        self._endpoints: dict[str, tuple[Endpoint, ...]] = {}
        self._homes: dict[Path, frozenset[str]] = {}
        """The networks of each sandbox."""
        self._young: set[Path] = set()
        """Sandboxes that joined since we started: they have no rules of an earlier process's."""
        self._schedules: dict[str, _Schedule] = {}
        self._states: dict[str, NetworkState] = {}
        self._complained: set[str] = set()
        """Networks whose trouble is in the log."""
        self._dirty: set[Path] = set()
        self._applying: set[Path] = set()
        self._written: dict[Path, float] = {}
        """Up to when each sandbox's changes would last, had they come one by one."""
        self._awaited: dict[Path, float] = {}
        self._vip_errors: dict[Path, str] = {}
        self._repair_due = self._started + REPAIR_EVERY
        self._engine: EngineView | None = None
        self._engine_error: str | None = None
        self._engine_due = float("-inf")
        self._engine_busy = False
        self._collect_due = float("-inf")
        self._collected = float("-inf")
        self._collect_busy = False

        self._stop = threading.Event()
        self._bell: Bell | None = None
        self._lookers: ThreadPoolExecutor | None = None
        self._writers: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None

    # --- what others see

    def wake(self) -> None:
        """Something has changed: look at everything soon."""
        self._woken = True
        self._ring()

    def state(self) -> dict[str, NetworkState]:
        """By network ID."""
        with self._lock:
            return dict(self._states)

    def vip_errors(self) -> dict[Path, str]:
        """Sandboxes whose VIP rules could not be written, and why."""
        with self._lock:
            return dict(self._vip_errors)

    def engine(self) -> tuple[EngineView | None, str | None]:
        """The last view of the engine, and why there is no newer one."""
        return self._engine, self._engine_error

    def sandbox(self, endpoint: Endpoint) -> Path | None:
        """Where the endpoint's namespace is, seen from here. Docker's path is the host's; ours has the same last part."""
        if not endpoint.sandbox_key:
            return None
        return self._sandboxes / Path(endpoint.sandbox_key).name

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """A sandbox is there, or about to come: it gets the last known VIPs at once, or as soon as it is there.

        Called inside Join: asks nobody but the kernel.
        """
        path = self.sandbox(endpoint)
        if path is None:
            return
        now = self._clock()
        network_id = endpoint.network_id
        network = self._networks.get(network_id) or self._driver.store.network(network_id)
        with self._lock:
            self._homes[path] = self._homes.get(path, frozenset()) | {network_id}
            self._young.add(path)
            self._awaited[path] = now + SANDBOX_PATIENCE
            if network is not None:
                self._networks.setdefault(network_id, network)
                known = self._endpoints.get(network_id, ())
                if endpoint not in known:
                    self._endpoints[network_id] = (*known, endpoint)
                schedule = self._schedule(network_id, now)
                schedule.budget.hint(now)
                schedule.eager_until = now + EAGER_FOR
                schedule.hurry(now)
        if self._union(path):
            self._apply(path)
        self._ring()

    def hint(self, network_id: str) -> None:
        """The services of a network may have changed."""
        now = self._clock()
        with self._lock:
            schedule = self._schedules.get(network_id)
            if schedule is None:
                return
            schedule.budget.hint(now)
            schedule.hurry(now)
        self._ring()

    # --- the loop

    def start(self) -> None:
        self._bell = Bell()
        self._lookers = ThreadPoolExecutor(LOOKERS, thread_name_prefix="look")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._ring()
        if self._thread is not None:
            self._thread.join(timeout=5)
        for pool in (self._lookers, self._writers):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _ring(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def _run(self) -> None:
        assert self._bell is not None
        pause = 0.0
        while not self._stop.is_set():
            try:
                pause = self._step()
            except Exception:
                # The loop must outlive whatever one step meets; the next starts from facts again.
                log.exception("sync failed")
                pause = self._interval
            self._bell.wait(pause, mounts=bool(self._awaited))

    def _submit(self, pool: ThreadPoolExecutor | None, job: Callable[[], None]) -> None:
        def body() -> None:
            try:
                job()
            except Exception:
                log.exception("sync job failed")

        assert pool is not None
        if not self._stop.is_set():
            # Pools refuse while the process ends.
            with contextlib.suppress(RuntimeError):
                pool.submit(body)

    def _step(self) -> float:
        """Start what is due; returns for how long nothing will be."""
        now = self._clock()
        for path in self._still_awaited(now):
            self._apply(path)
        roster_due = self._roster_read + (GAP if self._woken else REPAIR_EVERY)
        if now >= roster_due:
            self._read_roster(now)
            roster_due = self._roster_read + REPAIR_EVERY
        with self._lock:
            looks = self._due_looks(now)
            paths = {path for path in self._dirty - self._applying if now >= self._may_write(path)}
            self._dirty -= paths
            for path in paths:
                self._written[path] = max(now, self._written.get(path, now)) + WRITE_GAP
            self._applying |= paths
            ask_engine = now >= self._engine_due and not self._engine_busy
            self._engine_busy |= ask_engine
            collect = self._collection_is_due(now)
            self._collect_busy |= collect
        if ask_engine:
            self._submit(self._lookers, self._look_at_engine)
        for path in paths:
            self._submit(self._writers, partial(self._apply_dirty, path))
        for network_id in looks:
            self._submit(self._lookers, partial(self._look, network_id))
        if collect:
            self._submit(self._lookers, self._run_collect)
        with self._lock:
            times = [roster_due, self._engine_due, self._repair_due]
            times += [schedule.due for schedule in self._schedules.values()]
            times += [self._may_write(path) for path in self._dirty - self._applying]
            if self._awaited:
                times.append(now + SANDBOX_RETRY)
        return max(0.005, min(times) - self._clock())

    def _may_write(self, path: Path) -> float:
        """From when on a sandbox's rules may be changed again."""
        return self._written.get(path, float("-inf")) - WRITE_BURST * WRITE_GAP

    def _due_looks(self, now: float) -> list[str]:
        if now >= self._repair_due:
            self._repair_due = now + REPAIR_EVERY
            self._dirty |= self._homes.keys()
        looks = []
        for network_id, schedule in self._schedules.items():
            if now < schedule.due:
                continue
            if schedule.busy:
                schedule.due = now + GAP
                continue
            schedule.busy = True
            schedule.started = now
            schedule.due = now + self._pause(schedule, now)
            looks.append(network_id)
        return looks

    def _schedule(self, network_id: str, now: float) -> _Schedule:
        return self._schedules.setdefault(network_id, _Schedule(now, RefreshBudget(now)))

    def _pause(self, schedule: _Schedule, now: float) -> float:
        if now < schedule.eager_until:
            return min(GAP, self._interval)
        pause = self._interval
        if now - schedule.changed > QUIET_AFTER:
            pause = max(QUIET_INTERVAL, self._interval)
        return max(GAP, min(pause, schedule.budget.next() - now))

    def _collection_is_due(self, now: float) -> bool:
        return now >= self._collect_due and not self._collect_busy and self._engine_error is None

    def once(self) -> None:
        """Look at everything in this thread, and write what follows. For tests, and before the loop is started."""
        now = self._clock()
        self._read_roster(now)
        if now >= self._engine_due:
            self._look_at_engine()
        for network_id in list(self._schedules):
            self._look(network_id)
        with self._lock:
            paths = self._dirty | self._homes.keys()
            self._dirty.clear()
        for path in sorted(paths):
            self._apply(path)
        if self._collection_is_due(now):
            self._run_collect()

    # --- who is here

    def _read_roster(self, now: float) -> None:
        woken, self._woken = self._woken, False
        self._roster_read = now
        networks = {network.id: network for network in self._driver.store.networks()}
        endpoints: dict[str, list[Endpoint]] = {}
        homes: dict[Path, frozenset[str]] = {}
        for endpoint in self._driver.store.endpoints():
            if endpoint.network_id not in networks:
                continue
            endpoints.setdefault(endpoint.network_id, []).append(endpoint)
            path = self.sandbox(endpoint)
            if path is not None:
                homes[path] = homes.get(path, frozenset()) | {endpoint.network_id}
        with self._lock:
            changed = {
                path
                for path in homes.keys() | self._homes.keys()
                if homes.get(path) != self._homes.get(path)
            }
            self._dirty |= changed
            self._networks = networks
            self._endpoints = {key: tuple(value) for key, value in endpoints.items()}
            self._homes = homes
            self._young &= homes.keys()
            for network_id in endpoints:
                schedule = self._schedule(network_id, now)
                if woken:
                    schedule.hurry(now)
            for gone in self._schedules.keys() - endpoints.keys():
                del self._schedules[gone]
                self._states.pop(gone, None)
                self._flood_lists.forget(gone)
                self._dns_tasks.forget(gone)
                self._complained.discard(gone)
            for path in self._written.keys() - homes.keys():
                del self._written[path]
            for path in self._vip_errors.keys() - homes.keys():
                del self._vip_errors[path]
            if woken:
                self._collect_due = min(self._collect_due, max(now, self._collected + COLLECT_SOON))
            alive = homes.keys() | self._dirty | self._applying
        self._balancer.forget(alive)

    # --- the engine

    def _look_at_engine(self) -> None:
        try:
            view = self._directory.engine()
        except EngineError as error:
            if self._engine_error is None:
                log.warning("the engine does not answer, all stays as it is", reason=str(error))
            self._engine_error = str(error)
            self._engine_due = self._clock() + max(self._interval, GAP)
        else:
            if self._engine_error is not None:
                log.info("the engine answers again", version=view.version)
            self._engine, self._engine_error = view, None
            self._engine_due = self._clock() + ENGINE_EVERY
            self._engine_seen(view)
        finally:
            self._engine_busy = False

    def _run_collect(self) -> None:
        try:
            self._collect()
        except FreeFlowError as error:
            log.info("collection put off", reason=str(error))
        finally:
            self._collected = self._clock()
            self._collect_due = self._collected + COLLECT_EVERY
            self._collect_busy = False

    # --- a network

    def _look(self, network_id: str) -> None:
        with self._lock:
            network = self._networks.get(network_id)
            endpoints = self._endpoints.get(network_id, ())
            before = self._states.get(network_id, NetworkState())
        try:
            if network is not None:
                self._sync(network, endpoints, before)
                if network_id in self._complained:
                    self._complained.discard(network_id)
                    log.info("network synced again", network=network_id)
        except FreeFlowError as error:
            self._failed(network_id, before, error)
        finally:
            with self._lock:
                schedule = self._schedules.get(network_id)
                if schedule is not None:
                    schedule.busy = False
            if self._dirty:
                self._ring()

    def _failed(self, network_id: str, before: NetworkState, error: FreeFlowError) -> None:
        silent = self._engine_error is not None or network_id in self._complained
        if isinstance(error, EngineError) and before.error is None:
            # If it is the engine as a whole, that is said once for all networks.
            self._engine_due = min(self._engine_due, self._clock())
            silent = True
        if not silent:
            self._complained.add(network_id)
            log.warning("network not synced", network=network_id, reason=str(error))
        with self._lock:
            if network_id in self._schedules:
                known = self._states.get(network_id, before)
                self._states[network_id] = replace(known, error=str(error))

    def _sync(
        self, network: Network, endpoints: tuple[Endpoint, ...], before: NetworkState
    ) -> None:
        view = self._view(network.id, before, services=self._is_occasion(network.id, before))
        if before.view is None and self._only_young(network.id):
            # Better all tasks at once than the right ones a little later.
            before = self._publish(network, view, {}, before)
            self._ring()
        decision = self._dns_tasks.ask(view, before, self._owners(network.id, endpoints, view))
        if self._is_news(network, view, decision.tasks, before) and self._may_list(network.id):
            view = self._view(network.id, before, services=True)
            decision = self._dns_tasks.ask(view, before, self._owners(network.id, endpoints, view))
        self._publish(network, view, decision.tasks, before, decision.by_list)
        own = {self._driver.self_address(), self._engine.node_address if self._engine else None}
        self._flood_lists.set(network, view, endpoints, {item for item in own if item is not None})
        self._flood_lists.tell_of_tasks(network, view, before.view, endpoints)

    def _owners(
        self, network_id: str, endpoints: tuple[Endpoint, ...], view: NetworkView
    ) -> dict[Path, str]:
        """The sandboxes on a network, each with whose it is: that of a service's task is the service's."""
        services = {
            task.endpoint_id: service.name for service in view.services for task in service.tasks
        }
        owners = {path: f"sandbox {path}" for path in self._on_network(network_id)}
        for endpoint in endpoints:
            path = self.sandbox(endpoint)
            if path in owners and endpoint.id in services:
                owners[path] = f"service {services[endpoint.id]}"
        return owners

    # --- what the engine lists

    def _view(self, network_id: str, before: NetworkState, *, services: bool) -> NetworkView:
        view = self._directory.network(network_id, services=services)
        if view is None:
            raise NotFound(
                f"the engine does not know network {network_id} yet, or any more; nothing changes meanwhile"
            )
        known = before.view
        if services or known is None:
            return view
        if view.peers != known.peers or view.containers != known.containers:
            self.hint(network_id)
        return replace(view, services=known.services, others=known.others)

    def _is_occasion(self, network_id: str, before: NetworkState) -> bool:
        now = self._clock()
        with self._lock:
            schedule = self._schedules.get(network_id)
            return (schedule is not None and schedule.budget.take(now)) or before.view is None

    def _may_list(self, network_id: str) -> bool:
        now = self._clock()
        with self._lock:
            schedule = self._schedules.get(network_id)
            return schedule is not None and schedule.budget.take_early(now)

    @staticmethod
    def _is_news(
        network: Network,
        view: NetworkView,
        answers: Mapping[str, frozenset[IPv4Address]],
        before: NetworkState,
    ) -> bool:
        """Whether DNS knows tasks that aren't listed, or doesn't know a service that is; unless it was so before."""
        return bool(
            unlisted(network, view, answers) - before.unlisted
            or unknown(view, answers) - before.unknown
        )

    def _publish(
        self,
        network: Network,
        view: NetworkView,
        answers: dict[str, frozenset[IPv4Address]],
        before: NetworkState,
        by_list: frozenset[str] = frozenset(),
    ) -> NetworkState:
        now = self._clock()
        state = replace(next_state(network, view, answers, before, now), by_list=by_list)
        with self._lock:
            schedule = self._schedules.get(network.id)
            if schedule is None:
                return state
            self._states[network.id] = state
            if by_list:
                schedule.budget.within(LARGE_BEAT)
            if state.table is not before.table or before.seen is None:
                self._dirty |= set(self._on_network(network.id))
            changed = state.table is not before.table or view != before.view
            if changed:
                schedule.changed = now
        if changed:
            self._changed()
        return state

    def _on_network(self, network_id: str) -> list[Path]:
        with self._lock:
            return [path for path, ids in self._homes.items() if network_id in ids]

    def _only_young(self, network_id: str) -> bool:
        with self._lock:
            return self._young.issuperset(self._on_network(network_id))

    # --- VIPs

    def _still_awaited(self, now: float) -> list[Path]:
        with self._lock:
            for path, deadline in list(self._awaited.items()):
                if now > deadline or path not in self._homes:
                    del self._awaited[path]
            return list(self._awaited)

    def _union(self, path: Path) -> VipTable | None:
        """The VIPs of all networks of a sandbox; None if not all are known, and it may have rules for the others."""
        table: VipTable = {}
        with self._lock:
            unknown = False
            for network_id in sorted(self._homes.get(path, ())):
                state = self._states.get(network_id)
                if state is None or state.seen is None:
                    unknown = True
                else:
                    table.update(state.table)
            if unknown and path not in self._young and self._clock() - self._started < SETTLE:
                return None
        return table

    def _apply_dirty(self, path: Path) -> None:
        try:
            self._apply(path)
        finally:
            with self._lock:
                self._applying.discard(path)
            if self._dirty:
                self._ring()

    def _apply(self, path: Path) -> None:
        table = self._union(path)
        if table is None:
            return
        try:
            there = self._balancer.apply(path, table)
        except KernelError as error:
            with self._lock:
                news = self._vip_errors.get(path) != str(error)
                self._vip_errors[path] = str(error)
                self._awaited.pop(path, None)
            if news:
                log.error("VIP rules not written", sandbox=str(path), reason=str(error))
            return
        with self._lock:
            self._vip_errors.pop(path, None)
            appeared = there and self._awaited.pop(path, None) is not None
        if appeared:
            self._changed()
