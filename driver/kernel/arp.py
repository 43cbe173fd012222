"""Listens to ARP on the networks of this host: requests for addresses, and announcements.

ARP tells what Docker's API reports only when asked: a request for an address that nobody has may
mean a VIP that has just been made, and an announcement (RFC 5227, section 3) an endpoint that has
just joined. Frames are read from a bridge's own device: once each, after the source filter.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address
from typing import Final

from driver import names
from driver.model import ArpFrame

ETH_P_ARP: Final = 0x0806
_FORMAT: Final = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET_IPV4: Final = (1, 0x0800, 6, 4)
BURST: Final = 256
"""Frames that are read at a time, at most."""


def listener() -> socket.socket:
    """A socket that receives ARP in the calling thread's network namespace."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ARP))
    packets.setblocking(False)
    return packets


def parse(frame: bytes, interface: str) -> ArpFrame | None:
    """Decode an ARP frame without its Ethernet header; None if it is of no network of ours."""
    if len(frame) < _FORMAT.size or not interface.startswith(names.BRIDGE):
        return None
    *kind, _, _, sender, _, target = _FORMAT.unpack_from(frame)
    if tuple(kind) != _ETHERNET_IPV4:
        return None
    return ArpFrame(interface[len(names.BRIDGE) :], IPv4Address(sender), IPv4Address(target))


def hear(packets: socket.socket) -> frozenset[ArpFrame]:
    """The frames that came since the last call.

    Raises:
        OSError: the socket was closed, or can't be read any more.
    """
    frames = set()
    for _ in range(BURST):
        try:
            data, address = packets.recvfrom(64)
        except BlockingIOError:
            break
        frame = parse(data, address[0])
        if frame is not None:
            frames.add(frame)
    return frozenset(frames)
