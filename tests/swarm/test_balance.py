"""Services that stay on their host, and clients that stay with their task."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience, within
from tests.swarm.conftest import (
    NGINX,
    make_network,
    make_service,
    run_container,
    unique,
    wait_running,
)
from tests.swarm.test_services import LOAD, answered

HEALTHY = ("--health-cmd", "curl -sf http://127.0.0.1/", "--health-interval", "1s")
TWICE = 2


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
    """The host names of a service's containers on a host."""
    return set(
        host.docker("ps", "-q", "-f", f"label=com.docker.swarm.service.name={service}").split()
    )


def service_status(host: Host, service: str) -> Any:
    """A service in a host's status, which a host's only FreeFlow network has."""
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


def wait_reached(host: Host, client: str, service: str, tasks: set[str]) -> None:
    """Wait until exactly these tasks answer a client."""
    wait_until(
        f"{service} from {host.name}",
        lambda: set(answered(host, client, service, 2 * len(tasks))) == tasks,
    )


def test_each_host_uses_its_own_task(bed: Bed, manager: Host) -> None:
    """With balance=local a client reaches the task of its own host, by TCP and ping, on every
    engine version; status says so, and tasks.NAME still lists all."""
    network = make_network(manager, "-o", "balance=local")
    service = global_service(bed, network, NGINX)
    for host in bed.hosts:
        client = run_container(host, network)
        own = tasks_here(host, service)
        assert len(own) == 1
        wait_reached(host, client, service, own)
        assert reached(host, client, service) == own
        assert "1 received" in host.exec(client, "ping", "-c1", "-W2", service)
        shown = service_status(host, service)
        assert (shown["balance"], shown["why"]) == ("local", "on this host")
        assert (len(shown["here"]), len(shown["tasks"])) == (1, len(bed.hosts))
        listed = host.exec(client, "getent", "ahostsv4", f"tasks.{service}")
        assert len({line.split()[0] for line in listed.splitlines()}) == len(bed.hosts)


def test_a_task_that_is_lost_and_comes_back(bed: Bed, manager: Host) -> None:
    """When the host's own tasks are lost, clients reach those of other hosts within 2 s, and the
    own one again once it runs."""
    network = make_network(manager, "-o", "balance=local")
    service = global_service(bed, network, NGINX, "--restart-delay", "15s")
    host = bed.hosts[1]
    client = run_container(host, network)
    own = tasks_here(host, service)
    wait_reached(host, client, service, own)
    host.docker("kill", *own)
    time.sleep(within(2))
    others = reached(host, client, service)
    assert others
    assert not others & own
    assert len(others) == len(bed.hosts) - 1
    assert service_status(host, service)["why"] == "none on this host"
    wait_running(manager, service, len(bed.hosts), 90)
    time.sleep(within(2))
    again = tasks_here(host, service)
    assert again != own
    assert reached(host, client, service) == again


def test_hosts_without_a_task_use_all(bed: Bed, manager: Host) -> None:
    """Where a replicated service has no task, clients reach all of them in turn."""
    network = make_network(manager, "-o", "balance=local")
    where = f"node.hostname=={bed.hosts[1].name}"
    service = make_service(manager, network, NGINX, "--constraint", where, replicas=TWICE)
    near, far = bed.hosts[1], bed.hosts[2]
    own = tasks_here(near, service)
    assert len(own) == TWICE
    for host in (near, far):
        client = run_container(host, network)
        wait_reached(host, client, service, own)
        assert reached(host, client, service) == own
    assert service_status(near, service)["why"] == "on this host"
    assert service_status(far, service)["why"] == "none on this host"


def test_a_task_that_is_starting_is_not_used(bed: Bed, manager: Host) -> None:
    """A task on the client's host gets no connections before Docker says that it is healthy."""
    network = make_network(manager, "-o", "balance=local")
    near = bed.hosts[1]
    others = {host.name for host in bed.hosts} - {near.name}
    service = global_service(
        bed,
        network,
        f"[ $(hostname) = {near.name} ] || touch /ready; {NGINX}",
        *("--hostname", "{{.Node.Hostname}}"),
        *("--health-cmd", "test -e /ready", "--health-interval", "1s", "--health-retries", "99"),
        wait=False,
    )
    client = run_container(near, network)
    wait_reached(near, client, service, others)
    (task,) = tasks_here(near, service)
    for _ in range(3):
        assert reached(near, client, service) == others
        time.sleep(1)
    near.exec(task, "touch", "/ready")
    wait_reached(near, client, service, {near.name})
    assert reached(near, client, service) == {near.name}


