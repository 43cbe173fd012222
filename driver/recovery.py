"""Recovery: makes store, kernel and Docker agree again, at the start and while running.

`recover` runs before the first request is served and needs only store and kernel. `Collector` runs
in the background and asks Docker: Docker never repeats a teardown call that was lost, and the store
may have been lost.

    row   link   Docker lists it
    yes   no     -     the container's namespace is gone or was never made: drop the row    recover
    yes   yes    yes   alive: repair its links                                              recover
    yes   yes    no    the call that deleted it was lost: remove it after the grace time    collect
    no    yes    yes   the store was lost: store it again                                   collect
    no    yes    no    an orphan: remove it after the grace time                            collect

Nothing is removed that may be alive: if Docker doesn't answer, everything stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Final

import structlog

from driver import names
from driver.driver import Driver
from driver.errors import Conflict, EngineError, InvalidRequest, KernelError, NotFound
from driver.model import NetworkView
from driver.ports import Directory

log = structlog.get_logger()

GRACE: Final = 120.0
"""Seconds for which the engine may not list an endpoint: it lists none whose container is
starting."""
_BOOT_ID: Final = "boot_id"
_LASTING_SCOPES: Final = ("local", "global")


@dataclass(slots=True)
class Recovered:
    """The changes of one pass, for log, status and metrics."""

    rebooted: bool = False
    endpoints_forgotten: list[str] = field(default_factory=list)
    endpoints_repaired: list[str] = field(default_factory=list)
    endpoints_adopted: list[str] = field(default_factory=list)
    orphans_removed: list[str] = field(default_factory=list)
    networks_forgotten: list[str] = field(default_factory=list)
    networks_restored: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        unchanged = {"rebooted", "endpoints_repaired"}
        return any(value for name, value in asdict(self).items() if name not in unchanged)


def _unclaimed(driver: Driver) -> frozenset[str]:
    """Short IDs of endpoints with a link but no row. The kernel is read first: rows precede
    links."""
    present = driver.kernel.inventory()
    return present.endpoints - {names.short(item.id) for item in driver.store.endpoints()}


def recover(driver: Driver, boot_id: str) -> Recovered:
    """Make store and kernel agree.

    `boot_id` is /proc/sys/kernel/random/boot_id: if it is new, no container is alive. A network
    that can't be repaired is added to `failures`; the others are repaired.

    Raises:
        KernelError, StateError: nothing was repaired. The plugin serves requests all the same, and
            each of them reports why.
    """
    result = Recovered()
    store, kernel = driver.store, driver.kernel
    before = store.fact(_BOOT_ID)
    if before != boot_id:
        result.rebooted = before is not None
        result.endpoints_forgotten = [endpoint.id for endpoint in store.endpoints()]
        store.clear_endpoints()
        store.put_fact(_BOOT_ID, boot_id)
    kernel.prepare()
    present = kernel.inventory()
    networks = {network.id: network for network in store.networks()}
    for endpoint in store.endpoints():
        network = networks.get(endpoint.network_id)
        try:
            if names.short(endpoint.id) not in present.endpoints:
                kernel.detach(endpoint.network_id, endpoint.id)
                store.delete_endpoint(endpoint.id)
                result.endpoints_forgotten.append(endpoint.id)
            elif network is None:
                # Its network's row was lost: treated from here on as if its own row were lost.
                store.delete_endpoint(endpoint.id)
            else:
                kernel.attach(network, endpoint)
                result.endpoints_repaired.append(endpoint.id)
        except KernelError as error:
            result.failures.append(f"endpoint {endpoint.id}: {error}")
    unclaimed = _unclaimed(driver)
    # Only Docker knows which network they use: no network's links may go before it answers.
    driver.keep_links = bool(unclaimed)
    rows = {names.short(endpoint.id) for endpoint in store.endpoints()}
    for short_id in sorted(present.filters - rows):
        kernel.detach("", short_id)
        result.orphans_removed.append(short_id)
    if not unclaimed:
        used = {names.short(endpoint.network_id) for endpoint in store.endpoints()}
        for short_id in sorted(present.networks - used):
            kernel.remove_network(short_id)
            result.orphans_removed.append(short_id)
    log.info(
        "recovered",
        rebooted=result.rebooted,
        endpoints=len(result.endpoints_repaired),
        forgotten=len(result.endpoints_forgotten),
        unclaimed=len(unclaimed),
        failures=result.failures,
    )
    return result


@dataclass(slots=True, eq=False)
class Collector:
    """Removes what Docker no longer lists, and stores again what our store has lost.

    `clock` in seconds, any origin; `grace` in seconds.
    """

    driver: Driver
    directory: Directory
    clock: Callable[[], float]
    grace: float = GRACE
    _missing_since: dict[str, float] = field(default_factory=dict)
    _still_missing: set[str] = field(default_factory=set)

    def collect(self) -> Recovered:
        """One pass.

        Raises:
            EngineError: Docker doesn't answer; nothing was removed.
        """
        result = Recovered()
        driver = self.driver
        unclaimed = _unclaimed(driver)
        # Everything is read before anything is removed: half an answer is worth nothing.
        listed = self.directory.networks()
        asked = ((network_id, self.directory.network(network_id)) for network_id in sorted(listed))
        views = {network_id: view for network_id, view in asked if view is not None}
        self._still_missing = set()
        for network_id, view in views.items():
            self._try(result, network_id, partial(self._restore, view, unclaimed, result))
        for network in driver.store.networks():
            self._try(
                result,
                network.id,
                partial(self._forget, network.id, views.get(network.id), result),
            )
        for allocation in driver.store.allocations():
            if allocation.id not in listed and self._overdue("allocation " + allocation.id):
                driver.free_network(allocation.id)
        alive = {
            names.short(container.endpoint_id)
            for view in views.values()
            for container in view.containers
        }
        self._try(result, "links", partial(self._remove_orphans, alive, result))
        self._missing_since = {
            key: since for key, since in self._missing_since.items() if key in self._still_missing
        }
        if result.changed:
            log.info(
                "collected", **{name: value for name, value in asdict(result).items() if value}
            )
        return result

    def _overdue(self, key: str, grace: float | None = None) -> bool:
        """Whether `key` has been missing in each pass for the grace time."""
        self._still_missing.add(key)
        now = self.clock()
        return now - self._missing_since.setdefault(key, now) >= (
            self.grace if grace is None else grace
        )

    @staticmethod
    def _try(result: Recovered, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except (KernelError, Conflict, EngineError, InvalidRequest, NotFound) as error:
            # The next pass tries again.
            result.failures.append(f"{what}: {error}")

    def _restore(self, view: NetworkView, unclaimed: frozenset[str], result: Recovered) -> None:
        lost = [item for item in view.containers if names.short(item.endpoint_id) in unclaimed]
        if self.driver.store.network(view.id) is None:
            # For a Swarm's network Docker repeats CreateNetwork when it is needed, for others not.
            if not lost and view.scope not in _LASTING_SCOPES:
                return
            self.driver.create_network(
                view.id, view.options, view.subnets, ipv6=view.ipv6, internal=view.internal
            )
            result.networks_restored.append(view.id)
        for container in lost:
            key = container.sandbox_key or self.directory.sandbox_key(container.id)
            self.driver.adopt(view.id, replace(container, sandbox_key=key))
            result.endpoints_adopted.append(container.endpoint_id)

    def _forget(self, network_id: str, view: NetworkView | None, result: Recovered) -> None:
        driver = self.driver
        listed = {item.endpoint_id for item in view.containers} if view else set()
        # A veth pair goes with its container's namespace. Without it the container is dead or new.
        living = driver.kernel.inventory().endpoints
        for endpoint in driver.store.endpoints(network_id):
            grace = self.grace if names.short(endpoint.id) in living else self.grace / 6
            if endpoint.id not in listed and self._overdue(endpoint.id, grace):
                driver.delete_endpoint(network_id, endpoint.id)
                result.endpoints_forgotten.append(endpoint.id)
        unused = view is None and not driver.store.has_endpoints(network_id)
        if unused and self._overdue(network_id) and driver.forget_network(network_id):
            result.networks_forgotten.append(network_id)

    def _remove_orphans(self, alive: set[str], result: Recovered) -> None:
        driver = self.driver
        present = driver.kernel.inventory()
        rows = {names.short(endpoint.id) for endpoint in driver.store.endpoints()}
        for short_id in sorted((present.endpoints | present.filters) - rows - alive):
            if self._overdue(short_id):
                driver.kernel.detach("", short_id)
                result.orphans_removed.append(short_id)
        if _unclaimed(driver):
            return
        driver.keep_links = False
        used = {names.short(endpoint.network_id) for endpoint in driver.store.endpoints()}
        for short_id in sorted(present.networks - used):
            if driver.remove_links(short_id):
                result.orphans_removed.append(short_id)
