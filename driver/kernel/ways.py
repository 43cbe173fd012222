"""How peers are reached over the underlay: by which device, from which address, in packets of which size.

It is what the kernel's own VXLAN would do for a packet to them. Headers of our making go only where that is plain: over
an Ethernet device, since the frame is made for one, and from an IPv4 address.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.ebpf import Way
from driver.kernel.namespace import in_netns
from driver.kernel.netlink import Sockets
from driver.model import IPAddress

_ETHER: Final = 1
"""ARPHRD_ETHER, linux/if_arp.h."""
_UNICAST: Final = 1
"""RTN_UNICAST."""
_GROUPS: Final = 0x1 | 0x10 | 0x40
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE: linux/rtnetlink.h."""


@dataclass(frozen=True, slots=True)
class Ways:
    """`found` by peer; `refused`: why others have none."""

    found: dict[IPv4Address, Way] = field(default_factory=dict)
    refused: dict[IPAddress, str] = field(default_factory=dict)


def to(host: Sockets, peers: Iterable[IPAddress], local: IPAddress | None) -> Ways:
    """The ways to these peers; `local` is the address that the overlay sends from, if that is said."""
    found: dict[IPv4Address, Way] = {}
    refused: dict[IPAddress, str] = {}
    devices: dict[int, tuple[int, int]] = {}
    with host.take() as route:
        for peer in peers:
            if not isinstance(peer, IPv4Address):
                refused[peer] = "its address is IPv6: the outer checksum would have to be made too"
                continue
            try:
                found[peer] = _way(route, peer, local, devices)
            except ValueError as error:
                refused[peer] = str(error)
    return Ways(found, refused)


def _way(
    route: IPRoute, peer: IPv4Address, local: IPAddress | None, devices: dict[int, tuple[int, int]]
) -> Way:
    source = {"src": str(local)} if local is not None else {}
    try:
        answer = route.route("get", dst=str(peer), **source)[0]
    except NetlinkError as error:
        raise ValueError(f"there is no route: {os.strerror(error.code)}") from error
    index = answer.get_attr("RTA_OIF")
    if answer["type"] != _UNICAST or index is None:
        raise ValueError("the route leads to no device")
    if index not in devices:
        link = route.link("get", index=index)[0]
        devices[index] = (int(link["ifi_type"]), int(link.get_attr("IFLA_MTU")))
    kind, mtu = devices[index]
    if kind != _ETHER:
        raise ValueError("the device is not Ethernet")
    metrics = answer.get_attr("RTA_METRICS")
    on_route = metrics.get_attr("RTAX_MTU") if metrics else None
    own = ip_address(str(local) if local is not None else answer.get_attr("RTA_PREFSRC"))
    if not isinstance(own, IPv4Address):
        raise ValueError("this host's address is IPv6")
    router = answer.get_attr("RTA_GATEWAY")
    # A router with an IPv6 address only: the kernel finds it for each packet.
    through = IPv4Address(0) if answer.get_attr("RTA_VIA") else IPv4Address(str(router or peer))
    return Way(index, own, min(mtu, int(on_route)) if on_route else mtu, through)


class Changes:
    """Whether links, addresses or routes of a namespace have changed since the last question."""

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
                # More has changed than the socket holds.
                if error.errno != errno.ENOBUFS:
                    raise
            changed = True

    def close(self) -> None:
        self._socket.close()
