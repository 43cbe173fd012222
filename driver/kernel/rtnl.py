"""Routes, links and forwarding entries (rtnetlink), asked once per peer or per address.

Numbers and layouts: linux/rtnetlink.h, linux/neighbour.h. Messages are packed by hand
(`dataplane/nlmsg.py`): on a host with a thousand peers pyroute2 would take seconds.
"""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from dataplane.nlmsg import APPEND, CREATE, REPLACE, Netlink, attribute, attributes
from driver.model import IPAddress

_ROUTE: Final = struct.Struct("=8BI")
_NEIGHBOUR: Final = struct.Struct("=BxxxiHBB")
_LINK: Final = struct.Struct("=BxHiII")

_GET_LINK, _GET_ROUTE = 18, 26
_NEW_NEIGHBOUR, _DELETE_NEIGHBOUR, _GET_NEIGHBOUR = 28, 29, 30

_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER = 3, 4, 5, 10
_IFLA_LINKINFO, _IFLA_STATS64, _IFLA_LINK_NETNSID = 18, 23, 37
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_IFLA_VXLAN_ID, _IFLA_VXLAN_PORT = 1, 15
_ETHER: Final = 1
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY = 1, 2, 4, 5
_RTA_PREFSRC, _RTA_METRICS, _RTA_VIA = 7, 8, 18
_RTAX_MTU: Final = 2
_NDA_DST, _NDA_LLADDR = 1, 2
NTF_SELF, NTF_MASTER = 0x02, 0x04
NUD_REACHABLE, NUD_NOARP, NUD_PERMANENT = 0x02, 0x40, 0x80

# The first of struct rtnl_link_stats64 (linux/if_link.h).
_COUNTERS: Final = (
    "rx_packets",
    "tx_packets",
    "rx_bytes",
    "tx_bytes",
    "rx_errors",
    "tx_errors",
    "rx_dropped",
    "tx_dropped",
)
_STATS: Final = struct.Struct("=8Q")
_PATIENCE: Final = 10.0


@dataclass(frozen=True, slots=True)
class NetDevice:
    """An interface. `kind` is its kind of hardware (ARPHRD_…, linux/if_arp.h), `type` that of
    `ip link`, "" for hardware. `upon` is the index of the device below it, `master` that of the
    one above it (bond, bridge); 0: none. `vni` and UDP `port` are a VXLAN device's. `counters` of
    bytes and packets since it was made.
    """

    index: int
    name: str
    type: str
    upon: int
    master: int
    kind: int = _ETHER
    mtu: int = 0
    vni: int = 0
    port: int = 0
    counters: dict[str, int] = field(default_factory=dict)


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


class Rtnl(Netlink):
    """A netlink socket in the calling thread's namespace."""

    def __init__(self) -> None:
        channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        channel.bind((0, 0))
        channel.settimeout(_PATIENCE)
        super().__init__(channel)

    # --- links and routes

    def link(self, index: int) -> NetDevice:
        """A device of this namespace."""
        return _link(self.get(_GET_LINK, _LINK.pack(0, 0, index, 0, 0)))

    def links(self) -> list[NetDevice]:
        """All devices of this namespace."""
        return [_link(answer) for answer in self.dump(_GET_LINK, _LINK.pack(0, 0, 0, 0, 0))]

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

    def neighbours(self, index: int) -> list[tuple[str, IPAddress | None]]:
        """MAC address and peer of the FDB entries of a bridge port: its bridge's, which have no
        peer, and its own if it is a VXLAN device.
        """
        # By this form of request, an ifinfomsg, all kernels list one device only.
        body = _LINK.pack(socket.AF_BRIDGE, 0, index, 0, 0)
        found = []
        for answer in self.dump(_GET_NEIGHBOUR, body):
            entry = dict(attributes(answer, _NEIGHBOUR.size))
            mac, peer = entry.get(_NDA_LLADDR), entry.get(_NDA_DST)
            if _NEIGHBOUR.unpack_from(answer)[1] == index and mac:
                found.append((mac.hex(":"), ip_address(peer) if peer else None))
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


def _link(answer: bytes) -> NetDevice:
    _, kind, index, _, _ = _LINK.unpack_from(answer)
    found = dict(attributes(answer, _LINK.size))
    info = dict(attributes(found.get(_IFLA_LINKINFO, b"")))
    kind_name = _text(info.get(_IFLA_INFO_KIND, b""))
    data = dict(attributes(info.get(_IFLA_INFO_DATA, b""))) if kind_name == "vxlan" else {}
    stats = found.get(_IFLA_STATS64, bytes(_STATS.size))

    def number(of: int) -> int:
        return int.from_bytes(found.get(of, b""), sys.byteorder)

    return NetDevice(
        index,
        _text(found.get(_IFLA_IFNAME, b"")),
        type=kind_name,
        # Where it lies in another namespace, the index is of that.
        upon=0 if _IFLA_LINK_NETNSID in found else number(_IFLA_LINK),
        master=number(_IFLA_MASTER),
        kind=kind,
        mtu=number(_IFLA_MTU),
        vni=int.from_bytes(data.get(_IFLA_VXLAN_ID, b""), sys.byteorder),
        port=int.from_bytes(data.get(_IFLA_VXLAN_PORT, b""), "big"),
        counters=dict(zip(_COUNTERS, _STATS.unpack_from(stats), strict=True)),
    )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _entry(index: int, mac: str, peer: IPAddress | None, state: int, flags: int) -> bytes:
    body = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, state, flags, 0)
    body += attribute(_NDA_LLADDR, bytes.fromhex(mac.replace(":", "")))
    return body + (attribute(_NDA_DST, peer.packed) if peer is not None else b"")
