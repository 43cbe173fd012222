"""The router as the plugin runs it, with Docker's own containers; a process in each acts as the
library.
"""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataplane.router import library_wire as wire
from testbed import Bed, Host, wait_until
from tests.dataplane.library import Library, dial, listen
from tests.swarm.conftest import (
    REDIS,
    address,
    make_network,
    make_service,
    plugin_answers,
    run_container,
)

PORT = 7700
PLUGIN = "freeflow:latest"


def namespace(host: Host, container: str) -> Path:
    """A container's network namespace, as this process sees it."""
    key = host.inspect("inspect", container)["NetworkSettings"]["SandboxKey"]
    return Path(f"/proc/{host.pid}/root/run/docker/netns") / Path(key).name


def router_socket(host: Host) -> Path:
    return Path(f"/proc/{host.pid}/root/run/freeflow/router.sock")


def process_in(host: Host, container: str) -> tuple[Library, wire.Welcome]:
    """A process of a container that the router has welcomed."""
    library = Library.connect(router_socket(host), namespace(host, container))
    return library, library.hear(wire.Welcome)[0]


def vip_of(manager: Host, service: str) -> str:
    """A service's first VIP."""
    (address,) = manager.inspect("service", "inspect", service)["Endpoint"]["VirtualIPs"]
    return str(address["Addr"]).partition("/")[0]


def pair(host: Host, client: str, server: str, to: str, port: int = PORT) -> tuple[str, str]:
    """What both ends of a new connection receive: the kinds of the answers, or the refusal's
    reason.
    """
    (one, _), (other, _) = process_in(host, client), process_in(host, server)
    listener = listen(namespace(host, server), "0.0.0.0", port)
    try:
        connection = dial(namespace(host, client), to, port)
        accepted, _ = listener.accept()
        one.ask(connection)
        other.ask(accepted)
        (grant, memory), (answer, _) = one.hear(wire.Grant), other.hear(wire.Grant)
        assert memory is not None
        assert grant.incarnation == answer.incarnation
        listed = json.loads(host.freeflow("connections", "--json"))["connections"]
        ends = [connection for connection in listed if connection["path"] == "shm"]
        return ends[0]["container"], ends[1]["container"]
    finally:
        listener.close()


@pytest.fixture
def both_engines(bed: Bed) -> list[Host]:
    """A host of the newest engine and one of the oldest, because they make namespaces at different
    moments.
    """
    return [bed.hosts[0], bed.hosts[1]]


def test_containers_of_one_host(both_engines: list[Host], manager: Host) -> None:
    """Two containers that have just started are paired, on every engine, and the command names
    them.
    """
    network = make_network(manager)
    for host in both_engines:
        one, other = run_container(host, network), run_container(host, network)
        target = address(host, other, network)
        assert set(pair(host, one, other, target)) == {one, other}


def test_behind_a_vip(manager: Host) -> None:
    """A client of a service's VIP is paired with the task to which its connection leads."""
    network = make_network(manager)
    node = manager.docker("info", "-f", "{{.Name}}").strip()
    service = make_service(
        manager, network, REDIS, "--constraint", f"node.hostname=={node}", replicas=1
    )
    task = manager.docker("ps", "-q", "--filter", f"name={service}").strip()
    client = run_container(manager, network)
    vip = vip_of(manager, service)
    wait_until("the VIP", lambda: _connects(manager, client, vip), 20)
    assert len(set(pair(manager, client, task, vip))) == 2


def _connects(host: Host, client: str, to: str, port: int = 6379) -> bool:
    try:
        dial(namespace(host, client), to, port).close()
    except OSError:
        return False
    return True


