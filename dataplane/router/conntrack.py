"""What the connection tracking of a namespace knows of one connection.

In a client's namespace it says where a connection to a VIP leads; in the host's, whether a firewall
translates a connection between two containers on a bridge.

It speaks ctnetlink directly, for the reason given in `socket_table.py`: one request, one reply.
Without nf_conntrack_netlink the kernel tells nothing.
"""

from __future__ import annotations

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from dataplane.errors import KernelRefused
from dataplane.nlmsg import Netlink, attribute, attributes, nest
from dataplane.router.library_wire import Address
from dataplane.router.netlink_socket import netlink_in

_NETLINK_NETFILTER: Final = 12
# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_GET: Final = 1 << 8 | 1
_TUPLE_ORIG: Final = 1
_TUPLE_REPLY: Final = 2
_STATUS: Final = 3
_TUPLE_IP: Final = 1
_TUPLE_PROTO: Final = 2
_IP_SRC: Final = 1
_IP_DST: Final = 2
_IP6_SRC: Final = 3
_IP6_DST: Final = 4
_PROTO_NUM: Final = 1
_PROTO_SRC: Final = 2
_PROTO_DST: Final = 3
_AF_INET: Final = int(socket.AF_INET)
_AF_INET6: Final = int(socket.AF_INET6)
_ASSURED: Final = 4
"""enum ip_conntrack_status (linux/netfilter/nf_conntrack_common.h)."""
_TCP: Final = int(socket.IPPROTO_TCP)

_NFGEN: Final = struct.Struct("!BBH")
_PORT: Final = struct.Struct("!H")
_WORD: Final = struct.Struct("!I")


class Direction(NamedTuple):
    """Packets of one direction of a connection: from where, and to where."""

    source: Address
    target: Address


class TrackedConnection(NamedTuple):
    """`original`: as its first packet had it; `reply`: as answers to it do.

    `established`: packets have come from both sides, and the handshake is complete. The kernel
    keeps an entry only once a packet has passed all hooks, so a connection whose first packets are
    dropped has none. Later ones it counts before other rules see them.
    """

    original: Direction
    reply: Direction
    established: bool

    @property
    def is_translated(self) -> bool:
        """Whether answers have other addresses than those of the first packet, exchanged."""
        return (self.reply.target, self.reply.source) != self.original


class Conntrack:
    """Looks up the connections of one namespace. Its descriptor stays the caller's."""

    def __init__(self, namespace: int) -> None:
        """Raises KernelRefused."""
        self._netlink = Netlink(netlink_in(namespace, _NETLINK_NETFILTER, "conntrack"))

    def close(self) -> None:
        """Release the namespace."""
        self._netlink.close()

    def translated(self, local: Address, remote: Address) -> tuple[Address, Address] | None:
        """The server that a TCP connection leads to, and the client as it is seen there.

        None: the kernel does not track the connection.

        Raises:
            KernelRefused: the kernel doesn't tell.
        """
        found = self.find(local, remote)
        return None if found is None else (found.reply.source, found.reply.target)

    def find(self, local: Address, remote: Address) -> TrackedConnection | None:
        """The entry of a TCP connection, by the addresses of either direction; None: there is none.

        Addresses of different families are no connection's.

        Raises:
            KernelRefused: the kernel doesn't tell.
        """
        wide = local.ip.version == 6
        if remote.ip.version != local.ip.version:
            return None
        question = nest(
            _TUPLE_ORIG,
            nest(
                _TUPLE_IP,
                attribute(_IP6_SRC if wide else _IP_SRC, local.ip.packed),
                attribute(_IP6_DST if wide else _IP_DST, remote.ip.packed),
            ),
            nest(
                _TUPLE_PROTO,
                attribute(_PROTO_NUM, bytes([_TCP])),
                attribute(_PROTO_SRC, _PORT.pack(local.port)),
                attribute(_PROTO_DST, _PORT.pack(remote.port)),
            ),
        )
        family = _AF_INET6 if wide else _AF_INET
        try:
            return _read(self._netlink.get(_GET, _NFGEN.pack(family, 0, 0) + question))
        except (OSError, struct.error, KeyError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOENT:
                return None
            raise KernelRefused(
                f"cannot look up the connection {local} → {remote}", cause=str(error)
            ) from error


def _read(entry: bytes) -> TrackedConnection:
    parts = dict(attributes(entry, _NFGEN.size))
    return TrackedConnection(
        original=_direction(parts[_TUPLE_ORIG]),
        reply=_direction(parts[_TUPLE_REPLY]),
        established=bool(_WORD.unpack(parts[_STATUS])[0] & _ASSURED),
    )


def _direction(data: bytes) -> Direction:
    parts = dict(attributes(data))
    ip, proto = dict(attributes(parts[_TUPLE_IP])), dict(attributes(parts[_TUPLE_PROTO]))
    source: IPv4Address | IPv6Address
    target: IPv4Address | IPv6Address
    if _IP_SRC in ip:
        source, target = IPv4Address(ip[_IP_SRC]), IPv4Address(ip[_IP_DST])
    else:
        source, target = IPv6Address(ip[_IP6_SRC]), IPv6Address(ip[_IP6_DST])
    return Direction(
        Address(source, _PORT.unpack(proto[_PROTO_SRC])[0]),
        Address(target, _PORT.unpack(proto[_PROTO_DST])[0]),
    )
