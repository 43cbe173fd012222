"""The sync loop: what Docker knows about peers and services, brought into the kernel.

Each network with endpoints here is polled every interval (`network_poll.py`): its peers become the
flood list, its services the VIP tables of the containers on it (`vip_writer.py`). `schedule.py`
says what is due. Services are listed again when something hints that they have changed
(`refresh_budget.py`, `hints.py`). Invariants:

- One network is polled by one thread at a time, and a slow one doesn't delay others: a small pool
  of threads polls.
- A new sandbox gets the last known tables as soon as it is there, without a question to anybody.
  Since Docker 28 that is inside Join; up to 27 the loop waits for the mount, which comes just
  before the container's program runs.
- Cheap checks are frequent, expensive ones only when due: an unchanged answer isn't parsed, an
  unchanged flood list or table isn't written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from driver.driver import Driver
from driver.errors import FreeFlowError, KernelError
from driver.flood_list import Reach
from driver.model import Endpoint, EngineView, VipTable
from driver.network_poll import EngineWatch, NetworkPoll
from driver.ports import Balancer, Directory, TaskResolver
from driver.service_labels import ServiceLabels
from driver.sync_state import SyncState
from driver.vip_table import NetworkState
from driver.vip_writer import VipWriter
from driver.wakeup import Wakeup
from driver.worker import Worker

__all__ = ["NetworkState", "Syncer"]

log = structlog.get_logger()

POLLERS: Final = 4
"""Threads that wait for the engine."""
WRITERS: Final = 8
"""Threads that write VIP rules: many namespaces, each of which waits some 20 ms for the kernel's
grace period."""


class Syncer:
    """The loop. `clock` in seconds, any origin; `sandboxes` is where Docker's sandboxes are visible
    to us."""

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
        reach: Reach = lambda _, peers: peers,
    ) -> None:
        self._driver = driver
        self._collect = collect
        self._state = SyncState(sandboxes, interval, clock)
        self._engine = EngineWatch(directory, self._state, engine_seen)
        self._labels = ServiceLabels(directory, self._state, self._engine, self._wake)
        self._poll = NetworkPoll(
            self._state, driver, directory, resolver, self._engine, self._wake, changed, reach
        )
        self._writer = VipWriter(self._state, balancer, changed)
        self._wakeup: Wakeup | None = None
        self._pollers: ThreadPoolExecutor | None = None
        self._writers: ThreadPoolExecutor | None = None
        self._worker = Worker(
            "sync", self._step, retry=interval, sleep=self._sleep, wake=self._wake
        )

    # --- for others

    def wake(self) -> None:
        """Poll everything soon: something has changed."""
        with self._state.lock:
            self._state.schedule.wake()
        self._wake()

    def state(self) -> dict[str, NetworkState]:
        """By network ID."""
        with self._state.lock:
            return dict(self._state.states)

    def leads(self, sandbox: Path) -> VipTable:
        """The tasks of each VIP that get a sandbox's new connections."""
        return self._writer.balancer.leads(sandbox)

    def vip_errors(self) -> dict[Path, KernelError]:
        """Sandboxes whose VIP rules could not be written, and why."""
        return self._writer.errors()

    def engine(self) -> tuple[EngineView | None, str | None]:
        """The last view of the engine, and why there is no newer one."""
        return self._engine.view, self._engine.error

    def sandbox(self, endpoint: Endpoint) -> Path | None:
        """Where the endpoint's namespace is; None before its Join."""
        return self._state.sandbox(endpoint)

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """Write the last known VIPs of a sandbox that is there, or do so as soon as it comes.

        Called inside Join, so it uses no API but the kernel's.
        """
        path = self.sandbox(endpoint)
        if path is None:
            return
        network_id = endpoint.network_id
        network = self._state.networks.get(network_id) or self._driver.store.network(network_id)
        self._state.joined(path, endpoint, network)
        if self._state.vip_table(path):
            self._writer.write(path)
        self._wake()

    def hint(self, network_id: str) -> None:
        """The services of a network may have changed."""
        with self._state.lock:
            self._state.schedule.hint(network_id, self._state.clock())
        self._wake()

    # --- the loop

    def start(self) -> None:
        self._wakeup = Wakeup()
        self._pollers = ThreadPoolExecutor(POLLERS, thread_name_prefix="poll")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._worker.start()

    def stop(self) -> None:
        self._worker.stop()
        for pool in (self._pollers, self._writers):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _wake(self) -> None:
        if self._wakeup is not None:
            self._wakeup.wake()

    def _sleep(self, seconds: float) -> None:
        assert self._wakeup is not None
        self._wakeup.wait(seconds, mounts=bool(self._state.schedule.awaited))

    def _submit(self, pool: ThreadPoolExecutor | None, job: Callable[[], None]) -> None:
        def body() -> None:
            try:
                job()
            except Exception:
                log.exception("sync job failed")

        assert pool is not None
        if not self._worker.stopped.is_set():
            # Pools refuse while the process ends.
            with contextlib.suppress(RuntimeError):
                pool.submit(body)

    def _step(self) -> float:
        """Start what is due; returns the seconds for which nothing will be."""
        state, schedule = self._state, self._state.schedule
        now = state.clock()
        for path in state.still_awaited():
            self._writer.write(path)
        if schedule.roster_is_due(now):
            self._read_roster(now)
        with state.lock:
            due = schedule.take_due(now, state.homes, engine_answers=self._engine.error is None)
        if due.engine:
            self._submit(self._pollers, self._engine.poll)
        for path in due.sandboxes:
            self._submit(self._writers, partial(self._write_dirty, path))
        for network_id in due.networks:
            self._submit(self._pollers, partial(self._poll.poll, network_id))
        if due.labels:
            self._submit(self._pollers, self._labels.poll)
        if due.collection:
            self._submit(self._pollers, self._run_collect)
        with state.lock:
            return max(0.005, schedule.next(now) - state.clock())

    def once(self) -> None:
        """Poll everything in this thread, and write what follows. For tests, and before `start`."""
        state, schedule = self._state, self._state.schedule
        now = state.clock()
        self._read_roster(now)
        if schedule.engine_is_due(now):
            self._engine.poll()
        if schedule.labels_are_due(now):
            self._labels.poll()
        for network_id in schedule.networks():
            self._poll.poll(network_id)
        with state.lock:
            paths = schedule.dirty | state.homes.keys()
            schedule.dirty.clear()
        for path in sorted(paths):
            self._writer.write(path)
        if self._engine.error is None and schedule.collection_is_due(now):
            self._run_collect()

    def _read_roster(self, now: float) -> None:
        """Read the networks and endpoints of this host from the store."""
        state, store = self._state, self._driver.store
        with state.lock:
            woken = state.schedule.take_roster(now)
        gone = state.replace(store.networks(), store.endpoints(), now, woken=woken)
        for network_id in gone:
            self._poll.forget(network_id)
        self._writer.forget_others(set(state.homes))

    def _write_dirty(self, path: Path) -> None:
        try:
            self._writer.write(path)
        finally:
            with self._state.lock:
                self._state.schedule.sandbox_written(path)
            if self._state.schedule.dirty:
                self._wake()

    def _run_collect(self) -> None:
        try:
            self._collect()
        except FreeFlowError as error:
            log.info("collection deferred", reason=str(error))
        finally:
            with self._state.lock:
                self._state.schedule.collected(self._state.clock())
