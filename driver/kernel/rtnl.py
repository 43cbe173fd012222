"""Routes, links and forwarding entries (rtnetlink), asked once per peer or per address.

Numbers and layouts: linux/rtnetlink.h, linux/neighbour.h. Messages are packed by hand (`nlmsg.py`):
on a host with a thousand peers pyroute2 would take seconds.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from driver.errors import DOCTOR, KernelError
from driver.kernel.nlmsg import (
    ACK,
    APPEND,
    CREATE,
    DONE,
    DUMP,
    ERROR,
    INTERRUPTED,
    REPLACE,
    attribute,
    attributes,
    check,
    message,
    messages,
)
from driver.model import IPAddress

_ROUTE: Final = struct.Struct("=8BI")
_NEIGHBOUR: Final = struct.Struct("=BxxxiHBB")
_LINK: Final = struct.Struct("=BxHiII")

_NEW_LINK, _GET_LINK = 16, 18
_NEW_ROUTE, _GET_ROUTE = 24, 26
_NEW_NEIGHBOUR, _DELETE_NEIGHBOUR, _GET_NEIGHBOUR = 28, 29, 30

_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_LINK_NETNSID = 18, 37
_IFLA_INFO_KIND: Final = 1
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
class StackedLink:
    """A link and what it lies on: `upon` is the index of the device below it, `master` that of the
    one above it (bond, bridge); 0: none. `type` is that of `ip link`; "" for hardware."""

    index: int
    name: str
    type: str
    upon: int
    master: int


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel would send to an address: `kind` is RTN_…, `index` the device, `via` a gateway
    of the other family."""

    kind: int
    index: int
    source: IPAddress | None
    gateway: IPAddress | None
    via: bool
    mtu: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An FDB entry; `peer` is None in those of a bridge."""

    index: int
    mac: str
    peer: IPAddress | None
    state: int


class Rtnl:
    """A netlink socket in the calling thread's namespace, for one thread at a time.

    A request that the kernel refuses raises OSError.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(_PATIENCE)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._socket.send(message(kind, flags, self._sequence, body))
        return self._sequence

    def _messages(self, sequence: int) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and body of each message of an answer; without end."""
        while True:
            for kind, number, flags, body in messages(self._socket.recv(_RECEIVE)):
                if number == sequence:
                    yield kind, flags, body

    def change(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request that is answered by an acknowledgement only."""
        sequence = self._send(kind, flags | ACK, body)
        for found, _, answer in self._messages(sequence):
            if found == ERROR:
                check(answer)
                return

    def get(self, kind: int, body: bytes) -> bytes:
        """The one message that answers a request."""
        sequence = self._send(kind, 0, body)
        for found, _, answer in self._messages(sequence):
            if found == ERROR:
                check(answer)
                continue
            return answer
        raise AssertionError("unreachable: the messages have no end")

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All messages of a consistent listing."""
        for _ in range(_TRIES):
            sequence = self._send(kind, DUMP, body)
            listed: list[bytes] = []
            whole = True
            for found, flags, answer in self._messages(sequence):
                whole &= not flags & INTERRUPTED
                if found == DONE:
                    break
                if found == ERROR:
                    check(answer)
                    break
                listed.append(answer)
            if whole:
                return listed
        raise OSError(errno.EAGAIN, "the list changes faster than it can be read")

    # --- links and routes

    def link(self, index: int) -> Device:
        """A device of this namespace."""
        answer = self.get(_GET_LINK, _LINK.pack(0, 0, index, 0, 0))
        found = dict(attributes(answer, _LINK.size))
        return Device(
            name=found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
            kind=int(_LINK.unpack_from(answer)[1]),
            mtu=int.from_bytes(found.get(_IFLA_MTU, b""), sys.byteorder),
        )

    def stacked(self) -> list[StackedLink]:
        """All devices of this namespace."""
        found = []
        for answer in self.dump(_GET_LINK, _LINK.pack(0, 0, 0, 0, 0)):
            known = dict(attributes(answer, _LINK.size))
            info = dict(attributes(known.get(_IFLA_LINKINFO, b"")))

            def number(kind: int, known: dict[int, bytes] = known) -> int:
                return int.from_bytes(known.get(kind, b""), sys.byteorder)

            found.append(
                StackedLink(
                    index=int(_LINK.unpack_from(answer)[2]),
                    name=known.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
                    type=info.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
                    # Where it lies in another namespace, the index is of that.
                    upon=0 if _IFLA_LINK_NETNSID in known else number(_IFLA_LINK),
                    master=number(_IFLA_MASTER),
                )
            )
        return found

    def route(self, to: IPAddress, source: IPAddress | None = None) -> Route:
        """The route of a packet to an address, from `source` if given."""
        family = socket.AF_INET if to.version == 4 else socket.AF_INET6
        bits = to.max_prefixlen
        body = _ROUTE.pack(family, bits, bits if source else 0, 0, 0, 0, 0, 0, 0)
        body += attribute(_RTA_DST, to.packed)
        if source is not None:
            body += attribute(_RTA_SRC, source.packed)
        answer = self.get(_GET_ROUTE, body)
        found = dict(attributes(answer, _ROUTE.size))
        metrics = dict(attributes(found.get(_RTA_METRICS, b"")))

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
        """The FDB entries of a bridge port: its bridge's, and its own if it is a VXLAN device."""
        # By this form of request, an ifinfomsg, all kernels list one device only.
        body = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0)
        found = []
        for answer in self.dump(_GET_NEIGHBOUR, body):
            _, device, state, _, _ = _NEIGHBOUR.unpack_from(answer)
            entry = dict(attributes(answer, _NEIGHBOUR.size))
            mac, peer = entry.get(_NDA_LLADDR), entry.get(_NDA_DST)
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
        """Make an entry that replaces others of this MAC address, or (`append`) joins them."""
        mode = CREATE | (APPEND if append else REPLACE)
        self.change(_NEW_NEIGHBOUR, mode, _entry(index, mac, peer, state, flags))

    def drop_neighbour(self, index: int, mac: str, peer: IPAddress | None, flags: int) -> None:
        self.change(_DELETE_NEIGHBOUR, 0, _entry(index, mac, peer, 0, flags))


def _entry(index: int, mac: str, peer: IPAddress | None, state: int, flags: int) -> bytes:
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, state, flags, 0)
    body += attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    return body + (attribute(_NDA_DST, peer.packed) if peer is not None else b"")


def refused(error: OSError, what: str) -> KernelError:
    """Our exception for a request that the kernel refused; `what` names the request."""
    return KernelError(what, cause=str(error.strerror or error), remedy=DOCTOR)
