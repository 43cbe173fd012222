"""Resolves names of containers, tasks and services to addresses, for `freeflow ping`.

Containers are those of this host; tasks and services may be on any host of a network of this host.
As in Docker's DNS, a name may be followed by a dot and the network's name. A task may be given by
service and number, a container by the first characters of its ID.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from driver.errors import InvalidRequest, NotFound
from driver.model import NetworkView
from driver.vip_table import NetworkState

_LEAST: Final = 6
"""Characters of an ID that suffice."""
_SHOWN: Final = 8


@dataclass(frozen=True, slots=True)
class Found:
    """A match of a name on one network. `rank`: how well it fits, 0 is best."""

    rank: int
    name: str
    network: str
    address: IPv4Address

    def __str__(self) -> str:
        return f"{self.name}.{self.network} ({self.address})"


def _meant(view: NetworkView, name: str) -> Iterator[Found]:
    """Matches of `name` on a network."""

    def found(rank: int, full: str, address: IPv4Address) -> Found:
        return Found(rank, full, view.name or view.id[:12], address)

    for container in view.containers:
        if container.address is None:
            continue
        if container.name == name:
            yield found(0, container.name, container.address.ip)
        elif len(name) >= _LEAST and container.id.startswith(name):
            yield found(3, container.name or name, container.address.ip)
    for service in view.services:
        if service.name == name and service.vip is not None:
            yield found(1, service.name, service.vip)
        for task in service.tasks:
            if task.name == name:
                yield found(0, task.name, task.address)
            elif service.vip is None if service.name == name else task.name.startswith(f"{name}."):
                yield found(2, task.name, task.address)


def resolve(name: str, states: dict[str, NetworkState]) -> Found:
    """The address that a name means. `states` by network ID.

    Raises:
        NotFound: nothing matches.
        InvalidRequest: several addresses match equally well; the message lists them.
    """
    every: list[Found] = []
    for state in states.values():
        view = state.view
        if view is None:
            continue
        every += _meant(view, name)
        short, dot, network = name.rpartition(".")
        if dot and network == view.name:
            every += _meant(view, short)
    if not every:
        raise NotFound(
            "ping",
            cause=f"no container of this host, task or service on its FreeFlow networks is called {name}",
            remedy="freeflow status lists them",
        )
    best = min(match.rank for match in every)
    fitting = {match.address: match for match in every if match.rank == best}
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    listed = ", ".join(str(match) for match in list(fitting.values())[:_SHOWN])
    more = " and others" if len(fitting) > _SHOWN else ""
    raise InvalidRequest(
        "ping", cause=f"{name} may be {listed}{more}", remedy="give one of these names"
    )
