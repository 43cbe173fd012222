"""Routes to peers over the underlay: device, source address, next hop and MTU.

They are those that the kernel's VXLAN device would use. The fast path encapsulates only for simple
ones: over an Ethernet device, since it makes an Ethernet header, and from an IPv4 address.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

from dataplane.ebpf import PeerRoute
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import Sockets
from driver.kernel.rtnl import NetDevice, Rtnl
from driver.model import IPAddress

_ETHER: Final = 1
"""ARPHRD_ETHER, linux/if_arp.h."""
_UNICAST: Final = 1
"""RTN_UNICAST."""
_GROUPS: Final = 0x1 | 0x10 | 0x40
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE: linux/rtnetlink.h."""


@dataclass(frozen=True, slots=True)
class Routes:
    """`found`: the routes by peer; `refused`: why the fast path can't use those of other peers."""

    found: dict[IPv4Address, PeerRoute] = field(default_factory=dict)
    refused: dict[IPAddress, str] = field(default_factory=dict)


def find(host: Sockets, peers: Iterable[IPAddress], local: IPAddress | None) -> Routes:
    """The routes to these peers; `local` is the overlay's source address, if it is set."""
    found: dict[IPv4Address, PeerRoute] = {}
    refused: dict[IPAddress, str] = {}
    devices: dict[int, NetDevice] = {}
    with host.raw() as netlink:
        for peer in peers:
            if not isinstance(peer, IPv4Address):
                refused[peer] = "its address is IPv6, which needs an outer checksum"
                continue
            try:
                found[peer] = _way(netlink, peer, local, devices)
            except ValueError as error:
                refused[peer] = str(error)
    return Routes(found, refused)


def devices(host: Sockets, peers: Iterable[IPAddress], local: IPAddress | None) -> set[str]:
    """The names of the devices that lead to these peers, as far as they have a route."""
    found: set[int] = set()
    reached: set[str] = set()
    with host.raw() as netlink:
        for peer in peers:
            source = local if local is not None and local.version == peer.version else None
            with contextlib.suppress(OSError):
                found.add(netlink.route(peer, source).index)
        for index in found - {0}:
            # The device may be gone.
            with contextlib.suppress(OSError):
                reached.add(netlink.link(index).name)
    return reached - {"lo"}


def _way(
    netlink: Rtnl, peer: IPv4Address, local: IPAddress | None, devices: dict[int, NetDevice]
) -> PeerRoute:
    try:
        route = netlink.route(peer, local)
    except OSError as error:
        raise ValueError(f"there is no route: {error.strerror}") from error
    if route.kind != _UNICAST or not route.index:
        raise ValueError("the route leads to no device")
    if route.index not in devices:
        try:
            devices[route.index] = netlink.link(route.index)
        except OSError as error:
            raise ValueError(f"its device is gone: {error.strerror}") from error
    device = devices[route.index]
    if device.kind != _ETHER:
        raise ValueError("the device is not Ethernet")
    own = local or route.source
    if not isinstance(own, IPv4Address):
        raise ValueError("this host's address is IPv6")
    # A next hop with an IPv6 address only: the kernel resolves it for each packet.
    through = IPv4Address(0) if route.via else route.gateway or peer
    if not isinstance(through, IPv4Address):
        raise ValueError("its next hop's address is IPv6")
    mtu = min(device.mtu, route.mtu) if route.mtu else device.mtu
    return PeerRoute(route.index, own, mtu, through)


class RouteChanges:
    """True if links, addresses or routes of a namespace have changed since the last query."""

    def __init__(self, namespace: int) -> None:
        def open_socket() -> socket.socket:
            made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
            made.bind((0, _GROUPS))
            made.setblocking(False)
            return made

        self._socket = in_netns(namespace, open_socket)

    def __bool__(self) -> bool:
        changed = False
        while True:
            try:
                self._socket.recv(1 << 16)
            except BlockingIOError:
                return changed
            except OSError as error:
                # More changes than the socket's buffer can hold.
                if error.errno != errno.ENOBUFS:
                    raise
            changed = True

    def close(self) -> None:
        self._socket.close()