def test_a_label_balances_one_service(bed: Bed, manager: Host) -> None:
    """A service's label, on managers, and its containers' label, everywhere, balance this service
    alone; a change of the service's label is followed within 2 s."""
    network = make_network(manager)
    plain = global_service(bed, network, NGINX)
    label = "freeflow.balance=local"
    labelled = global_service(bed, network, NGINX, "--container-label", label)
    for host in bed.hosts:
        client = run_container(host, network)
        wait_reached(host, client, labelled, tasks_here(host, labelled))
        assert len(reached(host, client, plain)) == len(bed.hosts)
    client = run_container(manager, network)
    manager.docker("service", "update", "-d", "--label-add", label, plain)
    time.sleep(within(2))
    assert reached(manager, client, plain) == tasks_here(manager, plain)
    manager.docker("service", "update", "-d", "--label-add", "freeflow.balance=even", labelled)
    time.sleep(within(2))
    assert len(reached(manager, client, labelled)) == len(bed.hosts)


def test_a_client_keeps_its_task(bed: Bed, manager: Host) -> None:
    """With balance=source each client has one task, which it keeps while other tasks come and go
    and over a restart of the plugin; clients have different ones."""
    network = make_network(manager, "-o", "balance=source")
    service = make_service(manager, network, NGINX, replicas=3)
    clients = [(host, run_container(host, network)) for host in bed.hosts for _ in range(3)]
    own = {}
    for host, client in clients:
        wait_until("the VIP", lambda h=host, c=client: not answered(h, c, service, 1)["failed"])  # type: ignore[misc]
        time.sleep(within(2))
        (own[client],) = reached(host, client, service, 6)
        assert service_status(host, service)["clients"][client]
    assert len(set(own.values())) > 1
    manager.docker("service", "scale", "-d", f"{service}=6")
    wait_running(manager, service, 6)
    bed.hosts[1].docker("plugin", "disable", "-f", "freeflow:latest")
    bed.hosts[1].docker("plugin", "enable", "freeflow:latest")
    wait_until("the status", lambda: bed.hosts[1].status()["networks"], 30)
    time.sleep(within(3))
    for host, client in clients:
        assert reached(host, client, service, 6) == {own[client]}
    # The one task of a client leaves, and the client gets one other.
    host, victim = next(
        (host, task) for host in bed.hosts for task in tasks_here(host, service) & {*own.values()}
    )
    host.docker("kill", victim)
    time.sleep(within(2))
    for host, client in clients:
        found = reached(host, client, service, 6)
        assert len(found) == 1
        assert (found == {own[client]}) == (own[client] != victim)


def _update_under_load(bed: Bed, network: str, service: str, update: tuple[str, ...]) -> None:
    manager = bed.hosts[0]
    clients = [(host, run_container(host, network)) for host in bed.hosts]
    for host, client in clients:
        wait_until("the VIP", lambda h=host, c=client: not answered(h, c, service, 1)["failed"])  # type: ignore[misc]
    script = LOAD.format(seconds=40, name=service)
    loads = [
        host.spawn("docker", "exec", client, "sh", "-c", script, stdout=subprocess.PIPE)
        for host, client in clients
    ]
    running = ("service", "ps", "-q", "-f", "desired-state=running", service)
    before = set(manager.docker(*running).split())
    manager.docker("service", "update", "-d", "--force", *update, service)
    results = [load.communicate(timeout=patience(100))[0].split() for load in loads]
    assert not before & set(manager.docker(*running).split()), "the update took too long"
    for (host, _), (done, failed) in zip(clients, results, strict=True):
        assert int(done) > 20, host.engine
        assert failed == "0", (host.engine, done, failed)


def test_a_rolling_update_of_local_tasks_fails_no_request(bed: Bed, manager: Host) -> None:
    """During a rolling update of a global service, whose host has no task for a while, and of a
    replicated one that starts the new task first, no request fails."""
    network = make_network(manager, "-o", "balance=local")
    one = global_service(bed, network, NGINX, *HEALTHY)
    _update_under_load(bed, network, one, ("--update-delay", "1s"))
    two = make_service(manager, network, NGINX, *HEALTHY, replicas=4)
    _update_under_load(bed, network, two, ("--update-order", "start-first"))


def test_a_rolling_update_with_sticky_clients_fails_no_request(bed: Bed, manager: Host) -> None:
    """The same with balance=source: a client changes its task when this one leaves."""
    network = make_network(manager, "-o", "balance=source")
    service = make_service(manager, network, NGINX, *HEALTHY, replicas=3)
    _update_under_load(bed, network, service, ("--update-order", "start-first"))
