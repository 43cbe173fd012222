"""Containers on one host and a router, without Docker, for tests of the library and the router.

A container is a network namespace with an address; all containers are on one bridge. The router is
the real one, in its own process, and knows the containers. Nothing is pinned outside and nothing is
mounted on the host, so everything disappears with the test's process.

In a test::

    with bed("a", "b", library=Path("build/libfreeflow.so")) as made:
        a, b = made.containers.values()
        server = b.popen(["iperf3", "-s", "-1"])
        print(a.run(["iperf3", "-c", str(b.ipv4)]).stdout)
        for connection in made.router.connections().connections:
            print(connection.local, connection.remote, connection.path, connection.reason)

`popen` and `run` start programs as in a container with the mount: `/run/freeflow` has the router's
socket and the library, and LD_PRELOAD is set if the bed has a library (unless `accelerated=False`).
With VIPs::

    with bed("client", "s1", "s2", vips={"10.78.0.100": ("s1", "s2")}) as made: ...

With `bed("a", "b", bridged=True)` the network is as of Docker's `bridge` driver: the bridge is in
the router's own namespace, where `made.on_host` calls functions.

With `bed("a", loopback=True)` connections over loopback are upgraded too, for test suites that use
nothing else. `made.learn(settings=...)` sends the router a new snapshot.

From a shell, `python -m testbed.namespace_bed [--library FILE] [NAMES...]` makes a bed, prints how
to run programs in its containers, and removes it at the end of its input.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from pyroute2 import IPRoute

from dataplane.control import EndpointFact, NetworkFact, RouterSettings, RouterSnapshot
from dataplane.errors import RouterAway
from dataplane.router_client import RouterClient
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import new_namespace, set_up, wait_operational, write_vips
from testbed.patience import patience, slowness

T = TypeVar("T")

SUBNET: Final = "10.78.0"
SUBNET6: Final = "fd78::"
NETWORK: Final = "n1"
ROUTER: Final = "router.sock"
LIBRARY: Final = "libfreeflow.so"
_PATIENCE: Final = 10.0
BRIDGE: Final = "br0"
_OTHER_DRIVER: Final[dict[str, Any]] = {"kind": "bridge", "foreign": True, "bridge": BRIDGE}
TRACKING: Final = """
table inet tracking {
    chain forward {
        type filter hook forward priority 0
        ct state established accept
    }
}
"""
"""A rule for which the host tracks what it forwards, for nft."""

# Its own /run, so that nothing appears in the host's.
_INSIDE: Final = (
    "set -e; mount -t tmpfs tmpfs /run; mkdir -p /run/freeflow /run/lock; "
    'mount --bind "$0" /run/freeflow; exec "$@"'
)


@dataclass(eq=False)
class BedContainer:
    """A network namespace on the bed's bridge."""

    name: str
    number: int
    shared: Path
    """The folder that the container sees as /run/freeflow."""
    namespace: int = field(default_factory=new_namespace)
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    @property
    def ipv4(self) -> IPv4Address:
        return IPv4Address(f"{SUBNET}.{self.number}")

    @property
    def ipv6(self) -> IPv6Address:
        return IPv6Address(f"{SUBNET6}{self.number:x}")

    @property
    def inode(self) -> int:
        return os.fstat(self.namespace).st_ino

    @property
    def path(self) -> str:
        """The path of the namespace, for `nsenter --net=`."""
        return f"/proc/{os.getpid()}/fd/{self.namespace}"

    def do(self, function: Callable[[], T]) -> T:
        """Call a function inside the container's network namespace."""
        return in_netns(self.namespace, function)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """A command that runs another one inside the container, with /run/freeflow."""
        inside = ["unshare", "--mount", "sh", "-c", _INSIDE, str(self.shared), *arguments]
        return ["nsenter", f"--net={self.path}", *inside]

    def popen(
        self,
        arguments: Sequence[str],
        *,
        accelerated: bool = True,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a program inside the container; it is killed with the bed."""
        started = subprocess.Popen(
            self.command(_preloaded(arguments, self.shared) if accelerated else arguments),
            env=_environment(env),
            **options,
        )
        self.started.append(started)
        return started

    def run(
        self,
        arguments: Sequence[str],
        *,
        accelerated: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program inside the container to its end; input and output are text."""
        return subprocess.run(
            self.command(_preloaded(arguments, self.shared) if accelerated else arguments),
            env=_environment(env),
            timeout=patience(timeout),
            **{"check": True, "text": True, "capture_output": True, **options},
        )


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return {**own, "SLOWNESS": f"{slowness():.2f}", **(more or {})}


def _preloaded(arguments: Sequence[str], shared: Path) -> list[str]:
    """A command that sets LD_PRELOAD for the program alone, not for the programs that start it."""
    if not (shared / LIBRARY).exists():
        return list(arguments)
    return ["env", f"LD_PRELOAD=/run/freeflow/{LIBRARY}", *arguments]


class AnyContainer(Protocol):
    """A container of a test bed, on this machine or in a virtual one."""

    @property
    def name(self) -> str: ...
    @property
    def ipv4(self) -> IPv4Address: ...
    @property
    def ipv6(self) -> IPv6Address: ...
    @property
    def inode(self) -> int: ...
    @property
    def path(self) -> str: ...


def endpoint_fact(container: AnyContainer, network: str, more: Sequence[str] = ()) -> EndpointFact:
    """A container's endpoint as the driver describes it to the router; `more` are further
    addresses.
    """
    return EndpointFact(
        id=f"{container.name:0<12}",
        network=network,
        addresses=(str(container.ipv4), str(container.ipv6), *more),
        namespace=container.inode,
        path=container.path,
        container=container.name,
    )


@dataclass(eq=False)
class NamespaceBed:
    """Containers by name, and their router."""

    folder: Path
    containers: dict[str, BedContainer]
    vips: dict[str, tuple[str, ...]]
    settings: RouterSettings = field(default_factory=RouterSettings)
    networks: dict[str, str] = field(default_factory=dict)
    """Container to network, for those that are not on `NETWORK`."""
    loopback: bool = False
    """The first container's loopback addresses count as its own on the network."""
    guard: bool = True
    """Whether the router's sockets refuse descriptors, if the kernel can."""
    host: int | None = None
    """The namespace of router and bridge, if the network is another driver's."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def place_library(self, library: Path) -> None:
        """Give programs that start from now on this library; those that run keep theirs."""
        fresh = self.shared / f"{LIBRARY}.new"
        shutil.copy(library, fresh)
        fresh.replace(self.shared / LIBRARY)

    @property
    def router(self) -> RouterClient:
        """A client of the router's control socket."""
        return RouterClient(self.folder / "control.sock")

    def facts(self, **changes: Any) -> RouterSnapshot:
        """The current state of this bed, but for `changes`: fields of RouterSnapshot."""
        networks = sorted({NETWORK, *self.networks.values()})
        known = {
            "endpoints": tuple(
                endpoint_fact(
                    container,
                    self.networks.get(container.name, NETWORK),
                    self._loopback(container),
                )
                for container in self.containers.values()
            ),
            "networks": tuple(
                NetworkFact(
                    id=network,
                    subnets=(f"{SUBNET}.0/24", f"{SUBNET6}/64"),
                    **({} if self.host is None else _OTHER_DRIVER),
                    vips={
                        vip: tuple(
                            str(self.containers[task].ipv4) if task in self.containers else task
                            for task in tasks
                        )
                        for vip, tasks in self.vips.items()
                    },
                )
                for network in networks
            ),
            "settings": self.settings,
        }
        return RouterSnapshot(**{**known, **changes})

    def _loopback(self, container: BedContainer) -> tuple[str, ...]:
        first = next(iter(self.containers.values()))
        return ("127.0.0.1", "::1") if self.loopback and container is first else ()

    def on_host(self, function: Callable[[], T]) -> T:
        """Call a function in the namespace of router and bridge."""
        assert self.host is not None
        return in_netns(self.host, function)

    def learn(self, **changes: Any) -> None:
        """Send the router the current state of this bed; see `facts` for `changes`."""
        self.router.replace_snapshot(self.facts(**changes))

    def router_command(self) -> list[str]:
        """The command that starts the router."""
        place = (
            [] if self.host is None else ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self.host}"]
        )
        return [
            *place,
            sys.executable,
            "-m",
            "dataplane.router",
            f"--socket={self.shared / ROUTER}",
            f"--control={self.folder / 'control.sock'}",
            "--watch-stdin",
            *([] if self.guard else ["--no-guard"]),
        ]

    def start_router(self) -> None:
        """Start the router and send it a snapshot."""
        self.process = subprocess.Popen(
            self.router_command(),
            stdin=subprocess.PIPE,
            stdout=(self.folder / "router.log").open("ab"),
        )
        until = time.monotonic() + patience(_PATIENCE)
        while True:
            try:
                self.learn()
                return
            except RouterAway:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.02)

    def kill_router(self) -> None:
        """Kill the router, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def log(self) -> str:
        """The router's log."""
        return (self.folder / "router.log").read_text()

    def check_router(self) -> None:
        """Assert that the router has survived no bug."""
        if self.process is not None:
            assert "a bug in the router" not in self.log(), self.log()


