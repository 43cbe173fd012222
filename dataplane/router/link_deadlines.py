"""How long connections and queue pairs stay while there is no link.

Those that wait for the peer are reset after a time. Idle ones stay, as an idle TCP connection would
and as an idle queue pair of a device would. Only the relay knows which of them wait.

A link over RDMA on which nothing is on the way stays up when the peer's host is gone. So while
there is no session, the relay checks it as well: it has the peer's relay say something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from dataplane.router.link_table import Link, LinkState
from dataplane.router.loop import Loop
from dataplane.router.relay_wire import CONNECTION, QUEUE_PAIR, RelayExpire
from dataplane.router.remote_events import Transport

GIVE_UP: Final = {Transport.RDMA: 30.0, Transport.RELAY: 924.6}
"""Seconds without a link after which connections that have had something on the way are reset. With
TCP, which may cross the same network, as long as a TCP connection of its own would try
(tcp_retries2 in the kernel's ip-sysctl.rst)."""
QUEUE_PAIRS: Final = 30.0
"""The same of queue pairs, which are expected to fail as soon as those of a device."""
CHECKS: Final = 4
"""Checks of a link in that time."""


class LinkDeadlines:
    """Starts and stops the deadlines of links."""

    def __init__(
        self, loop: Loop, tell_relay: Callable[..., None], reset: Callable[[Link], None]
    ) -> None:
        """`reset` is called when all that use a link are to be reset."""
        self._loop = loop
        self._tell_relay = tell_relay
        self._reset = reset

    def check(self, link: Link) -> None:
        """The session is lost. If the link is up: is the peer's host still there? A link over TCP
        finds out by itself.
        """
        is_up = link.state is LinkState.UP and not link.deadlines
        if is_up and link.transport is Transport.RDMA:
            self._tell_relay(RelayExpire(link.number, CHECKS + 1, CONNECTION))
            self.start(link)

    def check_no_more(self, link: Link) -> None:
        """There is a session. A link that is not up has its deadlines all the same."""
        if link.state is LinkState.UP:
            self.stop(link)

    def start(self, link: Link) -> None:
        """There is no link, or nobody knows whether there is."""
        seconds = GIVE_UP[link.transport]
        if link.state is LinkState.STREAM:
            timer = self._loop.after(seconds, lambda: self._passed(link))
            link.deadlines[CONNECTION] = timer
            return
        self._check_later(link, CONNECTION, seconds / CHECKS)
        self._check_later(link, QUEUE_PAIR, QUEUE_PAIRS / CHECKS)

    def stop(self, link: Link) -> None:
        """Nobody on a link is reset."""
        for timer in link.deadlines.values():
            timer.cancel()
        link.deadlines.clear()

    def _passed(self, link: Link) -> None:
        link.deadlines.clear()
        self._reset(link)

    def _check_later(self, link: Link, user: int, seconds: float) -> None:
        timer = self._loop.after(seconds, lambda: self._check(link, user, seconds))
        link.deadlines[user] = timer

    def _check(self, link: Link, user: int, seconds: float) -> None:
        # One more, as bytes may have come just before the first.
        self._tell_relay(RelayExpire(link.number, CHECKS + 1, user))
        self._check_later(link, user, seconds)
