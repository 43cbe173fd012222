"""Failures on real hosts: of the plugin, the engine, the host, the underlay, the leader."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from testbed import Bed, Host, wait_until
from testbed.host import PLUGIN
from testbed.patience import patience
from tests.swarm.conftest import (
    NGINX,
    address,
    make_network,
    make_service,
    plugin_answers,
    remove_containers,
    run_container,
    wait_running,
)


def _reaches(host: Host, container: str, target: str) -> bool:
    return " 0% packet loss" in host.exec(
        container, "ping", "-c2", "-i0.2", "-W1", target, check=False
    )


def _ours(host: Host) -> list[str]:
    """FreeFlow's links on a host, in its own and in the overlay namespace."""
    text = host.run("ip", "-br", "link")
    if "overlay" in host.run("ls", "/run/freeflow-admin/netns", check=False):
        text += host.in_overlay("ip", "-br", "link")
    return [
        line.split()[0]
        for line in text.splitlines()
        if line.startswith(("ffb", "ffx", "ffh", "ffc"))
    ]


def _no_leftovers(host: Host) -> bool:
    """Whether each of a host's links to a container belongs to an endpoint in status."""
    endpoints = sum(len(network["endpoints"]) for network in host.status()["networks"])
    return len([name for name in _ours(host) if name.startswith("ffh")]) == endpoints


def test_killing_the_plugin_cuts_nothing_and_is_recovered_from(bed: Bed, manager: Host) -> None:
    """When the plugin is killed, connections continue; it restarts automatically, and new
    containers join.
    """
    network = make_network(manager)
    for host in bed.hosts[:3]:
        other = run_container(bed.hosts[3], network)
        target = address(bed.hosts[3], other, network)
        box = run_container(host, network)
        wait_until("the other", lambda h=host, b=box, t=target: _reaches(h, b, t), 15)  # type: ignore[misc]
        host.kill_plugin()
        assert _reaches(host, box, target)
        wait_until("the plugin to be back", lambda h=host: plugin_answers(h), 30)  # type: ignore[misc]
        late = run_container(host, network)
        wait_until("a new container", lambda h=host, b=late, t=target: _reaches(h, b, t), 15)  # type: ignore[misc]
        assert _reaches(host, box, target)


def test_a_service_follows_changes_after_the_plugin_was_killed(bed: Bed, manager: Host) -> None:
    """VIPs follow changes again once the plugin is back."""
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=1)
    client = run_container(bed.hosts[1], network)

    def answers() -> set[str]:
        script = f"for i in 1 2 3 4 5 6; do curl -s -m 3 http://{service}/ || echo failed; done"
        return set(bed.hosts[1].exec(client, "sh", "-c", script).split())

    wait_until("the VIP", lambda: "failed" not in answers(), 20)
    bed.hosts[1].kill_plugin()
    manager.docker("service", "scale", "-d", f"{service}=3")
    wait_running(manager, service, 3)
    wait_until("three tasks", lambda: len(answers() - {"failed"}) == 3, 30)


def test_disable_and_enable_with_containers_running(bed: Bed, manager: Host) -> None:
    """`docker plugin disable -f` leaves running containers connected; status says what to type;
    enabling recovers.
    """
    network = make_network(manager)
    host = bed.hosts[1]
    box = run_container(host, network)
    target = address(manager, run_container(manager, network), network)
    wait_until("the other", lambda: _reaches(host, box, target), 15)
    host.docker("plugin", "disable", "-f", PLUGIN)
    assert _reaches(host, box, target)
    assert "docker plugin enable" in host.freeflow("status", check=False)
    host.docker("plugin", "enable", PLUGIN)
    wait_until("the plugin", lambda: plugin_answers(host), 20)
    bed.wait_plugin_reported()
    late = wait_until("a new container", lambda: run_container(host, network), 30)
    wait_until("the other again", lambda: _reaches(host, late, target), 15)


def test_restart_of_the_engine(bed: Bed, manager: Host) -> None:
    """After a clean restart of dockerd, containers with a restart policy return and reach each
    other; no link leaks.
    """
    network = make_network(manager)
    for host in (bed.hosts[1], bed.hosts[3]):
        box = run_container(host, network, "--restart", "always")
        target = address(manager, run_container(manager, network), network)
        wait_until("the other", lambda h=host, b=box, t=target: _reaches(h, b, t), 15)  # type: ignore[misc]
        host.restart_dockerd()
        wait_until(
            "the other after the restart",
            lambda h=host, b=box, t=target: _reaches(h, b, t),  # type: ignore[misc]
            90,
            0.5,
        )


def test_kill_of_the_engine(bed: Bed, manager: Host) -> None:
    """After kill -9 of dockerd its tasks return, and the old endpoints' links are gone."""
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=4)
    host = bed.hosts[3]
    host.kill_dockerd()
    time.sleep(1)
    host.start_dockerd()
    wait_running(manager, service, 4, 120)
    client = run_container(manager, network)
    wait_until(
        "the VIP",
        lambda: (
            "failed"
            not in manager.exec(
                client,
                "sh",
                "-c",
                f"for i in 1 2 3 4 5 6 7 8; do curl -s -m 3 http://{service}/ || echo failed; done",
            )
        ),
        60,
    )
    wait_until("no links without an endpoint", lambda: _no_leftovers(host), 120, 1)