def connect(containers: Sequence[BedContainer], bridge: int) -> None:
    def make_bridge() -> None:
        with IPRoute() as route:
            route.link("add", ifname=BRIDGE, kind="bridge")
            route.link("set", index=route.link_lookup(ifname=BRIDGE)[0], state="up")

    in_netns(bridge, make_bridge)
    for container in containers:
        port = f"v{container.number}"

        def plug(port: str = port, container: BedContainer = container) -> None:
            with IPRoute() as route:
                peer = {"ifname": "eth0", "net_ns_fd": container.namespace}
                route.link("add", ifname=port, kind="veth", peer=peer)
                index = route.link_lookup(ifname=port)[0]
                route.link("set", index=index, master=route.link_lookup(ifname=BRIDGE)[0])
                route.link("set", index=index, state="up")

        addresses = (IPv4Interface((container.ipv4, 24)), IPv6Interface((container.ipv6, 64)))
        in_netns(bridge, plug)
        container.do(partial(set_up, "eth0", *addresses))
        in_netns(bridge, partial(wait_operational, port))


def _write_vips(made: NamespaceBed) -> None:
    known = made.containers
    table = {
        IPv4Address(vip): tuple(known[task].ipv4 for task in tasks if task in known)
        for vip, tasks in made.vips.items()
    }
    if table:
        for container in known.values():
            write_vips(container.namespace, table)


