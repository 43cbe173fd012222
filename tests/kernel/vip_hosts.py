"""A client and some tasks, each in a network namespace of its own, on one bridge: the world that
VIP rules live in.

Every task answers TCP and UDP on port 80 with its own address; pings are counted by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

from pyroute2 import IPRoute, netns

from driver.kernel.checksum import internet_checksum
from driver.kernel.namespace import in_netns
from testbed.kernel_hosts import wait_operational
from testbed.patience import patience

PORT = 80
NETWORK = "10.77.0"
CLIENT = IPv4Address(f"{NETWORK}.10")
VIP = IPv4Address(f"{NETWORK}.200")


def address(number: int) -> IPv4Address:
    """Of task `number`."""
    return IPv4Address(f"{NETWORK}.{20 + number}")


@dataclass
class Container:
    """A namespace with one interface on the bridge."""

    name: str
    address: IPv4Address
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    def serve(self) -> None:
        """Answer TCP and UDP with the own address."""

        def listen() -> tuple[socket.socket, socket.socket]:
            stream = socket.create_server(("0.0.0.0", PORT))
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            datagrams.bind(("0.0.0.0", PORT))
            return stream, datagrams

        stream, datagrams = in_netns(self.path, listen)
        self.sockets += [stream, datagrams]
        threading.Thread(target=self._answer_streams, args=(stream,), daemon=True).start()
        threading.Thread(target=self._answer_datagrams, args=(datagrams,), daemon=True).start()

    def _answer_streams(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            while connection.recv(1):
                connection.sendall(str(self.address).encode().ljust(15))

    def _answer_datagrams(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                _, peer = listener.recvfrom(64)
                if peer is None:
                    return  # shut down
                listener.sendto(str(self.address).encode(), peer)

    def pings_answered(self) -> int:
        """Echo requests that this namespace received."""

        def read() -> int:
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
            names, values = (line.split() for line in lines if line.startswith("Icmp:"))
            return int(dict(zip(names, values, strict=True))["InEchos"])

        return in_netns(self.path, read)

    def connect(self, to: IPv4Address) -> socket.socket:
        """An open TCP connection from here."""
        return in_netns(
            self.path,
            lambda: socket.create_connection((str(to), PORT), timeout=patience(2)),
        )

    def udp(self, to: IPv4Address, timeout: float | None = None) -> socket.socket:
        """A connected UDP socket from here."""

        def make() -> socket.socket:
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            datagrams.settimeout(patience(1) if timeout is None else timeout)
            datagrams.connect((str(to), PORT))
            return datagrams

        return in_netns(self.path, make)

    def ping(self, to: IPv4Address, identifier: int, timeout: float = 1.0) -> bool:
        """Whether an echo request of this identifier is answered from the address that it was sent
        to."""

        def make() -> socket.socket:
            return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

        total = internet_checksum(struct.pack("!BBHHH", 8, 0, 0, identifier, 1))
        with in_netns(self.path, make) as raw:
            raw.settimeout(timeout)
            raw.sendto(struct.pack("!BBHHH", 8, 0, total, identifier, 1), (str(to), 0))
            with contextlib.suppress(TimeoutError):
                while True:
                    packet, peer = raw.recvfrom(256)
                    kind, _, _, answered = struct.unpack_from("!BBHH", packet, 20)
                    if kind == 0 and answered == identifier and peer[0] == str(to):
                        return True
        return False

    def run(self, *command: str) -> None:
        """Run a program here; it must succeed."""
        in_netns(self.path, lambda: _run(command))

    def close(self) -> None:
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def _run(command: tuple[str, ...]) -> None:
    import subprocess

    subprocess.run(command, check=True, capture_output=True)


def ask(connection: socket.socket) -> str:
    """Which task answers on an open connection or UDP socket."""
    connection.sendall(b"?")
    return connection.recv(15).decode().strip()


@dataclass
class World:
    client: Container
    tasks: list[Container]
    bridge: str

    @property
    def addresses(self) -> tuple[IPv4Address, ...]:
        return tuple(task.address for task in self.tasks)


@contextlib.contextmanager
def world(tasks: int) -> Iterator[World]:
    """Namespaces `ffv<pid>...`, gone afterwards whatever happens."""
    prefix = f"ffv{os.getpid()}"
    made = World(
        Container(f"{prefix}c", CLIENT),
        [Container(f"{prefix}t{number}", address(number)) for number in range(tasks)],
        f"{prefix}b",
    )
    containers = [made.client, *made.tasks]
    try:
        netns.create(made.bridge)
        with in_netns(Path("/run/netns") / made.bridge, IPRoute) as route:
            route.link("add", ifname="b0", kind="bridge")
            bridge = route.link_lookup(ifname="b0")[0]
            route.link("set", index=bridge, state="up")
            for number, container in enumerate(containers):
                netns.create(container.name)
                route.link(
                    "add",
                    ifname=f"v{number}",
                    kind="veth",
                    peer={"ifname": "eth0", "net_ns_fd": container.name},
                )
                port = route.link_lookup(ifname=f"v{number}")[0]
                route.link("set", index=port, master=bridge, state="up")
        for container in containers:
            _configure(container)
        ports = [f"v{number}" for number in range(len(containers))]
        in_netns(Path("/run/netns") / made.bridge, partial(wait_operational, *ports))
        for task in made.tasks:
            task.serve()
        yield made
    finally:
        for container in containers:
            container.close()
        for name in [made.bridge, *(container.name for container in containers)]:
            with contextlib.suppress(OSError):
                netns.remove(name)


def _configure(container: Container) -> None:
    with in_netns(container.path, IPRoute) as route:
        eth0 = route.link_lookup(ifname="eth0")[0]
        route.addr("add", index=eth0, address=str(container.address), prefixlen=24)
        route.link("set", index=eth0, state="up")
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
