"""Networks of Docker's bridge driver on real engines: what moves, and that nothing else changes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience
from testbed.process import CommandError, run
from tests.swarm import busy
from tests.swarm.conftest import (
    LIBRARY,
    REDIS,
    address,
    make_network,
    make_service,
    remove_containers,
    run_container,
    unique,
)

BUSY = "-t get -n 100000000 -c 2 -q"
LABEL = ("--label", "freeflow.accelerate=on")


def make_bridge(host: Host, *options: str) -> str:
    """A network of the bridge driver; its name."""
    name = unique("bridge")
    host.docker("network", "create", *options, name)
    return name


@contextmanager
def bridge(host: Host, *options: str) -> Iterator[str]:
    """The same, removed at the end with its containers."""
    name = make_bridge(host, *options)
    try:
        yield name
    finally:
        # Also after a failure: later scenarios would find the network in status.
        on_it = host.docker("ps", "-aq", "--filter", f"network={name}").split()
        if on_it:
            host.docker("rm", "-f", *on_it)
        host.docker("network", "rm", name)


def paths(host: Host, remote: str) -> list[tuple[str, str]]:
    """Path and reason of this host's connections to a port or an address and port."""
    listed = json.loads(host.freeflow("connections", "--json"))["connections"]
    return [(one["path"], one["reason"] or "") for one in listed if one["remote"].endswith(remote)]


def listed(host: Host, network: str) -> Any:
    """What status says of a network, None without it. The engine may have removed another one a
    moment ago, which is listed until the plugin has heard of that.
    """
    rows = host.status()["other_networks"]
    return next((row for row in rows if row["name"] == network), None)


def check_gains(host: Host, network: str, client: str, line: str) -> None:
    """`freeflow status` shows a network with this in its first line, and two connections or more in
    shared memory; `freeflow connections` lists those of the client.
    """
    text = host.freeflow("status", check=False)
    shown = text.partition(f"\nnetwork {network}  ")[2].partition("\nnetwork ")[0]
    assert line in shown.splitlines()[0], text
    moved = re.search(r"connections: (\d+) on shm", shown)
    assert moved is not None, text
    assert int(moved[1]) >= 2, text
    rows = host.freeflow("connections").splitlines()
    assert sum(client in row and " shm" in row for row in rows) >= 2, rows


@contextmanager
def busy_program(host: Host, client: str, command: str) -> Iterator[None]:
    """A program in a container, which must not end by itself."""
    load = host.spawn("docker", "exec", client, *shlex.split(command))
    try:
        yield
        assert load.poll() is None
    finally:
        # `docker exec` leaves its program behind.
        host.exec(client, "pkill", command.split()[0], check=False)
        load.kill()
        load.wait(patience(20))


@contextmanager
def benchmark(host: Host, client: str, target: str, port: int = 6379) -> Iterator[None]:
    """Two connections of redis-benchmark that stay busy."""
    with busy_program(host, client, f"redis-benchmark {BUSY} -h {target} -p {port}"):
        yield


def answers(host: Host, client: str, target: str, port: int = 6379) -> bool:
    ping = ("timeout", "2", "redis-cli", "-h", target, "-p", str(port), "ping")
    return "PONG" in host.exec(client, *ping, check=False)


def wait_answer(host: Host, client: str, target: str, port: int = 6379) -> None:
    """Wait until a redis answers a client's container."""
    wait_until(f"redis on {host.engine}", lambda: answers(host, client, target, port), 60)


def wait_shared(host: Host, port: int = 6379) -> None:
    """Wait until both connections of a benchmark are in shared memory.

    Raises:
        AssertionError: they are not; it has the connections with their reasons, and the networks.
    """
    last: list[tuple[str, str]] = []

    def shared() -> bool:
        last[:] = paths(host, f":{port}")
        return last.count(("shm", "")) >= 2

    try:
        wait_until(f"shared memory on {host.engine}", shared, 60)
    except TimeoutError as error:
        networks = host.status()["other_networks"]
        raise AssertionError(f"{error}\nconnections: {last}\nnetworks: {networks}") from error


