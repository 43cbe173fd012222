"""Incoming connections of other routers, until they are sessions.

Only addresses of hosts that share a network with this one may connect. What they may cost before
they have shown a certificate is bounded, per address and altogether.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

import structlog

from dataplane.router.library_wire import IPAddress
from dataplane.router.limits import Bucket
from dataplane.router.loop import Loop, Timer
from dataplane.router.node_identity import Identity
from dataplane.router.session import PeerConnection, SessionOwner

log = structlog.get_logger()

UNAUTHENTICATED: Final = 64
UNAUTHENTICATED_EACH: Final = 16
"""Incoming connections that are no session yet, altogether and of one address. A new one takes the
place of the oldest that has not sent a ClientHello, or whose handshake is slow. So clients that
share a host's address can't keep that host out by sending nothing."""
SLOW: Final = 2.0
"""Seconds after which a handshake is slow."""
HANDSHAKES: Final = 16.0
"""Handshakes that begin per second with one address, and as many at once. Each costs some
milliseconds."""
ACCEPT_PAUSE: Final = 1.0
"""Seconds without accepting after the router ran out of descriptors."""
_AT_ONCE: Final = 32
_BACKLOG: Final = 128
_RESET: Final = struct.pack("ii", 1, 0)
"""struct linger: closing resets the connection."""
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


@dataclass(slots=True)
class Source:
    """The incoming connections of one address that are no session yet."""

    bucket: Bucket
    connections: dict[PeerConnection, None] = field(default_factory=dict)
    """The oldest first."""


class SessionListener:
    """The session port, and the connections to it."""

    def __init__(
        self,
        loop: Loop,
        owner: SessionOwner,
        is_peer: Callable[[IPAddress], bool],
        *,
        port: int,
        bind: str,
        ended: Counter[str],
    ) -> None:
        """`is_peer`: whether a host of this address shares a network with this one.

        `ended`: connections by the word of their end, to which the listener adds.
        """
        self._loop = loop
        self._owner = owner
        self._is_peer = is_peer
        self._bind = bind
        self._ended = ended
        self._identity: Identity | None = None
        self._socket: socket.socket | None = None
        self._paused: Timer | None = None
        self.port = port
        self.reason = ""
        """Why the port can't be listened on; "" if it can."""
        self.sources: dict[IPAddress, Source] = {}
        self.accepted = 0

    def open(self, identity: Identity) -> None:
        """Listen, unless it does already; connections are accepted with this identity."""
        self._identity = identity
        if self._socket is not None:
            return
        try:
            self._socket = _listen(self._bind, self.port)
        except OSError as error:
            reason = (
                f"TCP port {self.port} can't be listened on: {error.strerror or error}; "
                "see SESSION_PORT"
            )
            if reason != self.reason:
                log.error("sessions can't be accepted", reason=reason)
            self.reason = reason
            return
        self.reason = ""
        self._loop.watch(self._socket.fileno(), select.EPOLLIN, lambda _: self._accept())

    def close(self) -> None:
        """Stop listening. Accepted connections stay."""
        self.reason = ""
        if self._paused is not None:
            self._paused.cancel()
        if self._socket is not None:
            self._loop.forget(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # --- accepting

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if self._socket is None:
                return
            try:
                accepted, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR:
                    log.error("no descriptor for a session", reason=error.strerror)
                    self._loop.modify(self._socket.fileno(), 0)
                    self._paused = self._loop.after(ACCEPT_PAUSE, self._accept_again)
                    return
                continue
            self._admit(accepted, str(address[0]))

    def _accept_again(self) -> None:
        if self._socket is not None:
            self._loop.modify(self._socket.fileno(), select.EPOLLIN)

    def _admit(self, accepted: socket.socket, text: str) -> None:
        address = plain_address(text)
        if not self._is_peer(address):
            word = "foreign"
        else:
            word = "" if self._has_room(address) else "limit"
        if word:
            self._ended[word] += 1
            # A reset, so that neither host keeps state of the connection.
            with suppress(OSError):
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            accepted.close()
            return
        assert self._identity is not None
        self.accepted += 1
        connection = PeerConnection(self._loop, self._owner, self._identity, address, dialled=False)
        self.sources[address].connections[connection] = None
        connection.accept(accepted)

    def _has_room(self, address: IPAddress) -> bool:
        """Whether one more connection may come, in place of an older one if need be."""
        now = self._loop.now()
        source = self.sources.get(address)
        if source is None:
            source = self.sources[address] = Source(Bucket.full(HANDSHAKES, now))
        if len(source.connections) >= UNAUTHENTICATED_EACH:
            return self._make_room(source, now)
        if sum(len(other.connections) for other in self.sources.values()) >= UNAUTHENTICATED:
            most = max(self.sources.values(), key=lambda other: len(other.connections))
            return self._make_room(most, now)
        return True

    def _make_room(self, source: Source, now: float) -> bool:
        """End the oldest connection that has sent nothing, or whose handshake is slow."""
        silent = (each for each in source.connections if not each.has_opened)
        slow = (each for each in source.connections if now - each.since > SLOW)
        oldest = next(silent, None) or next(slow, None)
        if oldest is None:
            return False
        # The owner hears of its end later; its place is free now.
        del source.connections[oldest]
        oldest.end("limit", "later connections of its address took its place")
        return True

    # --- accepted connections

    def connections(self) -> Iterable[PeerConnection]:
        """All accepted connections that are no session yet."""
        return [each for source in self.sources.values() for each in source.connections]

    def connections_of(self, address: IPAddress) -> Iterable[PeerConnection]:
        """Those of one address."""
        source = self.sources.get(address)
        return [] if source is None else list(source.connections)

    def may_handshake(self, connection: PeerConnection) -> bool:
        """Whether a connection's handshake may begin. If not, the connection ends."""
        source = self.sources.get(connection.peer)
        if source is None or source.bucket.take(self._loop.now(), HANDSHAKES):
            return True
        connection.end("rate", f"more than {HANDSHAKES:g} handshakes per second of its address")
        return False

    def release(self, connection: PeerConnection) -> None:
        """A connection is a session now, or over."""
        source = self.sources.get(connection.peer)
        if source is not None:
            source.connections.pop(connection, None)

    def tick(self) -> None:
        """Forget addresses that have no connections and have used no handshake for a while."""
        now = self._loop.now()
        for address, source in list(self.sources.items()):
            if not source.connections and source.bucket.full_by(now, HANDSHAKES):
                del self.sources[address]


def plain_address(text: str) -> IPAddress:
    """An address as `Sessions.want` has it: IPv4-mapped IPv6 addresses are IPv4."""
    ip = ip_address(text)
    if ip.version == 6 and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def _listen(bind: str, port: int) -> socket.socket:
    """A listening socket of both address families, where the kernel has both."""
    family = socket.AF_INET6 if not bind or ":" in bind else socket.AF_INET
    try:
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        if bind or error.errno != errno.EAFNOSUPPORT:
            raise
        family = socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            made.bind((bind, port))
        except OSError as error:
            if bind or family != socket.AF_INET6 or error.errno != errno.EADDRNOTAVAIL:
                raise
            # The kernel has IPv6, but it is turned off.
            made.close()
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("", port))
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made
