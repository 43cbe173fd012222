"""Which addresses a namespace has now, by rtnetlink(7): one request and one reply for each."""

from __future__ import annotations

import socket
import struct
from typing import Final

from dataplane.nlmsg import Netlink, attribute
from dataplane.router.library_wire import IPAddress
from dataplane.router.netlink_socket import netlink_in

# linux/rtnetlink.h: RTM_GETROUTE, RTA_DST, RTN_LOCAL, and struct rtmsg, of which the type of a
# route is the eighth byte.
_GETROUTE: Final = 26
_DST: Final = 1
_LOCAL: Final = 2
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
_TYPE_OFFSET: Final = 7
_FAMILY: Final = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}


class LocalAddresses:
    """The addresses of one namespace. Its descriptor stays the caller's."""

    def __init__(self, namespace: int) -> None:
        """Raises KernelRefused."""
        self._netlink = Netlink(netlink_in(namespace, socket.NETLINK_ROUTE, "route"))

    def close(self) -> None:
        """Release the namespace."""
        self._netlink.close()

    def __contains__(self, ip: IPAddress) -> bool:
        """Whether packets to an address are the namespace's own."""
        question = _ROUTE.pack(_FAMILY[ip.version], ip.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
        try:
            route = self._netlink.get(_GETROUTE, question + attribute(_DST, ip.packed))
        except OSError:
            return False
        return route[_TYPE_OFFSET : _TYPE_OFFSET + 1] == bytes([_LOCAL])
