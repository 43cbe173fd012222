"""Announcing an endpoint: gratuitous ARP (RFC 5227, section 3) and unsolicited NA (RFC 4861,
section 7.2.6).

Frames leave through the network's bridge device, so they reach local ports and, by the flood list,
every peer. Each bridge and VXLAN device on the path learns where the endpoint's MAC address is now.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from driver.kernel.checksum import internet_checksum
from driver.model import Endpoint

_BROADCAST: Final = b"\xff" * 6
_ALL_NODES_MAC: Final = bytes.fromhex("333300000001")
_ALL_NODES: Final = IPv6Address("ff02::1")
_OVERRIDE: Final = 0x20000000


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def gratuitous_arp(mac: str, address: IPv4Address) -> bytes:
    """An ARP announcement, 42 bytes: a request for one's own address."""
    hardware = _octets(mac)
    header = _BROADCAST + hardware + struct.pack("!H", 0x0806)
    fixed = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return header + fixed + hardware + address.packed + b"\0" * 6 + address.packed


def unsolicited_advertisement(mac: str, address: IPv6Address) -> bytes:
    """A neighbour advertisement to all nodes, override set, with the target's link-layer address;
    86 bytes."""
    hardware = _octets(mac)
    body = struct.pack("!I", _OVERRIDE) + address.packed + b"\x02\x01" + hardware
    length = 4 + len(body)
    pseudo = address.packed + _ALL_NODES.packed + struct.pack("!II", length, 58)
    checksum = internet_checksum(pseudo + struct.pack("!BBH", 136, 0, 0) + body)
    packet = struct.pack("!IHBB", 6 << 28, length, 58, 255) + address.packed + _ALL_NODES.packed
    header = _ALL_NODES_MAC + hardware + struct.pack("!H", 0x86DD)
    return header + packet + struct.pack("!BBH", 136, 0, checksum) + body


def frames(endpoint: Endpoint) -> list[bytes]:
    """The announcements of an endpoint."""
    result = []
    if endpoint.ipv4 is not None:
        result.append(gratuitous_arp(endpoint.mac, endpoint.ipv4.ip))
    if endpoint.ipv6 is not None:
        result.append(unsolicited_advertisement(endpoint.mac, endpoint.ipv6.ip))
    return result


def send(packets: socket.socket, interface: str, endpoints: Iterable[Endpoint]) -> int:
    """Send the announcements through `interface`; returns the number of frames. OSError: it is
    gone.

    `packets` is a raw packet socket of the interface's namespace.
    """
    messages = [frame for endpoint in endpoints for frame in frames(endpoint)]
    for message in messages:
        packets.sendto(message, (interface, 0))
    return len(messages)
