"""Chooses which of a service's tasks get the new connections of a container.

- `even`: all of them, in turn.
- `local`: those on the container's own host while there are any, else all.
- `source`: one for each container, by the hash of its address. It keeps that task while the task
  takes connections, whatever other tasks come and go.

For `source` a container has the highest of its hashes with each task (rendezvous hashing, Thaler
and Ravishankar, 1998). So when a task leaves, only its own clients move, evenly to all others. A
remainder of one hash, as the kernel's `jhash` expression takes it, would move nearly all. By hashes
alone a new task would take clients from the others, so a container keeps its former choice.

The network's option says how to balance, or the label `freeflow.balance` of a service, which
managers know, or of its containers, which their host knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from driver.model import Choice, NetworkView, Service, VipTable

EVEN: Final = "even"
LOCAL: Final = "local"
SOURCE: Final = "source"
BALANCES: Final = (EVEN, LOCAL, SOURCE)
LABEL: Final = "freeflow.balance"

HERE: Final = "on this host"
NONE_HERE: Final = "none on this host"
BY_LIST: Final = "DNS does not tell which tasks take connections"


@dataclass(frozen=True, slots=True)
class Balance:
    """How a service's VIP is balanced on this host, where an option or a label says so.

    `kind` is one of `BALANCES`. `local` are the tasks that `local` prefers; empty: all get
    connections. `why` explains it to people.
    """

    kind: str
    local: frozenset[IPv4Address] = frozenset()
    why: str = ""


def balances(
    option: str,
    labels: Mapping[str, str],
    view: NetworkView,
    table: VipTable,
    by_list: Collection[str],
) -> dict[IPv4Address, Balance]:
    """How each VIP of a network is balanced; those that nothing is said about are left out.

    `option` is the network's, `labels` are values of `LABEL` by service name, `table` has the tasks
    that take connections.
    """
    here = {container.endpoint_id for container in view.containers}
    found = {}
    for service in view.services:
        label = labels.get(service.name)
        if service.vip is None or service.vip not in table or (label is None and option == EVEN):
            continue
        known = label in BALANCES
        kind = label if label is not None and known else option
        said = "" if label is None or known else f"{LABEL}={label[:40]} is none of the balances"
        active = table[service.vip]
        if kind == LOCAL:
            local, why = _local(service, active, here, service.name in by_list)
            found[service.vip] = Balance(LOCAL, local, "; ".join(filter(None, (why, said))))
        else:
            found[service.vip] = Balance(kind, why=said)
    return found


def _local(
    service: Service, active: Collection[IPv4Address], here: Collection[str], by_list: bool
) -> tuple[frozenset[IPv4Address], str]:
    """The tasks on this host that take connections, and why these."""
    if by_list:
        # One of this host's tasks may be ending, and it would get all connections.
        return frozenset(), BY_LIST
    local = {task.address for task in service.tasks if task.endpoint_id in here}
    found = frozenset(local.intersection(active))
    return found, HERE if found else NONE_HERE


def chosen(
    table: VipTable, choices: Mapping[IPv4Address, Choice], kept: Mapping[IPv4Address, IPv4Address]
) -> VipTable:
    """The tasks of each VIP that get a container's new connections.

    `table` has all tasks that take some. `kept` are the tasks that the container has had, for VIPs
    that are balanced by source.
    """
    found: VipTable = {}
    for vip, tasks in table.items():
        choice = choices.get(vip)
        if choice is None or not tasks:
            found[vip] = tasks
        elif choice.client is not None:
            before = kept.get(vip)
            found[vip] = (before if before in tasks else favourite(choice.client, tasks),)
        else:
            found[vip] = tuple(task for task in tasks if task in choice.local) or tasks
    return found


def favourite(client: IPv4Address, tasks: Iterable[IPv4Address]) -> IPv4Address:
    """The task with the highest hash with a client; the same on every host."""

    def weight(task: IPv4Address) -> tuple[bytes, IPv4Address]:
        return hashlib.blake2b(client.packed + task.packed, digest_size=8).digest(), task

    return max(tasks, key=weight)
