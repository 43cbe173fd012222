"""Frames as a container with raw sockets can make them: true ones and forged ones."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address

from driver.kernel.checksum import internet_checksum
from driver.model import IPAddress
from testbed.kernel_hosts import UDP_PORT, octets

BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = IPv6Address("ff02::1")
ALL_NODES_MAC = "33:33:00:00:00:01"
REQUEST, REPLY = 1, 2
ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT, REDIRECT = 134, 135, 136, 137
IPV4, ARP, IPV6, VLAN = 0x0800, 0x0806, 0x86DD, 0x8100


def ethernet(source: str, to: str, kind: int, payload: bytes) -> bytes:
    return octets(to) + octets(source) + struct.pack("!H", kind) + payload


def udp(source: IPAddress, to: IPAddress, data: bytes) -> bytes:
    """An IP packet with a UDP datagram to where containers listen."""
    length = 8 + len(data)
    header = struct.pack("!HHHH", 5000, UDP_PORT, length, 0)
    if source.version == 4:
        bare = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0)
        addresses = source.packed + to.packed
        total = internet_checksum(bare + addresses)
        return bare[:10] + struct.pack("!H", total) + addresses + header + data
    pseudo = source.packed + to.packed + struct.pack("!II", length, 17)
    total = internet_checksum(pseudo + header + data)
    header = header[:6] + struct.pack("!H", total)
    return struct.pack("!IHBB", 6 << 28, length, 17, 64) + source.packed + to.packed + header + data


def arp(operation: int, mac: str, address: IPv4Address, target: IPv4Address) -> bytes:
    fixed = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return fixed + octets(mac) + address.packed + bytes(6) + target.packed


def icmpv6(
    source: IPv6Address, to: IPv6Address, kind: int, body: bytes, *, behind_options: bool = False
) -> bytes:
    """An ICMPv6 message; with `behind_options` after an extension header of hop-by-hop options."""
    pseudo = source.packed + to.packed + struct.pack("!II", 4 + len(body), 58)
    total = internet_checksum(pseudo + struct.pack("!BBH", kind, 0, 0) + body)
    message = struct.pack("!BBH", kind, 0, total) + body
    following = 58
    if behind_options:
        # Padding of four bytes: PadN.
        message = bytes((58, 0, 1, 4, 0, 0, 0, 0)) + message
        following = 0
    header = struct.pack("!IHBB", 6 << 28, len(message), following, 255)
    return header + source.packed + to.packed + message


def advertisement(mac: str, source: IPv6Address, target: IPv6Address, **options: bool) -> bytes:
    """A neighbour advertisement to all, with the override flag."""
    body = struct.pack("!I", 0x20000000) + target.packed + b"\x02\x01" + octets(mac)
    return icmpv6(source, ALL_NODES, ADVERTISEMENT, body, **options)


def solicitation(source: IPv6Address, target: IPv6Address) -> bytes:
    """A neighbour solicitation; from :: it is a probe for duplicates (RFC 4862)."""
    group = IPv6Address(bytes.fromhex("ff0200000000000000000001ff") + target.packed[13:])
    return icmpv6(source, group, SOLICITATION, bytes(4) + target.packed)


def router_advertisement(source: IPv6Address) -> bytes:
    body = struct.pack("!BBHII", 64, 0, 1800, 0, 0)
    return icmpv6(source, ALL_NODES, ROUTER_ADVERTISEMENT, body)


def redirect(source: IPv6Address, to: IPv6Address) -> bytes:
    return icmpv6(source, to, REDIRECT, bytes(4) + source.packed + to.packed)


def send(packets: socket.socket, *frames: bytes) -> None:
    for frame in frames:
        packets.send(frame)