def test_reboot_of_a_host(bed: Bed, manager: Host) -> None:
    """A host that loses power returns with its tasks and reaches the others; its old endpoints are
    forgotten.
    """
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=4)
    host = bed.hosts[3]
    bed.reboot(host)
    bed.wait_plugin_reported()
    wait_running(manager, service, 4, 120)
    box = wait_until("a container on the host", lambda: run_container(host, network), 60)
    script = f"for i in 1 2 3 4 5 6 7 8; do curl -s -m 3 http://{service}/ || echo failed; done"
    wait_until("the VIP from there", lambda: "failed" not in host.exec(box, "sh", "-c", script), 60)
    wait_until("no links without an endpoint", lambda: _no_leftovers(host), 60, 1)


def test_a_cut_underlay_heals(bed: Bed, manager: Host) -> None:
    """When a host's underlay fails and returns, its containers are reachable again without any
    restart.
    """
    network = make_network(manager)
    host = bed.hosts[3]
    box = run_container(host, network)
    target = address(host, box, network)
    client = run_container(manager, network)
    wait_until("the container", lambda: _reaches(manager, client, target), 15)
    host.cut_underlay()
    assert not _reaches(manager, client, target)
    time.sleep(20)
    host.heal_underlay()
    wait_until("the container again", lambda: _reaches(manager, client, target), 90, 0.5)


def test_loss_and_return_of_a_worker(bed: Bed, manager: Host) -> None:
    """Swarm replaces the tasks of a lost worker, the VIP works meanwhile, and the worker is used
    again when it returns.
    """
    network = make_network(manager)
    service = make_service(manager, network, NGINX, replicas=4)
    client = run_container(manager, network)
    host = bed.hosts[3]
    host.power_off()
    wait_running(manager, service, 4, 120)
    script = f"for i in 1 2 3 4 5 6 7 8; do curl -s -m 3 http://{service}/ || echo failed; done"
    wait_until(
        "the VIP without the worker",
        lambda: "failed" not in manager.exec(client, "sh", "-c", script),
        60,
    )
    host.start()
    bed.wait_plugin_reported()
    manager.docker("service", "update", "-d", "--force", service)
    wait_running(manager, service, 4, 120)


def test_a_change_of_leader_keeps_networks_as_they_are(bed: Bed, manager: Host) -> None:
    """After the leader is demoted, the next leader gives every network the same VNI and prefix, and
    makes new networks.
    """
    network = make_network(manager)
    before = manager.inspect("network", "inspect", network)["Options"]
    box = run_container(bed.hosts[3], network)
    node = manager.docker("info", "-f", "{{.Swarm.NodeID}}").strip()
    second = bed.hosts[1]
    second.docker("node", "demote", node)

    def leader() -> str:
        return second.docker(
            "node",
            "ls",
            "-f",
            "role=manager",
            "--format",
            "{{.Hostname}} {{.ManagerStatus}}",
            check=False,
        )

    try:
        wait_until(
            "another leader",
            lambda: "Leader" in leader() and manager.name + " " not in leader(),
            60,
            0.5,
        )
        time.sleep(3)
        assert second.inspect("network", "inspect", network)["Options"] == before
        other = make_network(second)
        late = run_container(second, network)
        target = address(bed.hosts[3], box, network)
        wait_until("the old network", lambda: _reaches(second, late, target), 20)
        assert (
            second.inspect("network", "inspect", other)["Options"]["freeflow.vni"]
            != before["freeflow.vni"]
        )
    finally:
        second.docker("node", "promote", node)
        wait_until(
            "the first to manage again",
            lambda: manager.docker("info", "-f", "{{.Swarm.ControlAvailable}}").strip() == "true",
            60,
        )
        wait_until("its view", lambda: manager.docker("node", "ls", "-q", check=False).strip(), 30)


def test_a_network_removed_while_the_plugin_was_down(bed: Bed, manager: Host) -> None:
    """Whatever Docker removed while the plugin was down, the plugin removes later."""
    network = make_network(manager)
    host = bed.hosts[1]
    box = run_container(host, network)
    host.docker("plugin", "disable", "-f", PLUGIN)
    host.docker("rm", "-f", box, check=False)
    host.docker("plugin", "enable", PLUGIN)
    wait_until("the plugin", lambda: plugin_answers(host), 20)
    wait_until("no links left", lambda: not _ours(host), 150, 1)
    bed.wait_plugin_reported()


def test_killed_in_the_middle_of_starts(bed: Bed, manager: Host) -> None:
    """A plugin that is killed repeatedly while containers start leaves no link behind, and the last
    container works.
    """
    network = make_network(manager)
    host = bed.hosts[3]
    for pause in (0.05, 0.15, 0.3, 0.5, 0.8):
        start = host.spawn(
            *("docker", "run", "-d", "--rm", "--network", network, "workload:latest", "sleep", "3")
        )
        time.sleep(pause)
        for pid in host.plugin_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        start.wait(patience(60))
    wait_until("the plugin", lambda: plugin_answers(host), 30)
    box = wait_until("a container", lambda: run_container(host, network), 30)
    target = address(manager, run_container(manager, network), network)
    wait_until("the other host", lambda: _reaches(host, box, target), 20)
    remove_containers(host)
    wait_until("no links left", lambda: not _ours(host), 180, 1)
