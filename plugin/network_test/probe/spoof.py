"""Sends frames whose source is another's: the network should drop them.

Only containers of this test are given frames, and only such addresses are used as sources.
"""

from __future__ import annotations

import socket
import struct

from plugin.network_test.probe.data_server import NOTE
from plugin.network_test.probe.own_interfaces import interface_of
from plugin.network_test.probe.probe_wire import DATA, tag

_IPV4 = 0x0800
_UDP = 17
_TIMES = 5


def _sum(words: bytes) -> int:
    """The checksum of RFC 1071."""
    total: int = sum(struct.unpack(f"!{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(macs: tuple[str, str], addresses: tuple[str, str], port: int, content: bytes) -> bytes:
    """An Ethernet frame with a UDP datagram; both pairs are source and destination."""
    source, destination = (bytes.fromhex(mac.replace(":", "")) for mac in macs)
    ends = b"".join(map(socket.inet_aton, addresses))
    udp = struct.pack("!HHHH", port, port, 8 + len(content), 0) + content
    length = 20 + len(udp)
    head = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, 0, 64, _UDP, 0) + ends
    head = head[:10] + struct.pack("!H", _sum(head)) + head[12:]
    # A UDP checksum of 0 says that there is none (RFC 768).
    return destination + source + struct.pack("!H", _IPV4) + head + udp


def send_as(
    key: bytes, own: str, source: str, source_mac: str, to: str, to_mac: str, mark: str
) -> None:
    """Send a datagram with `mark` from the interface with the address `own`, some times.

    `source_mac` may be empty: the interface's own. Raises OSError; PermissionError without the
    capability NET_RAW.
    """
    interface = interface_of(own)
    content = tag(key, "data") + NOTE + mark.encode()
    macs = (source_mac or str(interface["mac"]), to_mac)
    whole = frame(macs, (source, to), DATA, content)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((str(interface["name"]), 0))
        for _ in range(_TIMES):
            sender.send(whole)