def start_pair(host: Host, network: str, *options: str) -> tuple[str, str]:
    """A redis and its client on a network, both with the library; their names."""
    server = run_container(host, network, *LIBRARY, *options, command=REDIS)
    client = run_container(host, network, *LIBRARY)
    return server, client


def test_a_labelled_bridge_is_accelerated(bed: Bed) -> None:
    """On each engine connections between two containers of a labelled bridge move to shared memory,
    and status shows the network with what they gain.
    """
    for host in bed.hosts[:3]:
        with bridge(host, *LABEL) as network:
            server, client = start_pair(host, network)
            wait_answer(host, client, server)
            with benchmark(host, client, server):
                wait_shared(host)
                row = listed(host, network)
                assert row["driver"] == "bridge"
                assert set(row["containers"]) == {server, client}
                line = f"bridge, {row['subnets'][0]}, accelerated within this host"
                check_gains(host, network, client, line)


def test_other_bridges_stay_as_they_are(manager: Host) -> None:
    """Connections on a bridge without the label, or with the label off, stay on TCP and unlisted;
    one whose containers may not reach each other is named with the reason.
    """
    for options in ((), ("--label", "freeflow.accelerate=off")):
        with bridge(manager, *options) as network:
            server, client = start_pair(manager, network)
            wait_answer(manager, client, server)
            with benchmark(manager, client, server):
                assert paths(manager, ":6379") == []
            assert listed(manager, network) is None
    icc = ("-o", "com.docker.network.bridge.enable_icc=false")
    with bridge(manager, *LABEL, *icc) as network:
        server, client = start_pair(manager, network)
        row = wait_until("the reason", lambda: listed(manager, network), 20)
        assert "may not reach each other" in row["reason"]
        assert not answers(manager, client, server)


def test_published_ports(manager: Host) -> None:
    """A connection to a published port by the host's address works as before, on TCP: through
    docker-proxy, translated, and back to the container itself.
    """
    with bridge(manager, *LABEL) as network:
        server, client = start_pair(manager, network, "--publish", "16379:6379")
        host = str(manager.address)
        gateway = manager.docker(
            *("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", network)
        ).strip()
        wait_answer(manager, client, host, 16379)
        for target in (host, gateway):
            for box in (client, server):
                with benchmark(manager, box, target, 16379):
                    found = wait_until("them", lambda: paths(manager, ":16379"), 20)
                    assert {path for path, _ in found} == {"bridge"}


def test_what_the_firewall_drops(manager: Host) -> None:
    """Rules of the host between two containers of a bridge hold, and those of connections that
    exist too, as long as they are on TCP.
    """
    with bridge(manager, *LABEL) as network:
        server, client = start_pair(manager, network)
        wait_answer(manager, client, server)
        rule = ("DOCKER-USER", "-p", "tcp", "--dport", "6379", "-j", "DROP")
        manager.run("iptables", "-I", *rule)
        try:
            assert not answers(manager, client, server)
        finally:
            manager.run("iptables", "-D", *rule)
        assert answers(manager, client, server)


def test_an_internal_network(manager: Host) -> None:
    """An internal bridge is accelerated, and leads nowhere else."""
    with bridge(manager, *LABEL, "--internal") as network:
        server, client = start_pair(manager, network)
        wait_answer(manager, client, server)
        with benchmark(manager, client, server):
            wait_shared(manager)
        outside = ("timeout", "2", "redis-cli", "-h", "192.168.77.254", "ping")
        assert "PONG" not in manager.exec(client, *outside, check=False)


def test_between_two_bridges(bed: Bed) -> None:
    """Two labelled bridges stay apart, and where the firewall lets a connection through from one to
    the other, it stays on TCP.
    """
    # Later engines let nothing of the kind through.
    host = next(each for each in bed.hosts if each.engine.startswith("26"))
    with bridge(host, *LABEL) as one, bridge(host, *LABEL) as other:
        server = run_container(host, one, *LIBRARY, command=REDIS)
        client = run_container(host, other, *LIBRARY)
        wait_answer(host, run_container(host, one), server)
        target = address(host, server, one)
        assert not answers(host, client, target)
        host.run("iptables", "-I", "DOCKER-USER", "-j", "ACCEPT")
        try:
            wait_answer(host, client, target)
            with benchmark(host, client, target):
                found = wait_until("them", lambda: paths(host, f"{target}:6379"), 20)
                assert set(found) == {("bridge", "foreign")}
        finally:
            host.run("iptables", "-D", "DOCKER-USER", "-j", "ACCEPT")


