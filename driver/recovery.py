"""Starting is recovering: what was promised, what the kernel has and what Docker says are made one again.

`recover` runs before the first request is served and needs only store and kernel. `collect` runs in the background and
asks Docker: teardown calls are made once and never repeated, so what Docker doesn't list any more is removed. Nothing is
removed that may be alive: an endpoint must be unknown to the engine for a grace time, a network must be without endpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from driver import names
from driver.driver import Driver
from driver.model import Endpoint
from driver.ports import Directory

log = structlog.get_logger()

GRACE: Final = 60.0
"""Seconds for which an endpoint may be unknown to the engine: one that is being started isn't listed yet."""
_BOOT_ID: Final = "boot_id"


@dataclass(slots=True)
class Recovered:
    """What a pass changed, for log, status and metrics."""

    rebooted: bool = False
    endpoints_forgotten: list[str] = field(default_factory=list)
    endpoints_repaired: list[str] = field(default_factory=list)
    orphans_removed: list[str] = field(default_factory=list)
    networks_forgotten: list[str] = field(default_factory=list)


def recover(driver: Driver, boot_id: str) -> Recovered:
    """Make store and kernel agree. `boot_id` is /proc/sys/kernel/random/boot_id: a new one means that no container lives.

    Raises:
        KernelError: the kernel refused; the plugin then serves requests, each of which will say why.
    """
    result = Recovered()
    store, kernel = driver.store, driver.kernel
    result.rebooted = store.fact(_BOOT_ID) != boot_id
    if result.rebooted:
        result.endpoints_forgotten = [endpoint.id for endpoint in store.endpoints()]
        store.clear_endpoints()
        store.put_fact(_BOOT_ID, boot_id)
    kernel.prepare()
    present = kernel.inventory()
    networks = {network.id: network for network in store.networks()}
    for endpoint in store.endpoints():
        network = networks.get(endpoint.network_id)
        if network is None or names.short(endpoint.id) not in present.endpoints:
            # Its veth is gone, and with it the container's namespace; or the crash was before it was made.
            kernel.detach(endpoint.network_id, endpoint.id)
            store.delete_endpoint(endpoint.id)
            result.endpoints_forgotten.append(endpoint.id)
        else:
            kernel.attach(network, endpoint)
            result.endpoints_repaired.append(endpoint.id)
    log.info(
        "recovered",
        rebooted=result.rebooted,
        endpoints=len(result.endpoints_repaired),
        forgotten=len(result.endpoints_forgotten),
    )
    return result


class Collector:
    """Removes what Docker no longer knows; `clock` in seconds, any origin."""

    def __init__(self, driver: Driver, directory: Directory, clock: Callable[[], float]) -> None:
        self._driver = driver
        self._directory = directory
        self._clock = clock
        self._missing_since: dict[str, float] = {}

    def collect(self) -> Recovered:
        """One pass.

        Raises:
            EngineError: Docker can't be asked; nothing was removed.
        """
        result = Recovered()
        now = self._clock()
        listed = self._directory.networks()
        still_missing: set[str] = set()
        for network in self._driver.store.networks():
            view = self._directory.network(network.id) if network.id in listed else None
            known = {container.endpoint_id for container in view.containers} if view else set()
            for endpoint in self._driver.store.endpoints(network.id):
                if endpoint.id in known:
                    continue
                still_missing.add(endpoint.id)
                if self._overdue(endpoint.id, now):
                    self._remove(endpoint)
                    result.endpoints_forgotten.append(endpoint.id)
            if view is None and not self._driver.store.endpoints(network.id):
                still_missing.add(network.id)
                if self._overdue(network.id, now):
                    self._driver.delete_network(network.id)
                    result.networks_forgotten.append(network.id)
        self._orphans(now, still_missing, result)
        self._missing_since = {
            key: since for key, since in self._missing_since.items() if key in still_missing
        }
        return result

    def _overdue(self, key: str, now: float) -> bool:
        return now - self._missing_since.setdefault(key, now) >= GRACE

    def _remove(self, endpoint: Endpoint) -> None:
        log.info("endpoint is unknown to Docker, removed", endpoint=endpoint.id)
        self._driver.delete_endpoint(endpoint.network_id, endpoint.id)

    def _orphans(self, now: float, still_missing: set[str], result: Recovered) -> None:
        """Links without a row: the state was lost. The engine's word decides whether a container lives on them."""
        present = self._driver.kernel.inventory()
        rows = {names.short(endpoint.id) for endpoint in self._driver.store.endpoints()}
        orphans = present.endpoints - rows
        if orphans:
            listed = {
                names.short(container.endpoint_id)
                for network_id in self._directory.networks()
                if (view := self._directory.network(network_id)) is not None
                for container in view.containers
            }
            for short_id in orphans - listed:
                still_missing.add(short_id)
                if self._overdue(short_id, now):
                    self._driver.kernel.detach("", short_id)
                    result.orphans_removed.append(short_id)
        used = {names.short(e.network_id) for e in self._driver.store.endpoints()}
        if orphans - set(result.orphans_removed):
            return
        for short_id in present.networks - used:
            still_missing.add("network " + short_id)
            if self._overdue("network " + short_id, now):
                self._driver.kernel.remove_network(short_id)
                result.orphans_removed.append(short_id)
