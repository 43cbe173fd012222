"""Hosts with an underlay between them and containers on them, for tests of `driver/kernel`.

A host is a thread in its own mount and network namespace, which the programs that it starts
inherit. Nothing is pinned outside, so everything disappears with the test's process, however that
ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_interface,
)
from pathlib import Path
from typing import Final, TypeVar

from pyroute2 import IPRoute

from dataplane.threads import in_thread
from driver import names, vip
from driver.kernel.checksum import internet_checksum
from driver.kernel.fastpath import Stage
from driver.kernel.linux import LinuxKernel
from driver.kernel.namespace import CLONE_NEWNET, OVERLAY_PIN, check, in_netns, libc
from driver.kernel.nf_tables import Batch
from driver.model import Endpoint, IPAddress, Network, VipTable
from testbed.ebpf_object import built
from testbed.patience import patience
from testbed.process import wait_until

T = TypeVar("T")

RUN: Final = Path("/run")
UDP_PORT: Final = 7001
TCP_PORT: Final = 7000
PREFIX6: Final = IPv6Network("fd42:7::/64")
_CLONE_NEWNS: Final = 0x00020000
_NODAD: Final = 0x02


def new_namespace() -> int:
    """Make a network namespace that exists as long as the returned descriptor is open."""

    def make() -> int:
        check(libc.unshare(CLONE_NEWNET), "making a network namespace")
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    return in_thread(make)


def set_up(device: str, *addresses: IPv4Interface | IPv6Interface) -> None:
    """Give a device of the calling thread's namespace its addresses; set it and `lo` up.

    IPv6 addresses are usable at once, without duplicate address detection. The device is a veth
    whose other end is up.
    """
    with IPRoute() as route:
        index = route.link_lookup(ifname=device)[0]
        for address in addresses:
            route.addr(
                "add",
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                flags=_NODAD if address.version == 6 else 0,
            )
        for one in (index, route.link_lookup(ifname="lo")[0]):
            route.link("set", index=one, state="up")
    wait_operational(device)


def wait_operational(*devices: str) -> None:
    """Wait until devices of the calling thread's namespace, which are set up, pass packets.

    The kernel attaches queues and lets a bridge's port forward later, in a thread of its own
    (linkwatch), which sets the operational state (RFC 2863). Until then packets are dropped. Each
    end of a veth pair has a state of its own.
    """
    with IPRoute() as route:

        def operational() -> bool:
            found = [route.link("get", ifname=device)[0] for device in devices]
            return all(link.get_attr("IFLA_OPERSTATE") == "UP" for link in found)

        wait_until(f"{', '.join(devices)} to be operational", operational, 5, 0.002)


def write_vips(namespace: Path | int, table: VipTable) -> None:
    """Write VIP rules into a namespace that has no FreeFlow rules yet."""

    def write() -> None:
        batch = Batch(vip.TABLE)
        vip.write_new(batch, table)
        batch.commit()

    in_netns(namespace, write)


def identifier(number: int) -> str:
    """An ID like Docker's, of 64 hexadecimal characters; IDs differ in their first characters."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def a_network(number: int = 1, *, mtu: int = 1450, vni: int = 0, port: int = 4799) -> Network:
    return Network(
        id=identifier(number),
        vni=vni or 4000 + number,
        port=port,
        mtu=mtu,
        prefix6=PREFIX6,
        ipv6=True,
    )


def an_endpoint(network: Network, number: int, mac: str = "") -> Endpoint:
    """Endpoint `number` of a network has 10.9.0.`number` and fd42:7::`number`."""
    return Endpoint(
        id=identifier(1000 + int(network.vni) * 256 + number),
        network_id=network.id,
        mac=mac or f"02:42:0a:09:00:{number:02x}",
        ipv4=IPv4Interface(f"10.9.0.{number}/24"),
        ipv6=IPv6Interface((PREFIX6[number], 64)),
    )


