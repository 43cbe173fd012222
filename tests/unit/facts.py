"""Fakes of what status and ping ask: see `plugin.facts`."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from dataplane.control import (
    Connections,
    ContainerCounts,
    PathCount,
    PathCounts,
    Statistics,
    VerbsObjects,
)
from dataplane.errors import RouterAway
from driver import names
from driver.errors import FreeFlowError, KernelError
from driver.kernel.fastpath import Stage
from driver.kernel.guard import Guarded
from driver.kernel.underlay import Underlay
from driver.model import Endpoint, EngineView, IPAddress, VipTable
from driver.sync import NetworkState

SANDBOXES = Path("/sandboxes")


@dataclass
class FakeKernelFacts:
    """Counters by interface name, dropped frames by short endpoint ID, hosts by MAC address."""

    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    behind: dict[str, IPAddress] = field(default_factory=dict)
    found: Underlay | FreeFlowError = field(
        default_factory=lambda: Underlay("eth0", 1500, IPv4Address("192.0.2.1"))
    )
    offload: bool | None = True

    def count(self, endpoint_id: str, *, received: int, sent: int) -> None:
        """What the container received and sent; the host's end of the pair counts the reverse."""
        self.counters[names.host_veth(endpoint_id)] = {"rx_bytes": sent, "tx_bytes": received}

    fastpath: Stage = field(default_factory=Stage)
    taken: set[str] = field(default_factory=set)

    guards: Guarded = field(default_factory=Guarded)

    def stage(self) -> Stage:
        return self.fastpath

    def guarded(self) -> Guarded:
        return self.guards

    def uses_fastpath(self, network_id: str, mac: str) -> bool:
        del network_id
        return mac in self.taken

    def underlay(self) -> Underlay:
        if isinstance(self.found, FreeFlowError):
            raise self.found
        return self.found

    def segments_tunnels(self) -> bool | None:
        return self.offload

    def links(self) -> dict[str, dict[str, int]]:
        return self.counters

    def spoofed(self) -> dict[str, int]:
        return self.dropped

    def learned(self, network_id: str) -> dict[str, IPAddress]:
        del network_id
        return self.behind

    def locate(self, network_id: str, mac: str) -> IPAddress | None:
        del network_id
        return self.behind.get(mac)


@dataclass
class FakeRouterFacts:
    """What the router says; None: nothing."""

    said: Statistics | None = None
    counts: tuple[PathCount, ...] = ()

    def statistics(self) -> Statistics:
        if self.said is None:
            raise RouterAway(
                "the router doesn't answer", cause="no such file", remedy="see its log"
            )
        return self.said

    def verbs(self) -> VerbsObjects:
        return VerbsObjects(devices=(), queue_pairs=(), reasons={})

    def connections(self) -> Connections:
        return Connections(connections=(), reasons={})

    def paths(self) -> PathCounts:
        return PathCounts(paths=self.counts)


def router_statistics(**fields: object) -> Statistics:
    values: dict[str, object] = {
        "uptime": 30.0,
        "learned": True,
        "processes": 3,
        "waiting": 1,
        "connections": 2,
        "arenas": 1,
        "memory": 24576,
        "granted": 9,
        "refused": {"remote": 4},
        "noted": {"option": 1},
        "wrong_messages": 5,
        "dropped": 0,
        "containers": (
            ContainerCounts(namespace=1, container="web.1.abc", processes=3, memory=24576),
            ContainerCounts(namespace=2, container=""),
        ),
    }
    return Statistics(**(values | fields))  # type: ignore[arg-type]


@dataclass
class FakeSyncFacts:
    """What the sync loop knows."""

    states: dict[str, NetworkState] = field(default_factory=dict)
    view: EngineView | None = None
    error: str | None = None
    vips_failed: dict[Path, KernelError] = field(default_factory=dict)
    led: dict[Path, VipTable] = field(default_factory=dict)

    def state(self) -> dict[str, NetworkState]:
        return self.states

    def engine(self) -> tuple[EngineView | None, str | None]:
        return self.view, self.error

    def vip_errors(self) -> dict[Path, KernelError]:
        return self.vips_failed

    def leads(self, sandbox: Path) -> VipTable:
        return self.led.get(sandbox, {})

    def sandbox(self, endpoint: Endpoint) -> Path | None:
        return SANDBOXES / Path(endpoint.sandbox_key).name if endpoint.sandbox_key else None


def engine_view(**fields: object) -> EngineView:
    values: dict[str, object] = {
        "version": "28.5.2",
        "hostname": "host1",
        "root": "/var/lib/docker",
        "swarm": True,
        "node_id": "n1",
        "node_address": IPv4Address("192.0.2.1"),
        "manager": True,
    }
    return EngineView(**(values | fields))  # type: ignore[arg-type]
