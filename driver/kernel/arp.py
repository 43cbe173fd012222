"""Listening to ARP on the networks of this host: who asks for an address, and who announces one.

It tells what Docker's API doesn't tell unasked: a container that asks for an address nobody has may mean a VIP that has
just been made, and an announcement (RFC 5227, section 3) an endpoint that has just come. Frames are heard where they
reach a bridge's own device: once each, after the source filter.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from driver import names

ETH_P_ARP: Final = 0x0806
_FORMAT: Final = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET_IPV4: Final = (1, 0x0800, 6, 4)
BURST: Final = 256
"""So many frames are read at a time."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One ARP frame on a network, given by its short ID (see `names.short`)."""

    network: str
    sender: IPv4Address
    target: IPv4Address

    @property
    def announcement(self) -> bool:
        """Whether it says where an address is rather than asks."""
        return self.sender == self.target


def listener() -> socket.socket:
    """A socket that hears ARP in the calling thread's network namespace."""
    heard = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ARP))
    heard.setblocking(False)
    return heard


def parse(frame: bytes, interface: str) -> Heard | None:
    """What an ARP frame without its Ethernet header says; None if it isn't one for us."""
    if len(frame) < _FORMAT.size or not interface.startswith(names.BRIDGE):
        return None
    *kind, _, _, sender, _, target = _FORMAT.unpack_from(frame)
    if tuple(kind) != _ETHERNET_IPV4:
        return None
    return Heard(interface[len(names.BRIDGE) :], IPv4Address(sender), IPv4Address(target))


def hear(packets: socket.socket) -> frozenset[Heard]:
    """What has come since the last time. OSError if the socket is of no use any more."""
    heard = set()
    for _ in range(BURST):
        try:
            frame, address = packets.recvfrom(64)
        except BlockingIOError:
            break
        found = parse(frame, address[0])
        if found is not None:
            heard.add(found)
    return frozenset(heard)
