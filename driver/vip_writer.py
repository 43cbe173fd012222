"""Writes the VIP rules of a sandbox: those of all its networks together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from driver.errors import KernelError
from driver.ports import Balancer
from driver.sync_state import SyncState

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class VipWriter:
    """`changed` is called when a sandbox that was awaited is there."""

    state: SyncState
    balancer: Balancer
    changed: Callable[[], None]
    _errors: dict[Path, KernelError] = field(default_factory=dict)

    def errors(self) -> dict[Path, KernelError]:
        """Sandboxes whose rules could not be written, and why."""
        with self.state.lock:
            return dict(self._errors)

    def forget_others(self, alive: set[Path]) -> None:
        """Forget sandboxes that aren't in `alive`."""
        with self.state.lock:
            for path in self._errors.keys() - alive:
                del self._errors[path]
            in_use = self.state.schedule.forget_sandboxes(alive)
        self.balancer.forget(in_use)

    def write(self, path: Path) -> None:
        """Write what is known now, if enough is."""
        state = self.state
        with state.lock:
            table, choices = state.vip_table(path), state.choices(path)
        if table is None:
            return
        try:
            there = self.balancer.apply(path, table, choices)
        except KernelError as error:
            with state.lock:
                before = self._errors.get(path)
                is_new = before is None or str(before) != str(error)
                self._errors[path] = error
                state.schedule.awaited.pop(path, None)
            if is_new:
                log.error("VIP rules not written", sandbox=str(path), reason=str(error))
            return
        with state.lock:
            self._errors.pop(path, None)
            appeared = there and state.schedule.awaited.pop(path, None) is not None
        if appeared:
            self.changed()
