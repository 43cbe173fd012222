"""When the sync loop polls a network or the engine, writes a sandbox's rules, or collects.

Pure: the time comes in as an argument, in seconds of one clock, and nothing here waits, locks or
asks anybody. The caller guards it (`SyncState.lock`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from driver.flood_list import REPAIR_EVERY
from driver.refresh_budget import LARGE_INTERVAL, RefreshBudget

WRITE_GAP: Final = 0.5
"""Seconds between two writes of a sandbox's rules, so that the changes of a rolling update are
written together. A task has 2 s from leaving DNS to its stop signal."""
WRITE_BURST: Final = 4
"""Writes that may come at once before."""
COLLECT_EVERY: Final = 30.0
COLLECT_SOON: Final = 5.0
"""Seconds after a change, which may mean that Docker wants a network that we have lost."""
ENGINE_EVERY: Final = 30.0
LABELS_EVERY: Final = 1.5
"""Seconds between two reads of the labels of services: a change is followed within 2 s."""
LABELS_RETRY: Final = 10.0
"""The same while a Swarm has no leader."""
GAP: Final = 0.1
"""Least seconds between two polls of the same network, whatever happens."""
EAGER_FOR: Final = 3.0
"""Seconds after a Join in which its network is polled every `GAP`: much changes then."""
QUIET_AFTER: Final = 30.0
QUIET_INTERVAL: Final = 1.0
"""Seconds between polls of a network that hasn't changed for `QUIET_AFTER`. A task has 2 s from
leaving DNS to its stop signal."""
SANDBOX_RETRY: Final = 0.05
SANDBOX_PATIENCE: Final = 30.0

_NEVER: Final = float("-inf")


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done now: networks to poll, sandboxes to write, the engine, a collection, the
    labels of services."""

    networks: tuple[str, ...]
    sandboxes: frozenset[Path]
    engine: bool
    collection: bool
    labels: bool


@dataclass(slots=True)
class _NetworkSchedule:
    due: float
    budget: RefreshBudget
    started: float = _NEVER
    busy: bool = False
    eager_until: float = _NEVER
    changed: float = _NEVER

    def hurry(self, now: float) -> None:
        self.due = min(self.due, max(now, self.started + GAP))


