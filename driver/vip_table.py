"""Computes the tasks behind each VIP from the engine's list and the answers of DNS."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from driver.balance import Balance
from driver.model import Network, NetworkView, Service, VipTable

KEEP_REFUSING: Final = 60.0
"""Seconds for which connections to a VIP without tasks are refused. The engine doesn't list such a
service, but clients still have its address. Later the address may belong to another service."""


@dataclass(frozen=True, slots=True)
class NetworkState:
    """The last known state of a network.

    `view` is the engine's last usable answer, `seen` its time (the loop's clock), `error` why there
    is no newer one. `table` maps VIPs to tasks. `vanished` VIPs have no service any more, since the
    given time. `idle` services have only tasks that take no connections, since the given time.
    `unlisted` and `unknown`: see the functions. For services in `by_list` only the engine's list
    names the tasks. `inactive`: by service name, the listed tasks that took no connections when DNS
    last answered. `balances`: see `balance.balances`; `labelled`: it knew the services' labels.
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
    inactive: dict[str, frozenset[IPv4Address]] = field(default_factory=dict)
    balances: dict[IPv4Address, Balance] = field(default_factory=dict)
    labelled: bool = False

    def resting(self, before: float) -> frozenset[Service]:
        """Services, with exactly these tasks, that have been idle since before a time."""
        return frozenset(service for service, since in self.idle.items() if since < before)


def own_addresses(network: Network, addresses: Iterable[IPv4Address]) -> tuple[IPv4Address, ...]:
    """The addresses that belong to the network, sorted."""
    pools = [subnet.pool for subnet in network.subnets]
    return tuple(sorted({a for a in addresses if not pools or any(a in pool for pool in pools)}))


def unlisted(
    network: Network, view: NetworkView, answers: Mapping[str, frozenset[IPv4Address]]
) -> frozenset[IPv4Address]:
    """Addresses of the network that DNS names as tasks and the engine's list doesn't have."""
    found: set[IPv4Address] = set()
    for service in view.services:
        active = own_addresses(network, answers.get(service.name, ()))
        found |= set(active) - {task.address for task in service.tasks}
    return frozenset(found)


def unknown(view: NetworkView, answers: Mapping[str, object]) -> frozenset[str]:
    """Services with a VIP that the engine lists and DNS doesn't know."""
    return frozenset(item.name for item in view.services if item.vip is not None) - answers.keys()


def _known(service: Service, before: NetworkState) -> frozenset[IPv4Address] | None:
    """The tasks to which the service's VIP led before; None if the service is new."""
    if before.view is None or service.vip not in before.table:
        return None
    for known in before.view.services:
        if (known.name, known.vip) == (service.name, service.vip):
            return frozenset(before.table[service.vip])
    return None


def _inactive(
    network: Network,
    service: Service,
    before: NetworkState,
    active: Collection[IPv4Address] | None,
) -> frozenset[IPv4Address]:
    """Listed tasks that take no connections by DNS's last answer."""
    listed = frozenset(own_addresses(network, (task.address for task in service.tasks)))
    if active is not None:
        return listed - frozenset(active)
    if _known(service, before) is None:
        return frozenset()
    return listed & before.inactive.get(service.name, frozenset())


def _tasks(
    network: Network,
    service: Service,
    inactive: Collection[IPv4Address],
    known: Collection[IPv4Address] | None,
) -> tuple[IPv4Address, ...]:
    """Listed tasks that are not inactive; if some are known, only these."""
    listed = own_addresses(network, (task.address for task in service.tasks))
    return tuple(
        address
        for address in listed
        if address not in inactive and (known is None or address in known)
    )


def next_state(
    network: Network,
    view: NetworkView,
    answers: Mapping[str, frozenset[IPv4Address]],
    before: NetworkState,
    now: float,
    by_list: Collection[str] = (),
) -> NetworkState:
    """The state after `before`, when the engine lists `view` and DNS gives `answers`; for services
    in `by_list` no answers are to be expected, so their list decides."""
    inactive = {
        service.name: _inactive(network, service, before, answers.get(service.name))
        for service in view.services
        if service.vip is not None
    }
    decided = answers.keys() | set(by_list)
    table: VipTable = {
        service.vip: _tasks(
            network,
            service,
            inactive[service.name],
            # The answer may come next time. A task that is new is perhaps not healthy yet.
            None if service.name in decided else _known(service, before),
        )
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
        frozenset(by_list),
        inactive=inactive,
    )
