"""`docker plugin upgrade` of the last version to this one, host by host, under load; and
`freeflow upgrade` from this one to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugin.version import VERSION
from testbed import Bed, Host, versions, wait_until
from testbed.bed import in_parallel
from testbed.host import PLUGIN
from testbed.images import NotPreparedError
from testbed.process import CommandError, run
from tests.swarm.busy import COUNT, EASY, command, goes_on, load, paths, task
from tests.swarm.conftest import (
    LIBRARY,
    REDIS,
    make_network,
    make_service,
    plugin_answers,
    run_container,
)

RENEWAL = 20.0
"""Seconds after which the client closes a connection, as pools of connections do."""
MOST = 30
"""Of its connections: some are always too young for the relay."""


@pytest.fixture(scope="module")
def older(plugin: Path) -> Iterator[Bed]:
    """A Swarm of two hosts that have the last version."""
    try:
        versions.last()
    except NotPreparedError as error:
        pytest.skip(str(error))
    with Bed(f"older{os.getpid()}", ["28.5", "26.1"]) as bed:
        bed.swarm(managers=1)
        bed.load_workload()
        last = bed.work / "last"
        versions.make_last_plugin(plugin, last)
        bed.install_plugin(last)
        run(["rm", "-rf", str(last)])
        yield bed


def push(bed: Bed, plugin: Path, tag: str = "next") -> str:
    """Push a plugin to the bed's registry; its reference."""
    host = bed.hosts[0]
    reference = f"{bed.registry}/freeflow:{tag}"
    run(["cp", "-a", str(plugin), f"{host.root}/tmp/plugin"])
    host.docker("plugin", "create", reference, "/tmp/plugin", timeout=180)
    host.docker("plugin", "push", reference, timeout=180)
    host.docker("plugin", "rm", reference)
    run(["rm", "-rf", f"{host.root}/tmp/plugin"])
    return reference


def upgrade(host: Host, reference: str) -> None:
    """What docs/upgrade.md says."""
    host.docker("plugin", "disable", "-f", PLUGIN)
    host.docker(
        *("plugin", "upgrade", "--grant-all-permissions", "--skip-remote-check", PLUGIN, reference),
        timeout=180,
    )
    host.docker("plugin", "set", PLUGIN, *(f"{name}={value}" for name, value in EASY.items()))
    host.docker("plugin", "enable", PLUGIN)
    wait_until(f"the plugin of {host.name}", lambda: plugin_answers(host), 30)


def stays_on_the_overlay(host: Host, box: str) -> None:
    """A host has a session with one that doesn't know the path `relay`, and no link."""

    def peers() -> list[dict[str, object]]:
        listed = host.status()["router"]["rdma"]["hosts"]
        return [peer for peer in listed if peer["session"]]

    (peer,) = wait_until("the session", peers, 30)
    assert (peer["relay"], peer["link"]) == (False, "none")
    assert not paths(host, box)["relay"]


@pytest.mark.timeout(900)
def test_upgrade_under_load(older: Bed, plugin: Path) -> None:
    """While both hosts are upgraded from the last version, no request of fifty connections between
    them fails and no answer is wrong. Afterwards connections are on the relay, without a restart of
    a container: those that running programs open anew, and all of programs that start.
    """
    near, far = older.hosts
    network = make_network(near)
    there = ("--constraint", f"node.hostname=={far.name}")
    here = ("--constraint", f"node.hostname=={near.name}")
    redis = make_service(near, network, REDIS, *there, *LIBRARY, replicas=1)
    ask = command(redis, COUNT, RENEWAL)
    box = task(near, make_service(near, network, ask, *here, *LIBRARY, replicas=1))
    server = task(far, redis)
    goes_on(near, box, "under the last version")
    lost = load(near, box).lost
    assert "relay" not in near.status()["router"]
    reference = push(older, plugin)
    for host in (near, far):
        upgrade(host, reference)
        goes_on(near, box, f"after the upgrade of {host.name}")
        if host is near:
            stays_on_the_overlay(near, box)
    older.wait_plugin_reported()

    def on_relay(box: str, count: int) -> bool:
        return paths(near, box)["relay"] >= count

    wait_until("the running client on the relay", lambda: on_relay(box, MOST), 120, 0.5)
    assert paths(far, server)["relay"] >= MOST // 2
    fresh = run_container(near, network, *LIBRARY, command=command(redis, 16))
    wait_until("a new client on the relay", lambda: on_relay(fresh, 16), 60, 0.5)
    goes_on(near, box, "at the end")
    assert load(near, box).lost == lost
    # Nothing was restarted.
    assert (task(near, box.partition(".")[0]), task(far, redis)) == (box, server)


NEXT = "99.0.0"


def make_next(plugin: Path, target: Path) -> None:
    """Make a plugin that differs from this version by its number."""
    run(["cp", "-a", str(plugin), str(target)])
    root = target / "rootfs"
    file = "usr/lib/python3/dist-packages/plugin/version.py"
    text = (root / file).read_text()
    assert VERSION in text
    (root / file).write_text(text.replace(VERSION, NEXT))
    options = ("-q", "-f", "--invalidation-mode", "unchecked-hash")
    run(["chroot", str(root), "python3", "-m", "compileall", *options, f"/{file}"])


def version(host: Host) -> str:
    """What the plugin that runs on a host says."""
    return str(host.status()["version"])


@pytest.mark.timeout(900)
def test_upgrade_by_one_command(older: Bed, plugin: Path) -> None:
    """`freeflow upgrade` on a manager brings the next version to all hosts, and tests the network
    after each. No request between the hosts fails meanwhile. If the version isn't there, no host
    is touched.
    """
    near, far = older.hosts
    if VERSION not in near.freeflow("--version") or "upgrade" not in near.freeflow("--help"):
        # The test before was left out.
        this = push(older, plugin)
        in_parallel([lambda h=host: upgrade(h, this) for host in older.hosts])  # type: ignore[misc]
        older.wait_plugin_reported()
    later = older.work / "later"
    make_next(plugin, later)
    reference = push(older, later, "later")
    run(["rm", "-rf", str(later)])
    in_parallel([lambda h=host: h.freeflow("test", "--prepare") for host in older.hosts])  # type: ignore[misc]
    network = make_network(near)
    there = ("--constraint", f"node.hostname=={far.name}")
    redis = make_service(near, network, REDIS, *there, *LIBRARY, replicas=1)
    box = run_container(near, network, *LIBRARY, command=command(redis, COUNT))
    server = task(far, redis)
    goes_on(near, box, "under this version")
    lost = load(near, box).lost
    with pytest.raises(CommandError):
        near.freeflow("upgrade", f"{older.registry}/freeflow:absent")
    assert {version(host) for host in older.hosts} == {VERSION}
    text = near.freeflow("upgrade", reference, timeout=400)
    assert "works on 2 hosts" in text
    assert {version(host) for host in older.hosts} == {NEXT}
    goes_on(near, box, "under the next version")
    assert load(near, box).lost == lost
    assert task(far, redis) == server
    assert near.docker("service", "ls", "-q", "--filter", "label=freeflow.upgrade") == ""