def test_a_peer_on_another_host(bed: Bed, manager: Host) -> None:
    """A request for a connection to another host's container, where the hosts have no RDMA, waits
    for company on the relays, and the list gives the reason: only this end has sent one.
    """
    network = make_network(manager)
    one, other = run_container(manager, network), run_container(bed.hosts[1], network)
    target = address(bed.hosts[1], other, network)
    listener = listen(namespace(bed.hosts[1], other), "0.0.0.0", PORT)
    connections: list[socket.socket] = []

    def connected() -> bool:
        try:
            connections.append(dial(namespace(manager, one), target, PORT))
        except OSError:
            return False
        return True

    wait_until("the other host", connected, 20)
    there = str(bed.hosts[1].address)

    def linked() -> bool:
        hosts = json.loads(manager.freeflow("status", "--json"))["router"]["rdma"]["hosts"]
        links = {peer["address"]: (peer["link"], peer["transport"]) for peer in hosts}
        return links.get(there) == ("up", "relay")

    wait_until("a link over TCP", linked, 60)
    library, _ = process_in(manager, one)
    library.ask(connections[0])

    def waits() -> bool:
        listed = json.loads(manager.freeflow("connections", "--json"))["connections"]
        reasons = {each["reason"] for each in listed if each["container"] == one}
        # The leader knows that the other end has sent no request.
        return reasons in ({"peer-short"}, {"few"})

    wait_until("the request", waits, 20)
    listener.close()


def test_a_network_without_acceleration(manager: Host) -> None:
    """With -o acceleration=off the router tells processes to send no requests."""
    network = make_network(manager, "-o", "acceleration=off")
    _, welcome = process_in(manager, run_container(manager, network))
    assert not welcome.enabled


def test_what_containers_see(manager: Host) -> None:
    """Every user of a container with the mount reaches the router, and can change nothing there."""
    network = make_network(manager)
    mount = "type=bind,src=/run/freeflow,dst=/run/freeflow"
    box = run_container(manager, network, "--mount", mount, "--user", "1000:1000")
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); "
        "s.connect('/run/freeflow/router.sock'); print('reached')"
    )
    assert manager.exec(box, "python3", "-c", code).strip() == "reached"
    root = run_container(manager, network, "--mount", mount)
    for command in ("touch /run/freeflow/x", "rm /run/freeflow/router.sock"):
        said = manager.exec(root, "sh", "-c", f"{command} 2>&1 || true")
        assert "Read-only file system" in said, command
    assert (
        manager.exec(box, "sh", "-c", "touch /run/freeflow/x 2>&1 || echo no")
        .strip()
        .endswith("no")
    )
    mode = router_socket(manager).stat().st_mode
    assert stat.S_IMODE(mode) == 0o666


def test_doctor_of_a_container(both_engines: list[Host], manager: Host) -> None:
    """The doctor distinguishes a container with mount and variable from one without, on every
    engine.
    """
    network = make_network(manager)
    for host in both_engines:
        without = run_container(host, network)
        said = host.freeflow("doctor", without, check=False)
        assert f"{without} has no /run/freeflow" in said
        mounted = run_container(
            host,
            network,
            *("--mount", "type=bind,src=/run/freeflow,dst=/run/freeflow"),
            *("--env", "LD_PRELOAD=/run/freeflow/libfreeflow.so"),
        )
        said = host.freeflow("doctor", mounted, check=False)
        assert "ok: /run/freeflow is in the container" in said
        assert "ok: a network of it is accelerated" in said
        assert "LD_PRELOAD isn't in their environment" not in said
        assert "not checked" not in said


@pytest.fixture
def disabled(bed: Bed) -> Iterator[Host]:
    """A host whose plugin is disabled during the test."""
    host = bed.hosts[3]
    host.docker("plugin", "disable", "-f", PLUGIN)
    yield host
    if not plugin_answers(host):
        host.docker("plugin", "enable", PLUGIN)
    wait_until("the plugin", lambda: plugin_answers(host), 30)


def test_the_router_ends_with_the_plugin(bed: Bed, disabled: Host) -> None:
    """A disabled plugin leaves no router; enabled again, its router pairs older containers."""
    assert not [
        line
        for line in disabled.run("ps", "-eo", "args").splitlines()
        if "dataplane.router" in line
    ]
    assert not router_socket(disabled).exists()
    disabled.docker("plugin", "enable", PLUGIN)
    wait_until("the router", lambda: router_socket(disabled).exists(), 20)


def test_death_of_the_plugin(bed: Bed, manager: Host) -> None:
    """A killed plugin returns with a router that knows the older containers."""
    host = bed.hosts[3]
    network = make_network(manager)
    one, other = run_container(host, network), run_container(host, network)
    target = address(host, other, network)
    assert set(pair(host, one, other, target)) == {one, other}
    host.kill_plugin()
    wait_until("the plugin", lambda: plugin_answers(host), 60)

    def paired() -> bool:
        try:
            return set(pair(host, one, other, target)) == {one, other}
        except OSError:
            return False

    wait_until("the router", paired, 30)