def test_equal_bridges_of_two_hosts(bed: Bed) -> None:
    """Two hosts have bridges with the same subnet, and containers with the same address. A
    connection from one to the other's published port works, and stays on TCP at both ends.
    """
    near, far = bed.hosts[:2]
    same = (*LABEL, "--subnet", "172.31.250.0/24")
    with bridge(near, *same) as here, bridge(far, *same) as there:
        server = run_container(far, there, *LIBRARY, "--publish", "16380:6379", command=REDIS)
        client = run_container(near, here, *LIBRARY)
        assert address(far, server, there) == address(near, client, here)
        wait_answer(near, client, str(far.address), 16380)
        with benchmark(near, client, str(far.address), 16380):
            for host, end in ((near, "remote"), (far, "local")):
                port = ":16380" if host is near else ":6379"

                def found(host: Host = host, end: str = end, port: str = port) -> set[str]:
                    listed = json.loads(host.freeflow("connections", "--json"))["connections"]
                    return {one["path"] for one in listed if one[end].endswith(port)}

                assert wait_until("connections", found, 20) == {"bridge"}


def test_the_same_subnet_again(manager: Host) -> None:
    """A network that is made again with the same name and subnet is accelerated as the new one that
    it is.
    """
    for _ in range(2):
        network = "again"
        manager.docker("network", "create", *LABEL, "--subnet", "172.31.251.0/24", network)
        try:
            server, client = start_pair(manager, network)
            wait_answer(manager, client, server)
            with benchmark(manager, client, server):
                wait_shared(manager)
                wanted = manager.docker("network", "inspect", "-f", "{{.Id}}", network).strip()
                assert listed(manager, network)["id"] == wanted
        finally:
            manager.docker("rm", "-f", *manager.docker("ps", "-aq").split())
            manager.docker("network", "rm", network)


def test_dockers_overlay(manager: Host) -> None:
    """On a labelled overlay of Docker's, connections to a container's name, to `tasks.NAME` and to
    a service without a VIP (dnsrr) move, within one host, and status shows what it gains; those to
    a VIP stay on TCP and work.
    """
    name = make_network(manager, *LABEL, driver="overlay")
    server, client = start_pair(manager, name)
    wait_answer(manager, client, server)
    with benchmark(manager, client, server):
        wait_shared(manager)
        line = f"overlay, {listed(manager, name)['subnets'][0]}, accelerated within and between"
        check_gains(manager, name, client, line)
    here = ("--constraint", f"node.hostname=={manager.name}")
    service = make_service(manager, name, REDIS, *LIBRARY, *here, replicas=1)
    wait_answer(manager, client, f"tasks.{service}")
    with benchmark(manager, client, f"tasks.{service}"):
        wait_shared(manager)
    by_dns = (*here, "--endpoint-mode", "dnsrr")
    without_vip = make_service(manager, name, REDIS, *LIBRARY, *by_dns, replicas=1)
    wait_answer(manager, client, without_vip)
    with benchmark(manager, client, without_vip):
        wait_shared(manager)
    # Not every kernel has IPVS, which overlay's VIPs need.
    if Path("/proc/net/ip_vs").exists():
        wait_answer(manager, client, service)
        with benchmark(manager, client, service):
            found = wait_until("connections", lambda: paths(manager, ":6379"), 20)
            assert set(found) == {("overlay", "balanced")}


