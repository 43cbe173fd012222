"""The sockets that a plugin process keeps open in the overlay namespace, so no call has to enter
it."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

from driver.kernel import arp
from driver.kernel.namespace import OVERLAY_PIN, in_netns
from driver.kernel.netlink import Sockets
from driver.kernel.nft import Session
from driver.model import ArpFrame


class Overlay:
    """Netlink sockets, an nft session and packet sockets; each stays in the namespace where it was
    opened."""

    def __init__(self, host_run: Path, identity: tuple[int, int]) -> None:
        self.identity = identity
        self.namespace = os.open(host_run / OVERLAY_PIN, os.O_RDONLY | os.O_CLOEXEC)
        self.links = Sockets(self.namespace)
        self.nft = in_netns(self.namespace, Session)
        self.arp = in_netns(self.namespace, arp.listener)
        self.packets = in_netns(
            self.namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        )

    def hear(self, seconds: float) -> frozenset[ArpFrame]:
        """See `ports.Kernel.hear`. OSError, ValueError: closed."""
        poll = select.poll()
        poll.register(self.arp, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return frozenset()
        return arp.hear(self.arp)

    def close(self) -> None:
        """Close all. Calls in progress fail, or complete in the old namespace."""
        self.links.close()
        self.nft.close()
        self.packets.close()
        self.arp.close()
        os.close(self.namespace)
