"""Hosts with routers and containers, without Docker.

Each guest has containers, which are namespaces on one VXLAN network, and the real router.

    with cluster(pair, containers=2) as (one, other):
        a, b = one.containers[0], other.containers[0]
        server = b.start(["iperf3", "-s", "-1"])
        b.wait_listening(5201)
        a.run(["iperf3", "-c", str(b.ipv4), "-n", "10M"])
        for connection in one.router.connections(a.inode).connections:
            print(connection.local, connection.remote, connection.path)

The network is the kernel's own, as a host without the eBPF programs has it. Containers share the
guest's files: the router's socket and the library are in /run/freeflow. `start` and `run` preload
the library unless told not to. The router gets a snapshot when it starts, and another one by
`learn`; `kill_router` acts as its crash. After `wait_linked` on each host, connections between
hosts use RDMA.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

import msgspec

from dataplane import control
from dataplane.control import NetworkFact, RouterSettings, RouterSnapshot
from dataplane.errors import DataplaneError, RouterAway
from testbed.namespace_bed import endpoint_fact
from testbed.process import CommandError, wait_until
from testbed.vm import Guest, GuestGoneError, Process
from testbed.vm.guest import MTU, SOURCES
from tests.dataplane.places import ROOT
from tests.unit import swarm_ca
from tests.unit.swarm_ca import Node

BUILT_LIBRARY: Final = ROOT / "build/libfreeflow.so"
BUILT_RELAY: Final = ROOT / "build/freeflow-relay"
LIBRARY: Final = "/run/freeflow/libfreeflow.so"
RELAY: Final = "/usr/lib/freeflow/freeflow-relay"
CONTROL: Final = "/run/freeflow-admin/router.sock"
SOCKET: Final = "/run/freeflow/router.sock"
SWARM: Final = "/run/freeflow-swarm"
"""The folder in a guest in which `Host.certify` puts certificates; for the router's option
`--swarm`.
"""
NETWORK: Final = "n1"
KEY: Final = "the secret of the test's hosts"
"""The key for sessions between routers whose hosts have no certificates."""
PORT: Final = 4789
_VNI: Final = 4242
_HEADERS: Final = 50
_ASK: Final = """
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(20)
connection.connect(sys.argv[1])
connection.sendall(sys.stdin.buffer.read())
answer = b""
while not answer.endswith(b"\\n"):
    data = connection.recv(1 << 18)
    if not data:
        sys.exit("closed before its answer")
    answer += data
sys.stdout.buffer.write(answer)
"""


class Router:
    """A client of a guest's router; like `dataplane.router_client` on the router's own host."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def replace_snapshot(self, facts: RouterSnapshot) -> None:
        self._ask(facts)

    def statistics(self) -> control.Statistics:
        answer = self._ask(control.StatisticsRequest())
        assert isinstance(answer, control.Statistics)
        return answer

    def connections(self, namespace: int | None = None) -> control.Connections:
        answer = self._ask(control.ConnectionsRequest(namespace=namespace))
        assert isinstance(answer, control.Connections)
        return answer

    def traffic(self, namespace: int | None = None) -> control.TrafficFacts:
        answer = self._ask(control.TrafficRequest(namespace=namespace))
        assert isinstance(answer, control.TrafficFacts)
        return answer

    def verbs(self) -> control.VerbsObjects:
        answer = self._ask(control.VerbsRequest())
        assert isinstance(answer, control.VerbsObjects)
        return answer

    def paths(self) -> control.PathCounts:
        answer = self._ask(control.PathsRequest())
        assert isinstance(answer, control.PathCounts)
        return answer

    def _ask(self, request: control.ControlRequest) -> control.ControlReply:
        line = msgspec.json.encode(request) + b"\n"
        try:
            done = self._guest.run(["python3", "-ESc", _ASK, CONTROL], stdin=line)
        except CommandError as error:
            raise RouterAway(f"{self._guest.name}: {error}") from error
        reply: control.ControlReply = msgspec.json.decode(done.stdout, type=control.ControlReply)
        if isinstance(reply, control.Failed):
            raise DataplaneError(f"{self._guest.name}: {reply.message}")
        return reply


