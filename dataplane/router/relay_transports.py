"""Opens a transport of the relay when another host has it too, and again when its device has
changed.

The relay of a host with an RDMA device also speaks TCP with hosts that have none, so each transport
is opened by itself. It is opened again only while it has no links.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

import structlog

from dataplane.router import relay_wire
from dataplane.router.loop import Loop
from dataplane.router.relay_process import RelayProcess
from dataplane.router.remote import OPENING, Remotes
from dataplane.router.remote_events import Transport
from dataplane.router.sessions import Sessions

log = structlog.get_logger()

OPEN_AGAIN: Final = 10.0
"""Seconds between two times that the relay opens a transport."""
STUCK: Final = 3
"""Attempts at a link after which the device is opened again: it may have been replaced by another
one of the same name."""


class RelayTransport:
    """One transport. `kind` is the relay's number of it."""

    def __init__(
        self,
        transport: Transport,
        kind: int,
        loop: Loop,
        relay: RelayProcess,
        remotes: Remotes[Sessions],
        opens_again: Callable[[], None],
    ) -> None:
        """`opens_again` is called before a device is opened again."""
        self.kind = kind
        self._transport = transport
        self._loop = loop
        self._relay = relay
        self._remotes = remotes
        self._opens_again = opens_again
        self.failure = ""
        """Why the relay could not open it; "" if it could."""
        self._opened_at = float("-inf")
        self._fresh = False
        """The device has been there since the relay opened it."""

    def decide(self, wanted: relay_wire.RelayOpen | None, why: str, *, others: bool) -> None:
        """Open what is wanted; None: nothing, and why. `others`: whether another host has it."""
        use = self._remotes.use
        if wanted is None:
            self._fresh = False
            self._relay.forget(self.kind)
            use(self._transport, why)
            return
        opened = self._relay.opened(self.kind)
        if opened is None:
            if others:
                self._relay.want(wanted)
            if self._relay.opened(self.kind) is None:
                use(self._transport, self._relay.why or "no other host has it")
            else:
                self.opening()
        elif wanted == opened and self._remotes.links.works(self._transport):
            # Whatever was reported about it meanwhile.
            self._fresh = True
            use(self._transport, "")
        elif wanted != opened or not self._fresh or self._is_stuck():
            # First the connections over the device as it was have to end.
            use(self._transport, "it is opened again")
            if self._may_open_again():
                self._opens_again()
                self._relay.want(wanted)
                self.opening()

    def _may_open_again(self) -> bool:
        late = self._loop.now() - self._opened_at > OPEN_AGAIN
        return late and self._remotes.links.idle(self._transport)

    def _is_stuck(self) -> bool:
        """Whether links fail: the device may have been replaced by one of the same name."""
        return self._remotes.links.tries(self._transport) > STUCK and self._may_open_again()

    def opening(self) -> None:
        """The relay opens the device."""
        self._opened_at = self._loop.now()
        self._fresh = True
        self._remotes.use(self._transport, OPENING)

    def opened(self, message: relay_wire.RelayOpened) -> None:
        """The relay has opened the device, or can't."""
        name = self._transport.value
        if message.error:
            why = message.text or os.strerror(message.error)
            if why != self.failure:
                log.error("relay can't open a transport", transport=name, reason=why)
            self.failure = why
            self._fresh = False
            self._remotes.use(self._transport, why)
            return
        self.failure = ""
        if self._fresh:
            opened = self._relay.opened(self.kind)
            device = "" if opened is None else opened.device
            log.info("transport open", transport=name, device=device, mtu=message.mtu)
            self._remotes.use(self._transport, "")
