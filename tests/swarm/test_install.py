"""Installing, upgrading and removing the plugin on separate hosts; a host outside a Swarm."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import Bed, CommandError, Host, wait_until
from testbed.process import run
from tests.swarm.conftest import address, run_container

NAME = "freeflow:latest"


@pytest.fixture(scope="module")
def alone() -> Iterator[Bed]:
    """Two hosts outside a Swarm: an old engine and a new one."""
    with Bed(f"alone{os.getpid()}", ["28.5", "20.10"]) as bed:
        bed.load_workload()
        yield bed


def _answers(host: Host) -> bool:
    return '"version"' in host.freeflow("status", "--json", check=False)


def _changed(plugin: Path, work: Path) -> Path:
    """Give the same plugin another version, because engines refuse two with the same content."""
    target = work / "changed"
    shutil.rmtree(target, ignore_errors=True)
    run(["cp", "-a", str(plugin), str(target)])
    (target / "rootfs/etc/freeflow-build").write_text("another\n")
    return target


def test_push_install_upgrade_and_remove(alone: Bed, plugin: Path) -> None:
    """From a registry: push, install under an alias with settings, upgrade with state and settings
    kept, remove; nothing is left.
    """
    host = alone.hosts[0]
    reference = f"{alone.registry}/freeflow:0.1.0"
    newer = f"{alone.registry}/freeflow:0.1.1"
    for source, name in ((plugin, reference), (_changed(plugin, alone.work), newer)):
        run(["cp", "-a", str(source), f"{host.root}/tmp/plugin"])
        host.docker("plugin", "create", name, "/tmp/plugin", timeout=180)
        host.docker("plugin", "push", name, timeout=180)
        host.docker("plugin", "rm", name)
        run(["rm", "-rf", f"{host.root}/tmp/plugin"])
    for target in alone.hosts:
        target.docker(
            *("plugin", "install", "--alias", NAME, "--grant-all-permissions", reference),
            *("SCOPE=local", "SYNC_INTERVAL=1"),
            timeout=180,
        )
        wait_until("the command", (target.root / "usr/local/bin/freeflow").exists, 15)
        target.docker("network", "create", "-d", NAME, "kept")
        box = run_container(target, "kept")
        target.docker("plugin", "disable", "-f", NAME)
        target.docker(
            *("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", NAME, newer),
            timeout=180,
        )
        target.docker("plugin", "enable", NAME)
        wait_until("the plugin", lambda t=target: _answers(t), 20)  # type: ignore[misc]
        status = target.status()
        assert status["settings"]["SYNC_INTERVAL"] == "1"
        assert [len(network["endpoints"]) for network in status["networks"]] == [1]
        second = run_container(target, "kept")
        to = address(target, box, "kept")
        assert " 0% packet loss" in target.exec(second, "ping", "-c1", "-W2", to)
        target.docker("rm", "-f", box, second)
        target.docker("network", "rm", "kept")
        target.freeflow("cleanup", "--all")
        target.docker("plugin", "disable", NAME)
        target.docker("plugin", "rm", NAME)
        links = target.run("ip", "-br", "link")
        assert not any(line.startswith("ff") for line in links.splitlines())
        assert not (target.root / "run/freeflow-admin").exists()
        assert not (target.root / "usr/local/bin/freeflow").exists()
        assert "freeflow-admin" not in target.run("cat", "/proc/self/mountinfo")


def test_local_scope_outside_a_swarm(alone: Bed, plugin: Path) -> None:
    """With SCOPE=local: a network of one host has names and isolation, refuses options at once, and
    survives a restart of the engine.
    """
    for host in alone.hosts:
        host.install_plugin(plugin, {"SCOPE": "local"})
        wait_until("the plugin", lambda h=host: _answers(h), 20)  # type: ignore[misc]
        host.docker("network", "create", "-d", NAME, "--subnet", "10.99.0.0/24", "here")
        with pytest.raises(CommandError) as caught:
            host.docker("network", "create", "-d", NAME, "-o", "mtuu=1", "wrong")
        assert "unknown option mtuu" in caught.value.output
        assert "vni" in caught.value.output
        one = run_container(host, "here", "--restart", "always")
        two = run_container(host, "here", "--restart", "always")
        assert " 0% packet loss" in host.exec(one, "ping", "-c1", "-W2", two)
        host.restart_dockerd()
        wait_until("the plugin", lambda h=host: _answers(h), 30)  # type: ignore[misc]
        wait_until(
            "the containers again",
            lambda h=host, o=one, t=two: (
                " 0% packet loss" in h.exec(o, "ping", "-c1", "-W2", t, check=False)
            ),  # type: ignore[misc]
            40,
        )
        three = run_container(host, "here")
        assert " 0% packet loss" in host.exec(three, "ping", "-c1", "-W2", one)
        host.docker("rm", "-f", one, two, three)
        host.docker("network", "rm", "here")
        assert json.loads(host.freeflow("status", "--json"))["networks"] == []


def test_the_plugin_listens_within_half_a_second(alone: Bed) -> None:
    """At Docker's first connection attempt, half a second after the start, the plugin listens:
    enabling takes less time than the second attempt.
    """
    for host in alone.hosts:
        listed = host.docker("plugin", "ls", "--format", "{{.Name}}")
        if NAME not in listed:
            pytest.fail("the scenario before this one installs the plugin")
        host.docker("plugin", "disable", "-f", NAME)
        begin = host.run("date", "+%s.%N")
        host.docker("plugin", "enable", NAME)
        end = host.run("date", "+%s.%N")
        # The second attempt is 3.5 s after the start.
        assert float(end) - float(begin) < 3.4
