"""What the router of accelerated connections is told: endpoints, networks and VIPs of this host, whenever they change.

The whole truth each time, so a router that has just started is told no less. Nothing waits for it: who is away learns
later, and knows until then what it was told last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, Protocol, TypeVar

import structlog
from msgspec.structs import replace

from dataplane.control import (
    Connections,
    EndpointFact,
    NetworkFact,
    PathCounts,
    RouterSettings,
    RouterSnapshot,
    Rule,
    Statistics,
)
from dataplane.errors import DataplaneError
from driver import options
from driver.errors import RouterError
from driver.kernel.namespace import is_namespace
from driver.model import Endpoint, IPAddress, Network
from driver.store import Store
from driver.vip_table import NetworkState

log = structlog.get_logger()

T = TypeVar("T")

GATHER: Final = 0.05
"""Seconds for which changes are gathered: many come together."""
REPEAT: Final = 30.0
"""Seconds after which the truth is looked at, whoever has forgotten to say that it changed."""
RETRY: Final = 0.1
AWAY: Final = 5.0
"""Seconds after which a router that doesn't answer is worth a line in the log."""
SANDBOX_RETRY: Final = 0.05
SANDBOX_PATIENCE: Final = 30.0
"""Docker up to 27 mounts a container's namespace some time after Join."""


class Router(Protocol):
    """See `dataplane.router_client.RouterClient`. All raise DataplaneError."""

    def replace_snapshot(self, facts: RouterSnapshot) -> None: ...

    def statistics(self) -> Statistics: ...

    def connections(self, namespace: int | None = None) -> Connections: ...

    def paths(self) -> PathCounts: ...


class Sandboxes(Protocol):
    """See `driver.sync.Syncer`."""

    def sandbox(self, endpoint: Endpoint) -> Path | None: ...

    def state(self) -> dict[str, NetworkState]: ...


@dataclass(frozen=True, slots=True)
class Self:
    """This host. Docker may advertise one address and have the overlay on another (`--data-path-addr`): `underlay`."""

    addresses: frozenset[IPAddress] = frozenset()
    underlay: IPAddress | None = None


def inode_of(sandbox: Path) -> int | None:
    """A namespace's number; None if there is none at this path yet, or any more."""
    try:
        return sandbox.stat().st_ino if is_namespace(sandbox) else None
    except OSError:
        return None


def facts(
    networks: Iterable[Network],
    endpoints: Iterable[Endpoint],
    states: Mapping[str, NetworkState],
    homes: Mapping[str, tuple[Path, int]],
    settings: RouterSettings,
    own: Self | None = None,
) -> RouterSnapshot:
    """What is true. `homes`: where each endpoint's namespace is, and its inode; those without are left out."""
    own = own or Self()
    names = {
        item.endpoint_id: item.name
        for state in states.values()
        if state.view is not None
        for item in state.view.containers
    }
    here = sorted((each for each in endpoints if each.id in homes), key=lambda each: each.id)
    used = {endpoint.network_id for endpoint in here}
    return RouterSnapshot(
        endpoints=tuple(
            EndpointFact(
                id=endpoint.id,
                network=endpoint.network_id,
                addresses=tuple(
                    str(each.ip) for each in (endpoint.ipv4, endpoint.ipv6) if each is not None
                ),
                namespace=homes[endpoint.id][1],
                path=str(homes[endpoint.id][0]),
                container=names.get(endpoint.id, ""),
            )
            for endpoint in here
        ),
        networks=tuple(
            _network(network, states.get(network.id, NetworkState()), settings.rule, own)
            for network in sorted(networks, key=lambda each: each.id)
            if network.id in used
        ),
        settings=settings,
        underlay="" if own.underlay is None else str(own.underlay),
    )


def _network(network: Network, state: NetworkState, rule: Rule, own: Self) -> NetworkFact:
    operations = options.upgrade_operations(network.options)
    subnets = [str(subnet.pool) for subnet in network.subnets]
    if network.ipv6:
        subnets.append(str(network.prefix6))
    return NetworkFact(
        id=network.id,
        name=state.view.name if state.view is not None else "",
        acceleration=network.acceleration,
        rdma=options.rdma(network.options),
        subnets=tuple(dict.fromkeys(subnets)),
        vips={
            str(vip): tuple(map(str, sorted(tasks)))
            for vip, tasks in sorted(_tasks(state).items())
            if tasks
        },
        rule=None if operations is None else replace(rule, operations=operations),
        peers=_peers(state, own),
    )


