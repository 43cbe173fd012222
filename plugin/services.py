"""The status of a service: which tasks its VIP leads to, from where, and why."""

from __future__ import annotations

from collections.abc import Mapping

from driver.balance import EVEN, SOURCE, Balance, chosen
from driver.model import Choice, Service, VipTable
from driver.vip_table import NetworkState
from plugin.status import ServiceStatus


def service_status(
    service: Service, state: NetworkState, leads: Mapping[str, VipTable]
) -> ServiceStatus:
    """The status of a service on a network. `leads` are the tasks that each of this host's
    containers gets, by its name."""
    by_list = service.name in state.by_list
    vip = service.vip
    if vip is None:
        tasks = [str(task.address) for task in service.tasks]
        return ServiceStatus(service.name, "", tasks, by_list)
    active = state.table.get(vip, ())
    balance = state.balances.get(vip, Balance(EVEN))
    clients = {}
    if balance.kind == SOURCE:
        found = {name: table.get(vip, ()) for name, table in sorted(leads.items())}
        clients = {name: str(tasks[0]) for name, tasks in found.items() if tasks}
        here = sorted(set(clients.values()))
    else:
        choices = {vip: Choice(local=balance.local)}
        here = [str(task) for task in chosen({vip: active}, choices, {})[vip]]
    return ServiceStatus(
        service.name,
        str(vip),
        [str(task) for task in active],
        by_list,
        balance.kind,
        here,
        clients,
        balance.why,
    )
