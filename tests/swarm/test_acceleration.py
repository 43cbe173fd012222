"""Containers that preload the library, on real engines: their connections use shared memory, and
nothing else changes.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

from driver.kernel.namespace import in_netns
from testbed import Bed, Host, wait_until
from testbed.host import PLUGIN
from testbed.patience import patience
from tests.swarm.conftest import (
    LIBRARY,
    NGINX,
    REDIS,
    address,
    make_network,
    make_service,
    plugin_answers,
    run_container,
    wait_running,
)

FILE = "head -c 5000000 /dev/urandom > /var/www/html/file; "
DIGEST = "curl -sf -m 20 http://{0}/file http://{0}/file http://{0}/file | sha256sum"

CLIENT = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 6379))
count, key = 0, b"counter-%d" % time.monotonic_ns()
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    connection.sendall(b"INCR %s\\r\\n" % key)
    answer = connection.recv(100)
    if not answer:
        break
    count += 1
    assert answer == b":%d\\r\\n" % count, (answer, count)
    time.sleep(0.001)
print("over" if not answer else "right", count)
"""
"""One connection that counts in redis, and checks each answer: `ADDRESS SECONDS`."""


LOAD = """
failed=0; done=0
end=$(($(date +%s) + {seconds}))
while [ $(date +%s) -lt $end ]; do
    if curl -sf -o /dev/null -m 5 http://{name}/; then done=$((done+1)); else failed=$((failed+1)); fi
done
echo $done $failed
"""


def on(host: Host) -> tuple[str, ...]:
    """Options for a service whose tasks run on this host, accelerated."""
    return ("--constraint", f"node.hostname=={host.name}", *LIBRARY)


def connections(host: Host) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(host.freeflow("connections", "--json"))["connections"]
    return listed


def on_shm(host: Host, container: str) -> int:
    """A container's connections in shared memory."""
    return sum(
        connection["container"] == container and connection["path"] == "shm"
        for connection in connections(host)
    )


def start_client(host: Host, client: str, to: str, seconds: float) -> str:
    """Start CLIENT in a container; return the file that will contain its verdict."""
    file = f"/tmp/client-{time.monotonic_ns()}"
    script = f"python3 -c '{CLIENT}' {to} {seconds} > {file} 2>&1"
    host.docker("exec", "-d", client, "sh", "-c", script)
    return file


def verdict(host: Host, client: str, file: str, timeout: float = 20) -> str:
    """The verdict of CLIENT at its end."""
    return wait_until(
        "the end of the client", lambda: host.exec(client, "cat", file).strip(), timeout, 0.2
    )


def test_a_service_behind_its_vip(bed: Bed, manager: Host) -> None:
    """Bytes from a service's tasks on this host arrive unchanged over shared memory, on every
    engine, and doctor finds nothing.
    """
    network = make_network(manager)
    for host in bed.hosts[:3]:
        service = make_service(manager, network, FILE + NGINX, *on(host), replicas=1)
        task = host.docker("ps", "-q", "--filter", f"name={service}").strip()
        client = run_container(host, network, *LIBRARY)
        wanted = host.exec(
            task,
            "sh",
            "-c",
            "cat /var/www/html/file /var/www/html/file /var/www/html/file | sha256sum",
        )
        wait_until(
            "the VIP",
            lambda h=host, c=client, s=service: h.exec(c, "curl", "-sf", s, check=False),  # type: ignore[misc]
        )
        assert host.exec(client, "sh", "-c", DIGEST.format(service)) == wanted, host.engine
        # Long enough for a machine on which a single request takes seconds.
        script = f"curl -s --limit-rate 1M 'http://{service}/file?[1-6]' >/dev/null"
        host.docker("exec", "-d", client, "sh", "-c", script)
        wait_until("shared memory", lambda h=host, c=client: on_shm(h, c) == 1, 25, 0.1)  # type: ignore[misc]
        assert "found" not in host.freeflow("doctor", client)
        if host is manager:
            _check_page(host, client, service)


def _check_page(host: Host, client: str, service: str) -> None:
    """The page that `freeflow ui` serves has the client's connection as a line to the task."""
    serve = "echo $$; exec /usr/local/bin/freeflow ui --json --listen 127.0.0.1:9478"
    page = host.spawn("sh", "-c", serve, stdout=subprocess.PIPE)
    assert page.stdout is not None
    pid = page.stdout.readline().strip()
    try:
        link = json.loads("".join(iter(page.stdout.readline, "}\n")) + "}")["url"]
        url, _, token = link.partition("#token=")

        def get() -> Any:
            headers = {"Authorization": f"Bearer {token}"}
            request = urllib.request.Request(f"{url}snapshot", headers=headers)
            with urllib.request.urlopen(request, timeout=patience(30)) as answer:
                return json.load(answer)

        found = in_netns(Path(f"/proc/{host.pid}/ns/net"), get)
    finally:
        # Not the process here: that is nsenter, which leaves its child alone.
        host.run("kill", pid, check=False)
        page.communicate(timeout=patience(10))
    (shown,) = [each for each in found["map"]["services"] if each["name"] == service]
    (task,) = shown["tasks"]
    names = {each["key"]: each["name"] for each in found["map"]["containers"]}
    assert names[task].startswith(f"{service}.1")
    (own,) = [key for key, name in names.items() if name == client]
    ends = {own, task}
    (edge,) = [each for each in found["traffic"]["edges"] if {each["a"], each["b"]} == ends]
    assert (edge["path"], edge["connections"]) == ("shm", 1)


