"""Reads how services want to be balanced, from the labels of services and containers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from driver.balance import LABEL
from driver.errors import EngineError
from driver.network_poll import EngineWatch
from driver.ports import Directory
from driver.sync_state import SyncState

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class ServiceLabels:
    """Keeps `SyncState.labels`. While the engine doesn't tell them they stay as they were.

    `wake_loop` makes the sync loop check its schedule.
    """

    directory: Directory
    state: SyncState
    engine: EngineWatch
    wake_loop: Callable[[], None]

    def poll(self) -> None:
        """Read the labels, and have all networks polled soon if they have changed."""
        state, labels = self.state, None
        try:
            labels = self._read()
        finally:
            with state.lock:
                leaderless = labels is None and self.engine.error is None
                if leaderless and state.labels is None:
                    # Nothing waits until there is a leader.
                    labels = {}
                if changed := labels is not None and labels != state.labels:
                    state.labels = labels
                    state.schedule.wake()
                state.schedule.labels_read(state.clock(), leaderless=leaderless)
        if changed:
            self.wake_loop()

    def _read(self) -> dict[str, str] | None:
        """The labels; None: the engine doesn't tell them now."""
        if self.engine.view is None:
            # Only an engine that is known to be a manager is asked for services.
            self.engine.poll()
        if self.engine.view is None:
            return None
        try:
            found = self.directory.labels(LABEL, manager=self.engine.view.manager)
        except EngineError as error:
            # The poll of the engine reports an engine that doesn't answer at all.
            log.debug("labels of services not read", reason=str(error))
            return None
        return {name: value.strip().lower() for name, value in found.items()}
