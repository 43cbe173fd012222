"""Installing, upgrading and removing the plugin on separate hosts; a host outside a Swarm; README's
quick start, and starts of containers when the plugin is gone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed import Bed, CommandError, Host, wait_until
from testbed.bed import in_parallel
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import within
from testbed.process import run
from tests.swarm.conftest import address, run_container

NAME = "freeflow:latest"
TOP = Path(__file__).resolve().parents[2]
RELEASED = "freeflow:0.1.0"


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
    reference = f"{alone.registry}/{RELEASED}"
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


def typed(section: str) -> list[str]:
    """The commands of a section of README, in order."""
    text = (TOP / "README.md").read_text()
    body = text.split(f"\n## {section}\n", maxsplit=1)[1].split("\n## ", maxsplit=1)[0]
    blocks = re.findall(r"^```console\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def type_in(host: Host, line: str) -> str:
    """Type a command as a newcomer does, who answers yes to Docker's question."""
    return host.run("sh", "-c", line, stdin="y\n", timeout=180)


def remove_plugin(host: Host) -> None:
    host.freeflow("cleanup", "--all", check=False)
    host.docker("plugin", "rm", "-f", NAME)


def make_install(host: Host, plugin: Path, tools: Path) -> None:
    """`make install RUNTIME=1` in this checkout, whose machine is the host."""
    for name in ("docker", "freeflow"):
        tool = tools / name
        tool.write_text(
            f'#!/bin/sh\nexec nsenter -t {host.pid} --mount --uts --net --pid -- {name} "$@"\n'
        )
        tool.chmod(0o755)
    # The host's working directory is its root.
    run(["mkdir", "-p", f"{host.root}/build"])
    run(["cp", "-a", str(plugin), f"{host.root}/build/plugin"])
    path = f"PATH={tools}:{os.environ['PATH']}"
    run(["env", path, "make", "-C", str(TOP), "install", "RUNTIME=1"], timeout=300)
    run(["rm", "-rf", f"{host.root}/build"])


PUBLIC = {
    "nginx": ("CMD", ["nginx", "-g", "daemon off;"]),
    "redis": ("CMD", ["redis-server", "--protected-mode", "no"]),
    "curlimages/curl": ("ENTRYPOINT", ["curl", "-sf", "-m", "10"]),
}
"""Public images of README's commands, and what makes the tests' image like them."""


def make_public_images(host: Host, *names: str) -> None:
    made = host.docker("create", WORKLOAD_IMAGE, "true").strip()
    for name in names:
        key, words = PUBLIC[name]
        host.docker("commit", "--change", f"{key} {json.dumps(words)}", made, name)
    host.docker("rm", made)


@pytest.fixture(scope="module")
def newcomers(alone: Bed, plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """Two hosts in a Swarm, installed as README says: one from a registry, one from a checkout.

    Nothing else is done to them. The scenarios before have pushed the plugin.
    """
    first, other = alone.hosts
    in_parallel([lambda h=host: remove_plugin(h) for host in alone.hosts])  # type: ignore[misc]
    assert "make install RUNTIME=1" in (TOP / "README.md").read_text()
    alone.swarm()
    for line in typed("Install"):
        type_in(first, line.replace("REGISTRY/freeflow:latest", f"{alone.registry}/{RELEASED}"))
    make_install(other, plugin, tmp_path_factory.mktemp("tools"))
    for host in alone.hosts:
        assert host.docker("info", "-f", "{{.DefaultRuntime}}").strip() == "freeflow", host.engine
    make_public_images(first, *PUBLIC)
    make_public_images(other, "nginx")  # for tasks of the service
    alone.wait_plugin_reported()
    return alone


def test_readmes_quick_start(newcomers: Bed) -> None:
    """README's lines work as they are typed, one after another: the service answers by its VIP, and
    the benchmark's connections are in shared memory.
    """
    host = newcomers.hosts[0]
    for line in typed("First network"):
        before = host.status()["router"]["granted"]
        said = type_in(host, line)
        if "curl" in line:
            assert "<html" in said
        elif "redis-benchmark" in line:
            assert host.status()["router"]["granted"] - before >= 50
    host.docker("service", "rm", "web")
    host.docker("rm", "-f", "cache")


@contextmanager
def stopped_plugin(host: Host) -> Iterator[None]:
    """The plugin's processes stopped: it listens, and never answers."""
    processes = host.plugin_pids()
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


def seconds_of_starts(host: Host, *options: str) -> float:
    """Start some containers one after another; each must work."""
    words = f"docker run --rm {' '.join(options)} {WORKLOAD_IMAGE} sh -c 'echo [$LD_PRELOAD]'"
    script = f"date +%s.%N; for i in 1 2; do {words} || exit 1; done; date +%s.%N"
    begin, *said, end = host.run("sh", "-c", script, timeout=120).split()
    assert said == ["[]"] * 2, host.engine
    return float(end) - float(begin)


def check_starts(host: Host, box: str) -> None:
    """Containers start, also one that had the library, and programs start in it."""
    words = ("--network", "plain", WORKLOAD_IMAGE, "sh", "-c", "echo [$LD_PRELOAD]")
    assert host.docker("run", "--rm", *words).strip() == "[]", host.engine
    assert host.exec(box, "echo", "well").strip() == "well"
    host.docker("restart", "-t", "0", box)
    assert host.exec(box, "echo", "well").strip() == "well"


def check_pace(host: Host, state: str) -> None:
    """No start waits for the plugin."""

    def waits_for_nothing() -> bool:
        # runc first: an engine that has just started is slower.
        without = seconds_of_starts(host, "--network", "plain", "--runtime", "runc")
        with_it = seconds_of_starts(host, "--network", "plain")
        # Its own deadline is 0.3 s for a start. One pair of measurements says little.
        return with_it - without < within(2 * 0.3)

    wait_until(f"starts on {host.engine}, plugin {state}", waits_for_nothing)


REMOVE_FILES = """
awk '$5 ~ "^/run/freeflow" { print $5 }' /proc/self/mountinfo | sort -r | xargs -r umount -l
rm -rf /run/freeflow* /usr/local/bin/freeflow
"""


def test_no_start_needs_the_plugin(newcomers: Bed) -> None:
    """With the runtime as the default, containers start without waiting while the plugin does not
    answer, is disabled, was removed with all of its files, and after a restart of the engine then;
    also containers that had the library.
    """
    for host in reversed(newcomers.hosts):
        for name, label in (("plain", "off"), ("labelled", "on")):
            host.docker("network", "create", "--label", f"freeflow.accelerate={label}", name)
        box = run_container(host, "labelled", "--restart", "always")
        assert "libfreeflow.so" in host.exec(box, "cat", "/proc/1/environ")
        with stopped_plugin(host):
            check_starts(host, box)
            check_pace(host, "stopped")
        host.docker("plugin", "disable", "-f", NAME)
        check_starts(host, box)
        host.docker("plugin", "rm", "-f", NAME)
        host.run("sh", "-c", REMOVE_FILES)
        check_starts(host, box)
        host.restart_dockerd()
        wait_until("the container", lambda h=host, b=box: h.exec(b, "true") == "", 60)  # type: ignore[misc]
        check_starts(host, box)
        check_pace(host, "removed")
