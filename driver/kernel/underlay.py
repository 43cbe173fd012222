"""The underlay: the device and address that carry the overlay, and the device's MTU."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from socket import AF_INET, AF_INET6
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver.errors import KernelError, SettingError
from driver.kernel.netlink import Sockets, requesting
from driver.model import IPAddress, IPNetwork

OVERHEAD_IPV4: Final = 50
"""Outer IPv4 + UDP + VXLAN + inner Ethernet, in bytes (RFC 7348, figure 1)."""
OVERHEAD_IPV6: Final = 70

_UP: Final = 1
_LOOPBACK: Final = 8
_SCOPE_GLOBAL: Final = 0


@dataclass(frozen=True, slots=True)
class Underlay:
    """The device that carries the overlay; `address` None: the routes decide."""

    device: str
    mtu: int
    address: IPAddress | None

    @property
    def overhead(self) -> int:
        return OVERHEAD_IPV6 if self.address and self.address.version == 6 else OVERHEAD_IPV4


def find(host: Sockets, choice: str, hint: IPAddress | None) -> Underlay:
    """The underlay by the setting UNDERLAY (interface or address), by Docker's hint, or by the
    default route.

    Raises:
        SettingError: UNDERLAY names no interface or address of this host.
        KernelError: no interface is up.
    """
    with requesting("finding the underlay"), host.take() as route:
        if choice:
            return _chosen(route, choice, hint)
        found = _by_address(route, hint) if hint is not None else None
        return found or _by_route(route) or _any(route)


def networks(host: Sockets, device: str) -> frozenset[IPNetwork]:
    """The networks of an interface's addresses; none if the interface is gone."""
    with host.take() as route:
        try:
            index = route.link("get", ifname=device)[0]["index"]
            return frozenset(
                ip_network((str(address), int(item["prefixlen"])), strict=False)
                for item in route.get_addr(index=index)
                if (address := item.get_attr("IFA_LOCAL") or item.get_attr("IFA_ADDRESS"))
            )
        except NetlinkError:
            return frozenset()


def _link(route: IPRoute, **match: Any) -> tuple[str, int]:
    link = route.link("get", **match)[0]
    return str(link.get_attr("IFLA_IFNAME")), int(link.get_attr("IFLA_MTU"))


def _chosen(route: IPRoute, choice: str, hint: IPAddress | None) -> Underlay:
    try:
        wanted = ip_address(choice)
    except ValueError:
        return _by_name(route, choice, hint)
    found = _by_address(route, wanted)
    if found is None:
        raise SettingError(
            f"setting UNDERLAY={choice}",
            cause="no interface of this host has this address",
            remedy="docker plugin set freeflow:latest UNDERLAY=INTERFACE",
        )
    return found


def _by_address(route: IPRoute, address: IPAddress) -> Underlay | None:
    family = AF_INET if address.version == 4 else AF_INET6
    for item in route.get_addr(family=family):
        if str(address) in (item.get_attr("IFA_LOCAL"), item.get_attr("IFA_ADDRESS")):
            device, mtu = _link(route, index=item["index"])
            return Underlay(device, mtu, address)
    return None


def _by_name(route: IPRoute, name: str, hint: IPAddress | None) -> Underlay:
    try:
        index = route.link("get", ifname=name)[0]["index"]
    except NetlinkError as error:
        raise SettingError(
            f"setting UNDERLAY={name}",
            cause="this host has no such interface",
            remedy="docker plugin set freeflow:latest UNDERLAY=INTERFACE",
        ) from error
    device, mtu = _link(route, index=index)
    # IPv4 comes first in the list.
    addresses = [
        ip_address(item.get_attr("IFA_LOCAL") or item.get_attr("IFA_ADDRESS"))
        for item in route.get_addr(index=index)
        if item["scope"] == _SCOPE_GLOBAL
    ]
    if hint in addresses:
        return Underlay(device, mtu, hint)
    return Underlay(device, mtu, addresses[0] if addresses else None)


def _by_route(route: IPRoute) -> Underlay | None:
    for family, outside in ((AF_INET, "192.0.2.1"), (AF_INET6, "2001:db8::1")):
        try:
            answer = route.route("get", dst=outside, family=family)[0]
        except (NetlinkError, IndexError):
            continue
        device, mtu = _link(route, index=answer.get_attr("RTA_OIF"))
        source = answer.get_attr("RTA_PREFSRC")
        # With IPv4 the routes give the best source address for each peer.
        return Underlay(device, mtu, ip_address(source) if family == AF_INET6 else None)
    return None


def _any(route: IPRoute) -> Underlay:
    """The device with the largest MTU that is up: a host without a route has no peers."""
    links = [
        (int(link.get_attr("IFLA_MTU")), str(link.get_attr("IFLA_IFNAME")))
        for link in route.get_links()
        if link["flags"] & _UP and not link["flags"] & _LOOPBACK
    ]
    if not links:
        raise KernelError(
            "FreeFlow has no underlay",
            cause="no network interface is up",
            remedy="bring one up or set UNDERLAY",
        )
    mtu, device = max(links)
    return Underlay(device, mtu, None)
