"""Starting is recovering: what was promised, what the kernel has and what Docker says are made one again.

`recover` runs before the first request is served and needs only store and kernel. `Collector` runs in the background and
asks Docker, since teardown calls are made once and never repeated, and since the store may have been lost:

    row   link   Docker lists it
    yes   no     -     the container's namespace is gone, or was never promised: drop the row           recover
    yes   yes    yes   alive: make again what its network lacks                                         recover
    yes   yes    no    its end went past us: remove, after the grace time                               collect
    no    yes    yes   the store was lost: learn it again                                               collect
    no    yes    no    nobody's: remove, after the grace time                                           collect

Nothing is removed that may be alive: if Docker can't be asked, everything stays.
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
"""Seconds for which an endpoint may be unknown to the engine: one that is being started isn't listed yet."""
_BOOT_ID: Final = "boot_id"
_LASTING_SCOPES: Final = ("local", "global")


@dataclass(slots=True)
class Recovered:
    """What a pass changed, for log, status and metrics."""

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
        return any(
            (
                self.endpoints_forgotten,
                self.endpoints_adopted,
                self.orphans_removed,
                self.networks_forgotten,
                self.networks_restored,
                self.failures,
            )
        )


def _unclaimed(driver: Driver) -> frozenset[str]:
    """Short IDs of endpoints with a link but no row. The kernel is asked first: a row is there before its link."""
    present = driver.kernel.inventory()
    return present.endpoints - {names.short(item.id) for item in driver.store.endpoints()}


def recover(driver: Driver, boot_id: str) -> Recovered:
    """Make store and kernel agree. `boot_id` is /proc/sys/kernel/random/boot_id: a new one means that no container lives.

    One network that can't be repaired doesn't keep the others from it: see `failures`.

    Raises:
        KernelError, StateError: nothing can be done; the plugin then serves requests, each of which will say why.
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
                # Its network's row was lost: from here on like an endpoint whose own row was lost.
                store.delete_endpoint(endpoint.id)
            else:
                kernel.attach(network, endpoint)
                result.endpoints_repaired.append(endpoint.id)
        except KernelError as error:
            result.failures.append(f"endpoint {endpoint.id}: {error}")
    unclaimed = _unclaimed(driver)
    # Whose network they use isn't known before Docker is asked: no network's links may go until then.
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


class Collector:
    """Removes what Docker no longer knows, and learns again what we no longer know.

    `clock` in seconds, any origin; `grace` in seconds.
    """

    def __init__(
        self,
        driver: Driver,
        directory: Directory,
        clock: Callable[[], float],
        grace: float = GRACE,
    ) -> None:
        self._driver = driver
        self._directory = directory
        self._clock = clock
        self._grace = grace
        self._missing_since: dict[str, float] = {}
        self._still_missing: set[str] = set()

    def collect(self) -> Recovered:
        """One pass.

        Raises:
            EngineError: Docker can't be asked; nothing was removed.
        """
        result = Recovered()
        driver = self._driver
        unclaimed = _unclaimed(driver)
        # All is read before anything is judged: half an answer is none.
        listed = self._directory.networks()
        asked = ((network_id, self._directory.network(network_id)) for network_id in sorted(listed))
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
        """Whether this has been missing at every pass for the grace time."""
        self._still_missing.add(key)
        now = self._clock()
        return now - self._missing_since.setdefault(key, now) >= (
            self._grace if grace is None else grace
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
        if self._driver.store.network(view.id) is None:
            # What Swarm brings to a host comes with CreateNetwork when it is needed; other networks came only once.
            if not lost and view.scope not in _LASTING_SCOPES:
                return
            self._driver.restore_network(view)
            result.networks_restored.append(view.id)
        for container in lost:
            key = container.sandbox_key or self._directory.sandbox_key(container.id)
            self._driver.adopt(view.id, replace(container, sandbox_key=key))
            result.endpoints_adopted.append(container.endpoint_id)

    def _forget(self, network_id: str, view: NetworkView | None, result: Recovered) -> None:
        driver = self._driver
        listed = {item.endpoint_id for item in view.containers} if view else set()
        # A veth pair goes with its container's namespace: without it the container is dead, or not yet made.
        living = driver.kernel.inventory().endpoints
        for endpoint in driver.store.endpoints(network_id):
            grace = self._grace if names.short(endpoint.id) in living else self._grace / 6
            if endpoint.id not in listed and self._overdue(endpoint.id, grace):
                driver.delete_endpoint(network_id, endpoint.id)
                result.endpoints_forgotten.append(endpoint.id)
        unused = view is None and not driver.store.has_endpoints(network_id)
        if unused and self._overdue(network_id) and driver.forget_network(network_id):
            result.networks_forgotten.append(network_id)

    def _remove_orphans(self, alive: set[str], result: Recovered) -> None:
        driver = self._driver
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