@dataclass(eq=False)
class Container:
    """A network namespace with an endpoint's veth in it, as Docker makes it."""

    host: KernelHost
    network: Network
    endpoint: Endpoint
    namespace: int = field(default_factory=new_namespace)
    sockets: list[socket.socket] = field(default_factory=list)

    @property
    def ipv4(self) -> IPv4Address:
        assert self.endpoint.ipv4 is not None
        return self.endpoint.ipv4.ip

    @property
    def ipv6(self) -> IPv6Address:
        assert isinstance(self.endpoint.ipv6, IPv6Interface)
        return self.endpoint.ipv6.ip

    def do(self, function: Callable[[], T]) -> T:
        """Call a function inside the namespace."""
        return in_netns(self.namespace, function)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a program inside the namespace and return its output."""
        return self.do(lambda: _run(command, check))

    def plug_in(self) -> None:
        """Do what dockerd does after Join: move, name, address and set up the veth."""
        link = names.container_veth(self.endpoint.id)

        def move() -> None:
            with IPRoute() as route:
                index = route.link_lookup(ifname=link)[0]
                route.link("set", index=index, net_ns_fd=self.namespace)

        def configure() -> None:
            with IPRoute() as route:
                index = route.link_lookup(ifname=link)[0]
                route.link("set", index=index, ifname="eth0")
            addresses = (self.endpoint.ipv4, self.endpoint.ipv6)
            set_up("eth0", *(address for address in addresses if address is not None))

        self.host.do(move)
        self.do(configure)
        port = partial(wait_operational, names.host_veth(self.endpoint.id))
        self.host.do(lambda: in_netns(RUN / OVERLAY_PIN, port))

    def serve(self) -> None:
        """Answer TCP with the hash of its bytes, UDP with the same datagram; IPv4 and IPv6."""

        def listen() -> tuple[socket.socket, socket.socket]:
            stream = socket.create_server(
                ("::", TCP_PORT), family=socket.AF_INET6, dualstack_ipv6=True
            )
            datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER: answers may be fragmented.
            datagrams.setsockopt(socket.IPPROTO_IP, 10, 0)
            datagrams.setsockopt(socket.IPPROTO_IPV6, 23, 0)
            datagrams.bind(("::", UDP_PORT))
            return stream, datagrams

        stream, datagrams = self.do(listen)
        self.sockets += [stream, datagrams]
        for target, served in ((_hash_streams, stream), (_echo, datagrams)):
            threading.Thread(target=target, args=(served,), daemon=True).start()

    def send(self, to: IPAddress, data: bytes, timeout: float = 30) -> bool:
        """Send by TCP; return whether the peer received exactly these bytes."""
        with self.connect(to, timeout) as stream:
            stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
            return stream.recv(64) == hashlib.sha256(data).hexdigest().encode()

    def connect(self, to: IPAddress, timeout: float = 5) -> socket.socket:
        return self.do(lambda: socket.create_connection((str(to), TCP_PORT), timeout=timeout))

    def udp(self, to: IPAddress, timeout: float = 1.0, *, whole: bool = True) -> socket.socket:
        """A connected socket. With `whole` it never fragments (ip(7), ipv6(7): PMTUDISC_DO)."""

        def make() -> socket.socket:
            family = socket.AF_INET if to.version == 4 else socket.AF_INET6
            made = socket.socket(family, socket.SOCK_DGRAM)
            # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER: 2 never fragments, 0 always may.
            level, option = (
                (socket.IPPROTO_IP, 10) if to.version == 4 else (socket.IPPROTO_IPV6, 23)
            )
            made.setsockopt(level, option, 2 if whole else 0)
            made.settimeout(timeout)
            made.connect((str(to), UDP_PORT))
            return made

        return self.do(make)

    def echoes(
        self,
        to: IPAddress,
        size: int = 32,
        tries: int = 3,
        timeout: float = 0.5,
        *,
        whole: bool = True,
    ) -> bool:
        """Whether a datagram of random bytes returns unchanged.

        `timeout`: the seconds of a quiet machine after which it is sent again, up to `tries` times.
        """
        data = os.urandom(size)
        with self.udp(to, timeout, whole=whole) as datagrams:
            for left in reversed(range(tries)):
                if not left:
                    datagrams.settimeout(patience(timeout))
                with contextlib.suppress(TimeoutError, ConnectionError):
                    datagrams.send(data)
                    if datagrams.recv(65535) == data:
                        return True
        return False

    def pings(self, to: IPAddress, count: int = 3, timeout: float = 1.0) -> bool:
        """Whether each of `count` pings is answered with its own data."""
        v4 = to.version == 4
        family = socket.AF_INET if v4 else socket.AF_INET6
        protocol = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
        with self.do(lambda: socket.socket(family, socket.SOCK_RAW, protocol)) as raw:
            raw.settimeout(patience(timeout))
            return all(_ping(raw, to, number) for number in range(1, count + 1))

    def packets(self) -> socket.socket:
        """A packet socket on eth0: sends frames unchanged, receives those from outside."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            made.bind(("eth0", 3))
            made.settimeout(0.2)
            return made

        made = self.do(make)
        self.sockets.append(made)
        return made

    def close(self) -> None:
        for opened in self.sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()
        os.close(self.namespace)


