"""Two hosts on one machine, each with a router and a relay, and containers of both on one network.

The routers run in network namespaces of their own, with a veth pair between them for the session.
The relays use each other's memory instead of an RDMA device (`--memory-relay`), or TCP, which each
connection may enter (`--open-relay`).

    with two_hosts(library=LIBRARY, relay=RELAY) as (one, other):
        a, b = one.containers["a"], other.containers["b"]
        server = b.popen(["iperf3", "-s", "-1"])
        print(a.run(["iperf3", "-c", str(b.ipv4)]).stdout)

With `versions` each host has its own version, and `upgrade` gives it another one. The first host
leads then: their certificates name them node1 and node2.
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
from testbed.namespace_bed import BedContainer, NamespaceBed, connect
from testbed.patience import patience
from testbed.versions import THIS, Version
from tests.unit.swarm_ca import Authority, write

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
    version: Version = THIS
    """The version of the router."""
    certified: bool = False
    """Whether it has a certificate of a Swarm, in `swarm`."""
    everywhere: dict[str, str] = field(default_factory=dict)
    """The containers of both hosts, with their addresses."""
    authority: Authority | None = None
    """Of the certificates; None: the hosts have a secret instead."""

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
        is_open = self.path == "relay" and not self.ruled and self.version.has_relay_path
        return [
            "env",
            f"--chdir={self.version.top}",
            "nsenter",
            f"--net=/proc/{os.getpid()}/fd/{self.namespace}",
            *super().router_command(),
            f"--relay={self.relay}",
            *(["--memory-relay"] if self.device else []),
            *(["--open-relay"] if is_open else []),
            *([f"--swarm={self.swarm}"] if self.certified else []),
        ]

    @property
    def swarm(self) -> Path:
        """Where an engine would keep what it has of its Swarm."""
        return self.folder / "swarm"

    def upgrade(self, version: Version) -> None:
        """Install another version, as an upgrade of the plugin does: programs that run keep their
        library.
        """
        self.kill_router()
        self.version, self.relay = version, version.relay
        self.place_library(version.library)
        self.start_router()

    def renew(self) -> None:
        """Give the host a new certificate."""
        assert self.authority is not None
        made = self.authority.node(f"node{self.number}")
        write(self.swarm, self.authority.root, made)

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

    def wait_session(self) -> None:
        """Wait until the two routers have a session."""
        until = time.monotonic() + patience(_PATIENCE)
        while not any(peer.session for peer in self.router.statistics().rdma.hosts):
            assert time.monotonic() < until, self.log()
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


def _install(hosts: Sequence[HostBed], versions: Sequence[Version]) -> None:
    """Give each host a version, and a certificate of one Swarm."""
    for host, version in zip(hosts, versions, strict=True):
        host.version, host.relay = version, version.relay
        host.place_library(version.library)
    _certify(hosts, Authority())


def _certify(hosts: Sequence[HostBed], authority: Authority) -> None:
    """Give each host a certificate of one Swarm."""
    for host in hosts:
        host.authority, host.certified = authority, True
        host.renew()


def _remove(host: HostBed) -> None:
    for container in host.containers.values():
        for process in container.started:
            if process.poll() is None:
                process.kill()
            process.wait()
    host.kill_router()
    for container in host.containers.values():
        os.close(container.namespace)
    os.close(host.namespace)


def blackhole(host: HostBed, other: HostBed, *, ends: bool = False) -> None:
    """Have the network lose all packets from one host to the other, without a word, or not any
    more: they go to an Ethernet address that nobody has.
    """

    def change() -> None:
        with IPRoute() as route:
            index = route.link_lookup(ifname="cable")[0]
            if ends:
                route.neigh("del", dst=other.address, ifindex=index)
            else:
                nobody = {"lladdr": "02:00:00:00:00:99", "state": "permanent"}
                route.neigh("replace", dst=other.address, ifindex=index, **nobody)

    in_netns(host.namespace, change)


@contextlib.contextmanager
def two_hosts(
    here: Sequence[str] = ("a",),
    there: Sequence[str] = ("b",),
    *,
    library: Path | None = None,
    relay: Path = THIS.relay,
    vips: Mapping[str, Sequence[str]] | None = None,
    settings: RouterSettings | None = None,
    path: str = "rdma",
    ruled: bool = False,
    devices: tuple[bool, bool] | None = None,
    versions: tuple[Version, Version] | None = None,
    authority: Authority | None = None,
) -> Iterator[tuple[HostBed, HostBed]]:
    """Two hosts with containers of these names. The link between the relays is up.

    `devices`: whether each host has one; unless given, both have if the path is rdma. `versions`:
    those of the hosts, with their libraries and relays in place of the others; only the session is
    up then.
    """
    folder = Path(tempfile.mkdtemp(prefix="freeflow-hosts-"))
    folder.chmod(0o755)
    key = KEY if versions is None and authority is None else ""
    wanted = replace(settings or RouterSettings(), session_key=key)
    made: list[HostBed] = []
    bridge = new_namespace()
    numbers = iter(range(2, 250))
    try:
        for number, names in enumerate((here, there), 1):
            place = folder / str(number)
            (place / "shared").mkdir(parents=True)
            containers = {
                name: BedContainer(name, next(numbers), place / "shared") for name in names
            }
            known = {vip: tuple(tasks) for vip, tasks in (vips or {}).items()}
            host = HostBed(
                place, containers, known, wanted, number=number, relay=relay, path=path, ruled=ruled
            )
            if library is not None:
                host.place_library(library)
            host.device = path == "rdma" if devices is None else devices[number - 1]
            made.append(host)
        if versions is not None:
            _install(made, versions)
        if authority is not None:
            _certify(made, authority)
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
            if versions is None:
                host.wait_linked()
            else:
                host.wait_session()
        yield made[0], made[1]
        for host in made:
            host.check_router()
    finally:
        for host in made:
            _remove(host)
        os.close(bridge)
        shutil.rmtree(folder, ignore_errors=True)
