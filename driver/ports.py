"""The driver's interfaces to the kernel, to Docker and to a container's namespace.

Each has a real implementation and a fake, on which the same contract tests run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from driver.model import (
    ArpFrame,
    Choice,
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
    """Our objects in the kernel, by short ID (see `names.short`).

    `endpoints` have a host-side veth; `filters` are endpoints of which only the source filter is
    left.
    """

    networks: frozenset[str]
    endpoints: frozenset[str]
    filters: frozenset[str] = frozenset()


class Kernel(Protocol):
    """Bridges, VXLAN devices, veths and source filters of this host.

    Every call is idempotent and raises `KernelError`.
    """

    def prepare(self) -> None:
        """Make or reopen the overlay namespace."""

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        """Make the network's bridge and VXLAN device if absent, then the endpoint's veth pair and
        filter.

        Afterwards the container's end (`names.container_veth`) is in the host's namespace, and the
        host's end is a port of the bridge and up.
        """

    def detach(self, network_id: str, endpoint_id: str) -> None:
        """Remove the endpoint's veth pair and filter, if they exist."""

    def remove_network(self, network_id: str) -> None:
        """Remove bridge and VXLAN device, if they exist."""

    def set_peers(self, network_id: str, peers: Iterable[IPAddress]) -> frozenset[IPAddress]:
        """Make `peers` the flood list of the VXLAN device, if there is one; returns those added."""

    def announce(
        self, network_id: str, endpoints: Iterable[Endpoint], *, again: bool = False
    ) -> None:
        """Send gratuitous ARP (RFC 5227) and unsolicited NA (RFC 4861) for the endpoints into the
        network, except for those whose link is gone.

        `again`: they were announced before, and only the frames are sent once more.
        """

    def hear(self, seconds: float) -> frozenset[ArpFrame]:
        """ARP frames that reached the networks since the last call; waits some seconds for the
        first."""

    def inventory(self) -> Inventory:
        """The objects that exist, whichever process made them."""

    def underlay_mtu(self, *, encrypted: bool = False) -> int:
        """The containers' MTU in bytes: that of the underlay, less the overhead of VXLAN, and of
        encryption."""

    def cleanup(self) -> list[str]:
        """Remove all our objects from the kernel; returns their names."""


class Balancer(Protocol):
    """VIPs in one container's network namespace. Raises `KernelError`."""

    def apply(
        self,
        sandbox: Path,
        table: VipTable,
        choices: Mapping[IPv4Address, Choice] | None = None,
    ) -> bool:
        """Make the namespace have the VIP rules of `table`; false: there is no such namespace
        (yet).

        New connections to a VIP in `choices` go to some of its tasks only. Flows to any task of
        `table` stay.
        """

    def leads(self, sandbox: Path) -> VipTable:
        """The tasks of each VIP that get the namespace's new connections, in the order of their
        turns; without any request to the kernel."""

    def forget(self, alive: Iterable[Path]) -> None:
        """Forget namespaces that aren't in `alive`, without any request to the kernel."""


class Directory(Protocol):
    """The API of this host's engine. Raises `EngineError`; never used while a request of Docker
    waits."""

    def engine(self) -> EngineView: ...

    def networks(self) -> frozenset[str]:
        """IDs of all networks that the engine lists for our driver."""

    def network(self, network_id: str, *, services: bool = False) -> NetworkView | None:
        """The engine's view, None if it knows no such network.

        Without `services` the view has no services and no `others`; with it, engines up to 28 log
        errors.
        """

    def labels(self, key: str, *, manager: bool) -> dict[str, str]:
        """The values of a label by service name: those of the services, which only managers know,
        and otherwise of their containers that run on this host."""

    def changed_containers(self) -> Iterator[str]:
        """IDs of this host's containers that start, or become healthy or unhealthy.

        Ends when the engine does.
        """

    def sandbox_key(self, container_id: str) -> str | None:
        """Docker's path of a container's namespace; None: it has none, or there is no such
        container."""


@dataclass(frozen=True, slots=True)
class TaskAnswers:
    """The answers of one container's DNS about services.

    `known`: by service name, the addresses of the tasks that take connections; the empty set is an
    answer, too. `silent`: services that it knows, but for whose tasks it gives no answer. About any
    other service it knows nothing, can't be queried, or its answers were lost or truncated. `slow`:
    the queries took all the time that was allowed.
    """

    known: Mapping[str, frozenset[IPv4Address]]
    silent: frozenset[str] = frozenset()
    slow: bool = False


class TaskResolver(Protocol):
    """Finds the tasks that take new connections, by the embedded DNS of one container."""

    def tasks(
        self,
        sandbox: Path,
        network_name: str,
        services: Sequence[Service],
        *,
        patient: bool = False,
    ) -> TaskAnswers:
        """Query this container's DNS. `patient`: wait longer for slow answers."""