def _run(command: tuple[str, ...], check: bool = True) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=patience(60), check=False
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def _ping(raw: socket.socket, to: IPAddress, number: int) -> bool:
    """One echo request and its reply (RFC 792, RFC 4443)."""
    v4 = to.version == 4
    data = struct.pack("!HH", os.getpid() & 0xFFFF, number) + os.urandom(56)
    # The kernel fills in ICMPv6's checksum.
    total = internet_checksum(struct.pack("!BBH", 8, 0, 0) + data) if v4 else 0
    raw.sendto(struct.pack("!BBH", 8 if v4 else 128, 0, total) + data, (str(to), 0))
    with contextlib.suppress(TimeoutError):
        while True:
            packet, peer = raw.recvfrom(2048)
            message = packet[(packet[0] & 15) * 4 :] if v4 else packet
            if message[0] == (0 if v4 else 129) and message[4:] == data and peer[0] == str(to):
                return True
    return False


def _hash_streams(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_hash, args=(connection,), daemon=True).start()


def _hash(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        total = hashlib.sha256()
        while data := connection.recv(1 << 20):
            total.update(data)
        connection.sendall(total.hexdigest().encode())


def _echo(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            data, peer = listener.recvfrom(65535)
            if not peer:
                return  # shut down
            listener.sendto(data, peer)


class KernelHost:
    """A host with 10.1.0.`number` or fd01::`number` on its eth0, and an empty, shared /run."""

    def __init__(self, number: int, mtu: int, ipv6_underlay: bool) -> None:
        self.number = number
        self.address: IPAddress = (
            IPv6Address(f"fd01::{number}") if ipv6_underlay else IPv4Address(f"10.1.0.{number}")
        )
        self.mtu = mtu
        self.programs: Path | None = built()
        """The eBPF object file; None: EBPF=off."""
        self.tcx = True
        self.sessions: int | None = None
        """The port of the routers' sessions."""
        self.listed: IPAddress | None = None
        """The address at which the Swarm lists the host, if it is not its own."""
        self.containers: list[Container] = []
        self._kernels: list[LinuxKernel] = []
        self._thread = ThreadPoolExecutor(1, f"host{number}")
        self._thread.submit(self._boot).result(60)
        self.namespace = self.do(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        self.kernel = self.new_kernel()

    @staticmethod
    def _boot() -> None:
        check(libc.unshare(CLONE_NEWNET | _CLONE_NEWNS), "making a host")
        _run(("mount", "--make-rprivate", "/"))
        _run(("mount", "-t", "tmpfs", "run", str(RUN)))
        _run(("mount", "--make-shared", str(RUN)))
        _run(("ip", "link", "set", "lo", "up"))

    def do(self, function: Callable[[], T]) -> T:
        """Call a function on the host. `function` must not call this: a host has one thread."""
        return self._thread.submit(function).result(120)

    def run(self, *command: str, check: bool = True) -> str:
        return self.do(lambda: _run(command, check))

    def in_overlay(self, *command: str) -> str:
        return self.run("nsenter", f"--net={RUN}/freeflow-admin/netns/overlay", *command)

    def new_kernel(self) -> LinuxKernel:
        """A kernel adapter like that of a plugin that has just started."""
        made = self.do(
            lambda: LinuxKernel(
                RUN,
                hint=lambda: self.address,
                programs=self.programs,
                tcx=self.tcx,
                sessions=self.sessions,
                listed=lambda: self.listed or self.address,
            )
        )
        self._kernels.append(made)
        return made

    def without_fast_path(self) -> None:
        """Continue as with EBPF=off: all packets take the kernel path."""
        self.programs = None
        self.kernel = self.new_kernel()
        self.do(self.kernel.prepare)

    def without_tcx(self) -> None:
        """Continue as on a kernel before 6.6."""
        self.tcx = False
        self.kernel = self.new_kernel()

    def container(self, network: Network, number: int, mac: str = "") -> Container:
        """A container with endpoint `number` of a network: attached, announced and serving."""
        made = Container(self, network, an_endpoint(network, number, mac))
        self.containers.append(made)
        self.do(lambda: self.kernel.attach(network, made.endpoint))
        self.do(lambda: self.kernel.announce(network.id, [made.endpoint]))
        made.plug_in()
        made.serve()
        return made

    def remove(self, container: Container) -> None:
        """Remove a container as Docker does."""
        self.containers.remove(container)
        container.close()
        endpoint = container.endpoint
        self.do(lambda: self.kernel.detach(endpoint.network_id, endpoint.id))

    def set_peers(self, network: Network, *others: KernelHost) -> frozenset[IPAddress]:
        return self.do(
            lambda: self.kernel.set_peers(network.id, [other.address for other in others])
        )

    def refresh(self) -> Stage:
        """Do what the plugin does after a start and every second; return the stage."""
        self.do(self.kernel.attach_programs)
        self.do(self.kernel.refresh)
        return self.do(self.kernel.stage)

    def close(self) -> None:
        for container in self.containers:
            container.close()
        for kernel in self._kernels:
            kernel.close()
        os.close(self.namespace)
        self._thread.shutdown()


@dataclass
class Lab:
    hosts: list[KernelHost]
    underlay: int

    def mesh(self, network: Network) -> None:
        """Make every host a peer of every other host."""
        for host in self.hosts:
            host.set_peers(network, *(other for other in self.hosts if other is not host))
            host.refresh()

    def link(self, host: KernelHost, state: str) -> None:
        """Set the underlay's end of a host's link "down" or "up"."""
        in_netns(
            self.underlay,
            lambda: _run(("ip", "link", "set", f"u{host.number}", state)),
        )


@contextlib.contextmanager
def lab(hosts: int = 2, *, mtu: int = 1500, ipv6_underlay: bool = False) -> Iterator[Lab]:
    """Hosts on one underlay, which are removed at the end in any case."""
    made = Lab([], new_namespace())
    try:
        with in_netns(made.underlay, IPRoute) as route:
            route.link("add", ifname="b", kind="bridge", br_mcast_snooping=0, mtu=mtu, state="up")
            bridge = route.link_lookup(ifname="b")[0]
            for number in range(1, hosts + 1):
                host = KernelHost(number, mtu, ipv6_underlay)
                made.hosts.append(host)
                route.link(
                    "add",
                    ifname=f"u{number}",
                    kind="veth",
                    mtu=mtu,
                    master=bridge,
                    state="up",
                    peer={"ifname": "eth0", "mtu": mtu, "net_ns_fd": host.namespace},
                )
                prefix = 24 if host.address.version == 4 else 64
                address = ip_interface((host.address, prefix))
                in_netns(host.namespace, partial(set_up, "eth0", address))
                in_netns(made.underlay, partial(wait_operational, f"u{number}"))
        yield made
    finally:
        for host in made.hosts:
            host.close()
        os.close(made.underlay)


def put_on_the_wire(source: KernelHost, to: KernelHost, payload: bytes, *, tos: int = 0) -> None:
    """Send a UDP packet between two hosts' VXLAN ports as the source's kernel does.

    It bypasses the rules for the source's programs.
    """
    assert isinstance(source.address, IPv4Address)
    macs = [_mac(host) for host in (to, source)]
    length = 8 + len(payload)
    header = struct.pack("!BBHHHBBH", 0x45, tos, 20 + length, 0, 0, 64, 17, 0)
    addresses = source.address.packed + to.address.packed
    packet = header[:10] + struct.pack("!H", internet_checksum(header + addresses)) + addresses
    packet += struct.pack("!HHHH", 50000, 4799, length, 0) + payload

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as made:
            made.bind(("eth0", 0x0800))
            made.send(b"".join(macs) + b"\x08\0" + packet)

    source.do(send)


def _mac(host: KernelHost) -> bytes:
    """The MAC address of a host's device on the underlay."""

    def look() -> bytes:
        with IPRoute() as route:
            link = route.link("get", ifname="eth0")[0]
            return octets(str(link.get_attr("IFLA_ADDRESS")))

    return host.do(look)


def heard(packets: socket.socket) -> list[bytes]:
    """All frames that have arrived, once no more arrive for a moment."""
    frames = []
    with contextlib.suppress(TimeoutError):
        while True:
            frame, address = packets.recvfrom(65535)
            if address[2] != socket.PACKET_OUTGOING:
                frames.append(frame)
    return frames


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def eventually(what: str, condition: Callable[[], object], timeout: float = 5) -> None:
    """Wait until a condition holds that changes soon; see `wait_until`."""
    wait_until(what, condition, timeout, 0.02)


def missing_tools() -> str:
    """The programs that these tests need and this machine lacks; empty if none."""
    if os.geteuid() != 0:
        return "root"
    return ", ".join(
        name
        for name in ("bridge", "ip", "mount", "nft", "nsenter", "sysctl")
        if not shutil.which(name)
    )
