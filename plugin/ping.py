"""`freeflow ping`: from a container's namespace of this host to an overlay address, saying which host and which path.

The echo (RFC 792, RFC 4443) leaves the namespace of a local container on the same network, so it takes the way that the
container's own packets take, VIPs included. Where the address lives is what the kernel then knows: the neighbour's MAC
address, and the peer behind which the VXLAN device learned it.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Final

import msgspec
from pyroute2 import IPRoute

from driver.driver import Driver
from driver.errors import InvalidRequest, NotFound
from driver.kernel.linux import LinuxKernel
from driver.kernel.namespace import in_netns, is_namespace
from driver.model import Endpoint, IPAddress, Network
from driver.sync import Syncer

MAX_COUNT: Final = 20
WAIT: Final = 1.0
PATTERN: Final = b"freeflow" * 7


class PingRequest(msgspec.Struct, frozen=True):
    """`address`: what to reach; `count`: echoes, 1 to 20."""

    address: str
    count: int = 3


class PingResult(msgspec.Struct, frozen=True):
    """`round_trips_ms`: one per answered echo. `host` is empty if the address was not found anywhere."""

    address: str
    network: str
    source: str
    task: str
    mac: str
    host: str
    host_address: str
    local: bool
    path: str
    sent: int
    round_trips_ms: list[float]


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def echo(address: IPAddress, count: int) -> tuple[list[float], str]:
    """Send `count` echoes from the calling thread's namespace; round trips in ms, and who answered."""
    six = address.version == 6
    family, protocol = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    )
    identifier = os.urandom(2)
    times, source = [], ""
    with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
        for sequence in range(count):
            head = struct.pack("!BBH", 128 if six else 8, 0, 0)
            body = identifier + struct.pack("!H", sequence) + PATTERN
            checksum = 0 if six else _checksum(head + body)
            message = head[:2] + struct.pack("!H", checksum) + body
            begin = time.perf_counter()
            try:
                raw.sendto(message, (str(address), 0))
            except OSError:
                continue
            while (left := begin + WAIT - time.perf_counter()) > 0:
                if not select.select([raw], [], [], left)[0]:
                    break
                answer, peer = raw.recvfrom(2048)
                if not six:
                    answer = answer[(answer[0] & 15) * 4 :]
                if answer[:1] == (b"\x81" if six else b"\0") and answer[4:8] == body[:4]:
                    times.append(round((time.perf_counter() - begin) * 1000, 3))
                    source = str(peer[0])
                    break
    return times, source


def _neighbours() -> dict[str, str]:
    with IPRoute() as route:
        return {
            str(item.get_attr("NDA_DST")): str(item.get_attr("NDA_LLADDR"))
            for item in route.get_neighbours()
            if item.get_attr("NDA_LLADDR")
        }


class Ping:
    """Runs pings on this host."""

    def __init__(self, driver: Driver, kernel: LinuxKernel, syncer: Syncer) -> None:
        self._driver = driver
        self._kernel = kernel
        self._syncer = syncer

    def __call__(self, wanted: PingRequest) -> PingResult:
        """Raises InvalidRequest for what isn't an address or count, NotFound if no container here is on its network."""
        try:
            address = ip_address(wanted.address)
        except ValueError as error:
            raise InvalidRequest(f"ping: {error}; give an address of a FreeFlow network") from error
        if not 1 <= wanted.count <= MAX_COUNT:
            raise InvalidRequest(f"ping: count {wanted.count} is not from 1 to {MAX_COUNT}")
        network, endpoint, sandbox = self._origin(address)

        def run() -> tuple[list[float], str, dict[str, str]]:
            times, _ = echo(address, wanted.count)
            return times, "", _neighbours()

        before = self._flows(network, address)
        times, _, neighbours = in_netns(sandbox, run)
        tasks = before or [address]
        mac = next((neighbours[str(task)] for task in tasks if str(task) in neighbours), "")
        task = next((str(task) for task in tasks if str(task) in neighbours), "")
        own = self._own(network, address)
        host, host_address, local = self._host(network, mac, own is not None)
        return PingResult(
            address=str(address),
            network=self._name(network),
            source=str(endpoint.ipv4.ip if endpoint.ipv4 else endpoint.id[:12]),
            task=task if task != str(address) else "",
            mac=mac or (own.mac if own else ""),
            host=host if times or mac or own else "",
            host_address=host_address,
            local=local,
            path="overlay",
            sent=wanted.count,
            round_trips_ms=times,
        )

    def _origin(self, address: IPAddress) -> tuple[Network, Endpoint, Path]:
        matching = []
        for network in self._driver.store.networks():
            pools = [subnet.pool for subnet in network.subnets]
            if any(address in pool for pool in (*pools, network.prefix6)):
                matching.append(network)
                for endpoint in self._driver.store.endpoints(network.id):
                    sandbox = self._syncer.sandbox(endpoint)
                    if sandbox is not None and is_namespace(sandbox):
                        return network, endpoint, sandbox
        if matching:
            raise NotFound(
                f"ping: no container of this host is on network {self._name(matching[0])}; "
                f"docker run -d --network {self._name(matching[0])} IMAGE, or ping from a host that has one"
            )
        raise NotFound(
            f"ping: {address} is in no FreeFlow network of this host; freeflow status lists them"
        )

    def _name(self, network: Network) -> str:
        state = self._syncer.state().get(network.id)
        return state.view.name if state and state.view else network.id[:12]

    def _flows(self, network: Network, address: IPAddress) -> list[IPAddress]:
        """The tasks behind an address, if it is a VIP."""
        state = self._syncer.state().get(network.id)
        if state is None or not isinstance(address, IPv4Address):
            return []
        return list(state.table.get(address, ()))

    def _own(self, network: Network, address: IPAddress) -> Endpoint | None:
        for endpoint in self._driver.store.endpoints(network.id):
            own = [item.ip for item in (endpoint.ipv4, endpoint.ipv6) if item is not None]
            if address in own:
                return endpoint
        return None

    def _host(self, network: Network, mac: str, own: bool) -> tuple[str, str, bool]:
        engine, _ = self._syncer.engine()
        here = engine.hostname if engine else os.uname().nodename
        behind = self._kernel.locate(network.id, mac) if mac and not own else None
        if behind is None:
            return here, str(self._driver.self_address() or ""), True
        name = (engine.hostnames if engine else {}).get(behind, str(behind))
        return name, str(behind), False


Runner = Callable[[PingRequest], PingResult]
