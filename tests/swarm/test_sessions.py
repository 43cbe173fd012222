"""Sessions with the certificates of real engines, read where the plugin reads them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from testbed import Bed, Host, wait_until
from tests.session_probe import Probe
from tests.swarm.conftest import make_network, run_container

PORT: Final = 4999
"""Another port than the router's."""


class HostProbe(Probe):
    """A probe inside a host's plugin."""

    def __init__(self, host: Host, hosts: list[Host], folder: Path) -> None:
        self.host = host

        def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            inside = ["nsenter", f"--target={host.plugin_pids()[0]}"]
            inside += ["--mount", "--net", "--pid", "--root", "--wd"]
            return subprocess.Popen([*inside, *command], **options)

        peers = [other.address for other in hosts if other is not host]
        super().__init__(host.name, folder, start, "/host/swarm", PORT, host.address, *peers)


@pytest.fixture
def probes(bed: Bed, tmp_path: Path) -> Iterator[list[HostProbe]]:
    """One probe on each host, each of which wants sessions with all others."""
    made = [HostProbe(host, bed.hosts, tmp_path) for host in bed.hosts]
    yield made
    for probe in made:
        probe.end()


def joined(probes: list[HostProbe]) -> bool:
    return all(
        probe.hears(*(other.host.address for other in probes if other is not probe))
        for probe in probes
    )


def node_of(host: Host) -> str:
    return host.docker("info", "-f", "{{.Swarm.NodeID}}").strip()


def wait_joined(what: str, probes: list[HostProbe], timeout: float = 30) -> None:
    try:
        wait_until(f"sessions {what}", lambda: joined(probes), timeout)
    except TimeoutError as error:
        words = {probe.host.name: probe.says() for probe in probes}
        raise AssertionError(f"{error}: {json.dumps(words, indent=1)}") from error


def routers_with_sessions(host: Host) -> set[str]:
    """The addresses of the hosts with which a host's router reports a session."""
    peers = host.status()["router"]["rdma"]["hosts"]
    return {peer["address"] for peer in peers if peer["session"]}


def listens(host: Host) -> bool:
    return ":4799 " in host.run("ss", "-Hltn")


def test_routers_of_the_plugin(bed: Bed, manager: Host) -> None:
    """The routers of hosts that share a network have sessions, whatever their engines; on a host
    without a shared network the port is closed.
    """
    assert not any(listens(host) for host in bed.hosts)
    network = make_network(manager)
    sharing = [bed.hosts[0], bed.hosts[1], bed.hosts[3]]
    boxes = [(host, run_container(host, network)) for host in sharing]
    for host in sharing:
        others = {str(other.address) for other in sharing if other is not host}
        wait_until(
            f"the sessions of {host.name}",
            lambda h=host, o=others: routers_with_sessions(h) == o,  # type: ignore[misc]
            30,
        )
    assert not listens(bed.hosts[2])
    for host, box in boxes:
        host.docker("rm", "-f", box)
    for host in sharing:
        wait_until(f"{host.name} to be quiet", lambda h=host: not listens(h), 30)  # type: ignore[misc]


ROLES: Final = ("manager", "manager", "manager", "worker")
"""The roles of the probes' nodes, at the beginning and at the end."""


def has_role(probe: HostProbe, manager: Host, role: str) -> bool:
    """Whether a probe's identity is its node's certificate for a role in the manager's Swarm."""
    cluster = manager.docker("info", "-f", "{{.Swarm.Cluster.ID}}").strip()
    said = probe.says()
    identity = (said["node"], said["cluster"], said["role"])
    return identity == (node_of(probe.host), cluster, f"swarm-{role}")


def change_roles(manager: Host, probes: list[HostProbe]) -> None:
    """Another role is another certificate."""
    probe = probes[1]
    node = node_of(probe.host)
    manager.docker("node", "demote", node)
    wait_until("a worker", lambda: has_role(probe, manager, "worker"), 30)
    wait_joined("of a worker", probes)
    manager.docker("node", "promote", node)
    wait_until("a manager", lambda: has_role(probe, manager, "manager"), 30)
    wait_joined("of a manager", probes)


def lock_and_unlock(manager: Host, probes: list[HostProbe]) -> None:
    """A locked Swarm encrypts its managers' keys, and no worker's."""
    manager.docker("swarm", "update", "--autolock=true")
    for probe in probes[:3]:
        wait_until(
            f"{probe.host.name} to be locked",
            lambda p=probe: "autolocked" in p.says()["reason"],  # type: ignore[misc]
            30,
        )
    assert has_role(probes[3], manager, "worker")
    manager.docker("swarm", "update", "--autolock=false")
    wait_joined("of an unlocked Swarm", probes, 45)


def leave_and_join(manager: Host, probes: list[HostProbe]) -> None:
    """A host that leaves has no identity; when it joins again it has another one."""
    last = probes[3]
    node = node_of(last.host)
    token = manager.docker("swarm", "join-token", "-q", "worker").strip()
    last.host.docker("swarm", "leave")
    wait_until("no identity", lambda: "join it to one" in last.says()["reason"], 15)
    assert last.says()["node"] == ""
    last.host.docker(
        *("swarm", "join", "--advertise-addr", str(last.host.address)),
        *("--token", token, f"{manager.address}:2377"),
    )
    assert node_of(last.host) != node
    wait_until("the new identity", lambda: has_role(last, manager, "worker"), 15)
    wait_joined("of a new node", probes, 45)
    manager.docker("node", "rm", "--force", node)


def replace_root(manager: Host, probes: list[HostProbe]) -> None:
    """Each node gets a certificate of the new root, one after the other, and then trusts that
    alone.
    """
    begun = [probe.says()["begun"] for probe in probes]
    root = manager.docker("swarm", "ca")
    manager.docker("swarm", "ca", "--rotate", "--quiet", timeout=120)
    assert manager.docker("swarm", "ca") != root
    for probe, before in zip(probes, begun, strict=True):
        wait_until("new sessions", lambda p=probe, b=before: p.says()["begun"] > b, 30)  # type: ignore[misc]
    wait_joined("of the new root", probes, 45)


def test_a_life_of_certificates(bed: Bed, manager: Host, probes: list[HostProbe]) -> None:
    """Whatever happens to a node, its identity is the engine's certificate, and sessions are
    restored.

    Managers and a worker, engines old and new; demoted and promoted; the Swarm locked and unlocked;
    left and joined again; the root certificate replaced.
    """
    begin = time.monotonic()
    wait_joined("of all", probes)
    for probe, role in zip(probes, ROLES, strict=True):
        assert has_role(probe, manager, role)
        assert probe.says()["reason"] == ""
    for step in (change_roles, lock_and_unlock, leave_and_join, replace_root):
        step(manager, probes)
        print(f"{time.monotonic() - begin:5.1f} s: {step.__name__}")
    for probe, role in zip(probes, ROLES, strict=True):
        assert has_role(probe, manager, role)
    assert not [
        said for probe in probes for said in probe.all() if "can't be used" in said["reason"]
    ]
    # Later scenarios start tasks on the new node.
    bed.wait_plugin_reported()
