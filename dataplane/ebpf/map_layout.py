"""`overlay.h` in Python: packs and unpacks keys and values of the maps. A test compares both.

Addresses are `ipaddress` objects here and in network byte order there. A network is the ifindex of
its bridge.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

LAYOUT: Final = 1
SLOTS: Final = 2048

ENCAP4, ENCAP6, DECAP4, DECAP6 = 1, 2, 4, 8
_IP4, _IP6, _VXLAN, _FINAL = 1, 2, 4, 8

SETTINGS: Final = struct.Struct("=QQIIIHHB7x")
PORT: Final = struct.Struct("=I4s4s2sH16s6s2xI")
FDB_KEY: Final = struct.Struct("=I6s2x")
FDB_ENTRY: Final = struct.Struct("=QI4s4sI16sI4x")
NETWORK_KEY: Final = struct.Struct("=4s2s2x")
INDEX: Final = struct.Struct("=I")
PEER_KEY: Final = struct.Struct("=I4s")
PEER: Final = struct.Struct("=I4sI4s")
COUNT: Final = struct.Struct("=8Q")

_NO_IP4: Final = bytes(4)
_NO_IP6: Final = bytes(16)


@dataclass(frozen=True, slots=True)
class FastPathSettings:
    """`struct ff_settings`. Times in nanoseconds of CLOCK_MONOTONIC."""

    lease: int
    idle: int
    inside: int
    outside: int
    flags: int
    ports: tuple[int, int]
    ttl: int

    def pack(self) -> bytes:
        return SETTINGS.pack(
            self.lease, self.idle, self.inside, self.outside, self.flags, *self.ports, self.ttl
        )

    @classmethod
    def unpack(cls, data: bytes) -> FastPathSettings:
        lease, idle, inside, outside, flags, low, high, ttl = SETTINGS.unpack(data)
        return cls(lease, idle, inside, outside, flags, (low, high), ttl)


def _octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _wire_vni(vni: int) -> bytes:
    """As in the header: RFC 7348, figure 1."""
    return (vni << 8).to_bytes(4, "big")


def _flags(ipv4: IPv4Address | None, ipv6: IPv6Address | None) -> int:
    return (_IP4 if ipv4 is not None else 0) | (_IP6 if ipv6 is not None else 0)


@dataclass(frozen=True, slots=True)
class Port:
    """A container's link (`struct ff_port`): its addresses, and how to encapsulate its packets."""

    net: int
    vni: int
    udp_port: int
    mac: str
    ipv4: IPv4Address | None
    ipv6: IPv6Address | None
    slot: int

    def pack(self) -> bytes:
        return PORT.pack(
            self.net,
            _wire_vni(self.vni),
            self.ipv4.packed if self.ipv4 else _NO_IP4,
            self.udp_port.to_bytes(2, "big"),
            _flags(self.ipv4, self.ipv6),
            self.ipv6.packed if self.ipv6 else _NO_IP6,
            _octets(self.mac),
            self.slot,
        )


def pack_vxlan(net: int) -> bytes:
    """The value of a VXLAN device in `ports`."""
    return PORT.pack(net, bytes(4), _NO_IP4, bytes(2), _VXLAN, _NO_IP6, bytes(6), 0)


def unpack_slot(port: bytes) -> int:
    """The slot in a value of `ports`; 0: a VXLAN device."""
    return int(PORT.unpack(port)[-1])


def pack_fdb_key(net: int, mac: str) -> bytes:
    return FDB_KEY.pack(net, _octets(mac))


def unpack_fdb_key(data: bytes) -> tuple[int, str]:
    net, mac = FDB_KEY.unpack(data)
    return net, mac.hex(":")


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """Where a MAC address is: here behind link `index`, or on host `peer`.

    In C it is `struct ff_fdb_entry`.
    """

    index: int
    peer: IPv4Address
    seen: int
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    slot: int = 0
    final: bool = False
    """The container is the final destination of packets to it: it forwards none."""

    def pack(self) -> bytes:
        return FDB_ENTRY.pack(
            self.seen,
            self.index,
            self.peer.packed,
            self.ipv4.packed if self.ipv4 else _NO_IP4,
            _flags(self.ipv4, self.ipv6) | (_FINAL if self.final else 0),
            self.ipv6.packed if self.ipv6 else _NO_IP6,
            self.slot,
        )

    @classmethod
    def unpack(cls, data: bytes) -> FdbEntry:
        seen, index, peer, ipv4, flags, ipv6, slot = FDB_ENTRY.unpack(data)
        return cls(
            index,
            IPv4Address(peer),
            seen,
            IPv4Address(ipv4) if flags & _IP4 else None,
            IPv6Address(ipv6) if flags & _IP6 else None,
            slot,
            bool(flags & _FINAL),
        )


NOWHERE: Final = IPv4Address(0)


def pack_network_key(vni: int, udp_port: int) -> bytes:
    return NETWORK_KEY.pack(_wire_vni(vni), udp_port.to_bytes(2, "big"))


def pack_peer_key(net: int, address: IPv4Address) -> bytes:
    return PEER_KEY.pack(net, address.packed)


def unpack_peer_key(data: bytes) -> tuple[int, IPv4Address]:
    net, address = PEER_KEY.unpack(data)
    return net, IPv4Address(address)


@dataclass(frozen=True, slots=True)
class PeerRoute:
    """The route to a peer (`struct ff_peer`): device, source address, path MTU and next hop.

    A next hop of 0.0.0.0 leaves the look-up to the kernel.
    """

    index: int
    source: IPv4Address
    mtu: int
    next: IPv4Address

    def pack(self) -> bytes:
        return PEER.pack(self.index, self.source.packed, self.mtu, self.next.packed)

    @classmethod
    def unpack(cls, data: bytes) -> PeerRoute:
        index, source, mtu, following = PEER.unpack(data)
        return cls(index, IPv4Address(source), mtu, IPv4Address(following))


@dataclass(frozen=True, slots=True)
class Count:
    """Packets and bytes of a container's link on the fast path (`struct ff_count`)."""

    local_packets: int = 0
    local_bytes: int = 0
    nic_packets: int = 0
    nic_bytes: int = 0
    vxlan_packets: int = 0
    vxlan_bytes: int = 0
    sent_packets: int = 0
    sent_bytes: int = 0

    @property
    def received_packets(self) -> int:
        return self.local_packets + self.nic_packets + self.vxlan_packets

    @property
    def received_bytes(self) -> int:
        return self.local_bytes + self.nic_bytes + self.vxlan_bytes

    @classmethod
    def unpack(cls, data: bytes) -> Count:
        """The sum of one value per CPU."""
        values = [COUNT.unpack_from(data, at) for at in range(0, len(data), COUNT.size)]
        return cls(*(sum(column) for column in zip(*values, strict=True)))
