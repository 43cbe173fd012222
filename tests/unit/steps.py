"""A host whose plugin can be killed between any two steps.

`Steps` counts the steps of store and kernel and raises `Crash` at a chosen one. `Crash` is a
BaseException: like a kill -9, it runs none of the driver's handlers. Over a `restart`, `Machine`
keeps what a host keeps: files, and the kernel's objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from driver import names
from driver.driver import Driver, DriverConfig
from driver.errors import EngineError, KernelError
from driver.model import ArpFrame, Endpoint, EngineView, IPAddress, Network, NetworkView
from driver.ports import Inventory
from driver.recovery import Recovered, recover
from driver.store import Store


class Stored(NamedTuple):
    """The content of a store at one moment."""

    networks: list[Network]
    endpoints: list[Endpoint]
    allocations: list[Network]


def stored(driver: Driver) -> Stored:
    """What a driver has stored."""
    store = driver.store
    return Stored(store.networks(), store.endpoints(), store.allocations())


class Crash(BaseException):
    """The plugin has died."""


class Steps:
    """Counts steps. The plugin dies at step `crash_at`; 0 means never."""

    def __init__(self) -> None:
        self.done = 0
        self.crash_at = 0

    def __call__(self) -> None:
        self.done += 1
        if self.done == self.crash_at:
            raise Crash


class SteppedStore(Store):
    """The real store, with a step before and after each write."""

    def __init__(self, directory: Path, steps: Steps) -> None:
        super().__init__(directory)
        self._steps = steps

    def _around(self, method: str, *values: Any) -> None:
        self._steps()
        getattr(Store, method)(self, *values)
        self._steps()

    def put_network(self, network: Network) -> None:
        self._around("put_network", network)

    def delete_network(self, network_id: str) -> None:
        self._around("delete_network", network_id)

    def put_allocation(self, network: Network) -> None:
        self._around("put_allocation", network)

    def delete_allocation(self, network_id: str) -> None:
        self._around("delete_allocation", network_id)

    def put_endpoint(self, endpoint: Endpoint) -> None:
        self._around("put_endpoint", endpoint)

    def delete_endpoint(self, endpoint_id: str) -> None:
        self._around("delete_endpoint", endpoint_id)

    def clear_endpoints(self) -> None:
        self._around("clear_endpoints")

    def put_fact(self, key: str, value: str) -> None:
        self._around("put_fact", key, value)


class SteppedKernel:
    """A kernel of objects by short ID, made and removed in the real kernel's order, with a step
    between any two.

    `failing` names endpoints (short ID) whose veth cannot be made.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.filters: dict[str, Endpoint] = {}
        self.bridges: set[str] = set()
        self.vxlans: set[str] = set()
        self.veths: dict[str, str] = {}
        self.announced: list[str] = []
        self.failing: set[str] = set()

    def prepare(self) -> None:
        self.steps()

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        short, link = names.short(endpoint.id), names.short(network.id)
        self.steps()
        self.filters[short] = endpoint
        self.steps()
        self.bridges.add(link)
        self.steps()
        if network.overlay:
            self.vxlans.add(link)
            self.steps()
        if short in self.failing:
            raise KernelError(f"making veth pair {names.host_veth(endpoint.id)}: no memory")
        self.veths[short] = link
        self.steps()

    def detach(self, network_id: str, endpoint_id: str) -> None:
        del network_id
        self.steps()
        self.veths.pop(names.short(endpoint_id), None)
        self.steps()
        self.filters.pop(names.short(endpoint_id), None)
        self.steps()

    def remove_network(self, network_id: str) -> None:
        self.steps()
        self.vxlans.discard(names.short(network_id))
        self.steps()
        self.bridges.discard(names.short(network_id))
        self.steps()

    def set_peers(self, network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        del network_id, peers
        return frozenset()

    def announce(
        self, network_id: str, endpoints: Iterable[Endpoint], *, again: bool = False
    ) -> None:
        del network_id, again
        self.steps()
        self.announced += [endpoint.id for endpoint in endpoints]

    def hear(self, seconds: float) -> frozenset[ArpFrame]:
        return frozenset()

    def inventory(self) -> Inventory:
        return Inventory(
            networks=frozenset(self.bridges | self.vxlans),
            endpoints=frozenset(self.veths),
            filters=frozenset(self.filters) - frozenset(self.veths),
        )

    def underlay_mtu(self, *, encrypted: bool = False) -> int:
        return 1450

    def cleanup(self) -> list[str]:
        return []

    def namespace_dies(self, endpoint_id: str) -> None:
        """Remove a container's namespace, and its veth pair with it; the filter stays."""
        self.veths.pop(names.short(endpoint_id), None)

    def reboot(self) -> None:
        """Assert that nothing is left."""
        self.filters.clear()
        self.bridges.clear()
        self.vxlans.clear()
        self.veths.clear()

    @property
    def empty(self) -> bool:
        return not (self.filters or self.bridges or self.vxlans or self.veths)


class FakeDirectory:
    """An engine that lists `views` and the `sandboxes` of its containers; if it is `down`, it does
    not answer.
    """

    def __init__(self) -> None:
        self.views: dict[str, NetworkView] = {}
        self.sandboxes: dict[str, str] = {}
        self.down = False

    def sandbox_key(self, container_id: str) -> str | None:
        return self.sandboxes.get(container_id)

    def engine(self) -> EngineView:
        raise EngineError("not asked in these tests")

    def networks(self) -> frozenset[str]:
        if self.down:
            raise EngineError("GET /networks: connection refused")
        return frozenset(self.views)

    def labels(self, key: str, *, manager: bool) -> dict[str, str]:
        del key, manager
        return {}

    def changed_containers(self) -> Iterator[str]:
        return iter(())

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        if self.down:
            raise EngineError("GET /networks: connection refused")
        return self.views.get(network_id)


class Machine:
    """A host with files and a kernel; `driver` is the plugin that runs on it now."""

    def __init__(self, directory: Path, config: DriverConfig | None = None) -> None:
        self.directory = directory
        self.config = config or DriverConfig()
        self.steps = Steps()
        self.kernel = SteppedKernel(self.steps)
        self.boot_id = "boot-1"
        self.now = 1000.0
        self.wakes = 0
        self.joined: list[str] = []
        self.store: SteppedStore | None = None
        self.next_crash = 0
        self.driver: Driver
        self.restart()

    def restart(self) -> Recovered:
        """Kill the plugin if it still runs, and start it; it dies again at step `next_crash` unless
        that is 0.
        """
        if self.store is not None:
            self.store.close()
        self.steps.crash_at = 0
        if self.next_crash:
            self.crash_in(self.next_crash)
        self.store = SteppedStore(self.directory, self.steps)
        self.driver = Driver(self.store, self.kernel, self.config, clock=lambda: self.now)
        self.driver.on_change(self._wake, lambda endpoint: self.joined.append(endpoint.id))
        return recover(self.driver, self.boot_id)

    def reboot(self) -> Recovered:
        self.kernel.reboot()
        self.boot_id += "+"
        return self.restart()

    def lose_state(self) -> None:
        """Remove the files; this takes effect at the next start."""
        assert self.store is not None
        self.store.close()
        self.store = None
        for file in self.directory.iterdir():
            file.unlink()

    def crash_in(self, steps: int) -> None:
        self.steps.crash_at = self.steps.done + steps

    def _wake(self) -> None:
        self.wakes += 1

    def consistent(self) -> None:
        """Assert that kernel and store agree, as they must after every start and between any two
        calls.
        """
        assert self.store is not None
        rows = self.store.endpoints()
        shorts = {names.short(row.id) for row in rows}
        links = {names.short(row.network_id) for row in rows}
        assert set(self.kernel.veths) == shorts
        assert set(self.kernel.filters) == shorts
        assert self.kernel.bridges == links
        assert self.kernel.vxlans == links
        for row in rows:
            assert self.kernel.veths[names.short(row.id)] == names.short(row.network_id)
            assert self.store.network(row.network_id) is not None

    def nothing_left(self) -> None:
        """Assert that neither kernel nor store has anything of FreeFlow."""
        assert self.store is not None
        assert self.kernel.empty
        assert not self.store.networks()
        assert not self.store.endpoints()
        assert not self.store.allocations()
