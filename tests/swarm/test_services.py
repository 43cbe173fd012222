"""Services on a FreeFlow network, as on Docker's own overlay: VIP, dnsrr, DNS, TCP, UDP, ping,
scaling, updates.
"""

from __future__ import annotations

import time
from collections import Counter

from testbed import Bed, Host, promised, wait_until
from testbed.patience import within
from tests.swarm.conftest import (
    NGINX,
    REDIS,
    make_network,
    make_service,
    run_container,
    wait_running,
)


def answered(host: Host, client: str, service: str, count: int) -> Counter[str]:
    script = f"for i in $(seq {count}); do curl -s -m 5 http://{service}/ || echo failed; done"
    return Counter(host.exec(client, "sh", "-c", script).split())


def served_by(host: Host, client: str, service: str, count: int) -> set[str]:
    """Which tasks answer a client; empty if a request fails."""
    found = answered(host, client, service, count)
    return set() if found["failed"] else set(found)


def test_a_vip_reaches_every_task_of_all_hosts_evenly(bed: Bed, manager: Host) -> None:
    """A service's VIP spreads connections evenly over its tasks on all hosts, from clients on every
    engine version.
    """
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=4)
    for host in bed.hosts:
        client = run_container(host, network)
        wait_until("the VIP", lambda h=host, c=client: answered(h, c, service, 1)["failed"] == 0)  # type: ignore[misc]
        answers = answered(host, client, service, 40)
        assert answers["failed"] == 0
        assert sorted(answers.values()) == [10, 10, 10, 10], (host.engine, answers)


def test_a_client_that_starts_reaches_a_vip_at_once(bed: Bed, manager: Host) -> None:
    """A container may connect to a VIP first of all: that must not hang, on any engine."""
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=2)
    for host in bed.hosts:
        # With the first container the network comes to the host, and gossip needs a moment then, on
        # overlay too.
        first = run_container(host, network)
        promised("the VIP", lambda h=host, c=first: not answered(h, c, service, 1)["failed"], 2)  # type: ignore[misc]
        text = host.docker(
            *("run", "--rm", "--network", network, "workload:latest"),
            *(
                "curl",
                "-s",
                "-m",
                "3",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                f"http://{service}/",
            ),
        )
        assert text.strip() == "200", host.engine


def test_a_new_service_is_reached_from_a_host_without_its_tasks(bed: Bed, manager: Host) -> None:
    """The first connection to a service that is much younger than the client succeeds at once, on
    every engine.

    No API tells the client's host about the service, and frequent requests would fill the engine's
    log.
    """
    network = make_network(manager)
    clients = [(host, run_container(host, network)) for host in bed.hosts[1:]]
    time.sleep(8)
    service = make_service(
        manager, network, NGINX, "--constraint", f"node.hostname=={manager.name}", replicas=2
    )
    time.sleep(within(2))
    form = "%{http_code} %{time_connect}"
    for host, client in clients:
        command = ["curl", "-s", "-m", "5", "-o", "/dev/null", "-w", form, f"http://{service}/"]
        code, seconds = host.exec(client, *command).split()
        assert code == "200", host.engine
        assert float(seconds) < 0.9, f"{host.engine}: the first packet was lost"


def test_dns_round_robin_and_task_names(bed: Bed, manager: Host) -> None:
    """With dnsrr a service's name lists its tasks, and tasks.NAME does for any service; connections
    work to each.
    """
    network = make_network(manager)
    service = make_service(manager, network, NGINX, "--endpoint-mode", "dnsrr", replicas=3)
    client = run_container(bed.hosts[1], network)

    def listed(name: str) -> set[str]:
        text = bed.hosts[1].exec(client, "getent", "ahostsv4", name, check=False)
        return {line.split()[0] for line in text.splitlines()}

    wait_until("three addresses", lambda: len(listed(service)) == 3)
    assert listed(f"tasks.{service}") == listed(service)
    for task in listed(service):
        assert bed.hosts[1].exec(client, "curl", "-s", "-m", "3", f"http://{task}/")


