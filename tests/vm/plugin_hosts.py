"""Hosts whose guests run the real plugin, as Docker starts it, beside an engine that knows what the
test tells it.

    with plugin_hosts(made, options={"encrypted": ""}) as hosts:
        hosts[0].add_container("10.78.1.1")
        hosts[0].status()

All devices and rules are the plugin's own, and the sessions between the hosts' routers use
certificates of one Swarm. A test does what Docker does: it calls the plugin's HTTP API, and moves
the interfaces into containers. `Hosts.tell` makes the engines list the peers of the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from driver import names
from testbed.vm import Guest, GuestGoneError, Process
from tests.unit import swarm_ca
from tests.unit.swarm_ca import Authority

BUILT: Final = "/src/build/plugin/rootfs"
"""The built plugin's root file system, which the guests see as it is: its code is compiled."""
ROOT: Final = "/opt/plugin"
"""Where it is mounted: a plugin's root is a mount, as Docker makes it."""
DOCKER: Final = "run/docker/plugins/freeflow.sock"
ADMIN: Final = "/run/freeflow-admin/admin.sock"
NETWORK: Final = "p3l8f1w0gk2c9d7h5m6n4b0aq"
POOL: Final = "10.78.0.0/16"
ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    # An emulated processor of a busy machine needs more than Docker's patience.
    "REQUEST_DEADLINE": "120",
    "SYNC_INTERVAL": "1",
    "VERBS": "off",
}
_POOLS: Final[dict[str, Any]] = {
    "IPv4Data": [{"AddressSpace": "", "Pool": POOL, "Gateway": "10.78.0.1/16"}],
    "IPv6Data": None,
}
_PREPARE: Final = """
mkdir -p /run/docker/netns {root}
mount --bind {built} {root}
cd {root}
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs tmpfs state
mount -t tmpfs tmpfs host
mkdir -p run/docker/plugins host/run host/bin host/swarm/certificates
mount --rbind /run host/run
for each in proc sys dev; do mount --rbind /$each $each; done
"""


