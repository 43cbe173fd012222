"""Containers that Docker starts again: after a reboot, and after the plugin was removed and
installed.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Network
from pathlib import Path

import pytest

from testbed import Bed, Host, wait_until
from testbed.host import PLUGIN
from tests.swarm.conftest import (
    LIBRARY,
    address,
    make_network,
    not_attached,
    plugin_answers,
    run_container,
)

PREFIX = IPv6Network("fd95::/64")

Box = tuple[Host, str, str]
"""A container: its host, its name, its network."""


def _network(manager: Host) -> str:
    return make_network(manager, "-o", f"ipv6={PREFIX}")


def _lasting(host: Host, network: str) -> Box:
    return host, run_container(host, network, *LIBRARY, "--restart", "always"), network


def _reaches(near: Box, far: Box) -> bool:
    """Ping another container over IPv4 and IPv6, at its current addresses."""
    ipv4 = address(*far)
    if not ipv4:
        return False
    ipv6 = PREFIX[int(IPv4Address(ipv4))]
    host, box, _ = near
    return all(
        " 0% packet loss" in host.exec(box, "ping", "-c1", "-W1", target, check=False)
        for target in (ipv4, str(ipv6))
    )


def _is_up(box: Box) -> bool:
    host, name, _ = box
    state = host.inspect("inspect", name)["State"]
    if not state["Running"] and not_attached(state["Error"]):
        host.docker("start", name, timeout=30, check=False)
    return bool(state["Running"])


def _links(host: Host) -> list[str]:
    """Host-side veths in the overlay namespace."""
    listed = host.in_overlay("ip", "-br", "link").splitlines()
    return [line.split()[0] for line in listed if line.startswith("ffh")]


@pytest.mark.timeout(600)
def test_containers_come_back_after_a_reboot(bed: Bed, manager: Host) -> None:
    """A container with a restart policy returns after its host's reboot, on every engine. It
    reaches other hosts and is reached, can be accelerated, and no old link is left.
    """
    network = _network(manager)
    boxes = {host.name: _lasting(host, network) for host in bed.hosts}
    own = boxes[manager.name]
    for host in bed.hosts[1:]:
        box = boxes[host.name]
        wait_until("the others", lambda b=box: _reaches(b, own), 15)  # type: ignore[misc]
        bed.reboot(host)
        wait_until(f"{box[1]} to be up", lambda b=box: _is_up(b), 120)  # type: ignore[misc]
        for near, far in ((box, own), (own, box)):
            wait_until(
                f"{far[0].name} from {near[0].name}",
                lambda n=near, f=far: _reaches(n, f),  # type: ignore[misc]
                90,
                0.5,
            )
        wait_until("one link", lambda h=host: len(_links(h)) == 1, 30)  # type: ignore[misc]
        # It mounts the folder of the running plugin, and its programs load the library.
        host.exec(box[1], "test", "-S", "/run/freeflow/router.sock")
        assert "libfreeflow.so" in host.exec(box[1], "cat", "/proc/self/maps")
        # While the engine starts it does not answer the plugin, and the verdict says so until the
        # next refresh.
        wait_until("a healthy verdict", lambda h=host: h.status()["healthy"], 30)  # type: ignore[misc]
    bed.wait_plugin_reported()


def test_the_plugin_is_removed_and_installed_under_containers(
    bed: Bed, manager: Host, plugin: Path
) -> None:
    """After `plugin disable -f`, `plugin rm -f` and a new install, with all state lost, connections
    have continued, the new plugin knows the containers, and they can be restarted and removed
    without a trace.
    """
    network = _network(manager)
    boxes = {host.name: _lasting(host, network) for host in bed.hosts}
    own = boxes[manager.name]
    for host in bed.hosts[1:]:
        box = boxes[host.name]
        wait_until("the others", lambda b=box: _reaches(b, own), 15)  # type: ignore[misc]
        before = _links(host)
        host.docker("plugin", "disable", "-f", PLUGIN)
        host.docker("plugin", "rm", "-f", PLUGIN)
        assert _reaches(box, own)
        assert _reaches(own, box)
        host.install_plugin(plugin)
        wait_until("the plugin", lambda h=host: plugin_answers(h), 20)  # type: ignore[misc]
        wait_until(
            "the container to be known again",
            lambda h=host: [len(n["endpoints"]) for n in h.status()["networks"]] == [1],  # type: ignore[misc]
            60,
        )
        assert _links(host) == before
        assert _reaches(box, own)
    # The manager must know the node's plugin before it attaches a container.
    bed.wait_plugin_reported()
    for host in bed.hosts[1:]:
        box = boxes[host.name]
        host.docker("restart", "-t", "0", box[1])
        wait_until("the others again", lambda b=box: _reaches(b, own), 30)  # type: ignore[misc]
        host.docker("rm", "-f", box[1])
        wait_until("no link", lambda h=host: not _links(h), 10)  # type: ignore[misc]
        assert "ff" not in host.in_overlay("ip", "-br", "link", "show", "type", "bridge")