def test_udp_and_ping_to_a_vip(bed: Bed, manager: Host) -> None:
    """A VIP carries UDP and answers ping."""
    network = make_network(manager)
    echo = (
        "exec python3 -c \"import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.bind(('',9000))\n"
        'while True: d,a=s.recvfrom(65535); s.sendto(d,a)"'
    )
    service = make_service(manager, network, echo, replicas=2)
    for host in bed.hosts[:3]:
        client = run_container(host, network)
        wait_until(
            "ping to the VIP",
            lambda h=host, c=client: (
                "1 received" in h.exec(c, "ping", "-c1", "-W1", service, check=False)
            ),  # type: ignore[misc]
        )
        script = (
            "import socket; s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(3);"
            f"s.connect(('{service}',9000)); s.send(b'x'*1200); print(len(s.recv(65535)))"
        )
        assert host.exec(client, "python3", "-c", script).strip() == "1200"


def test_redis_through_a_vip(bed: Bed, manager: Host) -> None:
    """A real client and a real server: what is written through the VIP is read back."""
    network = make_network(manager)
    service = make_service(manager, network, REDIS, replicas=1)
    client = run_container(bed.hosts[2], network)
    wait_until(
        "redis",
        lambda: (
            "PONG" in bed.hosts[2].exec(client, "redis-cli", "-h", service, "ping", check=False)
        ),
    )
    text = bed.hosts[2].exec(
        client, "redis-benchmark", "-h", service, "-q", "-n", "5000", "-t", "set,get"
    )
    assert "SET" in text
    assert "GET" in text


def test_scaling_is_followed_within_two_seconds(bed: Bed, manager: Host) -> None:
    """New tasks get connections, and removed ones get none two seconds after Docker knows."""
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=1)
    client = run_container(manager, network)
    wait_until("the VIP", lambda: answered(manager, client, service, 1)["failed"] == 0)
    manager.docker("service", "scale", "-d", f"{service}=4")
    wait_running(manager, service, 4)
    promised("four tasks", lambda: len(served_by(manager, client, service, 16)) == 4, 2)
    manager.docker("service", "scale", "-d", f"{service}=1")
    wait_running(manager, service, 1)
    promised("one task", lambda: len(served_by(manager, client, service, 16)) == 1, 2)


def test_a_killed_task_leaves_the_vip_within_two_seconds(bed: Bed, manager: Host) -> None:
    """A task whose container dies gets no new connections two seconds later."""
    network = make_network(manager)
    # Not at once again. But a start may fail: an engine that still removes the network before this
    # one refuses the same subnet ("Pool overlaps").
    service = make_service(manager, network, NGINX, "--restart-delay", "30s", replicas=3)
    client = run_container(bed.hosts[1], network)
    wait_until("all three", lambda: len(answered(bed.hosts[1], client, service, 9)) == 3)
    host, victim = next(
        (host, running[0])
        for host in bed.hosts
        if (running := host.docker("ps", "-q", "-f", f"name={service}").split())
    )
    host.docker("kill", victim)
    promised("two tasks", lambda: len(served_by(bed.hosts[1], client, service, 12)) == 2, 2)


def test_a_service_without_tasks_refuses(bed: Bed, manager: Host) -> None:
    """Without any task, a connection to the VIP fails at once instead of hanging."""
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=1)
    client = run_container(manager, network)
    wait_until("the VIP", lambda: answered(manager, client, service, 1)["failed"] == 0)
    vip = manager.exec(client, "getent", "hosts", service).split()[0]
    manager.docker("service", "scale", "-d", f"{service}=0")
    wait_until(
        "no tasks",
        lambda: not any(h.docker("ps", "-q", "-f", f"name={service}").strip() for h in bed.hosts),
    )
    time.sleep(within(2))
    begin = time.monotonic()
    manager.exec(client, "curl", "-s", "-m", "10", f"http://{vip}/", check=False)
    assert time.monotonic() - begin < within(4)


def test_a_service_update_adds_and_removes_a_network(bed: Bed, manager: Host) -> None:
    """`service update --network-add` and `--network-rm` work."""
    first, second = make_network(manager), make_network(manager)
    service = make_service(manager, first, NGINX, replicas=2)
    client = run_container(manager, second)
    manager.docker("service", "update", "-d", "--network-add", second, service)
    wait_until(
        "the VIP on the second network",
        lambda: answered(manager, client, service, 1)["failed"] == 0,
        60,
    )
    manager.docker("service", "update", "-d", "--network-rm", first, service)
    wait_running(manager, service, 2)
    wait_until(
        "the VIP afterwards", lambda: answered(manager, client, service, 4)["failed"] == 0, 60
    )
