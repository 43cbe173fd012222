"""Networks of Docker's bridge driver on real engines: what moves, and that nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience
from tests.swarm import busy
from tests.swarm.conftest import (
    LIBRARY,
    REDIS,
    make_network,
    make_service,
    run_container,
    unique,
)

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
    yield name
    on_it = host.docker("ps", "-aq", "--filter", f"network={name}").split()
    if on_it:
        host.docker("rm", "-f", *on_it)
    host.docker("network", "rm", name)


def paths(host: Host, remote: str) -> list[tuple[str, str]]:
    """Path and reason of this host's connections to a port or an address and port."""
    listed = json.loads(host.freeflow("connections", "--json"))["connections"]
    return [(one["path"], one["reason"] or "") for one in listed if one["remote"].endswith(remote)]


@contextmanager
def benchmark(host: Host, client: str, target: str, port: int = 6379) -> Iterator[None]:
    """Two connections of redis-benchmark that stay busy."""
    load = host.spawn(
        *("docker", "exec", client, "redis-benchmark", "-h", target, "-p", str(port)),
        *("-t", "get", "-n", "100000000", "-c", "2", "-q"),
    )
    try:
        yield
        assert load.poll() is None
    finally:
        load.kill()
        load.wait(patience(20))


def answers(host: Host, client: str, target: str, port: int = 6379) -> bool:
    ping = ("timeout", "2", "redis-cli", "-h", target, "-p", str(port), "ping")
    return "PONG" in host.exec(client, *ping, check=False)


def wait_answer(host: Host, client: str, target: str, port: int = 6379) -> None:
    """Wait until a redis answers a client's container."""
    wait_until(f"redis on {host.engine}", lambda: answers(host, client, target, port), 60)


def wait_shared(host: Host) -> None:
    """Wait until both connections of a benchmark are in shared memory."""

    def shared() -> bool:
        return paths(host, ":6379").count(("shm", "")) >= 2

    wait_until(f"shared memory on {host.engine}", shared, 60)


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
                (listed,) = host.status()["other_networks"]
                assert (listed["name"], listed["driver"]) == (network, "bridge")
                assert set(listed["containers"]) == {server, client}
                text = host.freeflow("status", check=False)
                assert f"network {network}" in text
                assert " on bridge" in text


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
            assert manager.status()["other_networks"] == []
    icc = ("-o", "com.docker.network.bridge.enable_icc=false")
    with bridge(manager, *LABEL, *icc) as network:
        server, client = start_pair(manager, network)
        (listed,) = wait_until("the reason", lambda: manager.status()["other_networks"], 20)
        assert "may not reach each other" in listed["reason"]
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


def test_dockers_overlay(manager: Host) -> None:
    """On a labelled overlay of Docker's, connections to a container's name move, within one host;
    those to a VIP stay on TCP and work.
    """
    name = make_network(manager, *LABEL, driver="overlay")
    server, client = start_pair(manager, name)
    wait_answer(manager, client, server)
    with benchmark(manager, client, server):
        wait_shared(manager)
    here = ("--constraint", f"node.hostname=={manager.name}")
    service = make_service(manager, name, REDIS, *LIBRARY, *here, replicas=1)
    wait_answer(manager, client, service)
    with benchmark(manager, client, service):
        found = wait_until("connections", lambda: paths(manager, ":6379"), 20)
        assert {path for path, _ in found} == {"overlay"}
    with benchmark(manager, client, f"tasks.{service}"):
        wait_shared(manager)


def test_a_container_leaves_the_network(manager: Host) -> None:
    """A container that is disconnected loses its connections there, and its address is another's
    when that gets it.
    """
    with bridge(manager, *LABEL) as network:
        server, client = start_pair(manager, network)
        wait_answer(manager, client, server)
        with benchmark(manager, client, server):
            wait_shared(manager)
        manager.docker("network", "disconnect", network, server)
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
        wait_until("the relays", lambda: busy.paths(near, box)["relay"] >= 16, 90, 0.5)
        assert busy.paths(far, server)["relay"] >= 16
        busy.goes_on(near, box, "on the relays")
        (listed,) = near.status()["other_networks"]
        assert listed["between_hosts"]
        far.docker("network", "disconnect", "-f", network, server)
        wait_until("TCP", lambda: not busy.paths(near, box)["relay"], 30)
    finally:
        busy.configure((near, far), busy.USUAL)
    secret = make_network(near, *LABEL, "--opt", "encrypted", driver="overlay")
    run_container(near, secret, *LIBRARY)

    def known() -> list[bool]:
        found = near.status()["other_networks"]
        return [each["between_hosts"] for each in found if each["name"] == secret]

    assert wait_until("the encrypted network", known, 20) == [False]
