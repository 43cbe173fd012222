"""Replaces the IPv6 address that the engine gave a container's interface by ours.

The engine's address isn't removed at once: engines since 28 announce it in the first seconds, and
the container's start fails if they can't. It gets a lifetime instead, after which the kernel
removes it, and is deprecated at once, so that no new connection uses it.
"""

from __future__ import annotations

from ipaddress import IPv6Interface, ip_address
from pathlib import Path
from socket import AF_INET6
from typing import Final

from pyroute2 import IPRoute

from driver.kernel.namespace import in_netns, is_namespace
from driver.kernel.netlink import requesting

LIFETIME: Final = 15
"""Seconds. Docker announces at most three times, at most two seconds apart."""
_FOREVER: Final = 0xFFFFFFFF
_NODAD: Final = 0x02
"""IFA_F_NODAD: a derived address is unique, and can be used at once."""


def exchange(
    sandbox: Path,
    mac: str,
    engines: IPv6Interface,
    ours: IPv6Interface,
    lifetime: int = LIFETIME,
) -> bool:
    """Replace the address of the interface with this MAC address.

    False: there is no such namespace, interface or address yet. True: done, now or earlier.

    Raises:
        KernelError: the namespace can't be entered, or the kernel refuses.
    """
    return is_namespace(sandbox) and in_netns(
        sandbox, lambda: _exchange(mac, engines, ours, lifetime)
    )


def _exchange(mac: str, engines: IPv6Interface, ours: IPv6Interface, lifetime: int) -> bool:
    with requesting(f"giving a container {ours}"), IPRoute() as route:
        links = {
            link["index"] for link in route.get_links() if link.get_attr("IFLA_ADDRESS") == mac
        }
        found = {
            ip_address(item.get_attr("IFA_ADDRESS")): int(item["index"])
            for item in route.get_addr(family=AF_INET6)
            if item["index"] in links
        }
        index = found.get(engines.ip)
        if index is None:
            return ours.ip in found
        # In this order: the first may give the subnet's route a lifetime, the second removes that.
        _put(route, index, engines, lifetime)
        _put(route, index, ours)
    return True


def _put(route: IPRoute, index: int, address: IPv6Interface, lifetime: int | None = None) -> None:
    route.addr(
        "replace",
        index=index,
        address=str(address.ip),
        prefixlen=address.network.prefixlen,
        flags=_NODAD,
        # The only form in which pyroute2 0.7 accepts `preferred` and `valid`.
        cacheinfo={
            "preferred": _FOREVER if lifetime is None else 0,
            "valid": _FOREVER if lifetime is None else lifetime,
        },
    )
