"""One TLS connection to another router, from the first packet to its end; never waits.

    CONNECTING ─► SHAKING ─► GREETING ─► UP
         └───────────┴──────────┴────────┴──► OVER

The certificate is checked before a byte of the other side is looked at. Until its first message has come, a connection has a
deadline, and what it may cost is bounded: OpenSSL's own buffers and one frame. Whatever goes wrong ends it with a reason, told
from the loop and never from inside a call.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple, Protocol

import structlog

from dataplane.errors import NoIdentity, WrongMessage
from dataplane.router.identity import PROTOCOL, Certified, Identity, certified
from dataplane.router.loop import Loop
from dataplane.router.peer_wire import Frames, Hello, Message, pack
from dataplane.router.wire import IPAddress

log = structlog.get_logger()

DEADLINE: Final = 10.0
"""Seconds from the first packet to the first message."""
MOST_UNSENT: Final = 8 << 20
"""Bytes that wait for a peer; past them it is too slow to speak with."""
MANY_UNSENT: Final = 1 << 20
"""Past them it is better to wait with what can wait,"""
FEW_UNSENT: Final = 256 << 10
"""until there are no more than these."""
_AT_ONCE: Final = 8
"""TLS records read per event."""
_RECORD: Final = 1 << 14
_CHUNK: Final = 1 << 16


class State(Enum):
    """What is being waited for."""

    CONNECTING = "connecting"
    SHAKING = "shaking hands"
    GREETING = "waiting for the peer's first message"
    UP = "up"
    OVER = "over"


class Ending(NamedTuple):
    """Why a connection is over: a word for counts, a sentence for people."""

    word: str
    text: str


class Owner(Protocol):
    """Who is told."""

    def authenticated(self, connection: Connection) -> None:
        """The other side is a node of ours: `connection.node`."""

    def heard(self, connection: Connection, message: Message) -> None:
        """A message has come; the first is a Hello."""

    def eased(self, connection: Connection) -> None:
        """Much had been waiting to be sent, and little is now."""

    def over(self, connection: Connection, ending: Ending) -> None:
        """Once, as the last."""


class Connection:
    """Made by `dial` or `accept`. `send` and `end` may be called in any state."""

    def __init__(
        self, loop: Loop, owner: Owner, identity: Identity, peer: IPAddress, *, dialled: bool
    ) -> None:
        self.peer = peer
        self.dialled = dialled
        self.identity = identity
        self.state = State.CONNECTING
        self.node = ""
        self.expires = 0.0
        self.since = loop.now()
        """When it began, then when it came up."""
        self.silent = 0
        """Beats without a byte of the peer; counted by the owner."""
        self.said: Hello | None = None
        """What the owner has told of itself."""
        self.instance = ""
        self._loop = loop
        self._owner = owner
        self._socket: socket.socket | None = None
        self._tls: ssl.SSLSocket | None = None
        self._frames = Frames()
        self._unsent = bytearray()
        self._congested = False
        self._events = 0
        self._deadline = loop.after(DEADLINE, self._late)

    # --- how it begins

    def dial(self, port: int, source: IPAddress | None) -> None:
        """Connect to the peer."""
        family = socket.AF_INET if self.peer.version == 4 else socket.AF_INET6
        try:
            made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._socket = made
            if source is not None and source.version == self.peer.version:
                made.bind((str(source), 0))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = made.connect_ex((str(self.peer), port))
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, os.strerror(number))
        except OSError as error:
            self.end("unreachable", f"can't be reached: {error.strerror or error}")
            return
        self._watch(select.EPOLLOUT)

    def accept(self, accepted: socket.socket) -> None:
        """Take over a connection that the peer has opened."""
        self._socket = accepted
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._wrap(accepted)
        except OSError as error:
            self.end("tls", _said(error))
            return
        self._watch(select.EPOLLIN)

    def _wrap(self, plain: socket.socket) -> None:
        context = self.identity.client if self.dialled else self.identity.server
        self._tls = context.wrap_socket(
            plain, server_side=not self.dialled, do_handshake_on_connect=False
        )
        self._socket = self._tls
        self.state = State.SHAKING

    # --- what others ask for

    def send(self, message: Message) -> bool:
        """Send, now or as soon as the peer takes it; false if it won't be. A slow peer loses its connection."""
        if self.state not in (State.GREETING, State.UP):
            return False
        data = pack(message)
        if len(self._unsent) + len(data) > MOST_UNSENT:
            self.end("slow", "doesn't take what it is sent")
            return False
        idle = not self._unsent
        self._unsent += data
        self._congested = self._congested or len(self._unsent) > MANY_UNSENT
        if idle:
            self._flush()
        return not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether it has ended; the owner may not have heard of it yet."""
        return self.state is State.OVER

    @property
    def congested(self) -> bool:
        """Whether so much waits to be sent that more should wait elsewhere; `Owner.eased` tells the end of it."""
        return self._congested

    def came_up(self, instance: str) -> None:
        """The owner has taken it for a session."""
        self._deadline.cancel()
        self.state = State.UP
        self.instance = instance
        self.since = self._loop.now()

    def end(self, word: str, text: str) -> None:
        """Close it; the owner hears of it from the loop."""
        if self.is_over:
            return
        self.state = State.OVER
        self._deadline.cancel()
        self._unsent.clear()
        if self._socket is not None:
            self._loop.forget(self._socket.fileno())
            # Not a word of farewell: it could have to wait.
            self._socket.close()
        ending = Ending(word, text)
        self._loop.after(0, lambda: self._owner.over(self, ending))

    # --- the loop

    def _watch(self, events: int) -> None:
        assert self._socket is not None
        self._events = events
        self._loop.watch(self._socket.fileno(), events, self._guarded)

    def _want(self, events: int) -> None:
        if events != self._events and not self.is_over and self._socket is not None:
            self._events = events
            self._loop.modify(self._socket.fileno(), events)

    def _late(self) -> None:
        self.end("silent", f"no session within {DEADLINE:g} s: {self.state.value}")

    def _guarded(self, events: int) -> None:
        self._guard(lambda: self._serve(events))

    def _guard(self, do: Callable[[], None]) -> None:
        """What the other side does can end its connection, and nothing else."""
        try:
            do()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (ssl.SSLCertVerificationError, NoIdentity) as error:
            self.end("certificate", _said(error))
        except ssl.SSLError as error:
            self.end("tls", _said(error))
        except OSError as error:
            word, text = _LOST[self.state]
            if error.errno in (errno.ECONNRESET, errno.EPIPE) and self.state is State.CONNECTING:
                text = _HUNG_UP
            self.end(word, f"{text}: {error.strerror or error}")
        except WrongMessage as error:
            self.end("protocol", str(error))
        except Exception:
            # A bug of ours costs one session, not all.
            log.exception("a bug in the router", peer=str(self.peer))
            self.end("bug", "a bug of this host's router; see its log")

    def _serve(self, events: int) -> None:
        if self.state is State.CONNECTING and not self._connected():
            return
        if self.state is State.SHAKING and not self._shaken():
            return
        if events & select.EPOLLOUT:
            self._write()
        if self.state in (State.GREETING, State.UP):
            self._read()

    def _connected(self) -> bool:
        plain = self._socket
        assert plain is not None
        number = plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        try:
            plain.getpeername()
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                # Not our event.
                return False
            raise
        self._loop.forget(plain.fileno())
        # The descriptor goes over to the wrapped socket.
        self._socket = None
        try:
            self._wrap(plain)
        except BaseException:
            plain.close()
            raise
        self._watch(select.EPOLLIN | select.EPOLLOUT)
        return True

    def _shaken(self) -> bool:
        tls = self._tls
        assert tls is not None
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._want(select.EPOLLIN)
            return False
        except ssl.SSLWantWriteError:
            self._want(select.EPOLLIN | select.EPOLLOUT)
            return False
        if tls.selected_alpn_protocol() != PROTOCOL:
            raise WrongMessage(f"it speaks another protocol than {PROTOCOL}")
        try:
            found: Certified = certified(tls.getpeercert())
        except ValueError as error:
            raise NoIdentity(str(error)) from error
        self.identity.check(found)
        self.node = found.node
        self.expires = found.expires
        self.state = State.GREETING
        self._want(select.EPOLLIN)
        self._owner.authenticated(self)
        return True

    def _read(self) -> None:
        tls = self._tls
        assert tls is not None
        for _ in range(_AT_ONCE):
            try:
                data = tls.recv(_CHUNK)
            except ssl.SSLWantWriteError:
                # TLS has something of its own to say.
                self._want(select.EPOLLIN | select.EPOLLOUT)
                return
            if not data:
                raise OSError(errno.ECONNRESET, "closed by the peer")
            self.silent = 0
            for message in self._frames.feed(data):
                self._owner.heard(self, message)
                if self.is_over:
                    return

    def _flush(self) -> None:
        self._guard(self._write)

    def _write(self) -> None:
        tls = self._tls
        if tls is None or self.state not in (State.GREETING, State.UP):
            return
        try:
            while self._unsent:
                # Nothing may view the buffer when bytes are taken off it.
                sent = tls.send(bytes(self._unsent[:_RECORD]))
                del self._unsent[:sent]
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._want(select.EPOLLIN | select.EPOLLOUT)
        else:
            self._want(select.EPOLLIN)
        if self._congested and len(self._unsent) <= FEW_UNSENT:
            self._congested = False
            self._loop.after(0, self._ease)

    def _ease(self) -> None:
        if self.state is State.UP and not self._congested:
            self._guard(lambda: self._owner.eased(self))


_HUNG_UP: Final = (
    "the peer hung up before it said a word: it may not share a network with this host"
)
_LOST: Final = {
    State.CONNECTING: ("unreachable", "can't be reached"),
    State.SHAKING: ("tls", _HUNG_UP),
    State.GREETING: ("tls", _HUNG_UP),
    State.UP: ("lost", "the connection is lost"),
    State.OVER: ("lost", "the connection is lost"),
}
# What OpenSSL calls an alert of the other side, in words that say whose fault it is.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "the peer wants a certificate",
    "UNKNOWN_CA": "the peer doesn't trust this host's certificate: is it in the same Swarm?",
    "CERTIFICATE_EXPIRED": "the peer takes this host's certificate for expired: compare the clocks",
    "BAD_CERTIFICATE": "the peer doesn't take this host's certificate",
}


def _said(error: Exception) -> str:
    """OpenSSL's errors without the line numbers of its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate isn't good: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return _HUNG_UP
    if isinstance(error, ssl.SSLError):
        name = error.reason or ""
        for alert, text in _ALERTS.items():
            if name.endswith(f"ALERT_{alert}"):
                return text
        return f"TLS failed: {name.lower().replace('_', ' ') or 'for no reason that it tells'}"
    return str(error)
