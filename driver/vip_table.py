"""From what the engine lists and what DNS says, to where a VIP leads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from driver.model import Network, NetworkView, Service, VipTable

KEEP_REFUSING: Final = 60.0
"""Seconds for which a VIP without a task is refused. A service without tasks vanishes from the engine's view, but clients
have its address; later nobody should, and the address may become another's."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    """What is known of a network. `view` is the last good one, `seen` when (the loop's clock), `error` why not newer.

    `table` is where its VIPs lead; those in `vanished` have no service any more, since when. `idle` are services whose
    tasks all take no connections, since when. `unlisted` and `unknown`: see the functions. Of the services
    `by_list` only the engine's list says which tasks they have.
    """

    view: NetworkView | None = None
    table: VipTable = field(default_factory=dict)
    seen: float | None = None
    error: str | None = None
    vanished: dict[IPv4Address, float] = field(default_factory=dict)
    idle: dict[Service, float] = field(default_factory=dict)
    unlisted: frozenset[IPv4Address] = frozenset()
    unknown: frozenset[str] = frozenset()
    by_list: frozenset[str] = frozenset()

    def resting(self, before: float) -> frozenset[Service]:
        """Services with just these tasks that have been idle since before this time."""
        return frozenset(service for service, since in self.idle.items() if since < before)


def own_addresses(network: Network, addresses: Iterable[IPv4Address]) -> tuple[IPv4Address, ...]:
    """Of these addresses those that belong to the network, sorted."""
    pools = [subnet.pool for subnet in network.subnets]
    return tuple(sorted({a for a in addresses if not pools or any(a in pool for pool in pools)}))


def unlisted(
    network: Network, view: NetworkView, answers: Mapping[str, frozenset[IPv4Address]]
) -> frozenset[IPv4Address]:
    """Addresses of the network that DNS gave for tasks, and that the engine's list of tasks doesn't have."""
    found: set[IPv4Address] = set()
    for service in view.services:
        active = own_addresses(network, answers.get(service.name, ()))
        found |= set(active) - {task.address for task in service.tasks}
    return frozenset(found)


def unknown(view: NetworkView, answers: Mapping[str, object]) -> frozenset[str]:
    """Services with a VIP that the engine lists, and that DNS doesn't know."""
    return frozenset(item.name for item in view.services if item.vip is not None) - answers.keys()


def _tasks(
    network: Network, service: Service, before: NetworkState, active: Collection[IPv4Address] | None
) -> tuple[IPv4Address, ...]:
    listed = own_addresses(network, (task.address for task in service.tasks))
    if active is None:
        # Nobody could be asked. What took no connections before doesn't now: tasks don't come back.
        active = frozenset(listed) - _inactive(service, before)
    return tuple(address for address in listed if address in active)


def _inactive(service: Service, before: NetworkState) -> frozenset[IPv4Address]:
    if before.view is None or service.vip is None or service.vip not in before.table:
        return frozenset()
    for known in before.view.services:
        if known.name == service.name:
            return frozenset(task.address for task in known.tasks) - frozenset(
                before.table[service.vip]
            )
    return frozenset()


def next_state(
    network: Network,
    view: NetworkView,
    answers: Mapping[str, frozenset[IPv4Address]],
    before: NetworkState,
    now: float,
) -> NetworkState:
    """The state that follows `before` when the engine shows `view` and DNS gave `answers` (see `ports.TaskResolver`)."""
    table: VipTable = {
        service.vip: _tasks(network, service, before, answers.get(service.name))
        for service in view.services
        if service.vip is not None
    }
    used = {task.address for service in view.services for task in service.tasks}
    used |= {item.address.ip for item in view.containers if item.address is not None}
    vanished = {
        vip: since
        for vip in before.table
        if vip not in table
        and vip not in used
        and now - (since := before.vanished.get(vip, now)) < KEEP_REFUSING
    }
    idle = {
        service: before.idle.get(service, now)
        for service in view.services
        if service.vip is not None
        and not table[service.vip]
        and answers.get(service.name) is not None
    }
    table.update(dict.fromkeys(vanished, ()))
    if table == before.table:
        table = before.table
    return NetworkState(
        view,
        table,
        now,
        None,
        vanished,
        idle,
        unlisted(network, view, answers),
        unknown(view, answers),
    )