def test_a_macvlan_network_of_the_swarm(bed: Bed, manager: Host) -> None:
    """A Swarm's macvlan network has the label of each host's own configuration: its connections
    move, on a manager and on a worker. Docker takes no label of the network itself.
    """
    hosts = (manager, bed.hosts[1])
    name, configuration = unique("lan"), unique("lan-here")
    used = ("-d", "macvlan", "--scope", "swarm", "--attachable", "--config-from", configuration)
    for number, host in enumerate(hosts):
        host.docker(
            *("network", "create", "--config-only", *LABEL, "--subnet", "172.29.0.0/16"),
            *("--ip-range", f"172.29.{number}.0/24", "-o", "parent=eth0", configuration),
        )
    manager.docker("network", "create", *used, name)
    try:
        with pytest.raises(CommandError):
            manager.docker("network", "create", *used, *LABEL, f"{name}-labelled")
        for host in hosts:
            server, client = start_pair(host, name)
            wait_answer(host, client, server)
            with benchmark(host, client, server):
                wait_shared(host)
                line = "macvlan, 172.29.0.0/16, accelerated within this host"
                check_gains(host, name, client, line)
            assert listed(host, configuration) is None
    finally:
        for host in hosts:
            remove_containers(host)
        # A network can't be removed while a host still has the one that uses it.
        for host, network in ((manager, name), *((host, configuration) for host in hosts)):
            wait_until(
                f"{network} to be removed",
                lambda host=host, network=network: host.docker("network", "rm", network),  # type: ignore[misc]
            )


def test_a_container_leaves_the_network(manager: Host) -> None:
    """A container that is disconnected loses its connections there, in shared memory too, and its
    address is another's when that gets it.
    """
    with bridge(manager, *LABEL) as network:
        server, client = start_pair(manager, network)
        wait_answer(manager, client, server)
        with benchmark(manager, client, server):
            wait_shared(manager)
            manager.docker("network", "disconnect", network, server)
            wait_until("TCP", lambda: ("shm", "") not in paths(manager, ":6379"), 20)
        assert not answers(manager, client, server)
        other = run_container(manager, network, *LIBRARY, command=REDIS)
        wait_answer(manager, client, other)
        with benchmark(manager, client, other):
            wait_shared(manager)


def test_with_the_runtime(manager: Host) -> None:
    """The runtime gives the library to containers on a labelled bridge, and to no others."""
    manager.freeflow("runtime", "install", "--default")
    words = ("run", "--rm", WORKLOAD_IMAGE, "sh", "-c", "echo [$LD_PRELOAD]")
    try:
        with bridge(manager, *LABEL) as network:
            for _ in range(2):
                said = manager.docker(words[0], words[1], "--network", network, *words[2:])
                assert "libfreeflow.so" in said
        with bridge(manager) as network:
            said = manager.docker(words[0], words[1], "--network", network, *words[2:])
            assert said.strip() == "[]"
    finally:
        manager.freeflow("runtime", "uninstall")


APPLICATION = """
version: "3.8"
services:
  cache:
    image: workload:latest
    command: redis-server --bind 0.0.0.0 --protected-mode no --save ""
  web:
    image: workload:latest
    command: sh -c "echo page >/var/www/html/index.html; exec nginx -g 'daemon off;'"
  database:
    image: workload:latest
    command:
      - sh
      - -c
      - |
        as="setpriv --reuid=postgres --regid=postgres --clear-groups"
        bin=$$(ls -d /usr/lib/postgresql/*/bin)
        install -d -o postgres /tmp/data
        $$as $$bin/initdb -A trust -D /tmp/data
        echo "host all all all trust" >>/tmp/data/pg_hba.conf
        exec $$as $$bin/postgres -D /tmp/data -h 0.0.0.0 -k /tmp
  client:
    image: workload:latest
    command: sleep infinity
    init: true
"""
ONE_LABEL = """
networks:
  default:
    labels:
      freeflow.accelerate: "on"
"""
PROGRAMS = {
    6379: f"redis-benchmark {BUSY} -h cache",
    80: "ab -k -q -n 100000000 -c 2 http://web/",
    5432: "pgbench -n -f /tmp/select -h database -U postgres -c 2 -T 100000 postgres",
}


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
def test_a_compose_application_with_one_label(manager: Host, tmp_path: Path) -> None:
    """On a host with the runtime, a compose application of redis, nginx and PostgreSQL on a plain
    bridge is as ever; with one label of its network, and nothing else, the connections of all three
    move to shared memory.
    """
    file, project = tmp_path / "docker-compose.yml", unique("compose")
    engine = f"DOCKER_HOST=unix://{manager.root}/run/docker.sock"

    def compose(*arguments: str) -> str:
        command = ("docker-compose", "-f", str(file), "-p", project, *arguments)
        return run(["env", engine, *command], timeout=180)

    def up(text: str) -> str:
        """Start the application; the client's container, from which all servers answer."""
        file.write_text(text)
        compose("up", "-d")
        client = compose("ps", "-q", "client").strip()
        manager.exec(client, "sh", "-c", "echo 'select 1;' >/tmp/select")
        ready = "redis-cli -h cache ping && curl -sf http://web/ && pg_isready -h database"
        wait_until(
            "the servers",
            lambda: "accepting" in manager.exec(client, "sh", "-c", ready, check=False),
            120,
        )
        return client

    manager.freeflow("runtime", "install", "--default")
    try:
        client = up(APPLICATION)
        with benchmark(manager, client, "cache"):
            assert paths(manager, ":6379") == []
        compose("down", "-t", "1")
        client = up(APPLICATION + ONE_LABEL)
        for port, program in PROGRAMS.items():
            with busy_program(manager, client, program):
                wait_shared(manager, port)
        assert "added by the runtime" in manager.freeflow("doctor", client, check=False)
    finally:
        compose("down", "-t", "1")
        manager.freeflow("runtime", "uninstall")


