"""Where a container's connection to a VIP leads, by the container's own connection tracking.

It speaks ctnetlink directly, for the reason given in `socket_table.py`: one request, one reply.
Without nf_conntrack_netlink in the kernel no connection is found.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address
from typing import Final

from dataplane.router.library_wire import Address
from dataplane.router.netlink_socket import netlink_in

_NETLINK_NETFILTER: Final = 12
_BUFFER: Final = 1 << 14
# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h
_GET: Final = 1 << 8 | 1
_NEW: Final = 1 << 8
_TUPLE_ORIG: Final = 1
_TUPLE_REPLY: Final = 2
_TUPLE_IP: Final = 1
_TUPLE_PROTO: Final = 2
_IP_SRC: Final = 1
_IP_DST: Final = 2
_PROTO_NUM: Final = 1
_PROTO_SRC: Final = 2
_PROTO_DST: Final = 3
_NESTED: Final = 0x8000
_REQUEST: Final = 1
_AF_INET: Final = int(socket.AF_INET)
_TCP: Final = int(socket.IPPROTO_TCP)

_HEADER: Final = struct.Struct("=IHHII")
_NFGEN: Final = struct.Struct("!BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
_PORT: Final = struct.Struct("!H")


class Conntrack:
    """Looks up the connections of one namespace. Its descriptor stays the caller's."""

    def __init__(self, namespace: int) -> None:
        """Raises KernelRefused."""
        self._socket = netlink_in(namespace, _NETLINK_NETFILTER, "conntrack")
        self._sequence = 0

    def close(self) -> None:
        """Release the namespace."""
        self._socket.close()

    def translated(self, local: Address, remote: Address) -> tuple[Address, Address] | None:
        """The server that a TCP connection over IPv4 leads to, and the client as it is seen there.

        None: the kernel does not track the connection.
        """
        if local.ip.version != 4:
            return None
        self._sequence += 1
        body = _NFGEN.pack(_AF_INET, 0, 0) + _nested(
            _TUPLE_ORIG,
            _nested(
                _TUPLE_IP,
                _attribute(_IP_SRC, local.ip.packed),
                _attribute(_IP_DST, remote.ip.packed),
            ),
            _nested(
                _TUPLE_PROTO,
                _attribute(_PROTO_NUM, bytes([_TCP])),
                _attribute(_PROTO_SRC, _PORT.pack(local.port)),
                _attribute(_PROTO_DST, _PORT.pack(remote.port)),
            ),
        )
        size = _HEADER.size + len(body)
        try:
            self._socket.send(_HEADER.pack(size, _GET, _REQUEST, self._sequence, 0) + body)
            return self._answer()
        except (OSError, struct.error, KeyError):
            return None

    def _answer(self) -> tuple[Address, Address] | None:
        while True:
            data = self._socket.recv(_BUFFER)
            size, kind, _, sequence, _ = _HEADER.unpack_from(data)
            if sequence != self._sequence:
                continue
            if kind != _NEW:
                return None
            attributes = _attributes(data[_HEADER.size + _NFGEN.size : size])
            reply = _attributes(attributes[_TUPLE_REPLY])
            ip, proto = _attributes(reply[_TUPLE_IP]), _attributes(reply[_TUPLE_PROTO])
            # The reply goes from the server to the client.
            return (
                Address(IPv4Address(ip[_IP_SRC]), _PORT.unpack(proto[_PROTO_SRC])[0]),
                Address(IPv4Address(ip[_IP_DST]), _PORT.unpack(proto[_PROTO_DST])[0]),
            )


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def _nested(kind: int, *inner: bytes) -> bytes:
    return _attribute(kind | _NESTED, b"".join(inner))


def _attributes(data: bytes) -> dict[int, bytes]:
    values = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if size < _ATTRIBUTE.size:
            break
        values[kind & ~_NESTED] = data[offset + _ATTRIBUTE.size : offset + size]
        offset += (size + 3) & ~3
    return values