@dataclass(eq=False)
class Container:
    """A network namespace in a guest, on the network of all hosts."""

    guest: Guest
    number: int
    """The number on its host, from 1."""
    inode: int = 0
    started: list[Process] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"c{self.guest.number}x{self.number}"

    @property
    def ipv4(self) -> IPv4Address:
        return IPv4Address("10.78.0.0") + self.guest.number * 256 + self.number

    @property
    def ipv6(self) -> IPv6Address:
        return IPv6Address("fd78::") + self.guest.number * 65536 + self.number

    @property
    def path(self) -> str:
        """The path of the namespace in the guest."""
        return f"/run/netns/{self.name}"

    def command(self, arguments: Sequence[str], accelerated: bool = True) -> list[str]:
        """A command that runs another one inside; it sets LD_PRELOAD for the program alone."""
        preloaded = ["env", f"LD_PRELOAD={LIBRARY}"] if accelerated else []
        return ["nsenter", f"--net={self.path}", *preloaded, *arguments]

    def start(
        self, arguments: Sequence[str], *, accelerated: bool = True, **options: Any
    ) -> Process:
        """Start a program inside the container; it is killed with the cluster."""
        process = self.guest.start(self.command(arguments, accelerated), **options)
        self.started.append(process)
        return process

    def run(
        self, arguments: Sequence[str], *, accelerated: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside the container to its end; the options are those of `Guest.run`."""
        return self.guest.run(self.command(arguments, accelerated), **options)

    def wait_listening(self, port: int) -> None:
        self.guest.wait_listening(port, self.name)


@dataclass(eq=False)
class Host:
    """A guest with its router and containers."""

    guest: Guest
    containers: list[Container]
    peers: tuple[str, ...]
    """The addresses of the other hosts."""
    settings: RouterSettings
    options: tuple[str, ...] = ()
    """Further options of the router."""
    process: Process | None = None

    @property
    def router(self) -> Router:
        return Router(self.guest)

    def facts(self, **changes: Any) -> RouterSnapshot:
        """The current state of this host, but for `changes`: fields of RouterSnapshot."""
        known: dict[str, Any] = {
            "endpoints": tuple(endpoint_fact(container, NETWORK) for container in self.containers),
            "networks": (
                NetworkFact(
                    id=NETWORK,
                    name=NETWORK,
                    subnets=("10.78.0.0/16", "fd78::/64"),
                    peers=self.peers,
                ),
            ),
            "settings": self.settings,
            "underlay": str(self.guest.address),
        }
        return RouterSnapshot(**{**known, **changes})

    def learn(self, **changes: Any) -> None:
        self.router.replace_snapshot(self.facts(**changes))

    def start_router(self) -> None:
        """Start the router and send it a snapshot."""
        sockets = [f"--socket={SOCKET}", f"--control={CONTROL}"]
        command = ["python3", "-m", "dataplane.router", *sockets, *self.options]
        self.process = process = self.guest.start(command, env=SOURCES)

        def learned() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"{self.guest.name}: the router has ended\n{self.log()}")
            try:
                self.learn()
            except RouterAway:
                return False
            return True

        self.guest.sh(f"for i in $(seq 600); do [ ! -S {CONTROL} ] || break; sleep 0.05; done")
        wait_until(f"{self.guest.name}: the router", learned, 60)

    def wait_linked(self, timeout: float = 60) -> None:
        """Wait until this host has a link over RDMA to each of the other hosts."""

        def linked() -> bool:
            rdma = self.router.statistics().rdma
            assert rdma is not None
            links = [(peer.link, peer.transport) for peer in rdma.hosts]
            return links.count(("up", "rdma")) == len(self.peers)

        wait_until(f"{self.guest.name}: links to {', '.join(self.peers)}", linked, timeout, 0.3)

    def certify(self, root: str, node: Node) -> None:
        """Install a node's certificate as its engine does: each file by rename."""
        folder = f"{SWARM}/certificates"
        for file, text in swarm_ca.files(root, node).items():
            self.guest.push(text, f"{folder}/.tmp-{file}", 0o600)
            self.guest.run(["mv", f"{folder}/.tmp-{file}", f"{folder}/{file}"])

    def kill_router(self) -> None:
        """Kill the router, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        """The router's log since its start."""
        return self.process.output + self.process.errors if self.process is not None else ""

    def make_network(self) -> None:
        """Make the VXLAN device, a bridge, and the containers on it."""
        own = self.guest.address
        mtu = MTU - _HEADERS
        lines = [
            f"link add vx0 type vxlan id {_VNI} local {own} dstport {PORT} nolearning",
            "link add br0 type bridge",
            f"link set vx0 mtu {mtu} master br0 up",
            "link set br0 up",
        ]
        for container in self.containers:
            port, name = f"v{container.number}", container.name
            lines += [
                f"netns add {name}",
                f"link add {port} mtu {mtu} master br0 type veth peer name eth0 mtu {mtu} netns {name}",
                f"link set {port} up",
                f"-n {name} addr add {container.ipv4}/16 dev eth0",
                f"-n {name} addr add {container.ipv6}/64 dev eth0 nodad",
                f"-n {name} link set lo up",
                f"-n {name} link set eth0 up",
            ]
        script = [f"ip {line}" for line in lines]
        # Frames for unknown addresses, which are all here, go to every host.
        script += [f"bridge fdb append 00:00:00:00:00:00 dev vx0 dst {peer}" for peer in self.peers]
        paths = " ".join(container.path for container in self.containers)
        inodes = self.guest.sh("; ".join([*script, f"stat -Lc %i {paths}"])).split()
        for container, inode in zip(self.containers, inodes, strict=True):
            container.inode = int(inode)

    def remove_network(self) -> None:
        names = " ".join(container.name for container in self.containers)
        self.guest.sh(
            f"for n in {names}; do ip netns del $n; done; ip link del vx0; ip link del br0"
        )


@contextlib.contextmanager
def cluster(
    made: Sequence[Guest],
    *,
    containers: int = 1,
    settings: RouterSettings | None = None,
    files: Mapping[str, Path] | None = None,
    options: Sequence[str] = (),
    routers: bool = True,
) -> Iterator[list[Host]]:
    """Guests as hosts of one network, each with this many containers.

    They get the built library and relay, and `files`: further or other files, by path. `options`
    are the router's. With `routers=False` no router runs until `start_router`. Guests with an RDMA
    device get links; see `wait_linked`.
    """
    hosts = [
        Host(
            guest,
            [Container(guest, number) for number in range(1, containers + 1)],
            tuple(str(other.address) for other in made if other is not guest),
            settings or RouterSettings(session_key=KEY),
            tuple(options),
        )
        for guest in made
    ]
    try:
        for host in hosts:
            host.guest.run(["mkdir", "-p", "/run/freeflow", "/run/freeflow-admin"])
            built = {LIBRARY: BUILT_LIBRARY, RELAY: BUILT_RELAY}
            for path, source in (built | dict(files or {})).items():
                host.guest.push(source, path)
            host.make_network()
        if routers:
            with ThreadPoolExecutor(len(hosts)) as pool:
                list(pool.map(Host.start_router, hosts))
        yield hosts
    finally:
        for host in hosts:
            # Guests that were switched off have nothing left to remove.
            with contextlib.suppress(GuestGoneError):
                for container in host.containers:
                    for process in container.started:
                        process.kill()
                host.kill_router()
                host.remove_network()
