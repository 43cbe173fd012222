"""Where a container's connection to a VIP leads, by the container's own connection tracking.

It speaks ctnetlink directly, for the reason given in `socket_table.py`: one request, one reply.
Without nf_conntrack_netlink in the kernel no connection is found.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address
from typing import Final

from dataplane.nlmsg import Netlink, attribute, attributes, nest
from dataplane.router.library_wire import Address
from dataplane.router.netlink_socket import netlink_in

_NETLINK_NETFILTER: Final = 12
# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_GET: Final = 1 << 8 | 1
_TUPLE_ORIG: Final = 1
_TUPLE_REPLY: Final = 2
_TUPLE_IP: Final = 1
_TUPLE_PROTO: Final = 2
_IP_SRC: Final = 1
_IP_DST: Final = 2
_PROTO_NUM: Final = 1
_PROTO_SRC: Final = 2
_PROTO_DST: Final = 3
_AF_INET: Final = int(socket.AF_INET)
_TCP: Final = int(socket.IPPROTO_TCP)

_NFGEN: Final = struct.Struct("!BBH")
_PORT: Final = struct.Struct("!H")


class Conntrack:
    """Looks up the connections of one namespace. Its descriptor stays the caller's."""

    def __init__(self, namespace: int) -> None:
        """Raises KernelRefused."""
        self._netlink = Netlink(netlink_in(namespace, _NETLINK_NETFILTER, "conntrack"))

    def close(self) -> None:
        """Release the namespace."""
        self._netlink.close()

    def translated(self, local: Address, remote: Address) -> tuple[Address, Address] | None:
        """The server that a TCP connection over IPv4 leads to, and the client as it is seen there.

        None: the kernel does not track the connection.
        """
        if local.ip.version != 4:
            return None
        original = nest(
            _TUPLE_ORIG,
            nest(
                _TUPLE_IP,
                attribute(_IP_SRC, local.ip.packed),
                attribute(_IP_DST, remote.ip.packed),
            ),
            nest(
                _TUPLE_PROTO,
                attribute(_PROTO_NUM, bytes([_TCP])),
                attribute(_PROTO_SRC, _PORT.pack(local.port)),
                attribute(_PROTO_DST, _PORT.pack(remote.port)),
            ),
        )
        try:
            return _read(self._netlink.get(_GET, _NFGEN.pack(_AF_INET, 0, 0) + original))
        except (OSError, struct.error, KeyError, ValueError):
            return None


def _read(entry: bytes) -> tuple[Address, Address]:
    reply = dict(attributes(dict(attributes(entry, _NFGEN.size))[_TUPLE_REPLY]))
    ip, proto = dict(attributes(reply[_TUPLE_IP])), dict(attributes(reply[_TUPLE_PROTO]))
    # The reply goes from the server to the client.
    return (
        Address(IPv4Address(ip[_IP_SRC]), _PORT.unpack(proto[_PROTO_SRC])[0]),
        Address(IPv4Address(ip[_IP_DST]), _PORT.unpack(proto[_PROTO_DST])[0]),
    )
