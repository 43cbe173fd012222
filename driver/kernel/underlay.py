"""The underlay: which device and address carry the overlay, and how large a packet may be on it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from typing import Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver.errors import KernelError, SettingError
from driver.model import IPAddress

OVERHEAD_IPV4: Final = 50
"""Outer IPv4 + UDP + VXLAN + inner Ethernet, in bytes (RFC 7348, figure 1)."""
OVERHEAD_IPV6: Final = 70


@dataclass(frozen=True, slots=True)
class Underlay:
    """The device that carries the overlay; `address` is None when nothing says which one of it to use."""

    device: str
    mtu: int
    address: IPAddress | None

    @property
    def overhead(self) -> int:
        return OVERHEAD_IPV6 if self.address and self.address.version == 6 else OVERHEAD_IPV4


def _link(route: IPRoute, **match: Any) -> tuple[str, int]:
    link = route.link("get", **match)[0]
    return link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MTU")


def _by_address(route: IPRoute, address: IPAddress) -> Underlay | None:
    family = 2 if isinstance(address, IPv4Address) else 10
    for item in route.get_addr(family=family):
        if item.get_attr("IFA_ADDRESS") == str(address) or item.get_attr("IFA_LOCAL") == str(
            address
        ):
            device, mtu = _link(route, index=item["index"])
            return Underlay(device, mtu, address)
    return None


def find(choice: str, hint: IPAddress | None) -> Underlay:
    """The underlay by the setting UNDERLAY (interface or address), else by Docker's hint, else the default route's.

    Raises:
        SettingError: UNDERLAY names no interface or address of this host.
        KernelError: nothing carries a route.
    """
    with IPRoute() as route:
        if choice:
            try:
                wanted = ip_address(choice)
            except ValueError:
                return _by_name(route, choice, hint)
            found = _by_address(route, wanted)
            if found is None:
                raise SettingError(
                    f"setting UNDERLAY={choice}: no interface of this host has this address; "
                    "docker plugin set freeflow:latest UNDERLAY=INTERFACE"
                )
            return found
        if hint is not None and (found := _by_address(route, hint)) is not None:
            return found
        for family, any_address in ((2, "192.0.2.1"), (10, "2001:db8::1")):
            try:
                answer = route.route("get", dst=any_address, family=family)[0]
            except (NetlinkError, IndexError):
                continue
            device, mtu = _link(route, index=answer.get_attr("RTA_OIF"))
            return Underlay(
                device, mtu, None if family == 2 else ip_address(answer.get_attr("RTA_PREFSRC"))
            )
        # A host without a route has no peers: take the largest device that is up.
        links = [
            (link.get_attr("IFLA_MTU"), link.get_attr("IFLA_IFNAME"))
            for link in route.get_links()
            if link["flags"] & 1 and not link["flags"] & 8
        ]
        if links:
            mtu, device = max(links)
            return Underlay(device, mtu, None)
    raise KernelError(
        "no network interface is up: FreeFlow has no underlay; bring one up or set UNDERLAY"
    )


def _by_name(route: IPRoute, name: str, hint: IPAddress | None) -> Underlay:
    try:
        device, mtu = _link(route, ifname=name)
    except NetlinkError as error:
        raise SettingError(
            f"setting UNDERLAY={name}: this host has no such interface; "
            "docker plugin set freeflow:latest UNDERLAY=INTERFACE"
        ) from error
    addresses = [
        ip_address(item.get_attr("IFA_ADDRESS"))
        for item in route.get_addr(label=name)
        if item.get_attr("IFA_ADDRESS")
    ]
    if hint in addresses:
        return Underlay(device, mtu, hint)
    return Underlay(device, mtu, addresses[0] if addresses else None)
