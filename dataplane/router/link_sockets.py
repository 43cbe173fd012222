"""The TCP connections of links: the leader's router dials the follower's session port, and both
routers hand the connections to their relays.

A connection is nobody's until it has shown the ticket of a link that is being made with its peer;
the session listener bounds what it costs until then. A ticket is good for one link, once for each
of its connections, and as long as `Links` waits for them. Connections that are not used are closed.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from dataplane.router.library_wire import IPAddress
from dataplane.router.link_preamble import ACCEPTED, SOCKETS, Preamble, pack
from dataplane.router.loop import Loop
from dataplane.router.peer_wire import TICKET
from dataplane.router.session import PeerConnection
from dataplane.router.session_listener import plain_address
from dataplane.router.sessions import Sessions

_FAILED: Final = select.EPOLLHUP | select.EPOLLERR


class LinkUser(Protocol):
    """Is told from the loop what became of a link's sockets: `links.Links`."""

    def sockets_ready(self, number: int, descriptors: list[int]) -> None:
        """They are there, by index. They stay the caller's."""

    def sockets_failed(self, number: int, text: str) -> None:
        """They can't be made."""


@dataclass(slots=True, eq=False)
class _Making:
    """The sockets of one link while it is made."""

    peer: IPAddress
    ticket: bytes
    sockets: dict[int, socket.socket] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    """Leader: the indices of those that the peer has accepted."""


class LinkSockets:
    """See the module. The `LinkSockets` of `link_table.py`."""

    def __init__(self, loop: Loop, sessions: Sessions, user: LinkUser) -> None:
        self._loop = loop
        self._sessions = sessions
        self._user = user
        self._dialled: dict[int, _Making] = {}
        self._expected: dict[int, _Making] = {}
        sessions.take_socket = self.arrived

    def cancel(self, number: int) -> None:
        """Close the sockets of a link that the relay doesn't have."""
        for making in (self._dialled.pop(number, None), self._expected.pop(number, None)):
            for one in making.sockets.values() if making is not None else ():
                self._loop.forget(one.fileno())
                one.close()

    # --- leader

    def dial(self, peer: IPAddress, number: int, ticket: bytes) -> None:
        """Dial the peer's router, from the address at which it has a session with this one."""
        self.cancel(number)
        making = self._dialled[number] = _Making(peer, ticket)
        session = self._sessions.session(peer)
        try:
            if session is None:
                raise OSError(errno.ENOTCONN, "there is no session")
            source = str(plain_address(session.local_address()))
            for index in range(SOCKETS):
                self._dial_one(number, making, index, source)
        except OSError as error:
            self._fail(number, making, error)

    def _dial_one(self, number: int, making: _Making, index: int, source: str) -> None:
        family = socket.AF_INET if making.peer.version == 4 else socket.AF_INET6
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        making.sockets[index] = made
        made.bind((source, 0))
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        port = self._sessions.listener.port
        error = made.connect_ex((str(making.peer), port))
        if error not in (0, errno.EINPROGRESS):
            raise OSError(error, os.strerror(error))
        step = self._guarded(number, making, partial(self._serve, number, making, index))
        self._loop.watch(made.fileno(), select.EPOLLOUT, step)

    def _guarded(
        self, number: int, making: _Making, serve: Callable[[int], None]
    ) -> Callable[[int], None]:
        def guarded(events: int) -> None:
            try:
                serve(events)
            except OSError as error:
                self._fail(number, making, error)

        return guarded

    def _serve(self, number: int, making: _Making, index: int, events: int) -> None:
        dialled = making.sockets[index]
        error = dialled.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        if events & select.EPOLLOUT:
            try:
                # A new connection's buffer has room for all of it.
                dialled.send(pack(Preamble(index, making.ticket)))
            except BlockingIOError:
                # The event was for another socket, which had this descriptor before.
                return
            self._loop.modify(dialled.fileno(), select.EPOLLIN)
        elif events & (select.EPOLLIN | _FAILED):
            try:
                answer = dialled.recv(1)
            except BlockingIOError:
                return
            if answer != ACCEPTED:
                raise OSError(errno.ECONNREFUSED, "the peer's router closed a connection")
            self._loop.forget(dialled.fileno())
            making.ready.add(index)
            if len(making.ready) == SOCKETS:
                self._done(self._dialled, number)

    def _fail(self, number: int, making: _Making, error: OSError) -> None:
        def tell() -> None:
            if self._dialled.get(number) is making:
                self.cancel(number)
                text = error.strerror or str(error)
                self._user.sockets_failed(number, f"TCP to the peer's router: {text}")

        self._loop.after(0, tell)

    # --- follower

    def expect(self, peer: IPAddress, number: int) -> bytes:
        """Wait for the peer's router to dial. The ticket that it has to show."""
        self.cancel(number)
        making = self._expected[number] = _Making(peer, secrets.token_bytes(TICKET))
        return making.ticket

    def arrived(self, connection: PeerConnection, preamble: Preamble) -> None:
        """An incoming connection has shown a ticket: take its socket, or end it."""
        known = (
            number
            for number, making in self._expected.items()
            if hmac.compare_digest(making.ticket, preamble.ticket)
            and making.peer == connection.peer
            and preamble.socket not in making.sockets
        )
        number = next(known, None)
        if number is None:
            connection.end("ticket", "it has no ticket for a link that is being made")
            return
        sockets = self._expected[number].sockets
        sockets[preamble.socket] = taken = connection.hand_over()
        with suppress(OSError):
            # An error shows again when the relay uses it.
            taken.send(ACCEPTED)
        if len(sockets) == SOCKETS:
            self._done(self._expected, number)

    def _done(self, makings: dict[int, _Making], number: int) -> None:
        making = makings[number]
        descriptors = [making.sockets[index].fileno() for index in range(SOCKETS)]
        self._user.sockets_ready(number, descriptors)
        self.cancel(number)
