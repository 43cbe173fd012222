"""What hints that a network's services have changed, heard without asking: ARP on the network, events of the engine.

- Something here asks for an address that nobody has: it may be a VIP that has just been made. The answer comes before
  the connection's second packet does.
- An endpoint announces itself: it may be a new task. The host of a task announces it again when Docker has made it part
  of its service, so this reaches every host that shares the network.
- A container of this host starts or becomes healthy: Docker makes it part of its service then.

A hint is only a hint: what follows is read from the engine. Containers can make up hints, hence `RefreshBudget`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Final

import structlog

from driver import names
from driver.errors import EngineError, KernelError
from driver.kernel.arp import Heard
from driver.ports import Directory, Kernel
from driver.vip_table import NetworkState

log = structlog.get_logger()

SETTLE: Final = 0.05
"""Seconds of rest after what was heard, in which more may come: bounds the work that a flood of ARP makes."""
PATIENCE: Final = 1.0
"""Seconds for which is listened at a time."""
RETRY: Final = 2.0
"""Seconds after which the engine is asked for events again."""
FORGET: Final = 300.0
"""Seconds for which an address that nobody has is no news."""
MEMORY: Final = 4096
"""So many such addresses are remembered."""


class Hints:
    """Two threads that listen. `states` is what is known by network ID, `hint` is called with the ID of a network."""

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
        self._asked: dict[tuple[str, IPv4Address], float] = {}
        self._stop = threading.Event()

    def start(self) -> None:
        for body in (self._listen_to_arp, self._listen_to_engine):
            threading.Thread(target=body, name="hints", daemon=True).start()

    def stop(self) -> None:
        """The threads end with their present wait, or with the process."""
        self._stop.set()

    # --- ARP

    def _listen_to_arp(self) -> None:
        trouble = ""
        while not self._stop.is_set():
            try:
                heard = self._kernel.hear(PATIENCE)
                trouble = ""
            except KernelError as error:
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("ARP not heard, new services may be seen late", reason=trouble)
                heard = frozenset()
                self._stop.wait(PATIENCE)
            if heard:
                self.heard(heard)
                self._stop.wait(SETTLE)

    def heard(self, frames: frozenset[Heard]) -> None:
        """Hint at each network on which a frame is about an address that nobody is known to have."""
        states = {names.short(key): (key, state) for key, state in self._states().items()}
        now = self._clock()
        for short in {frame.network for frame in frames} & states.keys():
            network_id, state = states[short]
            known = known_addresses(state)
            about = [frame for frame in frames if frame.network == short]
            if any(self._is_news(network_id, frame, known, now) for frame in about):
                self._hint(network_id)

    def _is_news(
        self, network_id: str, frame: Heard, known: frozenset[IPv4Address], now: float
    ) -> bool:
        if frame.target in known:
            return False
        if frame.announcement:
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

    def _listen_to_engine(self) -> None:
        while not self._stop.is_set():
            try:
                for container_id in self._directory.changed_containers():
                    self.container_changed(container_id)
            except EngineError as error:
                # That the engine doesn't answer is said by the sync loop.
                log.debug("no events of the engine", reason=str(error))
            self._stop.wait(RETRY)

    def container_changed(self, container_id: str) -> None:
        """Hint at each network that the container is on."""
        for network_id, state in self._states().items():
            view = state.view
            if view is not None and any(item.id == container_id for item in view.containers):
                self._hint(network_id)


def known_addresses(state: NetworkState) -> frozenset[IPv4Address]:
    """All addresses on a network of which is known whose they are."""
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