@contextlib.contextmanager
def bed(
    *names: str,
    vips: Mapping[str, Sequence[str]] | None = None,
    settings: RouterSettings | None = None,
    library: Path | None = None,
    networks: Mapping[str, str] | None = None,
    loopback: bool = False,
    router: bool = True,
    guard: bool = True,
    bridged: bool = False,
) -> Iterator[NamespaceBed]:
    """Containers of these names, and a router that knows them.

    `vips` maps an address to names of containers, or to addresses of tasks on other hosts.
    `networks` maps containers that are not on the common network to their network. With
    `router=False` no router runs until `start_router`. With `guard=False` the router's sockets
    accept descriptors, as on kernels before Linux 6.16. With `bridged` the network is as of
    Docker's `bridge` driver.
    """
    folder = Path(tempfile.mkdtemp(prefix="freeflow-bed-"))
    folder.chmod(0o755)
    (shared := folder / "shared").mkdir(mode=0o755)
    containers = {
        name: BedContainer(name, number, shared)
        for number, name in enumerate(names or ("a", "b"), 2)
    }
    made = NamespaceBed(
        folder,
        containers,
        {vip: tuple(tasks) for vip, tasks in (vips or {}).items()},
        settings or RouterSettings(),
        dict(networks or {}),
        loopback,
        guard,
    )
    if library is not None:
        made.place_library(library)
    bridge = new_namespace()
    made.host = bridge if bridged else None
    try:
        connect(list(containers.values()), bridge)
        _write_vips(made)
        if router:
            made.start_router()
        yield made
        made.check_router()
    finally:
        for container in containers.values():
            for process in container.started:
                if process.poll() is None:
                    process.kill()
                process.wait()
        made.kill_router()
        for container in containers.values():
            os.close(container.namespace)
        os.close(bridge)
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Keep a bed until the end of input."""
    parser = argparse.ArgumentParser(description="Containers and a router, without Docker.")
    parser.add_argument("names", nargs="*", default=["a", "b"])
    parser.add_argument("--library", type=Path)
    parser.add_argument("--loopback", action="store_true")
    parser.add_argument("--vip", action="append", default=[], help="ADDRESS=NAME,NAME")
    given = parser.parse_args()
    vips = {vip: tasks.split(",") for vip, _, tasks in (word.partition("=") for word in given.vip)}
    with bed(*given.names, vips=vips, library=given.library, loopback=given.loopback) as made:
        print(f"router's log: {made.folder / 'router.log'}")
        print(f"router's control socket: {made.folder / 'control.sock'}")
        for container in made.containers.values():
            inside = f"unshare --mount sh -c '{_INSIDE}' {container.shared}"
            print(f"{container.name} {container.ipv4} {container.ipv6}:")
            print(f"  nsenter --net={container.path} {inside} PROGRAM...")
        print("the end of input removes the bed", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
