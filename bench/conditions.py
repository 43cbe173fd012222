"""What a case changes at the underlay's devices of both hosts, and restores afterwards.

The devices belong to the test bed: in each host's network namespace, `eth0` leads to the underlay.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Final

from bench.errors import ProgramError
from bench.namespaces import run
from bench.swarm_hosts import BenchHost

DEVICE: Final = "eth0"
SEGMENTATION: Final = ("tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation")
SHAPED: Final = "1gbit"
QUEUE: Final = "10ms"
"""The longest time that a packet waits in a shaped link's queue, as in a switch's buffer."""
NOTICED: Final = 35.0
"""Seconds until both routers know that a device has changed: the plugins report devices to them
every 30 seconds."""
BURST: Final = "256kb"
"""At least one GSO packet: larger packets would be segmented before the link."""

Condition = Callable[[Sequence[BenchHost]], AbstractContextManager[None]]


@contextmanager
def unchanged(_: Sequence[BenchHost]) -> Iterator[None]:
    """The underlay as it is."""
    yield


def enabled(listing: str, feature: str) -> bool:
    """Whether `ethtool -k` lists a feature as on. Raises `ProgramError` if it lists no such one."""
    found = re.search(rf"^\s*{re.escape(feature)}: (on|off)", listing, re.MULTILINE)
    if not found:
        raise ProgramError(f"ethtool -k {DEVICE} lists no {feature}")
    return found[1] == "on"


def _on(host: BenchHost, *program: str) -> str:
    return run(host.namespaces.enter_network(*program), 20)


def _set(host: BenchHost, feature: str, on: bool) -> None:
    """Switch a feature. Raises `ProgramError` if the device doesn't do it."""
    _on(host, "ethtool", "-K", DEVICE, feature, "on" if on else "off")
    if enabled(_on(host, "ethtool", "-k", DEVICE), feature) != on:
        raise ProgramError(f"{host.name}: {DEVICE} doesn't switch {feature}")


@contextmanager
def without_tunnel_segmentation(hosts: Sequence[BenchHost]) -> Iterator[None]:
    """The devices do not segment tunnelled packets: software does it before them."""
    with ExitStack() as restore:
        restore.callback(time.sleep, NOTICED)
        for host in hosts:
            listing = _on(host, "ethtool", "-k", DEVICE)
            for feature in SEGMENTATION:
                if enabled(listing, feature):
                    restore.callback(_set, host, feature, True)
                    _set(host, feature, False)
        time.sleep(NOTICED)
        yield


@contextmanager
def shaped(hosts: Sequence[BenchHost]) -> Iterator[None]:
    """Each host sends at most 1 Gbit/s, through one queue."""
    with ExitStack() as restore:
        for host in hosts:
            queue = ("rate", SHAPED, "burst", BURST, "latency", QUEUE)
            _on(host, "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *queue)
            restore.callback(_on, host, "tc", "qdisc", "del", "dev", DEVICE, "root")
        yield