def test_the_setting_includes_networks_without_a_label(manager: Host) -> None:
    """With OTHER_NETWORKS=on connections on Docker's default network move too, which can have no
    label.
    """
    busy.configure((manager,), {"OTHER_NETWORKS": "on"})
    try:
        server, client = start_pair(manager, "bridge")
        target = address(manager, server, "bridge")
        wait_answer(manager, client, target)
        with benchmark(manager, client, target):
            wait_shared(manager)
        assert set(listed(manager, "bridge")["containers"]) == {server, client}
    finally:
        remove_containers(manager)
        busy.configure((manager,), {"OTHER_NETWORKS": "off"})


@pytest.mark.parametrize("what", ["plugin", "engine"])
def test_restarts(manager: Host, what: str) -> None:
    """After a restart of the plugin, or of the engine, connections move again."""
    with bridge(manager, *LABEL) as network:
        server, client = start_pair(manager, network, "--restart", "always")
        manager.docker("update", "--restart", "always", client)
        wait_answer(manager, client, server)
        if what == "plugin":
            manager.docker("plugin", "disable", "-f", "freeflow:latest")
            manager.docker("plugin", "enable", "freeflow:latest")
        else:
            manager.restart_dockerd()
        wait_answer(manager, client, server)
        with benchmark(manager, client, server):
            wait_shared(manager)


def test_dockers_overlay_between_hosts(bed: Bed) -> None:
    """On a labelled overlay of Docker's, many busy connections between containers of two hosts move
    to the relays, without a wrong answer; those of an encrypted one are offered to no host.
    """
    near, far = bed.hosts[:2]
    busy.configure((near, far), busy.EASY)
    try:
        network = make_network(near, *LABEL, driver="overlay")
        server = run_container(far, network, *LIBRARY, command=REDIS)
        wait_answer(near, run_container(near, network), server)
        box = run_container(near, network, *LIBRARY, command=busy.command(server, 16))
        for host, end in ((near, box), (far, server)):
            wait_until(
                f"the relays on {host.name}",
                lambda h=host, e=end: busy.paths(h, e)["relay"] >= 16,  # type: ignore[misc]
                90,
                0.5,
            )
        busy.goes_on(near, box, "on the relays")
        assert listed(near, network)["between_hosts"]
        far.docker("network", "disconnect", "-f", network, server)
        wait_until("TCP", lambda: not busy.paths(near, box)["relay"], 30)
    finally:
        busy.configure((near, far), busy.USUAL)
    secret = make_network(near, *LABEL, "--opt", "encrypted", driver="overlay")
    run_container(near, secret, *LIBRARY)
    row = wait_until("the encrypted network", lambda: listed(near, secret), 20)
    assert not row["between_hosts"]
