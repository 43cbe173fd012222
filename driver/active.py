"""Which tasks of a network's services take connections, by the DNS of whichever container on the network knows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver.members import NetworkState
from driver.model import NetworkView
from driver.ports import TaskResolver

ASKERS: Final = 3
"""So many containers of a network are asked at most."""
REST_AFTER: Final = 5.0
"""Seconds after which a service without active tasks isn't asked about again until its list changes. Asking would make
Docker's DNS ask outside, and a task that left doesn't come back: it is being stopped."""


class ActiveTasks:
    """Remembers which container knew the last answer. For one thread per network."""

    def __init__(self, resolver: TaskResolver, clock: Callable[[], float]) -> None:
        self._resolver = resolver
        self._clock = clock
        self._askers: dict[str, Path] = {}

    def forget(self, network_id: str) -> None:
        """The network has no endpoints here any more."""
        self._askers.pop(network_id, None)

    def ask(
        self, view: NetworkView, before: NetworkState, sandboxes: Collection[Path]
    ) -> dict[str, frozenset[IPv4Address]]:
        """By service name; see `ports.TaskResolver.tasks`. `sandboxes` are those on the network."""
        answers: dict[str, frozenset[IPv4Address]] = {}
        resting = before.resting(self._clock() - REST_AFTER)
        missing = []
        for service in view.services:
            if service in resting:
                answers[service.name] = frozenset()
            elif service.vip is not None:
                missing.append(service)
        for asker in self._in_order(view.id, sandboxes) if missing else ():
            found = self._resolver.tasks(asker, view.name, missing)
            if found:
                self._askers[view.id] = asker
            answers.update(found)
            missing = [service for service in missing if service.name not in found]
            if not missing:
                break
        return answers

    def _in_order(self, network_id: str, sandboxes: Collection[Path]) -> list[Path]:
        last = self._askers.get(network_id)
        # The last one that knew is asked first; the oldest sandboxes aren't better than others.
        ordered = sorted(sandboxes, key=lambda path: (path != last, path))
        return [path for path in ordered if path.exists()][:ASKERS]
