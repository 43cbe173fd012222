"""Interfaces of the parts whose facts status and ping need: kernel, sync loop and router.

Each has one implementation, and a fake in tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from dataplane.control import Connections, PathCounts, Statistics, VerbsObjects
from driver.errors import KernelError
from driver.kernel.fastpath import Stage
from driver.kernel.guard import Guarded
from driver.kernel.underlay import Underlay
from driver.model import Endpoint, EngineView, IPAddress, VipTable
from driver.sync import NetworkState


class KernelFacts(Protocol):
    """See `driver.kernel.linux.LinuxKernel`."""

    def underlay(self) -> Underlay: ...

    def segments_tunnels(self) -> bool | None: ...

    def links(self) -> dict[str, dict[str, int]]: ...

    def spoofed(self) -> dict[str, int]: ...

    def learned(self, network_id: str) -> dict[str, IPAddress]: ...

    def locate(self, network_id: str, mac: str) -> IPAddress | None: ...

    def stage(self) -> Stage: ...

    def guarded(self) -> Guarded: ...

    def uses_fastpath(self, network_id: str, mac: str) -> bool: ...


class RouterFacts(Protocol):
    """See `dataplane.router_client.RouterClient`. All raise DataplaneError."""

    def statistics(self) -> Statistics: ...

    def connections(self) -> Connections: ...

    def verbs(self) -> VerbsObjects: ...

    def paths(self) -> PathCounts: ...


class SyncFacts(Protocol):
    """See `driver.sync.Syncer`."""

    def state(self) -> dict[str, NetworkState]: ...

    def engine(self) -> tuple[EngineView | None, str | None]: ...

    def vip_errors(self) -> Mapping[Path, KernelError]: ...

    def sandbox(self, endpoint: Endpoint) -> Path | None: ...

    def leads(self, sandbox: Path) -> VipTable: ...
