"""IPv6 addresses of a container's interface: ours in place of the one that the engine counted."""

from __future__ import annotations

import errno
from ipaddress import IPv6Interface, ip_address
from pathlib import Path
from socket import AF_INET6
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from driver.kernel.namespace import in_netns, is_namespace
from driver.kernel.netlink import translate

_NODAD: Final = 0x02
"""IFA_F_NODAD: the address is unique by what it is derived from, and of use at once."""


def exchange(sandbox: Path, mac: str, engines: IPv6Interface, ours: IPv6Interface) -> bool:
    """Replace the address on the interface with this MAC address.

    False if there is no such namespace, interface or address: not yet, or not any more.

    Raises:
        KernelError: the namespace can't be entered, or the kernel refuses.
    """
    return is_namespace(sandbox) and in_netns(sandbox, lambda: _exchange(mac, engines, ours))


def _exchange(mac: str, engines: IPv6Interface, ours: IPv6Interface) -> bool:
    with IPRoute() as route:
        try:
            own = {
                link["index"] for link in route.get_links() if link.get_attr("IFLA_ADDRESS") == mac
            }
            index = next(
                (
                    item["index"]
                    for item in route.get_addr(family=AF_INET6)
                    if item["index"] in own
                    and ip_address(item.get_attr("IFA_ADDRESS")) == engines.ip
                ),
                None,
            )
            if index is None:
                return False
            _change(route, "add", index, ours, errno.EEXIST)
            _change(route, "del", index, engines, errno.EADDRNOTAVAIL)
        except NetlinkError as error:
            raise translate(error, f"giving a container {ours}") from error
    return True


def _change(route: IPRoute, action: str, index: int, address: IPv6Interface, fine: int) -> None:
    try:
        route.addr(
            action,
            index=index,
            address=str(address.ip),
            prefixlen=address.network.prefixlen,
            **({"flags": _NODAD} if action == "add" else {}),
        )
    except NetlinkError as error:
        if error.code != fine:
            raise
