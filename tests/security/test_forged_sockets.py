"""A task forges a socket with the addresses of another process's connection, and requests that
connection from the router.

A client connects to a service's virtual address (VIP), which leads to a task on another host. A
hostile task of the same service on the client's host forges a socket with the addresses of that
connection. It needs NET_ADMIN (to put the client's address on its own loopback device), or only
NET_RAW, which Docker grants by default (to forge a handshake on its loopback device).
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import pytest

from dataplane.control import RouterSettings, Rule
from dataplane.router import library_wire as wire
from driver.kernel.checksum import internet_checksum
from driver.kernel.namespace import in_netns
from testbed.namespace_bed import BedContainer, NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.library import Library

VIP: Final = "10.78.0.100"
PORT: Final = 7000
CLIENT_PORT: Final = 40000
CAP_NET_RAW: Final = 13
SYN, SYN_ACK, ACK = 2, 0x12, 0x10
_CAPABILITY_VERSION: Final = 0x20080522


@dataclass
class Service:
    """A client, a hostile task on its host, and a correct task that the router knows on another
    host.
    """

    bed: NamespaceBed
    listener: socket.socket
    kept: list[Any] = field(default_factory=list)

    def library(self, name: str) -> Library:
        made = Library.connect(self.bed.shared / "router.sock", self.bed.containers[name].namespace)
        made.hear(wire.Welcome)
        return made

    def connection(self) -> socket.socket:
        """The client's end of a connection to the VIP, which leads to the correct task."""

        def dial() -> socket.socket:
            made = socket.socket()
            made.bind(("0.0.0.0", CLIENT_PORT))
            made.settimeout(patience(5))
            made.connect((VIP, PORT))
            return made

        client = in_netns(self.bed.containers["client"].namespace, dial)
        self.kept += [client, self.listener.accept()]
        return client


@pytest.fixture
def service() -> Iterator[Service]:
    settings = RouterSettings(rule=Rule(operations=2, age=0))
    with bed("client", "hostile", "far", vips={VIP: ("far",)}, settings=settings) as made:
        hostile, far = made.containers["hostile"], made.containers["far"]
        facts = made.facts()
        network = msgspec.structs.replace(
            facts.networks[0], vips={VIP: (str(hostile.ipv4), str(far.ipv4))}
        )
        here = tuple(endpoint for endpoint in facts.endpoints if endpoint.container != "far")
        made.router.replace_snapshot(
            msgspec.structs.replace(facts, endpoints=here, networks=(network,))
        )
        listener = in_netns(far.namespace, lambda: socket.create_server(("0.0.0.0", PORT)))
        yield Service(made, listener)
        listener.close()


def by_address(task: BedContainer, client: str) -> tuple[socket.socket, Any]:
    """With NET_ADMIN: put the client's address on the task's own loopback device."""
    task.run(["ip", "address", "add", f"{client}/32", "dev", "lo"], check=True)

    def make() -> tuple[socket.socket, Any]:
        listener = socket.create_server((str(task.ipv4), PORT))
        other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((client, CLIENT_PORT))
        other.settimeout(patience(5))
        other.connect((str(task.ipv4), PORT))
        forged, _ = listener.accept()
        return forged, (listener, other)

    return in_netns(task.namespace, make)


def by_handshake(task: BedContainer, client: str) -> tuple[socket.socket, Any]:
    """With NET_RAW alone: a listener and a handshake, bound to the task's loopback device."""

    def make() -> tuple[socket.socket, Any]:
        keep_only(CAP_NET_RAW)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        listener.bind(("0.0.0.0", PORT))
        listener.listen()
        listener.settimeout(patience(5))
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        tap.bind(("lo", 0x0800))
        tap.settimeout(patience(5))
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        us = str(task.ipv4)
        raw.sendto(segment(client, us, 1000, 0, SYN), (us, 0))
        number = answered(tap)
        raw.sendto(segment(client, us, 1001, number + 1, ACK), (us, 0))
        forged, _ = listener.accept()
        forged.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"")
        return forged, (listener, tap, raw)

    return in_netns(task.namespace, make)


def keep_only(capability: int) -> None:
    """Drop all other capabilities of the calling thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    mask = 1 << capability
    data = struct.pack("=6I", mask, mask, 0, 0, 0, 0)
    if libc.capset(header, data) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def answered(tap: socket.socket) -> int:
    """The sequence number of the listener's SYN-ACK."""
    while True:
        packet = tap.recv(200)
        if packet[9] == socket.IPPROTO_TCP and packet[33] == SYN_ACK:
            return int(struct.unpack("!I", packet[24:28])[0])


def segment(source: str, destination: str, sequence: int, acknowledged: int, flags: int) -> bytes:
    """An IPv4 packet with a TCP segment without data."""
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    tcp = struct.pack(
        "!HHIIBBHHH", CLIENT_PORT, PORT, sequence, acknowledged, 5 << 4, flags, 65535, 0, 0
    )
    pseudo = ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
    tcp = tcp[:16] + struct.pack("!H", internet_checksum(pseudo + tcp)) + tcp[18:]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0, 64, socket.IPPROTO_TCP, 0)
    return header + ends + tcp


@pytest.mark.parametrize("forge", [by_address, by_handshake])
@pytest.mark.parametrize("forger_first", [False, True])
def test_a_forged_socket_gets_no_connection_of_another_task(
    service: Service,
    forge: Callable[[BedContainer, str], tuple[socket.socket, Any]],
    forger_first: bool,
) -> None:
    """A socket that a task has forged does not give it a client's connection to a task of another
    host.
    """
    client = service.connection()
    forged, kept = forge(
        service.bed.containers["hostile"], str(service.bed.containers["client"].ipv4)
    )
    service.kept += [forged, kept]
    honest, hostile = service.library("client"), service.library("hostile")
    requests = [(hostile, forged), (honest, client)]
    for library, tcp in requests if forger_first else reversed(requests):
        library.ask(tcp)
    honest.hear(wire.Refuse)
    assert hostile.silent(0.5)
