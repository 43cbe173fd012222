"""Services that stay on their host, and clients that stay with their task."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from typing import Any

from testbed import Bed, Host, promised, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience
from tests.swarm.conftest import (
    NGINX,
    address,
    make_network,
    make_service,
    run_container,
    unique,
    wait_running,
)
from tests.swarm.test_services import answered, served_by

HEALTHY = ("--health-cmd", "curl -sf http://127.0.0.1/", "--health-interval", "1s")
WHEN_READY = ("--health-cmd", "test -e /ready", "--health-interval", "1s", "--health-retries", "99")
BY_NODE = ("--hostname", "{{.Node.Hostname}}")
"""A task answers with the name of its host."""
LOCAL = "freeflow.balance=local"
SOURCE = "freeflow.balance=source"

LOAD = """
done=0
while [ ! -e /over ]; do for name in {names}; do
    if said=$(curl -sSf -o /dev/null -m 5 -w '%{{remote_ip}} after %{{time_total}} s' http://$name/ 2>&1)
    then done=$((done+1)); else echo "$(date +%T.%N) $name: $said"; fi
done; sleep 0.1; done
echo $done
"""
"""Prints each request that fails, and how many did not."""


def global_service(bed: Bed, network: str, command: str, *options: str, wait: bool = True) -> str:
    """Start a service with one task on each host and return its name, by default when all run."""
    manager, name = bed.hosts[0], unique("svc")
    manager.docker(
        *("service", "create", "-d", "--no-resolve-image", "--name", name, "--network", network),
        *("--mode", "global", "--stop-grace-period", "2s", *options),
        *(WORKLOAD_IMAGE, "sh", "-c", command),
    )
    if wait:
        wait_running(manager, name, len(bed.hosts))
    return name


def tasks_here(host: Host, service: str) -> set[str]:
    """The IDs of a service's containers on a host, which are their host names by default."""
    label = f"label=com.docker.swarm.service.name={service}"
    return set(host.docker("ps", "-q", "-f", label).split())


def service_status(host: Host, service: str) -> Any:
    """A service in a host's status."""
    (found,) = (
        each
        for network in host.status()["networks"]
        for each in network["services"]
        if each["name"] == service
    )
    return found


def reached(host: Host, client: str, service: str, count: int = 12) -> set[str]:
    """Who answers a client; no request may fail."""
    found = answered(host, client, service, count)
    assert not found["failed"], (host.engine, found)
    return set(found)


def check_follows(host: Host, client: str, service: str, tasks: set[str]) -> None:
    """Within 2 s exactly these tasks answer a client, and no request fails."""
    promised(
        f"{service} from {host.name}, engine {host.engine}",
        lambda: served_by(host, client, service, 12) == tasks,
        2,
    )


def check_knows(host: Host, service: str, count: int) -> None:
    """Within 2 s a host knows of so many tasks."""
    promised(
        f"tasks of {service} on {host.name}",
        lambda: len(service_status(host, service)["tasks"]) == count,
        2,
    )


def wait_reached(host: Host, client: str, service: str, tasks: set[str]) -> None:
    """Wait until exactly these tasks answer a client."""
    wait_until(
        f"{service} from {host.name}",
        lambda: set(answered(host, client, service, 3 * len(tasks))) == tasks,
    )


def wait_served(clients: Mapping[str, Host], *services: str) -> None:
    """Wait until all clients have reached these services."""
    for service in services:
        for client, host in clients.items():
            wait_until(
                f"{service} from {host.name}",
                lambda h=host, c=client, s=service: not answered(h, c, s, 1)["failed"],  # type: ignore[misc]
            )


def one_client_each(bed: Bed, network: str) -> dict[str, Host]:
    return {run_container(host, network): host for host in bed.hosts}


def test_clients_use_the_tasks_of_their_host(bed: Bed, manager: Host) -> None:
    """With balance=local a client reaches its own host's healthy tasks and no others, on every
    engine; without any it reaches all. Status says so, and tasks.NAME lists all.

    One host's task starts, is lost and comes back: within 2 s connections follow what Docker says.
    """
    network = make_network(manager, "-o", "balance=local")
    near, far = bed.hosts[1], bed.hosts[2]
    start = f"[ $(hostname) = {near.name} ] || touch /ready; {NGINX}"
    service = global_service(bed, network, start, *BY_NODE, *WHEN_READY, wait=False)
    where = f"node.hostname=={near.name}"
    two = make_service(manager, network, NGINX, "--constraint", where, replicas=2)
    client_of = {host: client for client, host in one_client_each(bed, network).items()}
    client, others = client_of[near], {host.name for host in bed.hosts} - {near.name}
    # The task here is starting.
    wait_reached(near, client, service, others)
    (starting,) = tasks_here(near, service)
    near.exec(starting, "touch", "/ready")
    wait_running(manager, service, len(bed.hosts))
    for host, each in client_of.items():
        check_follows(host, each, service, {host.name})
        assert "1 received" in host.exec(each, "ping", "-c1", "-W2", service)
        shown = service_status(host, service)
        assert (shown["balance"], shown["why"]) == ("local", "on this host")
        assert (len(shown["here"]), len(shown["tasks"])) == (1, len(bed.hosts))
        listed = host.exec(each, "getent", "ahostsv4", f"tasks.{service}")
        assert len({line.split()[0] for line in listed.splitlines()}) == len(bed.hosts)
    # It is lost.
    near.docker("kill", starting)
    check_follows(near, client, service, others)
    assert service_status(near, service)["why"] == "none on this host"
    # It comes back.
    for task in wait_until("the new task", lambda: tasks_here(near, service), 60):
        near.exec(task, "touch", "/ready")
    wait_running(manager, service, len(bed.hosts))
    check_follows(near, client, service, {near.name})
    # A replicated service that only this host has.
    for host in (near, far):
        assert reached(host, client_of[host], two) == tasks_here(near, two)
    assert service_status(near, two)["why"] == "on this host"
    assert service_status(far, two)["why"] == "none on this host"


def test_a_label_balances_one_service(bed: Bed, manager: Host) -> None:
    """A service's label, on managers, and its containers' label, everywhere, balance this service
    alone; a change of the service's label is followed within 2 s."""
    network = make_network(manager)
    plain = global_service(bed, network, NGINX, *BY_NODE, wait=False)
    labelled = global_service(bed, network, NGINX, *BY_NODE, "--container-label", LOCAL)
    clients, everywhere = one_client_each(bed, network), {host.name for host in bed.hosts}
    for client, host in clients.items():
        wait_reached(host, client, labelled, {host.name})
        wait_reached(host, client, plain, everywhere)
    client = next(iter(clients))
    manager.docker("service", "update", "-d", "--label-add", LOCAL, plain)
    manager.docker("service", "update", "-d", "--label-add", "freeflow.balance=even", labelled)
    check_follows(manager, client, plain, {manager.name})
    check_follows(manager, client, labelled, everywhere)
    manager.docker("service", "update", "-d", "--label-add", SOURCE, plain)
    promised("one task", lambda: len(served_by(manager, client, plain, 12)) == 1, 2)


def test_a_client_keeps_its_task(bed: Bed, manager: Host) -> None:
    """With balance=source each client has one task, which status tells. It keeps the task while
    others come and go, and over a restart of the plugin; when the task leaves, it has another."""
    network = make_network(manager, "-o", "balance=source")
    service = make_service(manager, network, NGINX, replicas=3)
    clients = one_client_each(bed, network)
    wait_served(clients, service)
    for host in bed.hosts:
        check_knows(host, service, 3)
    own = {}
    for client, host in clients.items():
        (own[client],) = reached(host, client, service, 6)
        shown = service_status(host, service)
        assert shown["clients"][client] in shown["here"]
    manager.docker("service", "scale", "-d", f"{service}=6")
    bed.hosts[1].docker("plugin", "disable", "-f", "freeflow:latest")
    bed.hosts[1].docker("plugin", "enable", "freeflow:latest")
    wait_until("the status", lambda: bed.hosts[1].status()["networks"], 30)
    wait_running(manager, service, 6)
    for client, host in clients.items():
        check_knows(host, service, 6)
        assert reached(host, client, service, 6) == {own[client]}
    # The task of some client leaves.
    host, victim = next(
        (host, task) for host in bed.hosts for task in tasks_here(host, service) & {*own.values()}
    )
    lost = address(host, victim, network)
    host.docker("kill", victim)
    for host in bed.hosts:
        promised(
            f"a lost task on {host.name}",
            lambda h=host: lost not in service_status(h, service)["tasks"],  # type: ignore[misc]
            2,
        )
    for client, host in clients.items():
        found = reached(host, client, service, 6)
        assert len(found) == 1
        assert (found == {own[client]}) == (own[client] != victim)


def test_a_rolling_update_under_load_fails_no_request(bed: Bed, manager: Host) -> None:
    """During a rolling update no request fails, from clients on every host, however the service is
    balanced: evenly; local, where a host has no task for a while; and by source."""
    network = make_network(manager)
    first = ("--update-order", "start-first", "--stop-grace-period", "5s", "--update-delay", "1s")
    even = make_service(manager, network, NGINX, *HEALTHY, *first, wait=False)
    source = make_service(
        *(manager, network, NGINX, *HEALTHY, *first),
        *("--label", SOURCE, "--container-label", SOURCE),
        wait=False,
    )
    local = global_service(bed, network, NGINX, *HEALTHY, "--container-label", LOCAL)
    services = {even: 3, source: 3, local: len(bed.hosts)}
    for service, count in services.items():
        wait_running(manager, service, count)
    clients = one_client_each(bed, network)
    wait_served(clients, *services)
    script = LOAD.format(names=" ".join(services))
    loads = [
        host.spawn("docker", "exec", client, "sh", "-c", script, stdout=subprocess.PIPE)
        for client, host in clients.items()
    ]
    for service in services:
        _update(manager, service)
    for service, count in services.items():
        wait_until(f"the update of {service}", lambda s=service: _updated(manager, s), 120, 0.5)  # type: ignore[misc]
        wait_running(manager, service, count)
    # The load goes on for a while.
    time.sleep(3)
    for client, host in clients.items():
        host.exec(client, "touch", "/over")
    results = [load.communicate(timeout=patience(30))[0].splitlines() for load in loads]
    for host, (*failed, done) in zip(clients.values(), results, strict=True):
        assert not failed, (host.engine, services, done, failed)
        assert int(done) > 60, host.engine


def _update(manager: Host, service: str) -> None:
    manager.docker("service", "update", "-d", "--force", service)


def _updated(manager: Host, service: str) -> bool:
    """Whether a service's last update is complete."""
    form = "{{if .UpdateStatus}}{{.UpdateStatus.State}}{{end}}"
    return manager.docker("service", "inspect", "-f", form, service).strip() == "completed"
