"""Tells the router of accelerated connections about this host: endpoints, networks and VIPs.

Each message is a full snapshot, so a router that has just started gets everything. Nobody waits for
the router. While it doesn't answer, it works with the last snapshot that it received.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, Protocol

import structlog
from msgspec.structs import replace

from dataplane.control import (
    EncryptionKeys,
    EndpointFact,
    NetworkFact,
    RouterSettings,
    RouterSnapshot,
    Rule,
)
from dataplane.errors import DataplaneError
from driver import options
from driver.kernel.namespace import is_namespace
from driver.model import Endpoint, IPAddress, Network
from driver.other_networks import OtherNetwork, other_hosts, with_others
from driver.store import Store
from driver.vip_table import NetworkState
from driver.worker import Worker

log = structlog.get_logger()

GATHER: Final = 0.05
"""Seconds for which changes are collected: many come together."""
REPEAT: Final = 30.0
"""Seconds after which the snapshot is sent again, in case a change didn't call `wake`."""
RETRY: Final = 0.1
AWAY: Final = 5.0
"""Seconds after which a router that doesn't answer is logged."""
SANDBOX_RETRY: Final = 0.05
SANDBOX_PATIENCE: Final = 30.0
"""Docker up to 27 mounts a container's namespace some time after Join."""


class Router(Protocol):
    """Implemented by `dataplane.router_client.RouterClient`. Raises DataplaneError."""

    def replace_snapshot(self, facts: RouterSnapshot) -> None: ...


class Sandboxes(Protocol):
    """Implemented by `driver.sync.Syncer`."""

    def sandbox(self, endpoint: Endpoint) -> Path | None: ...

    def state(self) -> dict[str, NetworkState]: ...


@dataclass(frozen=True, slots=True)
class ThisHost:
    """Addresses by which other hosts know this one, and the one that its overlay sends from.

    The two differ where Docker advertises one address and has the overlay on another
    (`--data-path-addr`).
    """

    addresses: frozenset[IPAddress] = frozenset()
    underlay: IPAddress | None = None
    tunnel_offload: bool | None = None
    """Whether the underlay's device segments UDP tunnels; None: unknown."""


def inode_of(sandbox: Path) -> int | None:
    """The inode of a namespace; None if no namespace is mounted at this path."""
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
    own: ThisHost | None = None,
    *,
    rdma_encrypted: bool = False,
) -> RouterSnapshot:
    """The snapshot. `homes`: path and inode of each endpoint's namespace; endpoints without are
    left out."""
    own = own or ThisHost()
    names = {
        item.endpoint_id: item.name
        for state in states.values()
        if state.view is not None
        for item in state.view.containers
    }
    here = sorted((item for item in endpoints if item.id in homes), key=lambda item: item.id)
    used = {endpoint.network_id for endpoint in here}
    return RouterSnapshot(
        endpoints=tuple(
            EndpointFact(
                id=endpoint.id,
                network=endpoint.network_id,
                addresses=tuple(
                    str(item.ip) for item in (endpoint.ipv4, endpoint.ipv6) if item is not None
                ),
                namespace=homes[endpoint.id][1],
                path=str(homes[endpoint.id][0]),
                container=names.get(endpoint.id, ""),
            )
            for endpoint in here
        ),
        networks=tuple(
            _network(
                network,
                states.get(network.id, NetworkState()),
                settings.rule,
                own,
                rdma_encrypted=rdma_encrypted,
            )
            for network in sorted(networks, key=lambda item: item.id)
            if network.id in used
        ),
        settings=settings,
        underlay="" if own.underlay is None else str(own.underlay),
        tunnel_offload=own.tunnel_offload,
    )


def _network(
    network: Network, state: NetworkState, rule: Rule, own: ThisHost, *, rdma_encrypted: bool
) -> NetworkFact:
    operations = options.upgrade_operations(network.options)
    subnets = [str(subnet.pool) for subnet in network.subnets]
    if network.ipv6:
        subnets.append(str(network.prefix6))
    return NetworkFact(
        id=network.id,
        name=state.view.name if state.view is not None else "",
        acceleration=network.acceleration,
        rdma=options.rdma(network.options) and (rdma_encrypted or not network.encrypted),
        encrypted=network.encrypted,
        relay=options.relay(network.options),
        verbs=options.verbs(network.options),
        verbs_direct=options.verbs_direct(network.options),
        subnets=tuple(dict.fromkeys(subnets)),
        vips={
            str(vip): tuple(map(str, sorted(tasks)))
            for vip, tasks in sorted(_tasks(state).items())
            if tasks
        },
        rule=None if operations is None else replace(rule, operations=operations),
        peers=_peers(state, own),
    )


