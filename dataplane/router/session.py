"""One connection to another router, from the first packet to its end. It never waits.

    CONNECTING ─► HANDSHAKE ─► GREETING ─► UP
         └────────────┴───────────┴────────┴──► OVER

The peer's certificate is checked before any of its messages is read. Until its first message has
come, a connection has a deadline, and what it may cost is bounded: OpenSSL's own buffers and one
frame. A handshake costs milliseconds, so an incoming one begins only when a complete ClientHello is
there and the owner allows it. An incoming connection that begins with the preamble of a link
(`link_preamble.py`) never becomes a session. A session has a share of the loop's time: a peer that
needs more is read more slowly, and TCP makes it wait. Every error ends the connection with a
reason. The owner is told from the loop, never from inside a call.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from typing import Final, NamedTuple, Protocol

import structlog

from dataplane.errors import NoIdentity, WrongMessage
from dataplane.router import link_preamble
from dataplane.router.library_wire import IPAddress
from dataplane.router.limits import Share
from dataplane.router.link_preamble import Preamble
from dataplane.router.loop import Loop, Timer
from dataplane.router.node_identity import Identity
from dataplane.router.peer_wire import Frames, Message, PeerHello, pack
from dataplane.router.tls_stream import TlsStream, describe, has_client_hello

log = structlog.get_logger()

DEADLINE: Final = 10.0
"""Seconds from the first packet to the first message."""
OPENING: Final = 2.0
"""Seconds from an incoming connection's first packet to its complete ClientHello."""
SHARE: Final = 0.25
"""Share of the processor for the messages of one peer,"""
BURST: Final = 0.5
"""and seconds of work that it may cause at once, if it has been quiet before."""
TURN: Final = 0.005
"""Seconds of work after which everybody else is served before more of this peer."""
MOST_UNSENT: Final = 8 << 20
"""Bytes that wait for a peer. A peer with more is too slow and loses its session."""
MANY_UNSENT: Final = 1 << 20
"""Bytes from which on a session is congested: what can wait should wait,"""
FEW_UNSENT: Final = 256 << 10
"""until no more than these are left."""
_CHUNK: Final = 1 << 16
"""Bytes read per event: the event comes again if there are more."""
_MOST_AT_ONCE: Final = 1 << 18


class SessionState(Enum):
    """What the connection waits for."""

    CONNECTING = "connecting"
    HANDSHAKE = "shaking hands"
    GREETING = "waiting for the peer's first message"
    UP = "up"
    OVER = "over"


class Ending(NamedTuple):
    """Why a connection is over: a word for counts, a sentence for people."""

    word: str
    text: str


class SessionOwner(Protocol):
    """The owner of connections hears what happens to them."""

    def opened(self, connection: PeerConnection) -> bool:
        """An incoming connection has sent a complete ClientHello. May its handshake begin?"""

    def showed_ticket(self, connection: PeerConnection, preamble: Preamble) -> None:
        """An incoming connection is for a link: take its socket (`hand_over`), or end it."""

    def authenticated(self, connection: PeerConnection) -> None:
        """The peer's certificate is that of a node: `connection.node`."""

    def heard(self, connection: PeerConnection, message: Message) -> None:
        """A message has come; the first is a Hello."""

    def eased(self, connection: PeerConnection) -> None:
        """The connection was congested and is no longer."""

    def over(self, connection: PeerConnection, ending: Ending) -> None:
        """The connection is over. Comes once, after everything else."""


