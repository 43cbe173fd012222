"""Two hosts on one machine, each with a router and a relay, and containers of both on one network.

The routers run in network namespaces of their own, with a veth pair between them for the session.
The relays use each other's memory instead of an RDMA device (`--memory-relay`), or TCP, which each
connection may enter (`--open-relay`).

    with two_hosts(library=LIBRARY, relay=RELAY) as (one, other):
        a, b = one.containers["a"], other.containers["b"]
        server = b.popen(["iperf3", "-s", "-1"])
        print(a.run(["iperf3", "-c", str(b.ipv4)]).stdout)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace
from pyroute2 import IPRoute

from dataplane.control import PeerFact, RdmaFacts, RelayFacts, RouterSettings, RouterSnapshot
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace, write_vips
from testbed.namespace_bed import LIBRARY, BedContainer, NamespaceBed, connect
from testbed.patience import patience

KEY: Final = "a secret of two hosts that are one machine"
_PATIENCE: Final = 15.0


@dataclass(eq=False)
class HostBed(NamespaceBed):
    """One host. `number` is 1 or 2."""

    number: int = 1
    namespace: int = field(default_factory=new_namespace)
    relay: Path = Path()
    path: str = "rdma"
    """The path of connections with the other host: rdma or relay."""
    device: bool = True
    """Whether the host has what stands for an RDMA device."""
    ruled: bool = False
    """Connections enter the relay by the rule, otherwise all do."""
    everywhere: dict[str, str] = field(default_factory=dict)
    """The containers of both hosts, with their addresses."""

    @property
    def address(self) -> str:
        return f"192.0.2.{self.number}"

    def facts(self, **changes: Any) -> RouterSnapshot:
        """The snapshot of this host, for its router."""
        made = super().facts()
        networks = tuple(
            replace(network, peers=(f"192.0.2.{3 - self.number}",), vips=self._vips())
            for network in made.networks
        )
        return replace(made, **{"networks": networks, "underlay": self.address, **changes})

    def _vips(self) -> dict[str, tuple[str, ...]]:
        return {
            vip: tuple(self.everywhere[task] for task in tasks) for vip, tasks in self.vips.items()
        }

    def router_command(self) -> list[str]:
        """The router's command, in the host's namespace and with a relay."""
        return [
            "nsenter",
            f"--net=/proc/{os.getpid()}/fd/{self.namespace}",
            *super().router_command(),
            f"--relay={self.relay}",
            *(["--memory-relay"] if self.device else []),
            *(["--open-relay"] if self.path == "relay" and not self.ruled else []),
        ]

    def counts(self) -> RdmaFacts | RelayFacts:
        """What the router counts about the path."""
        said = self.router.statistics()
        return said.rdma if self.path == "rdma" else said.relay

    def peer(self) -> PeerFact:
        """What the router reports about the other host."""
        (peer,) = self.router.statistics().rdma.hosts
        return peer

    def wait_linked(self) -> None:
        """Wait until connections can move."""
        until = time.monotonic() + patience(_PATIENCE)
        while True:
            peers = self.router.statistics().rdma.hosts
            if not self.counts().why and any(peer.link == "up" for peer in peers):
                return
            assert time.monotonic() < until, (self.counts(), peers, self.log())
            time.sleep(0.02)

    def relay_pid(self) -> int:
        """The process of the relay, the router's only child of that name."""
        assert self.process is not None
        router = self.process.pid
        children = Path(f"/proc/{router}/task/{router}/children").read_text().split()
        (pid,) = [
            int(child)
            for child in children
            if Path(f"/proc/{child}/comm").read_text().strip() == self.relay.name[:15]
        ]
        return pid


def _join(one: HostBed, other: HostBed) -> None:
    """Connect two hosts by a veth pair."""

    def make() -> None:
        with IPRoute() as route:
            peer = {"ifname": "cable", "net_ns_fd": other.namespace}
            route.link("add", ifname="cable", kind="veth", peer=peer)

    def configure(address: str) -> None:
        with IPRoute() as route:
            cable = route.link_lookup(ifname="cable")[0]
            route.addr("add", index=cable, address=address, prefixlen=24)
            for index in (cable, route.link_lookup(ifname="lo")[0]):
                route.link("set", index=index, state="up")

    in_netns(one.namespace, make)
    for host in (one, other):
        in_netns(host.namespace, partial(configure, host.address))


def cut(host: HostBed, *, up: bool = False) -> None:
    """Pull the cable, or plug it in again."""

    def change() -> None:
        with IPRoute() as route:
            index = route.link_lookup(ifname="cable")[0]
            route.link("set", index=index, state="up" if up else "down")

    in_netns(host.namespace, change)


@contextlib.contextmanager
def two_hosts(
    here: Sequence[str] = ("a",),
    there: Sequence[str] = ("b",),
    *,
    library: Path | None = None,
    relay: Path,
    vips: Mapping[str, Sequence[str]] | None = None,
    settings: RouterSettings | None = None,
    path: str = "rdma",
    ruled: bool = False,
    devices: tuple[bool, bool] | None = None,
) -> Iterator[tuple[HostBed, HostBed]]:
    """Two hosts with containers of these names. The link between the relays is up.

    `devices`: whether each host has one; unless given, both have if the path is rdma.
    """
    folder = Path(tempfile.mkdtemp(prefix="freeflow-hosts-"))
    folder.chmod(0o755)
    wanted = replace(settings or RouterSettings(), session_key=KEY)
    made: list[HostBed] = []
    bridge = new_namespace()
    numbers = iter(range(2, 250))
    try:
        for number, names in enumerate((here, there), 1):
            place = folder / str(number)
            (place / "shared").mkdir(parents=True)
            if library is not None:
                shutil.copy(library, place / "shared" / LIBRARY)
            containers = {
                name: BedContainer(name, next(numbers), place / "shared") for name in names
            }
            known = {vip: tuple(tasks) for vip, tasks in (vips or {}).items()}
            host = HostBed(
                place, containers, known, wanted, number=number, relay=relay, path=path, ruled=ruled
            )
            host.device = path == "rdma" if devices is None else devices[number - 1]
            made.append(host)
        every = {name: box for host in made for name, box in host.containers.items()}
        connect(list(every.values()), bridge)
        _join(*made)
        for host in made:
            host.everywhere = {name: str(box.ipv4) for name, box in every.items()}
            for container in host.containers.values():
                if vips:
                    table = {
                        IPv4Address(vip): tuple(every[task].ipv4 for task in of)
                        for vip, of in vips.items()
                    }
                    write_vips(container.namespace, table)
            host.start_router()
        for host in made:
            host.wait_linked()
        yield made[0], made[1]
        for host in made:
            host.check_router()
    finally:
        for host in made:
            for container in host.containers.values():
                for process in container.started:
                    if process.poll() is None:
                        process.kill()
                    process.wait()
            host.kill_router()
            for container in host.containers.values():
                os.close(container.namespace)
            os.close(host.namespace)
        os.close(bridge)
        shutil.rmtree(folder, ignore_errors=True)