def _peers(state: NetworkState, own: Self) -> tuple[str, ...]:
    """The other hosts. None while nothing says which of them is this one."""
    if state.view is None or not own.addresses:
        return ()
    others = {peer.address for peer in state.view.peers} - own.addresses
    return tuple(sorted(map(str, others)))


def _tasks(state: NetworkState) -> dict[IPv4Address, set[IPv4Address]]:
    """By VIP. A task that takes no new connections still has old ones."""
    found = {vip: set(tasks) for vip, tasks in state.table.items()}
    for service in state.view.services if state.view is not None else ():
        if service.vip is not None:
            found.setdefault(service.vip, set()).update(task.address for task in service.tasks)
    return found


class Accelerator:
    """Tells the router, and asks it. `router` may be away at any time."""

    def __init__(
        self,
        store: Store,
        sandboxes: Sandboxes,
        router: Router,
        settings: RouterSettings,
        clock: Callable[[], float] = time.monotonic,
        inode: Callable[[Path], int | None] = inode_of,
        own: Callable[[], Self] = Self,
    ) -> None:
        self._store = store
        self._sandboxes = sandboxes
        self._router = router
        self._settings = settings
        self._clock = clock
        self._inode = inode
        self._own = own
        self._told: RouterSnapshot | None = None
        self._told_at = float("-inf")
        self._anew = False
        self._missing: dict[str, float] = {}
        """Endpoints whose namespace isn't there, and until when it is waited for."""
        self._failing: float | None = None
        self._complained = False
        self._woken = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    # --- telling

    def wake(self) -> None:
        """Something may have changed."""
        self._woken.set()

    def router_started(self) -> None:
        """A new router knows nothing."""
        self._anew = True
        self._woken.set()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="accelerator", daemon=True)
        self._woken.set()
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._woken.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        pause = 0.0
        while not self._stopped.is_set():
            if self._woken.wait(pause):
                self._stopped.wait(GATHER)
            try:
                pause = self.once()
            except Exception:
                # Whatever one look meets, the next starts from facts again.
                log.exception("the router isn't told")
                pause = AWAY

    def once(self) -> float:
        """Tell the router what it doesn't know; returns for how long there will be nothing, unless woken."""
        self._woken.clear()
        anew, self._anew = self._anew, False
        now = self._clock()
        known = self._look(now)
        # Now and then in any case: a router may have told us of its start before another's end.
        if anew or known != self._told or now - self._told_at >= REPEAT:
            try:
                self._router.replace_snapshot(known)
            except DataplaneError as error:
                self._failed(now, error)
                return RETRY
            self._told, self._told_at = known, now
        if self._complained:
            log.info("the router answers again")
        self._failing, self._complained = None, False
        return SANDBOX_RETRY if any(until > now for until in self._missing.values()) else REPEAT

    def _failed(self, now: float, error: DataplaneError) -> None:
        self._told = None
        if self._failing is None:
            self._failing = now
        elif now - self._failing > AWAY and not self._complained:
            self._complained = True
            log.warning("the router doesn't answer; connections stay on TCP", reason=str(error))

    def _look(self, now: float) -> RouterSnapshot:
        homes: dict[str, tuple[Path, int]] = {}
        missing: dict[str, float] = {}
        endpoints = list(self._store.endpoints())
        for endpoint in endpoints:
            path = self._sandboxes.sandbox(endpoint)
            if path is None:
                continue
            inode = self._inode(path)
            if inode is None:
                missing[endpoint.id] = self._missing.get(endpoint.id, now + SANDBOX_PATIENCE)
            else:
                homes[endpoint.id] = (path, inode)
        self._missing = missing
        return facts(
            self._store.networks(),
            endpoints,
            self._sandboxes.state(),
            homes,
            self._settings,
            self._own(),
        )

    # --- asking

    def statistics(self) -> Statistics:
        """The router's counts. Raises RouterError."""
        return _answer(self._router.statistics)

    def connections(self) -> Connections:
        """Which path each connection takes. Raises RouterError."""
        return _answer(self._router.connections)

    def paths(self) -> PathCounts:
        """How many take which. Raises RouterError."""
        return _answer(self._router.paths)


def _answer(ask: Callable[[], T]) -> T:
    try:
        return ask()
    except DataplaneError as error:
        raise RouterError(f"{error}; journalctl -u docker | grep router says why") from error
