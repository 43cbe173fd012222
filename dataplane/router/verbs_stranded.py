"""Ends queue pairs whose hosts don't reach each other any more.

Connections of TCP wait for their peer's host as long as TCP would. A queue pair is expected to fail
much sooner, like one of a device whose packets are not acknowledged. Only the relays know that the
link is lost, and for how long: so one that is used again in time loses nothing.
"""

from __future__ import annotations

from typing import Final

from dataplane.router.library_wire import IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Loop
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import QUEUE_PAIR
from dataplane.router.remote_connections import RemoteConnection, RemoteConnections
from dataplane.router.remote_events import LIVE, Event, On
from dataplane.router.remote_hosts import RemoteHost, RemoteHosts

STRANDED: Final = 30.0
"""Seconds without a link after which the queue pairs on it end."""


class StrandedQueuePairs:
    """See the module."""

    def __init__(
        self, loop: Loop, hosts: RemoteHosts, links: Links, connections: RemoteConnections
    ) -> None:
        self._loop = loop
        self._hosts = hosts
        self._links = links
        self._connections = connections
        self._since: dict[IPAddress, float] = {}
        """When a host was first found without a link, though it has queue pairs."""

    def tick(self) -> None:
        """Some time has passed."""
        now = self._loop.now()
        stranded = {
            host.address: found
            for host in self._hosts
            if not self._links.is_up(host.address) and (found := self._queue_pairs(host))
        }
        self._since = {address: self._since.get(address, now) for address in stranded}
        for address, found in stranded.items():
            if now - self._since[address] >= STRANDED:
                for connection in found:
                    self._connections.step(connection, Event(On.LEAVE_PATH, reason=Reason.NO_LINK))

    def _queue_pairs(self, host: RemoteHost) -> list[RemoteConnection]:
        return [
            one
            for one in self._connections.of(host)
            if one.users.kind == QUEUE_PAIR and one.state.phase in LIVE and not one.state.leaving
        ]
