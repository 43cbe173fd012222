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
    """Keeps `SyncState.labels`. While the engine doesn't answer they stay as they were.

    `wake_loop` makes the sync loop check its schedule.
    """

    directory: Directory
    state: SyncState
    engine: EngineWatch
    wake_loop: Callable[[], None]

    def poll(self) -> None:
        """Read the labels, and have all networks polled soon if they have changed."""
        state, view, labels = self.state, self.engine.view, None
        try:
            found = self.directory.labels(LABEL, manager=view is not None and view.manager)
            labels = {name: value.strip().lower() for name, value in found.items()}
        except EngineError as error:
            # The poll of the engine reports an engine that doesn't answer at all.
            log.debug("labels of services not read", reason=str(error))
        finally:
            with state.lock:
                if changed := labels is not None and labels != state.labels:
                    state.labels = labels or {}
                    state.schedule.wake()
                state.schedule.labels_read(state.clock(), answered=labels is not None)
        if changed:
            self.wake_loop()