class Schedule:
    """The due times of everything that the sync loop does. `interval`: seconds between two
    polls."""

    def __init__(self, now: float, interval: float) -> None:
        self._interval = interval
        self._networks: dict[str, _NetworkSchedule] = {}
        self._repair_due = now + REPAIR_EVERY
        self._woken = True
        self._roster_read = _NEVER
        self.dirty: set[Path] = set()
        """Sandboxes whose rules have to be written."""
        self._writing: set[Path] = set()
        self._written: dict[Path, float] = {}
        """Up to when each sandbox's writes would last, had they come one by one."""
        self.awaited: dict[Path, float] = {}
        """Sandboxes that Docker has announced and not made yet, each with the end of patience."""
        self._engine_due = _NEVER
        self._engine_busy = False
        self._labels_due = _NEVER
        self._labels_busy = False
        self._collection_due = _NEVER
        self._collected = _NEVER
        self._collecting = False

    # --- everything at once

    def take_due(self, now: float, sandboxes: Iterable[Path], *, engine_answers: bool) -> Due:
        """What is due now; it counts as begun. `sandboxes` are all of them."""
        if now >= self._repair_due:
            self._repair_due = now + REPAIR_EVERY
            self.dirty.update(sandboxes)
        paths = {path for path in self.dirty - self._writing if now >= self._may_write(path)}
        self.dirty -= paths
        for path in paths:
            self._written[path] = max(now, self._written.get(path, now)) + WRITE_GAP
        self._writing |= paths
        engine = now >= self._engine_due and not self._engine_busy
        self._engine_busy |= engine
        collection = engine_answers and self.collection_is_due(now)
        self._collecting |= collection
        labels = self.labels_are_due(now)
        self._labels_busy |= labels
        return Due(self._take_networks(now), frozenset(paths), engine, collection, labels)

    def next(self, now: float) -> float:
        """When something will be due."""
        times = [self._roster_due(), self._engine_due, self._repair_due]
        times += [network.due for network in self._networks.values()]
        times += [self._may_write(path) for path in self.dirty - self._writing]
        if self._networks and not self._labels_busy:
            times.append(self._labels_due)
        if self.awaited:
            times.append(now + SANDBOX_RETRY)
        return min(times)

    # --- the list of endpoints

    def wake(self) -> None:
        """Poll everything soon: something has changed."""
        self._woken = True

    def _roster_due(self) -> float:
        return self._roster_read + (GAP if self._woken else REPAIR_EVERY)

    def roster_is_due(self, now: float) -> bool:
        return now >= self._roster_due()

    def take_roster(self, now: float) -> bool:
        """The list of endpoints is read now. Returns whether `wake` was called."""
        woken, self._woken = self._woken, False
        self._roster_read = now
        if woken:
            soon = max(now, self._collected + COLLECT_SOON)
            self._collection_due = min(self._collection_due, soon)
        return woken

    # --- networks

    def networks(self) -> set[str]:
        return set(self._networks)

    def add_network(self, network_id: str, now: float, *, hurry: bool = False) -> None:
        schedule = self._networks.setdefault(network_id, _NetworkSchedule(now, RefreshBudget(now)))
        if hurry:
            schedule.hurry(now)

    def drop_network(self, network_id: str) -> None:
        del self._networks[network_id]

    def hint(self, network_id: str, now: float, *, joined: bool = False) -> None:
        """The services of a network may have changed; `joined`: by a container that has just
        come."""
        schedule = self._networks.get(network_id)
        if schedule is None:
            return
        schedule.budget.hint(now)
        if joined:
            schedule.eager_until = now + EAGER_FOR
        schedule.hurry(now)

    def network_changed(self, network_id: str, now: float) -> None:
        self._networks[network_id].changed = now

    def network_polled(self, network_id: str) -> None:
        schedule = self._networks.get(network_id)
        if schedule is not None:
            schedule.busy = False

    def may_list(self, network_id: str, now: float, *, early: bool = False) -> bool:
        """Whether the services of a network may be listed now; if so, that counts as done."""
        schedule = self._networks.get(network_id)
        if schedule is None:
            return False
        return schedule.budget.take_early(now) if early else schedule.budget.take(now)

    def list_often(self, network_id: str) -> None:
        """Only the engine's list tells which tasks a large service has."""
        self._networks[network_id].budget.within(LARGE_INTERVAL)

    def _take_networks(self, now: float) -> tuple[str, ...]:
        found = []
        for network_id, schedule in self._networks.items():
            if now < schedule.due:
                continue
            if schedule.busy:
                schedule.due = now + GAP
                continue
            schedule.busy = True
            schedule.started = now
            schedule.due = now + self._pause(schedule, now)
            found.append(network_id)
        return tuple(found)

    def _pause(self, schedule: _NetworkSchedule, now: float) -> float:
        if now < schedule.eager_until:
            return min(GAP, self._interval)
        pause = self._interval
        if now - schedule.changed > QUIET_AFTER:
            pause = max(QUIET_INTERVAL, self._interval)
        return max(GAP, min(pause, schedule.budget.next() - now))

    # --- sandboxes

    def _may_write(self, path: Path) -> float:
        """From when on a sandbox's rules may be written again."""
        return self._written.get(path, _NEVER) - WRITE_BURST * WRITE_GAP

    def sandbox_written(self, path: Path) -> None:
        self._writing.discard(path)

    def forget_sandboxes(self, alive: set[Path]) -> set[Path]:
        """Forget what was written to others; returns those that are in use in any way."""
        for path in self._written.keys() - alive:
            del self._written[path]
        return alive | self.dirty | self._writing

    # --- the engine and collections

    def engine_is_due(self, now: float) -> bool:
        return now >= self._engine_due

    def poll_engine_by(self, time: float) -> None:
        self._engine_due = min(self._engine_due, time)

    def engine_polled(self, now: float, *, answered: bool) -> None:
        self._engine_due = now + (ENGINE_EVERY if answered else max(self._interval, GAP))
        self._engine_busy = False

    def labels_are_due(self, now: float) -> bool:
        return bool(self._networks) and now >= self._labels_due and not self._labels_busy

    def labels_read(self, now: float, *, leaderless: bool = False) -> None:
        self._labels_due = now + (LABELS_RETRY if leaderless else LABELS_EVERY)
        self._labels_busy = False

    def collection_is_due(self, now: float) -> bool:
        return now >= self._collection_due and not self._collecting

    def collected(self, now: float) -> None:
        self._collected = now
        self._collection_due = now + COLLECT_EVERY
        self._collecting = False