def test_a_rolling_update_under_load(manager: Host) -> None:
    """During an update of a service with accelerated clients no request fails, as on TCP, and each
    answer is right.
    """
    network = make_network(manager)
    service = make_service(
        manager,
        network,
        FILE + NGINX,
        *on(manager),
        *("--update-order", "start-first", "--update-delay", "1s", "--stop-grace-period", "5s"),
        *("--health-cmd", "curl -sf http://127.0.0.1/", "--health-interval", "1s"),
        replicas=2,
    )
    client = run_container(manager, network, *LIBRARY)
    wait_until("the VIP", lambda: manager.exec(client, "curl", "-sf", service, check=False))
    load = LOAD.format(seconds=25, name=service)
    manager.docker("exec", "-d", client, "sh", "-c", f"({load}) > /tmp/load")
    manager.docker("service", "update", "--force", "-d", service)
    text = wait_until("the load", lambda: manager.exec(client, "cat", "/tmp/load"), 40, 0.5)
    done, failed = map(int, text.split())
    assert done > 100
    assert failed == 0
    wait_running(manager, service, 2)


def test_the_plugin_goes_and_comes_back(bed: Bed, manager: Host) -> None:
    """A connection in shared memory continues without the plugin and after its return. New ones use
    TCP meanwhile, and shared memory again afterwards, also from older containers.
    """
    network = make_network(manager)
    host = bed.hosts[1]
    server = run_container(host, network, *LIBRARY, command=REDIS)
    client = run_container(host, network, *LIBRARY)
    other = run_container(host, network, *LIBRARY, command=REDIS)
    target, second = address(host, server, network), address(host, other, network)
    file = start_client(host, client, target, 30)
    wait_until("shared memory", lambda: on_shm(host, client) == 1, 10, 0.1)
    host.docker("plugin", "disable", "-f", PLUGIN)
    assert verdict(host, client, start_client(host, client, second, 2)).startswith("right")
    host.docker("plugin", "enable", PLUGIN)
    wait_until("the plugin", lambda: plugin_answers(host), 20)
    late = start_client(host, client, second, 8)
    wait_until("shared memory again", lambda: on_shm(host, client) >= 1, 10, 0.1)
    assert verdict(host, client, late).startswith("right")
    assert verdict(host, client, file, 40).startswith("right")
    bed.wait_plugin_reported()


def test_the_server_is_killed(manager: Host) -> None:
    """A client notices its server's death at once, as on TCP."""
    network = make_network(manager)
    server = run_container(manager, network, *LIBRARY, command=REDIS)
    client = run_container(manager, network, *LIBRARY)
    file = start_client(manager, client, address(manager, server, network), 60)
    wait_until("shared memory", lambda: on_shm(manager, client) == 1, 10, 0.1)
    manager.docker("kill", server)
    assert "over" in (said := verdict(manager, client, file, 5)) or "ConnectionReset" in said


def test_who_gets_nothing(bed: Bed, manager: Host) -> None:
    """A container without the library, one on another network, one whose network is off, and one on
    another host use TCP, and the list gives the reason.
    """
    network, off = make_network(manager), make_network(manager, "-o", "acceleration=off")
    host = bed.hosts[0]
    server = run_container(host, network, *LIBRARY, command=REDIS)
    target = address(host, server, network)
    far = run_container(bed.hosts[1], network, *LIBRARY)
    plain = run_container(host, network)
    wait_until(
        "the other host",
        lambda: "PONG" in bed.hosts[1].exec(far, "redis-cli", "-h", target, "ping", check=False),
    )
    clients = [(bed.hosts[1], far, start_client(bed.hosts[1], far, target, 3))]
    assert verdict(*clients[0]).startswith("right")
    last = start_client(host, plain, target, 10)

    def reasons() -> set[str]:
        listed = connections(host)
        assert "shm" not in {connection["path"] for connection in listed}
        return {each["reason"] for each in listed if each["container"] == server}

    wait_until("the server's connection in the list", reasons)
    assert verdict(host, plain, last).startswith("right")
    apart = run_container(host, off, *LIBRARY, command=REDIS)
    client = run_container(host, off, *LIBRARY)
    file = start_client(host, client, address(host, apart, off), 3)
    time.sleep(1.5)
    assert not on_shm(host, client)
    assert verdict(host, client, file).startswith("right")


def test_a_hardened_container(manager: Host) -> None:
    """Acceleration works with a read-only root, another user, no capabilities and no new
    privileges.
    """
    network = make_network(manager)
    server = run_container(manager, network, *LIBRARY, command=REDIS)
    client = run_container(
        *(manager, network, *LIBRARY, "--read-only", "--tmpfs", "/tmp", "--user", "1000:1000"),
        *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "64m"),
    )
    file = start_client(manager, client, address(manager, server, network), 10)
    wait_until("shared memory", lambda: on_shm(manager, client) == 1, 10, 0.1)
    assert verdict(manager, client, file).startswith("right")


def test_a_container_is_disconnected(manager: Host) -> None:
    """`docker network disconnect` stops an accelerated connection as it stops TCP."""
    network = make_network(manager)
    server = run_container(manager, network, *LIBRARY, command=REDIS)
    client = run_container(manager, network, *LIBRARY)
    start_client(manager, client, address(manager, server, network), 60)
    wait_until("shared memory", partial(on_shm, manager, client), 10, 0.1)

    def count() -> str:
        return manager.exec(server, "sh", "-c", "redis-cli info stats | grep total_commands")

    manager.docker("network", "disconnect", network, client)
    time.sleep(1)
    # redis-cli itself adds one each time.
    before = int(count().strip().rpartition(":")[2])
    time.sleep(1)
    assert int(count().strip().rpartition(":")[2]) - before < 5
