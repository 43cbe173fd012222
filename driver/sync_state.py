"""What the parts of the sync loop share: networks, endpoints and sandboxes of this host.

`lock` guards all of it, the schedule included. Nothing is asked or written while it is held.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver.balance import LOCAL, SOURCE
from driver.model import Choice, Choices, Endpoint, Network, VipTable
from driver.schedule import SANDBOX_PATIENCE, Schedule
from driver.vip_table import NetworkState

START_PATIENCE: Final = 10.0
"""Seconds after the start for which older containers keep their rules until all their networks are
known."""


class SyncState:
    """`sandboxes` is the folder in which Docker's sandboxes are visible to us."""

    def __init__(self, sandboxes: Path, interval: float, clock: Callable[[], float]) -> None:
        self.lock = threading.RLock()
        self.clock = clock
        self.schedule = Schedule(clock(), interval)
        self.networks: dict[str, Network] = {}
        self.endpoints: dict[str, tuple[Endpoint, ...]] = {}
        """By network ID."""
        self.homes: dict[Path, frozenset[str]] = {}
        """The networks of each sandbox."""
        self.states: dict[str, NetworkState] = {}
        """Last known state by network ID."""
        self.labels: dict[str, str] | None = None
        """How services want to be balanced, by service name: see `balance.py`. None: not read
        yet."""
        self._folder = sandboxes
        self._started = clock()
        self._young: set[Path] = set()
        """Sandboxes that joined since our start: no earlier process has written rules there."""

    def sandbox(self, endpoint: Endpoint) -> Path | None:
        """The endpoint's namespace. Docker's path is the host's; ours has the same last part."""
        if not endpoint.sandbox_key:
            return None
        return self._folder / Path(endpoint.sandbox_key).name

    def joined(self, path: Path, endpoint: Endpoint, network: Network | None) -> None:
        """Add an endpoint whose sandbox is there, or about to come."""
        now, network_id = self.clock(), endpoint.network_id
        with self.lock:
            self.homes[path] = self.homes.get(path, frozenset()) | {network_id}
            self._young.add(path)
            self.schedule.awaited[path] = now + SANDBOX_PATIENCE
            if network is not None:
                self.networks.setdefault(network_id, network)
                known = self.endpoints.get(network_id, ())
                if endpoint not in known:
                    self.endpoints[network_id] = (*known, endpoint)
                self.schedule.add_network(network_id, now)
                self.schedule.hint(network_id, now, joined=True)

    def replace(
        self, networks: Iterable[Network], endpoints: Iterable[Endpoint], now: float, *, woken: bool
    ) -> set[str]:
        """Take over what the store has; returns the networks that have no endpoints any more."""
        known = {network.id: network for network in networks}
        by_network: dict[str, list[Endpoint]] = {}
        homes: dict[Path, frozenset[str]] = {}
        for endpoint in endpoints:
            if endpoint.network_id not in known:
                continue
            by_network.setdefault(endpoint.network_id, []).append(endpoint)
            path = self.sandbox(endpoint)
            if path is not None:
                homes[path] = homes.get(path, frozenset()) | {endpoint.network_id}
        with self.lock:
            self.schedule.dirty |= {
                path
                for path in homes.keys() | self.homes.keys()
                if homes.get(path) != self.homes.get(path)
            }
            self.networks = known
            self.endpoints = {key: tuple(value) for key, value in by_network.items()}
            self.homes = homes
            self._young &= homes.keys()
            for network_id in by_network:
                self.schedule.add_network(network_id, now, hurry=woken)
            gone = self.schedule.networks() - by_network.keys()
            for network_id in gone:
                self.schedule.drop_network(network_id)
                self.states.pop(network_id, None)
        return gone

    def on_network(self, network_id: str) -> list[Path]:
        """The sandboxes on a network."""
        with self.lock:
            return [path for path, ids in self.homes.items() if network_id in ids]

    def only_young(self, network_id: str) -> bool:
        """Whether all sandboxes on a network joined since our start."""
        with self.lock:
            return self._young.issuperset(self.on_network(network_id))

    def still_awaited(self) -> list[Path]:
        """Sandboxes that may appear at any moment."""
        now, awaited = self.clock(), self.schedule.awaited
        with self.lock:
            for path, deadline in list(awaited.items()):
                if now > deadline or path not in self.homes:
                    del awaited[path]
            return list(awaited)

    def vip_table(self, path: Path) -> VipTable | None:
        """The VIPs of all networks of a sandbox.

        None: not all networks and labels are known yet, and an earlier process may have written
        rules.
        """
        table: VipTable = {}
        with self.lock:
            complete = True
            for network_id in sorted(self.homes.get(path, ())):
                state = self.states.get(network_id)
                if state is None or state.seen is None:
                    complete = False
                else:
                    complete &= state.labelled
                    table.update(state.table)
            starting = self.clock() - self._started < START_PATIENCE
            if not complete and path not in self._young and starting:
                return None
        return table

    def choices(self, path: Path) -> Choices:
        """Which tasks of a VIP a sandbox prefers, for VIPs that aren't balanced evenly."""
        found: Choices = {}
        with self.lock:
            for network_id in sorted(self.homes.get(path, ())):
                state = self.states.get(network_id)
                for vip, balance in state.balances.items() if state is not None else ():
                    if balance.kind == LOCAL:
                        found[vip] = Choice(local=balance.local)
                    elif balance.kind == SOURCE:
                        found[vip] = Choice(client=self._address(network_id, path))
        return found

    def _address(self, network_id: str, path: Path) -> IPv4Address | None:
        """A sandbox's address on a network."""
        for endpoint in self.endpoints.get(network_id, ()):
            if endpoint.ipv4 is not None and self.sandbox(endpoint) == path:
                return endpoint.ipv4.ip
        return None