class PeerConnection:
    """Made by `dial` or `accept`. `send` and `end` may be called in any state."""

    def __init__(
        self, loop: Loop, owner: SessionOwner, identity: Identity, peer: IPAddress, *, dialled: bool
    ) -> None:
        self.peer = peer
        self.dialled = dialled
        self.identity = identity
        self.state = SessionState.CONNECTING
        self.node = ""
        self.expires = 0.0
        self.since = loop.now()
        """When it began; once it is up, when it came up."""
        self.silent = 0
        """Ticks without a byte of the peer; counted by the owner."""
        self.said: PeerHello | None = None
        """The last Hello that the owner has sent."""
        self.instance = ""
        self._loop = loop
        self._owner = owner
        self._socket: socket.socket | None = None
        context = identity.client if dialled else identity.server
        self._tls = TlsStream(context, server_side=not dialled)
        self._opening: bytearray | None = None if dialled else bytearray()
        """An incoming connection's first record, until it is complete."""
        self._frames = Frames()
        self._heard: Iterator[Message] = iter(())
        """Messages that have come and were not handed over yet."""
        self._share = Share.full(SHARE, BURST, loop.now())
        self._resting: Timer | None = None
        """Runs while the peer is not read, since it has used up its share."""
        self._unsent = bytearray()
        """Encrypted bytes."""
        self._congested = False
        self._events = 0
        self._deadline = loop.after(DEADLINE if dialled else OPENING, self._late)

    # --- how it begins

    def dial(self, port: int, source: IPAddress | None) -> None:
        """Connect to the peer, from an address of this host."""
        family = socket.AF_INET if self.peer.version == 4 else socket.AF_INET6
        try:
            made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._socket = made
            if source is not None and source.version == self.peer.version:
                try:
                    made.bind((str(source), 0))
                except OSError as error:
                    self.end("refused", f"{source} can't be dialled from: {error.strerror}")
                    return
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = made.connect_ex((str(self.peer), port))
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, os.strerror(number))
            self._watch(select.EPOLLOUT)
        except OSError as error:
            self.end("unreachable", f"can't be reached: {error.strerror or error}")

    def accept(self, accepted: socket.socket) -> None:
        """Take over a connection that the peer has opened."""
        self._socket = accepted
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.state = SessionState.HANDSHAKE
            self._watch(select.EPOLLIN)
        except OSError as error:
            self.end("lost", f"the connection is lost: {error.strerror}")

    # --- for the owner

    def send(self, message: Message) -> bool:
        """Send, now or as soon as the peer takes it; false if that can't be.

        A peer that takes too little loses its connection.
        """
        if self.state not in (SessionState.GREETING, SessionState.UP):
            return False
        data = pack(message)
        if len(self._unsent) + len(data) > MOST_UNSENT:
            self.end("slow", "doesn't read what it is sent")
            return False
        self._guard(lambda: self._encrypt(data))
        return not self.is_over

    def _encrypt(self, data: bytes) -> None:
        self._tls.write(data)
        self._flush()

    @property
    def is_over(self) -> bool:
        """Whether it has ended; the owner may not have been told yet."""
        return self.state is SessionState.OVER

    @property
    def congested(self) -> bool:
        """Whether so much waits to be sent that more should wait elsewhere, until `eased`."""
        return self._congested

    @property
    def has_opened(self) -> bool:
        """Whether the peer has sent a complete ClientHello. The preamble of a link never counts."""
        return self._opening is None

    @property
    def is_resting(self) -> bool:
        """Whether the peer is not read, since it has used up its share of this router's time."""
        return self._resting is not None

    def local_address(self) -> str:
        """This host's address of the connection.

        Raises:
            OSError: it is not connected.
        """
        if self._socket is None:
            raise OSError(errno.ENOTCONN, "not connected")
        return str(self._socket.getsockname()[0])

    def hand_over(self) -> socket.socket:
        """End it without closing its socket, which is the caller's. Only for `showed_ticket`."""
        taken = self._socket
        assert taken is not None
        self._loop.forget(taken.fileno())
        self._socket = None
        self.end("link", "it is a link's")
        return taken

    def came_up(self, instance: str) -> None:
        """The owner has made it the session with its peer."""
        self._deadline.cancel()
        self.state = SessionState.UP
        self.instance = instance
        self.since = self._loop.now()

    def end(self, word: str, text: str) -> None:
        """Close it. The owner is told from the loop."""
        if self.is_over:
            return
        self.state = SessionState.OVER
        self._deadline.cancel()
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        self._unsent.clear()
        if self._socket is not None:
            self._loop.forget(self._socket.fileno())
            # Without close_notify, which might have to wait.
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
        seconds = DEADLINE if self.has_opened else OPENING
        self.end("silent", f"no session within {seconds:g} s: {self.state.value}")

    def _guarded(self, events: int) -> None:
        self._guard(lambda: self._serve(events))

    def _guard(self, do: Callable[[], None]) -> None:
        """Whatever the peer does can end its own connection, and nothing else."""
        try:
            do()
        except (ssl.SSLCertVerificationError, NoIdentity) as error:
            self.end("certificate", describe(error))
        except ssl.SSLError as error:
            self.end("tls", describe(error))
        except OSError as error:
            word, text = _LOST[self.state]
            if error.errno == errno.ECONNRESET and self.state is SessionState.CONNECTING:
                word, text = _LOST[SessionState.HANDSHAKE]
            self.end(word, f"{text}: {error.strerror or error}")
        except WrongMessage as error:
            self.end("protocol", str(error))
        except Exception:
            # A bug of ours costs one session, not all.
            log.exception("a bug in the router", peer=str(self.peer))
            self.end("bug", "a bug of this host's router; see its log")

    def _serve(self, events: int) -> None:
        if self.state is SessionState.CONNECTING:
            if not self._connected():
                return
            self.state = SessionState.HANDSHAKE
            self._shake_hands()
        if events & select.EPOLLOUT:
            self._flush()
        if self.is_resting:
            if events & (select.EPOLLHUP | select.EPOLLERR):
                raise OSError(errno.ECONNRESET, "closed by the peer")
        elif events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
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
                # The event was for an earlier socket of this number.
                return False
            raise
        return True

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        if not data:
            raise OSError(errno.ECONNRESET, "closed by the peer")
        self.silent = 0
        if self._opening is not None:
            self._opening += data
            if link_preamble.begins(self._opening):
                preamble = link_preamble.parse(self._opening)
                if preamble is not None:
                    self._owner.showed_ticket(self, preamble)
                return
            if not has_client_hello(self._opening) or not self._owner.opened(self):
                return
            data, self._opening = bytes(self._opening), None
            self._deadline.cancel()
            self._deadline = self._loop.after(DEADLINE, self._late)
        self._tls.feed(data)
        if self.state is SessionState.HANDSHAKE:
            self._shake_hands()
        if self.state in (SessionState.GREETING, SessionState.UP):
            self._hear()

    def _shake_hands(self) -> None:
        try:
            done = self._tls.shake_hands()
        except ssl.SSLError:
            with suppress(OSError):
                # The alert that tells the peer.
                self._flush()
            raise
        self._flush()
        if not done:
            return
        peer = self._tls.peer()
        self.identity.check(peer)
        self.node = peer.node
        self.expires = peer.expires
        self.state = SessionState.GREETING
        self._owner.authenticated(self)

    def _hear(self) -> None:
        """Hand over all complete messages that have come, as far as the peer's share allows."""
        begun = time.thread_time()
        while not self.is_over:
            for message in self._heard:
                self._owner.heard(self, message)
                if self.is_over:
                    return
                spent = time.thread_time() - begun
                if spent >= TURN:
                    self._rest(spent)
                    return
            data = self._tls.read(_CHUNK)
            if data is None:
                break
            if not data:
                raise OSError(errno.ECONNRESET, "closed by the peer")
            self._heard = self._frames.feed(data)
        self._share.spend(time.thread_time() - begun, self._loop.now())
        # TLS may have something of its own to send.
        self._flush()

    def _rest(self, spent: float) -> None:
        """Go on with the peer in the next round of the loop, or when its share allows it."""
        self._share.spend(spent, self._loop.now())
        self._resting = self._loop.after(self._share.pause(TURN), lambda: self._guard(self._go_on))
        self._flush()

    def _go_on(self) -> None:
        self._resting = None
        self.silent = 0
        self._hear()
        self._flush()

    def _flush(self) -> None:
        if self.is_over or self._socket is None:
            return
        self._unsent += self._tls.take()
        try:
            while self._unsent:
                # A copy: no view of the buffer may exist when bytes are removed from it.
                sent = self._socket.send(bytes(self._unsent[:_MOST_AT_ONCE]))
                del self._unsent[:sent]
        except BlockingIOError:
            pass
        waiting = len(self._unsent)
        if waiting > MOST_UNSENT + _CHUNK:
            self.end("slow", "doesn't read what it is sent")
            return
        self._want((0 if self.is_resting else select.EPOLLIN) | (select.EPOLLOUT if waiting else 0))
        if waiting > MANY_UNSENT:
            self._congested = True
        elif self._congested and waiting <= FEW_UNSENT:
            self._congested = False
            self._loop.after(0, self._ease)

    def _ease(self) -> None:
        if self.state is SessionState.UP and not self._congested:
            self._guard(lambda: self._owner.eased(self))


_HUNG_UP: Final = (
    "the peer closed the connection before its first message: it may not share a network with "
    "this host"
)
_LOST: Final = {
    SessionState.CONNECTING: ("unreachable", "can't be reached"),
    SessionState.HANDSHAKE: ("refused", _HUNG_UP),
    SessionState.GREETING: ("refused", _HUNG_UP),
    SessionState.UP: ("lost", "the connection is lost"),
    SessionState.OVER: ("lost", "the connection is lost"),
}
