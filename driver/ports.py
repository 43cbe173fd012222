"""The seams of the driver: what it needs of the kernel, of Docker and of a container's namespace.

Each has one real implementation and one fake; the same contract tests run on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from driver.model import (
    ArpFrame,
    Endpoint,
    EngineView,
    IPAddress,
    Network,
    NetworkView,
    Service,
    VipTable,
)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What of ours exists in the kernel, by short ID (see `names.short`).

    `endpoints` have a host-side veth; of those in `filters` only the source filter is left.
    """

    networks: frozenset[str]
    endpoints: frozenset[str]
    filters: frozenset[str] = frozenset()


class Kernel(Protocol):
    """Bridges, VXLAN devices, veths and source filters of this host. Every call is idempotent.

    All raise `KernelError`.
    """

    def prepare(self) -> None:
        """Make or reopen the overlay namespace."""

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        """Make the network's bridge and VXLAN device if absent, then the endpoint's veth pair and filter.

        Afterwards the container's end (`names.container_veth`) is in the host's namespace, the host's end is an
        up port of the bridge.
        """

    def detach(self, network_id: str, endpoint_id: str) -> None:
        """Remove the endpoint's veth pair and filter; absence is fine."""

    def remove_network(self, network_id: str) -> None:
        """Remove bridge and VXLAN device; absence is fine."""

    def set_peers(self, network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        """Make the flood list of the VXLAN device exactly `peers`; returns those added. No device: nothing."""

    def announce(self, network_id: str, endpoints: Iterable[Endpoint]) -> None:
        """Send gratuitous ARP (RFC 5227) and unsolicited NA (RFC 4861) for the endpoints into the network."""

    def hear(self, seconds: float) -> frozenset[ArpFrame]:
        """ARP frames that reached the networks since the last call; waits so long for the first."""

    def inventory(self) -> Inventory:
        """What exists, whoever made it."""

    def underlay_mtu(self) -> int:
        """MTU in bytes that the underlay leaves for containers: its device's, less the overhead of VXLAN."""

    def cleanup(self) -> list[str]:
        """Remove everything of ours from the kernel; returns the names of what was removed."""


class Balancer(Protocol):
    """VIPs in one container's network namespace. Raises `KernelError`."""

    def apply(self, sandbox: Path, table: VipTable) -> bool:
        """Make the namespace's VIP rules those of `table`; false if the namespace is gone or not there yet."""

    def forget(self, alive: Iterable[Path]) -> None:
        """Drop what is remembered of namespaces that aren't in `alive`. Asks the kernel nothing."""


class Directory(Protocol):
    """Docker's own facts, read from the engine of this host. Raises `EngineError`; never used inside a request."""

    def engine(self) -> EngineView: ...

    def networks(self) -> frozenset[str]:
        """IDs of all networks that the engine lists for our driver."""

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        """The engine's view, None if it knows no such network.

        Without `services` the view has no services and no `others`; with it, engines up to 28 log errors.
        """

    def changed_containers(self) -> Iterator[str]:
        """IDs of this host's containers as they start, and become healthy or unhealthy; ends when the engine does."""

    def sandbox_key(self, container_id: str) -> str | None:
        """Docker's name of a container's namespace; None if it has none, or there is no such container."""


@dataclass(frozen=True, slots=True)
class Told:
    """What one container's DNS says of services.

    `known`: by service name the addresses that it gives for the service's tasks; of those listed they take connections,
    and the empty set is an answer, too. `silent`: it knows the service, and doesn't answer for its tasks. Of a service that is in
    neither it knows nothing, can't be asked, or its answers were lost or cut short. `slow`: asking took all the time there is.
    """

    known: Mapping[str, frozenset[IPv4Address]]
    silent: frozenset[str] = frozenset()
    slow: bool = False


class TaskResolver(Protocol):
    """Which tasks of a service take new connections, by the embedded DNS of one container."""

    def tasks(
        self,
        sandbox: Path,
        network_name: str,
        services: Sequence[Service],
        *,
        patient: bool = False,
    ) -> Told:
        """What this container's DNS says. `patient`: wait longer for what may be slow."""
