"""freeflow-runc on real engines: stacks that nobody has edited, and what must not break."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.process import CommandError
from tests.swarm.conftest import (
    address,
    make_network,
    plugin_answers,
    remove_containers,
    run_container,
    unique,
)

STACK = """\
version: "3.8"
services:
  cache:
    image: {image}
    command: redis-server --bind 0.0.0.0 --protected-mode no --save ""
    networks: [backend]
    deploy: &everywhere
      mode: global
  web:
    image: {image}
    command: nginx -g "daemon off;"
    networks: [backend]
    deploy: *everywhere
  db:
    image: {image}
    user: postgres
    command:
      - sh
      - -c
      - |
        PATH=$$PATH:$$(echo /usr/lib/postgresql/*/bin)
        initdb -A trust -D /tmp/db >/dev/null && echo "host all all all trust" >>/tmp/db/pg_hba.conf
        exec postgres -D /tmp/db -c listen_addresses=0.0.0.0 -c unix_socket_directories=/tmp
    networks: [backend]
    deploy: *everywhere
  clients:
    image: {image}
    command: ["sleep", "1000000"]
    networks: [backend]
    deploy: *everywhere
  without:
    image: {image}
    command: ["sleep", "1000000"]
    networks: [backend]
    labels: {{freeflow.accelerate: "off"}}
    deploy: *everywhere
networks:
  backend:
    driver: freeflow:latest
    attachable: true
"""
LOADS = {
    "cache": (6379, "redis-benchmark -h {0} -t get -n 100000000 -c 2 -q"),
    "web": (80, "ab -k -q -c 2 -n 100000000 http://{0}/index.nginx-debian.html"),
    "db": (5432, "export PGUSER=postgres; pgbench -h {0} -i -q && pgbench -h {0} -c 2 -T 1000"),
}
"""By service: its port, and a load program with two connections that ends after the test."""
LIBRARY = "/run/freeflow/libfreeflow.so"


@pytest.fixture
def default(bed: Bed) -> Iterator[None]:
    """freeflow-runc as the default runtime of every host."""
    for host in bed.hosts:
        host.freeflow("runtime", "install", "--default")
    yield
    for host in bed.hosts:
        containers = host.docker("ps", "-aq").split()
        if containers:
            host.docker("rm", "-f", *containers)
        host.freeflow("runtime", "uninstall")


def variable(host: Host, container: str) -> str:
    """LD_PRELOAD of a container's first process."""
    text = host.exec(container, "sh", "-c", "tr '\\0' '\\n' </proc/1/environ")
    return next((line[11:] for line in text.splitlines() if line.startswith("LD_PRELOAD=")), "")


def task(host: Host, service: str) -> str:
    wanted = f"label=com.docker.swarm.service.name={service}"
    return str(wait_until(service, lambda: host.docker("ps", "-q", "--filter", wanted).strip(), 60))


def shm_connections(host: Host, service: str, port: int) -> int:
    """The connections in shared memory from a service's containers to a port."""
    listed = json.loads(host.freeflow("connections", "--json"))["connections"]
    return sum(
        item["path"] == "shm"
        and item["container"].startswith(f"{service}.")
        and item["remote"].endswith(f":{port}")
        for item in listed
    )


def check_stack(host: Host, stack: str) -> None:
    """Each service of this host has its connections from this host's client in shared memory."""
    box = task(host, f"{stack}_clients")
    assert variable(host, box) == LIBRARY
    assert variable(host, task(host, f"{stack}_without")) == ""
    for service, (port, load) in LOADS.items():
        to = address(host, task(host, f"{stack}_{service}"), f"{stack}_backend")
        listens = f"nc -z {to} {port} && echo yes"
        wait_until(service, partial(host.exec, box, "sh", "-c", listens, check=False), 60)
        # By docker exec: its programs have the library, too.
        spawned = host.spawn("docker", "exec", box, "sh", "-c", load.format(to))
        try:
            on_shm = partial(shm_connections, host, f"{stack}_clients", port)
            wait_until(f"{service} on shm", lambda on_shm=on_shm: on_shm() >= 2, 60)  # type: ignore[misc]
        finally:
            host.exec(box, "pkill", "-f", to, check=False)
            spawned.kill()
            spawned.wait()
    assert "added by the runtime" in host.freeflow("doctor", box, check=False)


@pytest.mark.usefixtures("default")
def test_an_unchanged_stack_is_accelerated(bed: Bed, manager: Host) -> None:
    """Installing the runtime is all that a stack of redis, nginx and PostgreSQL on a FreeFlow
    network needs, on each engine; a service that opts out doesn't get the library.
    """
    name = unique("stack")
    text = STACK.format(image=WORKLOAD_IMAGE)
    manager.run("sh", "-c", f"cat >/root/{name}.yml", stdin=text)
    manager.docker("stack", "deploy", "-c", f"/root/{name}.yml", name)
    try:
        for host in bed.hosts[:3]:
            check_stack(host, name)
    finally:
        manager.docker("stack", "rm", name)


@pytest.mark.usefixtures("default")
def test_containers_of_every_engine(bed: Bed, manager: Host) -> None:
    """On each engine, whether systemd makes the control groups or the engine itself, a container
    gets the library at its first start and at a restart, whether the host knew the network or not;
    so do programs of docker exec.
    """
    drivers = {host.docker("info", "-f", "{{.CgroupDriver}}").strip() for host in bed.hosts}
    assert drivers == {"cgroupfs", "systemd"}
    network = make_network(manager, "--attachable")
    for host in bed.hosts:
        box = run_container(host, network)
        assert variable(host, box) == LIBRARY, host.engine
        host.docker("restart", "-t", "0", box)
        assert variable(host, box) == LIBRARY, host.engine
        assert LIBRARY in host.exec(box, "sh", "-c", "echo $LD_PRELOAD")
        out = run_container(host, network, "--label", "freeflow.accelerate=off")
        assert variable(host, out) == ""
        off = run_container(host, network, "--env", "FREEFLOW=off")
        assert variable(host, off) == ""


@pytest.mark.usefixtures("default")
def test_other_networks_and_runtimes(bed: Bed) -> None:
    """Containers on other networks, and those that name runc, start as ever."""
    for host in bed.hosts:
        for options in (
            ("--network", "bridge"),
            ("--network", "host"),
            ("--network", "none"),
            ("--runtime", "runc"),
            ("--read-only",),
            ("--cap-add", "NET_ADMIN"),
            ("--tmpfs", "/run"),
        ):
            words = ("run", "--rm", *options, WORKLOAD_IMAGE, "sh", "-c", "echo [$LD_PRELOAD]")
            assert host.docker(*words).strip() == "[]", (host.engine, options)


@contextmanager
def engine_file(host: Host, value: dict[str, Any]) -> Iterator[None]:
    """The engine restarted with these settings in daemon.json; afterwards without the file."""
    text = json.dumps(value)
    host.run("sh", "-c", "mkdir -p /etc/docker && cat >/etc/docker/daemon.json", stdin=text)
    host.restart_dockerd()
    wait_until("the plugin", lambda: plugin_answers(host), 60)
    try:
        yield
    finally:
        remove_containers(host)
        host.freeflow("runtime", "uninstall")
        host.run("rm", "-f", "/etc/docker/daemon.json")
        host.restart_dockerd()
        wait_until("the plugin", lambda: plugin_answers(host), 60)


def test_checkpoint_is_refused_by_name(bed: Bed) -> None:
    """On each engine a container with the library can't be checkpointed, says why, and runs on;
    one without it is left to runc.
    """
    for host in bed.hosts[:3]:
        network = make_network(bed.hosts[0], "--attachable")
        # Only experimental engines have the command.
        with engine_file(host, {"experimental": True}):
            host.freeflow("runtime", "install", "--default")
            box = run_container(host, network)
            with pytest.raises(CommandError) as raised:
                host.docker("checkpoint", "create", box, "one")
            assert "can't be checkpointed" in str(raised.value), host.engine
            assert "freeflow.accelerate=off" in str(raised.value), host.engine
            assert variable(host, box) == LIBRARY, host.engine
            other = run_container(host, network, "--label", "freeflow.accelerate=off")
            with pytest.raises(CommandError) as raised:
                host.docker("checkpoint", "create", other, "one")
            # runc's own answer: the engines have no CRIU.
            assert "criu" in str(raised.value), host.engine
            assert "can't be checkpointed" not in str(raised.value), host.engine


MINE = """\
#!/bin/sh
echo "$@" >>/run/mine.log
exec runc "$@"
"""


@pytest.mark.parametrize("groups", ["cgroupfs", "systemd"])
def test_a_runtime_of_the_users(bed: Bed, groups: str) -> None:
    """A default runtime of the user's own is the one that is called, also by docker exec, and is
    the default again after uninstalling. It gets the names of control groups that the engine meant
    for runc.
    """
    manager = next(host for host in bed.hosts if host.has_systemd == (groups == "systemd"))
    manager.run("sh", "-c", "cat >/usr/local/bin/mine; chmod 755 /usr/local/bin/mine", stdin=MINE)
    own = {"runtimes": {"mine": {"path": "/usr/local/bin/mine"}}, "default-runtime": "mine"}
    with engine_file(manager, own):
        manager.freeflow("runtime", "install", "--default")
        network = make_network(manager, "--attachable")
        manager.run("sh", "-c", ": >/run/mine.log")
        box = run_container(manager, network)
        assert variable(manager, box) == LIBRARY
        identifier = manager.docker("inspect", "-f", "{{.Id}}", box).strip()
        calls = [
            line.split()
            for line in manager.run("cat", "/run/mine.log").splitlines()
            if identifier in line
        ]
        assert {"create", "exec"} <= {word for line in calls for word in line}
        asked = any("--systemd-cgroup" in line for line in calls)
        assert asked == (groups == "systemd")
        own_groups = manager.exec(box, "cat", "/proc/1/cgroup")
        assert (f"docker-{identifier}.scope" in own_groups) == (groups == "systemd")
        remove_containers(manager)
        manager.freeflow("runtime", "uninstall")
        value = json.loads(manager.run("cat", "/etc/docker/daemon.json"))
        assert value == own
        assert manager.docker("info", "-f", "{{.DefaultRuntime}}").strip() == "mine"


def test_install_and_uninstall_restart_nothing(manager: Host) -> None:
    """Neither command restarts a container, and both leave the engine's other settings alone. A
    container that was made with the runtime can be started after uninstalling.
    """
    before = '{\n  "max-concurrent-downloads": 4\n}\n'
    manager.run("sh", "-c", "mkdir -p /etc/docker && cat >/etc/docker/daemon.json", stdin=before)
    network = make_network(manager, "--attachable")
    box = run_container(manager, network)
    started = manager.docker("inspect", "-f", "{{.State.StartedAt}}", box)
    manager.freeflow("runtime", "install")
    named = run_container(manager, network, "--runtime", "freeflow")
    assert variable(manager, named) == LIBRARY
    assert variable(manager, run_container(manager, network)) == ""
    manager.docker("rm", "-f", named)
    manager.freeflow("runtime", "install", "--default")
    with_it = run_container(manager, network)
    assert variable(manager, with_it) == LIBRARY
    said = manager.freeflow("runtime", "uninstall")
    assert with_it in said
    manager.docker("restart", "-t", "0", with_it)
    assert variable(manager, with_it) == ""
    manager.docker("rm", "-f", with_it)
    manager.freeflow("runtime", "uninstall")
    assert manager.docker("inspect", "-f", "{{.State.StartedAt}}", box) == started
    value = json.loads(manager.run("cat", "/etc/docker/daemon.json"))
    assert value == {"max-concurrent-downloads": 4, "default-runtime": "runc"}
    manager.run("sh", "-c", "test ! -e /usr/local/lib/freeflow && rm /etc/docker/daemon.json")
    manager.docker("run", "--rm", WORKLOAD_IMAGE, "true")


@pytest.mark.usefixtures("default")
def test_without_the_plugin(manager: Host) -> None:
    """With the plugin disabled, containers on other networks start, and none waits for it."""
    manager.docker("plugin", "disable", "-f", "freeflow:latest")
    try:
        network = unique("plain")
        manager.docker("network", "create", network)
        words = ("run", "--rm", "--network", network, WORKLOAD_IMAGE, "echo", "well")
        assert manager.docker(*words).strip() == "well"
        manager.docker("network", "rm", network)
    finally:
        manager.docker("plugin", "enable", "freeflow:latest")
