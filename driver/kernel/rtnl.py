"""Netlink messages made and read by hand, for what is asked once per peer or per address.

pyroute2 takes a fifth of a millisecond and more for each message that it encodes or decodes; on a host with a thousand peers
that is seconds. Here a message costs some microseconds. Numbers and layouts: linux/rtnetlink.h, linux/neighbour.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from driver.errors import KernelError
from driver.model import IPAddress

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_ROUTE: Final = struct.Struct("=8BI")
_NEIGHBOUR: Final = struct.Struct("=BxxxiHBB")
_LINK: Final = struct.Struct("=BxHiII")
_ERROR: Final = struct.Struct("=i")

_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_INTERRUPTED: Final = 0x10
"""NLM_F_DUMP_INTR: what was listed changed meanwhile."""
_ERROR_MESSAGE, _DONE = 2, 3
_NEW_LINK, _GET_LINK = 16, 18
_NEW_ROUTE, _GET_ROUTE = 24, 26
_NEW_NEIGHBOUR, _DELETE_NEIGHBOUR, _GET_NEIGHBOUR = 28, 29, 30
_CREATE, _REPLACE, _APPEND = 0x400, 0x100, 0x800

_IFLA_IFNAME, _IFLA_MTU = 3, 4
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC, _RTA_METRICS, _RTA_VIA = (
    1,
    2,
    4,
    5,
    7,
    8,
    18,
)
_RTAX_MTU: Final = 2
_NDA_DST, _NDA_LLADDR = 1, 2
NTF_SELF, NTF_MASTER = 0x02, 0x04
NUD_REACHABLE, NUD_NOARP, NUD_PERMANENT = 0x02, 0x40, 0x80

_RECEIVE: Final = 1 << 17
_PATIENCE: Final = 10.0
_TRIES: Final = 20


@dataclass(frozen=True, slots=True)
class Device:
    """A link: its name, kind of hardware (ARPHRD_…, linux/if_arp.h) and MTU."""

    name: str
    kind: int
    mtu: int


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel would send to an address."""

    kind: int
    index: int
    source: IPAddress | None
    gateway: IPAddress | None
    via: bool
    mtu: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of a forwarding table: `peer` None is one of a bridge."""

    index: int
    mac: str
    peer: IPAddress | None
    state: int


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes, offset: int) -> Mapping[int, bytes]:
    found = {}
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


class Rtnl:
    """One netlink socket in the calling thread's namespace; for one thread at a time. Refusals are OSError."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(_PATIENCE)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | _REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        return self._sequence

    def _messages(self, sequence: int) -> Iterator[tuple[int, int, bytes]]:
        """Kind, flags and body of each message of an answer; without end."""
        while True:
            data = self._socket.recv(_RECEIVE)
            offset = 0
            while offset + _HEADER.size <= len(data):
                length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
                if number == sequence:
                    yield kind, flags, data[offset + _HEADER.size : offset + length]
                offset += max((length + 3) & ~3, _HEADER.size)

    @staticmethod
    def _check(body: bytes) -> None:
        code = -_ERROR.unpack_from(body)[0]
        if code:
            raise OSError(code, os.strerror(code))

    def change(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request that has no answer but whether it was done."""
        sequence = self._send(kind, flags | _ACK, body)
        for found, _, answer in self._messages(sequence):
            if found == _ERROR_MESSAGE:
                self._check(answer)
                return

    def get(self, kind: int, body: bytes) -> bytes:
        """The one message that answers a request."""
        sequence = self._send(kind, 0, body)
        for found, _, answer in self._messages(sequence):
            if found == _ERROR_MESSAGE:
                self._check(answer)
                continue
            return answer
        raise AssertionError("unreachable: the messages have no end")

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All messages of a listing, from one moment."""
        for _ in range(_TRIES):
            sequence = self._send(kind, _DUMP, body)
            listed: list[bytes] = []
            whole = True
            for found, flags, answer in self._messages(sequence):
                whole &= not flags & _INTERRUPTED
                if found == _DONE:
                    break
                if found == _ERROR_MESSAGE:
                    self._check(answer)
                    break
                listed.append(answer)
            if whole:
                return listed
        raise OSError(errno.EAGAIN, "what is listed changes faster than it can be listed")

    # --- links and routes

    def link(self, index: int) -> Device:
        """A device of this namespace."""
        answer = self.get(_GET_LINK, _LINK.pack(0, 0, index, 0, 0))
        found = _attributes(answer, _LINK.size)
        return Device(
            name=found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
            kind=int(_LINK.unpack_from(answer)[1]),
            mtu=int.from_bytes(found.get(_IFLA_MTU, b""), sys.byteorder),
        )

    def route(self, to: IPAddress, source: IPAddress | None = None) -> Route:
        """How a packet to an address would go, from `source` if that is said."""
        family = socket.AF_INET if to.version == 4 else socket.AF_INET6
        bits = to.max_prefixlen
        body = _ROUTE.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0)
        body += _attribute(_RTA_DST, to.packed)
        if source is not None:
            body += _attribute(_RTA_SRC, source.packed)
        answer = self.get(_GET_ROUTE, body)
        found = _attributes(answer, _ROUTE.size)
        metrics = _attributes(found.get(_RTA_METRICS, b""), 0)

        def address(kind: int) -> IPAddress | None:
            return ip_address(found[kind]) if kind in found else None

        return Route(
            kind=_ROUTE.unpack_from(answer)[7],
            index=int.from_bytes(found.get(_RTA_OIF, b""), sys.byteorder),
            source=address(_RTA_PREFSRC),
            gateway=address(_RTA_GATEWAY),
            via=_RTA_VIA in found,
            mtu=int.from_bytes(metrics.get(_RTAX_MTU, b""), sys.byteorder),
        )

    # --- forwarding entries

    def neighbours(self, index: int) -> list[Neighbour]:
        """What a port of a bridge has: its bridge's entries about it, and its own if it is a VXLAN device."""
        # By this form of request, an ifinfomsg, all kernels list one device only.
        body = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0)
        found = []
        for answer in self.dump(_GET_NEIGHBOUR, body):
            _, device, state, _, _ = _NEIGHBOUR.unpack_from(answer)
            attributes = _attributes(answer, _NEIGHBOUR.size)
            mac = attributes.get(_NDA_LLADDR)
            peer = attributes.get(_NDA_DST)
            if device == index and mac:
                found.append(
                    Neighbour(index, mac.hex(":"), ip_address(peer) if peer else None, state)
                )
        return found

    def put_neighbour(
        self,
        index: int,
        mac: str,
        peer: IPAddress | None,
        state: int,
        flags: int,
        *,
        append: bool = False,
    ) -> None:
        """Make an entry, in place of another of this MAC address, or (`append`) beside them."""
        mode = _CREATE | (_APPEND if append else _REPLACE)
        self.change(_NEW_NEIGHBOUR, mode, _entry(index, mac, peer, state, flags))

    def drop_neighbour(self, index: int, mac: str, peer: IPAddress | None, flags: int) -> None:
        self.change(_DELETE_NEIGHBOUR, 0, _entry(index, mac, peer, 0, flags))


def _entry(index: int, mac: str, peer: IPAddress | None, state: int, flags: int) -> bytes:
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, state, flags, 0)
    body += _attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    return body + (_attribute(_NDA_DST, peer.packed) if peer is not None else b"")


def refused(error: OSError, what: str) -> KernelError:
    """Our exception for the kernel's refusal of `what`."""
    return KernelError(f"{what}: {error.strerror or error}")
