"""Whether the underlay's device segments UDP tunnels, as the kernel says."""

from __future__ import annotations

import subprocess
from pathlib import Path

from driver.kernel.namespace import isolated
from driver.kernel.netlink import Sockets
from driver.kernel.offload import segments_tunnels

FEATURE = "tx-udp_tnl-segmentation"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def found(*names: str) -> list[bool | None]:
    """What is found for some devices of this thread's namespace."""
    with Path("/proc/thread-self/ns/net").open() as namespace:
        sockets = Sockets(namespace.fileno())
        try:
            return [segments_tunnels(sockets, name) for name in names]
        finally:
            sockets.close()


def test_each_device_below_counts() -> None:
    """The feature is there while the device and all below it have it; of a device that doesn't
    exist it isn't known.
    """

    def inside() -> list[list[bool | None]]:
        run("ip", "link", "add", "u0", "type", "veth", "peer", "name", "u1")
        run("ip", "link", "add", "link", "u0", "name", "upper", "type", "macvlan")
        both = [found("u0", "upper", "gone")]
        run("ethtool", "-K", "u0", FEATURE, "off")
        return [*both, found("u0", "upper", "u1")]

    before, after = isolated(inside)
    assert before[:2] == [True, True]
    assert before[2] is None
    assert after[:2] == [False, False]
    assert after[2] is True
