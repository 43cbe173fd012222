"""How long connections stay while there is no link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from dataplane.router import relay_wire as relay
from dataplane.router.link_table import Link, LinkState
from dataplane.router.loop import Loop
from dataplane.router.relay_wire import RelayKind
from dataplane.router.remote_events import Transport

GIVE_UP: Final = {Transport.RDMA: 30.0, Transport.RELAY: 924.6}
"""Seconds without a link after which its connections are reset. With TCP, which may cross the same
network, those that have had something on the way for as long as a TCP connection of its own would
try (tcp_retries2 in the kernel's ip-sysctl.rst). An idle TCP connection would stay."""
CHECKS: Final = 4
"""Checks of a link over TCP in that time."""


class LinkDeadlines:
    """Starts and stops the deadlines of links."""

    def __init__(
        self, loop: Loop, tell_relay: Callable[..., None], reset: Callable[[Link], None]
    ) -> None:
        """`reset` is called when all connections of a link are to be reset."""
        self._loop = loop
        self._tell_relay = tell_relay
        self._reset = reset

    def start(self, link: Link) -> None:
        seconds = GIVE_UP[link.transport]
        if _is_checked(link):
            seconds /= CHECKS
        link.deadline = self._loop.after(seconds, lambda: self._passed(link))

    def stop(self, link: Link) -> None:
        """The connections of a link are not reset."""
        if link.deadline is not None:
            link.deadline.cancel()
            link.deadline = None

    def _passed(self, link: Link) -> None:
        link.deadline = None
        if _is_checked(link):
            # One more, as bytes may have come just before the first.
            self._tell_relay(relay.Number(RelayKind.EXPIRE, link.number, CHECKS + 1))
            self.start(link)
        else:
            self._reset(link)


def _is_checked(link: Link) -> bool:
    """Whether the relay finds, check by check, which connections wait for something in vain."""
    return link.transport is Transport.RELAY and link.state is not LinkState.STREAM