def _peers(state: NetworkState, own: ThisHost) -> tuple[str, ...]:
    view = state.view
    return () if view is None else tuple(sorted(map(str, other_hosts(view, own.addresses))))


def _tasks(state: NetworkState) -> dict[IPv4Address, set[IPv4Address]]:
    """All tasks of each VIP: one that takes no new connections may still have old ones."""
    found = {vip: set(tasks) for vip, tasks in state.table.items()}
    for service in state.view.services if state.view is not None else ():
        if service.vip is not None:
            found.setdefault(service.vip, set()).update(task.address for task in service.tasks)
    return found


class Accelerator:
    """Sends snapshots to the router. `router` may be unreachable at any time."""

    def __init__(
        self,
        store: Store,
        sandboxes: Sandboxes,
        router: Router,
        settings: RouterSettings,
        clock: Callable[[], float] = time.monotonic,
        inode: Callable[[Path], int | None] = inode_of,
        own: Callable[[], ThisHost] = ThisHost,
        others: Callable[[], Sequence[OtherNetwork]] = tuple,
        expected: Callable[[], tuple[str, ...]] = tuple,
        encryption: Callable[[], EncryptionKeys | None] = lambda: None,
        *,
        rdma_encrypted: bool = False,
    ) -> None:
        """`others`: accelerated networks of other drivers; `expected`: the subnets of those, or of
        all while they aren't known. `encryption`: this host's public keys.
        `rdma_encrypted`: the user says that the cards encrypt, so RDMA may serve encrypted
        networks."""
        self._store = store
        self._sandboxes = sandboxes
        self._router = router
        self._settings = settings
        self._clock = clock
        self._inode = inode
        self._own = own
        self._others = others
        self._expected = expected
        self._encryption = encryption
        self._rdma_encrypted = rdma_encrypted
        self._sent: RouterSnapshot | None = None
        self._sent_at = float("-inf")
        self._send_again = False
        self._missing: dict[str, float] = {}
        """Endpoints whose namespace isn't there, each with the time until which it is awaited."""
        self._failing: float | None = None
        self._logged = False
        self._woken = threading.Event()
        self._worker = Worker(
            "accelerator", self.once, retry=AWAY, sleep=self._sleep, wake=self._woken.set
        )

    def wake(self) -> None:
        """Send a snapshot soon: something may have changed."""
        self._woken.set()

    def router_started(self) -> None:
        """Send a snapshot to a new router, whatever the earlier one has received."""
        self._send_again = True
        self._woken.set()

    def start(self) -> None:
        self._woken.set()
        self._worker.start(after=GATHER)

    def stop(self) -> None:
        self._worker.stop()

    def _sleep(self, seconds: float) -> None:
        if self._woken.wait(seconds):
            self._worker.stopped.wait(GATHER)

    def once(self) -> float:
        """Send a snapshot if it differs from the last; returns the seconds until the next check."""
        self._woken.clear()
        again, self._send_again = self._send_again, False
        now = self._clock()
        known = self._snapshot(now)
        # Regularly in any case: `router_started` may have come before the earlier router's end.
        if again or known != self._sent or now - self._sent_at >= REPEAT:
            try:
                self._router.replace_snapshot(known)
            except DataplaneError as error:
                self._failed(now, error)
                return RETRY
            self._sent, self._sent_at = known, now
        if self._logged:
            log.info("the router answers again")
        self._failing, self._logged = None, False
        return SANDBOX_RETRY if any(until > now for until in self._missing.values()) else REPEAT

    def _failed(self, now: float, error: DataplaneError) -> None:
        self._sent = None
        if self._failing is None:
            self._failing = now
        elif now - self._failing > AWAY and not self._logged:
            self._logged = True
            log.warning("the router does not answer; connections stay on TCP", reason=str(error))

    def _snapshot(self, now: float) -> RouterSnapshot:
        homes: dict[str, tuple[Path, int]] = {}
        missing: dict[str, float] = {}

        def look(endpoint_id: str, path: Path) -> int | None:
            inode = self._inode(path)
            if inode is None:
                missing[endpoint_id] = self._missing.get(endpoint_id, now + SANDBOX_PATIENCE)
            return inode

        endpoints = list(self._store.endpoints())
        for endpoint in endpoints:
            path = self._sandboxes.sandbox(endpoint)
            if path is not None and (inode := look(endpoint.id, path)) is not None:
                homes[endpoint.id] = (path, inode)
        host = self._own()
        own = facts(
            self._store.networks(),
            endpoints,
            self._sandboxes.state(),
            homes,
            self._settings,
            host,
            rdma_encrypted=self._rdma_encrypted,
        )
        # Before the networks: otherwise it could seem that all are known already.
        own = replace(own, encryption=self._encryption(), expected=self._expected())
        found = with_others(own, self._others(), look, host.addresses)
        self._missing = missing
        return found
