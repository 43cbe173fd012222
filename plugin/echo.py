"""Echo requests (RFC 792, RFC 4443) from a container's namespace, and its neighbours afterwards."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from driver.kernel import flows
from driver.kernel.checksum import internet_checksum
from driver.kernel.namespace import in_netns
from driver.model import IPAddress

WAIT: Final = 1.0
"""Seconds to wait for an answer."""
LATE: Final = 64
"""Packets that are read after that time, at most: others may send answers that nobody asked for."""
PATTERN: Final = b"freeflow" * 7


@dataclass(frozen=True, slots=True)
class Probe:
    """Round trips in ms, one per answer; neighbours, address → MAC; a VIP's task, if known."""

    times: list[float]
    neighbours: dict[str, str]
    task: IPv4Address | None = None


Prober = Callable[[Path, IPAddress, int, bool], Probe]
"""Called with a namespace, an address, the number of echoes, and whether the address is a VIP."""


def _left(begin: float) -> float:
    """Seconds that are left for an answer to what was sent at `begin`."""
    return begin + WAIT - time.perf_counter()


def echo(address: IPAddress, count: int, identifier: int) -> list[float]:
    """Send `count` echo requests from the calling thread's namespace.

    Returns the round trips of the answered ones, in ms.
    """
    six = address.version == 6
    family, protocol = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    )
    times = []
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        for sequence in range(count):
            head = struct.pack("!BBH", 128 if six else 8, 0, 0)
            body = struct.pack("!HH", identifier, sequence) + PATTERN
            checksum = 0 if six else internet_checksum(head + body)
            message = head[:2] + struct.pack("!H", checksum) + body
            begin = time.perf_counter()
            try:
                raw.sendto(message, (str(address), 0))
            except OSError:
                continue
            late = 0
            # An answer that has come counts even if this thread did not run in the meantime.
            while late < LATE and select.select([raw], [], [], max(0.0, _left(begin)))[0]:
                late += _left(begin) < 0
                answer = raw.recv(2048)
                if not six:
                    answer = answer[(answer[0] & 15) * 4 :]
                if answer[:1] == (b"\x81" if six else b"\0") and answer[4:8] == body[:4]:
                    times.append(round((time.perf_counter() - begin) * 1000, 3))
                    break
    return times


def _neighbours() -> dict[str, str]:
    with IPRoute() as route:
        return {
            str(item.get_attr("NDA_DST")): str(item.get_attr("NDA_LLADDR"))
            for item in route.get_neighbours()
            if item.get_attr("NDA_LLADDR")
        }


def probe(namespace: Path, address: IPAddress, count: int, vip: bool) -> Probe:
    """Send echo requests from a namespace, and read its neighbours and flows afterwards.

    Raises:
        KernelError: the namespace is gone.
    """
    identifier = int.from_bytes(os.urandom(2), "big")

    def run() -> Probe:
        times = echo(address, count, identifier)
        answering = None
        if vip and isinstance(address, IPv4Address):
            answering = flows.answering(address, identifier)
        return Probe(times, _neighbours(), answering)

    return in_netns(namespace, run)
