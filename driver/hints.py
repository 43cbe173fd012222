"""Hints that a network's services may have changed, from ARP on the network and the engine's
events.

- A container here requests an address that nobody has: a VIP that was just made, perhaps. The reply
  comes before the connection's second packet.
- An endpoint announces itself: a new task, perhaps. A task's host announces it again once Docker
  has added it to its service, so every host that shares the network gets this hint.
- A container of this host starts or becomes healthy: Docker adds it to its service then.

A hint is only a hint: the facts are read from the engine. Containers can forge hints, therefore
`RefreshBudget` limits their cost.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Final

import structlog

from driver import names
from driver.errors import EngineError, KernelError
from driver.model import ArpFrame
from driver.ports import Directory, Kernel
from driver.vip_table import NetworkState
from driver.worker import Worker

log = structlog.get_logger()

PAUSE: Final = 0.05
"""Seconds between two reads of ARP. Limits the work that a flood of ARP causes."""
PATIENCE: Final = 1.0
"""Seconds for which one read waits for ARP."""
RETRY: Final = 2.0
"""Seconds after which the engine is asked for events again."""
FORGET: Final = 300.0
"""Seconds for which further requests for an address that nobody has are no hints."""
MEMORY: Final = 4096
"""Number of such addresses that are remembered."""


class Hints:
    """Two threads: one reads ARP, one the engine's events.

    `states` are the networks' last known states by network ID; `hint` is called with the ID of a
    network whose services may have changed.
    """

    def __init__(
        self,
        kernel: Kernel,
        directory: Directory,
        states: Callable[[], dict[str, NetworkState]],
        hint: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._kernel = kernel
        self._directory = directory
        self._states = states
        self._hint = hint
        self._clock = clock
        self._failure = ""
        self._asked: dict[tuple[str, IPv4Address], float] = {}
        self._workers = (
            Worker("hints-arp", self._read_arp, retry=PATIENCE),
            Worker("hints-engine", self._read_events, retry=RETRY),
        )

    def start(self) -> None:
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """Ask the threads to end. Each does so after its present read, or with the process."""
        for worker in self._workers:
            worker.stop(wait=False)

    # --- ARP

    def _read_arp(self) -> float:
        try:
            frames = self._kernel.hear(PATIENCE)
            self._failure = ""
        except KernelError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                log.warning("no ARP is read, new services may be found late", reason=str(error))
            return PATIENCE
        if not frames:
            return 0.0
        self.heard(frames)
        return PAUSE

    def heard(self, frames: frozenset[ArpFrame]) -> None:
        """Hint at each network on which a frame names an address without a known owner."""
        states = {names.short(key): (key, state) for key, state in self._states().items()}
        now = self._clock()
        for short in {frame.network for frame in frames} & states.keys():
            network_id, state = states[short]
            known = known_addresses(state)
            about = [frame for frame in frames if frame.network == short]
            if any(self._is_hint(network_id, frame, known, now) for frame in about):
                self._hint(network_id)

    def _is_hint(
        self, network_id: str, frame: ArpFrame, known: frozenset[IPv4Address], now: float
    ) -> bool:
        if frame.target in known:
            return False
        if frame.is_announcement:
            return True
        key = (network_id, frame.target)
        asked = self._asked.pop(key, None)
        if asked is not None and now - asked < FORGET:
            self._asked[key] = asked
            return False
        self._asked[key] = now
        while len(self._asked) > MEMORY:
            del self._asked[next(iter(self._asked))]
        return True

    # --- the engine

    def _read_events(self) -> float:
        try:
            for container_id in self._directory.changed_containers():
                self.container_changed(container_id)
        except EngineError as error:
            # The sync loop reports that the engine doesn't answer.
            log.debug("no events of the engine", reason=str(error))
        return RETRY

    def container_changed(self, container_id: str) -> None:
        """Hint at each network that the container is on."""
        for network_id, state in self._states().items():
            view = state.view
            if view is not None and any(item.id == container_id for item in view.containers):
                self._hint(network_id)


def known_addresses(state: NetworkState) -> frozenset[IPv4Address]:
    """The addresses of a network whose owners are known."""
    view = state.view
    if view is None:
        return frozenset()
    found = set(state.table) | view.others
    for service in view.services:
        found |= {task.address for task in service.tasks}
        if service.vip is not None:
            found.add(service.vip)
    found |= {item.address.ip for item in view.containers if item.address is not None}
    for subnet in view.subnets:
        if subnet.gateway is not None and isinstance(subnet.gateway.ip, IPv4Address):
            found.add(subnet.gateway.ip)
    return frozenset(found)
