"""`freeflow ping`: pings an overlay address from a container's namespace, and finds host and path.

The target may be given by a name: see `lookup.py`.

The echo request leaves the namespace of a local container on the same network, so it takes the path
of the container's own packets, VIPs included. Afterwards the kernel knows where the address is: the
task in conntrack's entry of the echo, the neighbour's MAC address, and the peer behind which the
VXLAN device learned that. Read on in `echo.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Final

import msgspec

from dataplane.control import Statistics
from dataplane.errors import DataplaneError
from driver import options
from driver.driver import Driver
from driver.errors import InvalidRequest, NotFound
from driver.kernel.namespace import is_namespace
from driver.model import Endpoint, IPAddress, Network
from plugin.echo import Prober, probe
from plugin.facts import KernelFacts, RouterFacts, SyncFacts
from plugin.lookup import resolve
from plugin.paths import ENCRYPTED_BY, FAST, OVERLAY

MAX_COUNT: Final = 20


class PingRequest(msgspec.Struct, frozen=True):
    """`address`: an address or a name; `count`: echo requests, 1 to 20."""

    address: str
    count: int = 3


class PingResult(msgspec.Struct, frozen=True):
    """`round_trips_ms`: one per answered echo. `host` is empty if the address was not found.

    `name` is the target's full name, if it was given by name. `path` is the echoes'; `tcp` is the
    path to which connections of programs with the library can move, `reason` why no faster one.
    """

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
    tcp: str = ""
    reason: str = ""
    name: str = ""
    encryption: str = ""
    """What encrypts the echoes; empty: they don't leave the host, or the network isn't
    encrypted."""


@dataclass(slots=True, eq=False)
class Ping:
    """Runs pings on this host."""

    driver: Driver
    kernel: KernelFacts
    syncer: SyncFacts
    probe: Prober = probe
    is_there: Callable[[Path], bool] = is_namespace
    router: RouterFacts | None = None

    def __call__(self, wanted: PingRequest) -> PingResult:
        """Ping a target.

        Raises:
            InvalidRequest: the name is ambiguous, or the count out of range.
            NotFound: there is no such name, or no container of this host is on its network.
        """
        address, name = self._target(wanted.address)
        if not 1 <= wanted.count <= MAX_COUNT:
            raise InvalidRequest(
                "ping",
                cause=f"count {wanted.count} is not from 1 to {MAX_COUNT}",
                remedy="freeflow ping --count 3 sends three echoes",
            )
        network, endpoint, sandbox = self._origin(address)
        tasks = self._tasks(network, address)
        probe = self.probe(sandbox, address, wanted.count, bool(tasks))
        task = probe.task if tasks else None
        mac = probe.neighbours.get(str(task or address), "")
        own = self._own(network, task or address)
        found = bool(mac or own)
        host, host_address, local = self._host(network, mac, own is not None)
        tcp, reason = self._tcp(network, host_address, local) if found else ("", "")
        path = self._path(network, mac or (own.mac if own else ""))
        if tcp == OVERLAY:
            tcp = path
        return PingResult(
            address=str(address),
            network=self._name(network),
            source=str(endpoint.ipv4.ip if endpoint.ipv4 else endpoint.id[:12]),
            task=str(task or ""),
            mac=mac or (own.mac if own else ""),
            host=host if found else "",
            host_address=host_address if found else "",
            local=local and found,
            path=path,
            sent=wanted.count,
            round_trips_ms=probe.times,
            tcp=tcp,
            reason=reason,
            name=name,
            encryption=ENCRYPTED_BY[OVERLAY] if network.encrypted and not local else "",
        )

    def _target(self, wanted: str) -> tuple[IPAddress, str]:
        """The target's address, and its name if it was given by name."""
        try:
            return ip_address(wanted), ""
        except ValueError:
            found = resolve(wanted, self.syncer.state())
            return found.address, found.name

    def _path(self, network: Network, mac: str) -> str:
        return FAST if mac and self.kernel.uses_fastpath(network.id, mac) else OVERLAY

    def _tcp(self, network: Network, host: str, local: bool) -> tuple[str, str]:
        """The path to which connections can move, and why no faster one."""
        if self.router is None:
            return "", ""
        try:
            known = self.router.statistics()
        except DataplaneError:
            return "overlay", "the router does not answer"
        if not network.acceleration:
            return "overlay", "acceleration is off for the network"
        if local:
            return "shm", ""
        return _to_other_host(known, network.options, host)

    def _origin(self, address: IPAddress) -> tuple[Network, Endpoint, Path]:
        matching = []
        for network in self.driver.store.networks():
            pools = [subnet.pool for subnet in network.subnets]
            if any(address in pool for pool in (*pools, network.prefix6)):
                matching.append(network)
                for endpoint in self.driver.store.endpoints(network.id):
                    sandbox = self.syncer.sandbox(endpoint)
                    if sandbox is not None and self.is_there(sandbox):
                        return network, endpoint, sandbox
        if matching:
            name = self._name(matching[0])
            raise NotFound(
                "ping",
                cause=f"no container of this host is on network {name}",
                remedy=f"docker run -d --network {name} IMAGE, or ping from a host that has one",
            )
        raise NotFound(
            "ping",
            cause=f"{address} is in no FreeFlow network of this host",
            remedy="freeflow status lists them",
        )

    def _name(self, network: Network) -> str:
        state = self.syncer.state().get(network.id)
        return state.view.name if state and state.view else network.id[:12]

    def _tasks(self, network: Network, address: IPAddress) -> tuple[IPv4Address, ...]:
        """The tasks behind an address, if it is a VIP."""
        state = self.syncer.state().get(network.id)
        if state is None or not isinstance(address, IPv4Address):
            return ()
        return state.table.get(address, ())

    def _own(self, network: Network, address: IPAddress) -> Endpoint | None:
        for endpoint in self.driver.store.endpoints(network.id):
            own = [item.ip for item in (endpoint.ipv4, endpoint.ipv6) if item is not None]
            if address in own:
                return endpoint
        return None

    def _host(self, network: Network, mac: str, own: bool) -> tuple[str, str, bool]:
        engine, _ = self.syncer.engine()
        here = engine.hostname if engine else os.uname().nodename
        behind = self.kernel.locate(network.id, mac) if mac and not own else None
        if behind is None:
            return here, str(self.driver.self_address() or ""), True
        name = (engine.hostnames if engine else {}).get(behind, str(behind))
        return name, str(behind), False


def _to_other_host(known: Statistics, chosen: Mapping[str, str], host: str) -> tuple[str, str]:
    """The path to which connections to a host can move, and why no faster one."""
    rdma = known.rdma.on and options.rdma(chosen)
    relay = known.relay.on and options.relay(chosen)
    if not rdma and not relay:
        return "overlay", "RDMA and the relays are off for the network or this host"
    if not (rdma and not known.rdma.why) and not (relay and not known.relay.why):
        return "overlay", known.relay.why if relay else known.rdma.why
    for peer in known.rdma.hosts:
        if peer.address == host or peer.data_path == host:
            if not peer.session:
                return "overlay", f"no session with its host: {peer.reason}"
            if not (rdma and peer.rdma) and not (relay and peer.relay):
                return "overlay", "its host has no RDMA device, and its relay no TCP"
            if peer.link != "up":
                return "overlay", f"link {peer.link}"
            if not {"rdma": rdma, "relay": relay}.get(peer.transport, False):
                return "overlay", f"{peer.transport} is off for the network"
            return peer.transport, peer.why_not_rdma and f"no RDMA: {peer.why_not_rdma}"
    return "overlay", "no session with its host"
