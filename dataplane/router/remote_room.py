"""How many connections to other hosts there may be, and how much memory for them.

Links and registered memory are shared by all containers of a host. So none of them may take all of
it, whatever its peers on other hosts do.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from dataplane.router.library_wire import IPAddress
from dataplane.router.relay_wire import LINK_CONNECTIONS
from dataplane.router.tally import add

OF_CONTAINER: Final = LINK_CONNECTIONS // 4
"""Connections of one container on one link."""
MEMORY_OF_CONTAINER: Final = 7 / 8
"""The part of the registered memory that one container may have. Only with RDMA memory is
registered.
"""


class RemoteRoom:
    """Counts connections and their memory: on each link, and of each container."""

    def __init__(self) -> None:
        self.registered = 0
        """Bytes of all connections' rings, which are registered with the device."""
        self._registered_of: Counter[int] = Counter()
        """The same by namespace."""
        self._connections: Counter[IPAddress] = Counter()
        self._connections_of: Counter[tuple[IPAddress, int]] = Counter()
        """By host, and namespace."""

    def has(self, host: IPAddress, namespace: int, cost: int, memory: int) -> bool:
        """Whether there is room for one more connection of a container, which registers so many
        bytes. `memory`: how many bytes may be registered.
        """
        if (
            self._connections[host] >= LINK_CONNECTIONS
            or self._connections_of[host, namespace] >= OF_CONTAINER
        ):
            return False
        return not cost or (
            self.registered + cost <= memory
            and self._registered_of[namespace] + cost <= memory * MEMORY_OF_CONTAINER
        )

    def add(self, host: IPAddress, namespace: int, cost: int) -> None:
        """There is a new connection."""
        self._change(host, namespace, 1, cost)

    def remove(self, host: IPAddress, namespace: int, cost: int) -> None:
        """A connection is gone."""
        self._change(host, namespace, -1, -cost)

    def _change(self, host: IPAddress, namespace: int, connections: int, cost: int) -> None:
        self.registered += cost
        add(self._registered_of, namespace, cost)
        add(self._connections, host, connections)
        add(self._connections_of, (host, namespace), connections)