@dataclass(eq=False)
class PluginContainer:
    """A container as Docker makes it: a namespace with the endpoint's interface."""

    host: PluginHost
    address: str

    @property
    def name(self) -> str:
        return f"c{self.address.replace('.', '-')}"

    @property
    def endpoint(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def mac(self) -> bytes:
        return bytes([2, 66, *map(int, self.address.split("."))])

    def start(self, command: Sequence[str], **options: Any) -> Process:
        return self.host.guest.start(self.command(command), **options)

    def run(self, command: Sequence[str], **options: Any) -> str:
        return self.host.guest.run(self.command(command), **options).stdout

    def command(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]


@dataclass(eq=False)
class PluginHost:
    """A guest with the plugin."""

    guest: Guest
    built: str = BUILT
    """The plugin's root file system."""
    settings: dict[str, str] = field(default_factory=dict)
    containers: dict[str, PluginContainer] = field(default_factory=dict)
    process: Process | None = None
    engine: Process | None = None

    @property
    def address(self) -> str:
        return str(self.guest.address)

    # --- the plugin's life

    def prepare(self, authority: Authority) -> None:
        """Mount what Docker mounts, and install the node's certificate."""
        self.guest.sh(_PREPARE.format(root=ROOT, built=self.built))
        node = authority.node(f"node{self.guest.number}")
        for file, text in swarm_ca.files(authority.root, node).items():
            self.guest.push(text, f"{ROOT}/host/swarm/certificates/{file}", 0o600)
        program = "/src/tests/vm/programs/engine.py"
        command = ["python3", "-ES", program, "/run/docker.sock", "/run/engine.json"]
        self.engine = self.guest.start(command)

    def start_plugin(self, unset: Sequence[str] = ()) -> None:
        """Start the plugin and wait until it answers; it doesn't get the settings in `unset`."""
        environment = {**ENVIRONMENT, **self.settings}
        words = [f"{name}={value}" for name, value in environment.items() if name not in unset]
        # Nothing else: a variable that is no setting is an error.
        command = [
            "env",
            "-i",
            *words,
            "chroot",
            ROOT,
            "/usr/bin/python3",
            "-P",
            "-m",
            "plugin",
        ]
        self.guest.run(["rm", "-f", f"{ROOT}/{DOCKER}"])
        self.process = self.guest.start(command)
        self.guest.sh(f"until [ -S {ROOT}/{DOCKER} ]; do sleep 0.1; done")
        self.call("GetCapabilities")
        self.call("DiscoverNew", DiscoveryType=1, DiscoveryData=_node(self.address))

    def kill_plugin(self) -> None:
        """Kill the plugin with all its processes, as a crash does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def log(self) -> str:
        return self.process.output + self.process.errors if self.process is not None else ""

    # --- what Docker and users do

    def request(self, socket: str, path: str, body: object = None, check: bool = True) -> Any:
        """Send a request, and return the answer's value; with `check` AssertionError if it is an
        error.
        """
        method = ["-X", "POST", "-d", json.dumps(body)] if body is not None else []
        command = ["curl", "-sg", "-m", "150", *method, "--unix-socket", socket, f"http://x/{path}"]
        answer = json.loads(self.guest.run(command).stdout or "null")
        failed = isinstance(answer, dict) and "Err" in answer
        assert not (check and failed), f"{self.guest.name}: {path}: {answer}\n{self.log()[-4000:]}"
        return answer

    def call(self, name: str, check: bool = True, **body: object) -> Any:
        return self.request(f"{ROOT}/{DOCKER}", f"NetworkDriver.{name}", body, check)

    def status(self) -> Any:
        """What `freeflow status --json` shows."""
        return self.request(ADMIN, "admin/status")

    def create_network(self, options: Mapping[str, str], check: bool = True) -> Any:
        return self.call(
            "CreateNetwork",
            check,
            NetworkID=NETWORK,
            Options={"com.docker.network.generic": dict(options)},
            **_POOLS,
        )

    def add_container(self, address: str) -> PluginContainer:
        """Make a container, as Docker does. The first address of a host is 10.78.NUMBER.1."""
        container = PluginContainer(self, address)
        error = self.request_endpoint(container)
        assert "Err" not in error, f"{error}\n{self.log()[-4000:]}"
        key = f"/var/run/docker/netns/{container.name}"
        both: dict[str, Any] = {"NetworkID": NETWORK, "EndpointID": container.endpoint}
        self.call("Join", **both, SandboxKey=key, Options={})
        name, link = container.name, names.container_veth(container.endpoint)
        self.guest.sh(
            f"ip netns add {name}; touch /run/docker/netns/{name};"
            f"mount --bind /run/netns/{name} /run/docker/netns/{name};"
            f"ip link set {link} netns {name} name eth0; ip -n {name} link set lo up;"
            f"ip -n {name} addr add {address}/16 dev eth0; ip -n {name} link set eth0 up"
        )
        self.containers[address] = container
        return container

    def listed(self) -> dict[str, dict[str, str]]:
        """Its containers as the engine lists them; the plugin removes endpoints of others."""
        return {
            container.name: {
                "Name": container.name,
                "EndpointID": container.endpoint,
                "MacAddress": container.mac.hex(":"),
                "IPv4Address": f"{container.address}/16",
            }
            for container in self.containers.values()
        }

    def request_endpoint(self, container: PluginContainer) -> Any:
        """CreateEndpoint's answer, which may be an error."""
        interface = {
            "Address": f"{container.address}/16",
            "MacAddress": container.mac.hex(":"),
        }
        return self.call(
            "CreateEndpoint",
            False,
            NetworkID=NETWORK,
            EndpointID=container.endpoint,
            Interface=interface,
            Options={},
        )


def _node(address: str) -> dict[str, object]:
    return {"Address": address, "Self": True}


class PluginHosts(list[PluginHost]):
    """Hosts of one Swarm with one network."""

    authority: Authority
    options: dict[str, str]
    """The network's options, as the leader has completed them."""

    def add_container(self, number: int) -> PluginContainer:
        """Make the first container of a host, by the host's number from 1."""
        made = self[number - 1].add_container(f"10.78.{number}.1")
        self.tell()
        return made

    def tell(self, peers: Sequence[PluginHost] | None = None) -> None:
        """Make the engine of each host list these hosts as the network's, by default all."""
        listed = [
            {"Name": host.guest.name, "IP": host.address}
            for host in (self if peers is None else peers)
        ]
        for host in self:
            network = {
                "Id": NETWORK,
                "Name": "net",
                "Driver": "freeflow:latest",
                "Scope": "swarm",
                "Peers": listed,
                "Containers": host.listed(),
                "IPAM": {"Config": [{"Subnet": POOL, "Gateway": "10.78.0.1"}]},
            }
            node = f"node{host.guest.number}"
            swarm = {"LocalNodeState": "active", "NodeID": node, "NodeAddr": host.address}
            answers = {
                "/version": {"ApiVersion": "1.45", "Version": "26.1.5"},
                "/info": {"ServerVersion": "26.1.5", "Name": host.guest.name, "Swarm": swarm},
                "/plugins": [
                    {
                        "Name": "freeflow:latest",
                        "Config": {"Interface": {"Socket": "freeflow.sock"}},
                    }
                ],
                "/networks": [network],
                f"/networks/{NETWORK}": network,
                "/containers/json": [],
            }
            host.guest.push(json.dumps(answers), "/run/engine.new")
            host.guest.run(["mv", "/run/engine.new", "/run/engine.json"])


@contextlib.contextmanager
def plugin_hosts(
    made: Sequence[Guest], *, options: Mapping[str, str], settings: Mapping[str, str] | None = None
) -> Iterator[PluginHosts]:
    """Guests as hosts of a network with these options; the first host allocates it."""
    hosts = PluginHosts(PluginHost(guest, settings=dict(settings or {})) for guest in made)
    hosts.authority = Authority()
    try:
        for host in hosts:
            host.prepare(hosts.authority)
        hosts.tell()
        with ThreadPoolExecutor(len(hosts)) as pool:
            list(pool.map(PluginHost.start_plugin, hosts))
        allocated = hosts[0].call(
            "AllocateNetwork", NetworkID=NETWORK, Options=dict(options), **_POOLS
        )
        hosts.options = allocated["Options"]
        for host in hosts:
            host.create_network(hosts.options)
        yield hosts
    except BaseException:
        # pytest shows it with the error.
        for host in hosts:
            print(f"--- {host.guest.name}\n{host.log()[-5000:]}")
        raise
    finally:
        for host in hosts:
            with contextlib.suppress(GuestGoneError):
                host.kill_plugin()
