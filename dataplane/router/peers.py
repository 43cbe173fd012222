"""Sessions with the routers of other hosts: at most one for each peer's address, come back by themselves.

Both hosts may dial. The one with the smaller node ID chooses: the other says Hello as soon as it trusts the certificate, the
chooser only on the connection that it takes; so both always mean the same one. Only the addresses of hosts that share a
network with this one are dialled or let in, and what they may cost before they have shown a certificate is bounded.
"""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, Protocol

import msgspec
import structlog

from dataplane.errors import WrongMessage
from dataplane.router.identities import Identities
from dataplane.router.library_wire import IPAddress
from dataplane.router.limits import Bucket
from dataplane.router.loop import Loop, Timer
from dataplane.router.node_identity import Identity
from dataplane.router.peer_wire import PEER_VERSION, Message, PeerHello, PeerPing, PeerPong, ip_of
from dataplane.router.session import DEADLINE, Ending, PeerConnection

log = structlog.get_logger()

BEAT: Final = 1.0
SILENCE: Final = 5
"""Beats without a word of the peer after which a session is dead. Beats, not seconds: a router that was stopped for a while
reads first what has come, and judges then."""
LEAST_PAUSE: Final = 1.0
MOST_PAUSE: Final = 30.0
"""Seconds between two dials of a peer, doubled each time."""
LASTS: Final = 10.0
"""Seconds after which a session counts as good: its loss is no failed dial."""
COURTESY: Final = 1.0
"""Seconds that the host of the greater address leaves to the other, so that not both dial."""
STRANGERS: Final = 64
STRANGERS_EACH: Final = 16
"""Incoming connections without a session, altogether and of one address. A newcomer takes the place of the oldest that hasn't
sent a ClientHello, or whose handshake is slow. So those who share a host's address can't keep the host out by saying nothing."""
SLOW: Final = 2.0
"""Seconds after which a handshake is slow."""
HANDSHAKES: Final = 16.0
"""Handshakes that begin per second with one address, and as many at once. Each costs some milliseconds."""
_AT_ONCE: Final = 32
_BACKLOG: Final = 128
_TELLING: Final = ("certificate", "protocol", "bug")
"""What an incoming connection that came to nothing tells of its peer; the rest may be anybody's."""
_RESET: Final = struct.pack("ii", 1, 0)


class SessionUser(Protocol):
    """Who needs the sessions. It's called from the loop, never from inside a call to `Sessions`."""

    def up(self, peer: IPAddress, hello: PeerHello) -> None:
        """There is a session. The node is the certificate's; the rest is the peer's word."""

    def down(self, peer: IPAddress, reason: str) -> None:
        """It's gone: once for each `up`. What was sent last may not have arrived."""

    def message(self, peer: IPAddress, message: Message) -> None:
        """Something was said; a Hello if `data_path` or `rdma` has changed. WrongMessage ends the session."""

    def eased(self, peer: IPAddress) -> None:
        """The session was congested and isn't any more."""


class SessionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start, unless they say now."""

    up: int
    """Now."""
    dialled: int
    accepted: int
    begun: int
    """Sessions that came up."""
    ended: dict[str, int]
    """Connections that are over, by word."""


@dataclass(slots=True, eq=False)
class _Peer:
    address: IPAddress
    pause: float = LEAST_PAUSE
    session: PeerConnection | None = None
    hello: PeerHello | None = None
    told: bool = False
    """Whether the user has heard of the session."""
    dialled: PeerConnection | None = None
    any_source: bool = False
    """Whether the next dial leaves it to the kernel from which of this host's addresses it goes out."""
    timer: Timer | None = None
    """The next dial."""
    reason: str = "not dialled yet"


@dataclass(slots=True)
class _Source:
    """What comes from one address without being a session."""

    bucket: Bucket
    strangers: dict[PeerConnection, None] = field(default_factory=dict)
    """The oldest first."""


class Sessions:
    """See the module. `start` it, tell it whom to `want`, and `introduce` this host."""

    def __init__(
        self,
        loop: Loop,
        identities: Identities,
        user: SessionUser,
        *,
        instance: str,
        port: int,
        build: str = "",
        bind: str = "",
        wall: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._loop = loop
        self._identities = identities
        self._user = user
        self._port = port
        self._bind = bind
        self._wall = wall
        self._jitter = jitter
        self._said = PeerHello(instance=instance, node="0", data_path="", rdma=False, build=build)
        self._identity: Identity | None = None
        self._source: IPAddress | None = None
        self._peers: dict[IPAddress, _Peer] = {}
        self._sources: dict[IPAddress, _Source] = {}
        self._listener: socket.socket | None = None
        self._not_listening = ""
        self._paused: Timer | None = None
        self._beat: Timer | None = None
        self._dialled = self._accepted = self._begun = 0
        self._ended: Counter[str] = Counter()

    # --- what the user says

    def start(self) -> None:
        """Read the identity, and begin to beat."""
        self._tick()

    def introduce(self, *, data_path: str, rdma: bool, ring: int = 0) -> None:
        """What peers are told of this host from now on, those of running sessions too."""
        said = msgspec.structs.replace(self._said, data_path=data_path, rdma=rdma, ring=ring)
        if said == self._said:
            return
        self._said = said
        for peer in self._peers.values():
            if peer.session is not None:
                self._say_hello(peer.session)

    def want(self, peers: Set[IPAddress], source: IPAddress | None = None) -> None:
        """The addresses with which there shall be sessions: all of them, each time. `source`: this host's own among them."""
        self._source = source
        for address in [each for each in self._peers if each not in peers]:
            self._forget(self._peers.pop(address))
        for address in peers:
            if address not in self._peers and address != source:
                peer = self._peers[address] = _Peer(address)
                self._dial_in(peer, self._courtesy(address))
        self._listen_or_not()

    def listen(self, port: int) -> None:
        """Another port, of all hosts."""
        if port != self._port:
            self._port = port
            self._stop_listening()
            self._listen_or_not()

    def use(self, identities: Identities) -> None:
        """Another origin of identities."""
        self._identities = identities
        self._recognise()

    def send(self, peer: IPAddress, message: Message) -> bool:
        """Whether it's on its way. False: there is no session, or it's lost by this (`down` comes then), or it's too long."""
        session = self.session(peer)
        if session is None:
            return False
        try:
            return session.send(message)
        except WrongMessage as error:
            log.error("a message can't be sent", peer=str(peer), reason=str(error))
            return False

    def drop(self, peer: IPAddress, reason: str) -> None:
        """End a session whose peer talks nonsense."""
        session = self.session(peer)
        if session is not None:
            session.end("protocol", reason)

    def close(self) -> None:
        """End all. Nobody is told."""
        self._stop_listening()
        for timer in (self._beat, self._paused):
            if timer is not None:
                timer.cancel()
        for peer in self._peers.values():
            peer.told = False
            if peer.timer is not None:
                peer.timer.cancel()
        for connection in self._connections():
            connection.end("local", "this host's router ends")
        self._peers.clear()

    # --- what the user asks

    @property
    def node(self) -> str:
        """This host's node ID; "" without an identity."""
        return "" if self._identity is None else self._identity.own.node

    @property
    def instance(self) -> str:
        """This router's."""
        return self._said.instance

    @property
    def reason(self) -> str:
        """Why there are no sessions at all; "" if there may be."""
        if self._identity is None:
            return self._identities.reason or "the identity isn't read yet"
        return self._not_listening

    def session(self, peer: IPAddress) -> PeerConnection | None:
        """The session with a peer, if one is up."""
        found = self._peers.get(peer)
        session = None if found is None else found.session
        return None if session is None or session.is_over else session

    def hello(self, peer: IPAddress) -> PeerHello | None:
        """What a peer with a session has told of itself."""
        return None if self.session(peer) is None else self._peers[peer].hello

    def congested(self, peer: IPAddress) -> bool:
        """Whether what can wait should: `SessionUser.eased` tells when not any more."""
        session = self.session(peer)
        return session is not None and session.congested

    def reasons(self) -> dict[IPAddress, str]:
        """The wanted peers, and for each why there is no session with it; "" if there is one."""
        return {
            address: "" if self.session(address) is not None else self.reason or peer.reason
            for address, peer in self._peers.items()
        }

    def counts(self) -> SessionCounts:
        """For statistics."""
        return SessionCounts(
            up=sum(self.session(address) is not None for address in self._peers),
            dialled=self._dialled,
            accepted=self._accepted,
            begun=self._begun,
            ended=dict(self._ended),
        )

    # --- each second

    def _tick(self) -> None:
        self._beat = self._loop.after(BEAT, self._tick)
        self._recognise()
        self._listen_or_not()
        now = self._wall()
        for peer in list(self._peers.values()):
            session = peer.session
            if session is None or session.is_over:
                continue
            session.silent += not session.is_resting
            if session.silent > SILENCE:
                session.end("silent", f"nothing was heard for {SILENCE * BEAT:g} s")
            elif now >= session.expires:
                session.end("certificate", "the peer's certificate has expired")
            else:
                session.send(PeerPing())
        self._forget_sources()

    def _recognise(self) -> None:
        """Take over what has become of this host's identity; sessions of another one end, and are dialled anew."""
        identity = self._identities.look()
        if identity is self._identity:
            return
        self._identity = identity
        text = "this host's certificate has changed" if identity else self._identities.reason
        for connection in self._connections():
            connection.end("identity", text)
        if identity is None:
            log.warning("no sessions with other hosts", reason=self._identities.reason)
            self._stop_listening()
            return
        log.info("sessions with other hosts", node=identity.own.node, role=identity.own.role)
        self._said = msgspec.structs.replace(self._said, node=identity.own.node)
        for peer in self._peers.values():
            peer.pause = LEAST_PAUSE
            self._dial_in(peer, self._courtesy(peer.address))
        self._listen_or_not()

    def _connections(self) -> list[PeerConnection]:
        """All that aren't over."""
        found = [stranger for source in self._sources.values() for stranger in source.strangers]
        for peer in self._peers.values():
            found += [each for each in (peer.session, peer.dialled) if each is not None]
        return found

    # --- dialling

    def _courtesy(self, address: IPAddress) -> float:
        source = self._source
        first = source is None or (source.version, source.packed) < (
            address.version,
            address.packed,
        )
        return 0.0 if first else COURTESY

    def _dial_in(self, peer: _Peer, seconds: float) -> None:
        if peer.timer is not None:
            peer.timer.cancel()
        peer.timer = self._loop.after(seconds, lambda: self._dial(peer))

    def _dial(self, peer: _Peer) -> None:
        if self._identity is None or peer.session is not None or peer.dialled is not None:
            return
        self._dialled += 1
        peer.dialled = PeerConnection(self._loop, self, self._identity, peer.address, dialled=True)
        peer.dialled.dial(self._port, None if peer.any_source else self._source)

    def _dial_again(self, peer: _Peer) -> None:
        """After a failure."""
        self._dial_in(peer, peer.pause * (0.75 + self._jitter() / 2))
        peer.pause = min(peer.pause * 2, MOST_PAUSE)

    def _forget(self, peer: _Peer) -> None:
        """It isn't wanted any more."""
        if peer.timer is not None:
            peer.timer.cancel()
        for connection in (peer.session, peer.dialled):
            if connection is not None:
                connection.end("unwanted", "no network is shared any more")
        source = self._sources.get(peer.address)
        for connection in [] if source is None else list(source.strangers):
            connection.end("unwanted", "no network is shared any more")
        if peer.session is not None:
            # Its end finds the peer gone, or another of the same address.
            self._loop.after(0, lambda: self._tell_down(peer, "no network is shared any more"))

    # --- being dialled

    def _listen_or_not(self) -> None:
        """The port is open only for somebody."""
        if self._identity is None or not self._peers:
            self._stop_listening()
            return
        if self._listener is not None:
            return
        try:
            self._listener = _listener(self._bind, self._port)
        except OSError as error:
            reason = f"TCP port {self._port} can't be listened on: {error.strerror or error}; see SESSION_PORT"
            if reason != self._not_listening:
                log.error("sessions can't be accepted", reason=reason)
            self._not_listening = reason
            return
        self._not_listening = ""
        self._loop.watch(self._listener.fileno(), select.EPOLLIN, lambda _: self._accept())

    def _stop_listening(self) -> None:
        self._not_listening = ""
        if self._listener is not None:
            self._loop.forget(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if self._listener is None:
                return
            try:
                accepted, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.error("no descriptor for a session", reason=error.strerror)
                    self._loop.modify(self._listener.fileno(), 0)
                    self._paused = self._loop.after(BEAT, self._accept_again)
                    return
                continue
            self._admit(accepted, str(address[0]))

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.modify(self._listener.fileno(), select.EPOLLIN)

    def _admit(self, accepted: socket.socket, text: str) -> None:
        address = _plain(text)
        word = "foreign" if address not in self._peers else self._too_many(address)
        if word or self._identity is None:
            self._ended[word] += 1
            # No state is left of it, on either host.
            with suppress(OSError):
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            accepted.close()
            return
        self._accepted += 1
        stranger = PeerConnection(self._loop, self, self._identity, address, dialled=False)
        self._sources[address].strangers[stranger] = None
        stranger.accept(accepted)

    def _too_many(self, address: IPAddress) -> str:
        now = self._loop.now()
        source = self._sources.get(address)
        if source is None:
            source = self._sources[address] = _Source(Bucket.full(HANDSHAKES, now))
        if len(source.strangers) >= STRANGERS_EACH:
            return "" if self._make_room(source, now) else "limit"
        if sum(len(each.strangers) for each in self._sources.values()) >= STRANGERS:
            most = max(self._sources.values(), key=lambda each: len(each.strangers))
            return "" if self._make_room(most, now) else "limit"
        return ""

    def _make_room(self, source: _Source, now: float) -> bool:
        """End the oldest connection of a source that says nothing, or whose handshake takes long."""
        silent = (each for each in source.strangers if not each.has_opened)
        slow = (each for each in source.strangers if now - each.since > SLOW)
        oldest = next(silent, None) or next(slow, None)
        if oldest is None:
            return False
        # The owner of its end hears of it later; its place is free now.
        del source.strangers[oldest]
        oldest.end("limit", "others have come from its address meanwhile")
        return True

    def _forget_sources(self) -> None:
        now = self._loop.now()
        for address, source in list(self._sources.items()):
            if not source.strangers and source.bucket.full_by(now, HANDSHAKES):
                del self._sources[address]

    # --- what connections tell (`session.SessionOwner`)

    def opened(self, connection: PeerConnection) -> bool:
        """See `session.SessionOwner`."""
        source = self._sources.get(connection.peer)
        if source is None or source.bucket.take(self._loop.now(), HANDSHAKES):
            return True
        connection.end("rate", f"more than {HANDSHAKES:g} handshakes per second of its address")
        return False

    def authenticated(self, connection: PeerConnection) -> None:
        """See `session.SessionOwner`."""
        if self.node > connection.node:
            self._say_hello(connection)

    def heard(self, connection: PeerConnection, message: Message) -> None:
        """See `session.SessionOwner`."""
        peer = self._peers.get(connection.peer)
        if peer is None:
            return
        if connection is not peer.session:
            if not isinstance(message, PeerHello):
                raise WrongMessage("its first message is no Hello")
            self._greeted(peer, connection, message)
        elif isinstance(message, PeerPing):
            connection.send(PeerPong())
        elif isinstance(message, PeerHello):
            self._changed(peer, connection, message)
        elif not isinstance(message, PeerPong):
            self._user.message(connection.peer, message)

    def eased(self, connection: PeerConnection) -> None:
        """See `session.SessionOwner`."""
        if self.session(connection.peer) is connection:
            self._user.eased(connection.peer)

    def over(self, connection: PeerConnection, ending: Ending) -> None:
        """See `session.SessionOwner`."""
        self._ended[ending.word] += 1
        source = self._sources.get(connection.peer)
        if source is not None:
            source.strangers.pop(connection, None)
        peer = self._peers.get(connection.peer)
        if peer is None:
            return
        if connection is peer.session:
            if self._loop.now() - connection.since >= LASTS:
                peer.pause = LEAST_PAUSE
            self._tell_down(peer, ending.text)
        elif peer.session is not None:
            if connection is peer.dialled:
                peer.dialled = None
            return
        elif connection is peer.dialled:
            peer.dialled = None
            if ending.word == "refused":
                # The peer lets in the address that its engine has been told, which need not be the one that we know.
                peer.any_source = not peer.any_source
            self._explain(peer, ending.text)
        else:
            if ending.word in _TELLING:
                self._explain(peer, ending.text)
            return
        if ending.word == "identity":
            # The other host doesn't know that it's worth it.
            self._dial_in(peer, 0)
        else:
            self._dial_again(peer)

    def _explain(self, peer: _Peer, text: str) -> None:
        if text != peer.reason:
            peer.reason = text
            log.info("no session", peer=str(peer.address), reason=text)

    # --- how a session begins and ends

    def _say_hello(self, connection: PeerConnection) -> None:
        if connection.said != self._said and connection.send(self._said):
            connection.said = self._said

    def _check(self, connection: PeerConnection, hello: PeerHello) -> None:
        if hello.version != PEER_VERSION:
            raise WrongMessage(
                f"the peer speaks version {hello.version}, this host {PEER_VERSION}: run one version of the plugin on all hosts"
            )
        if hello.node != connection.node:
            raise WrongMessage("the peer says that it is another node than its certificate does")
        if hello.data_path:
            ip_of(hello.data_path)

    def _greeted(self, peer: _Peer, connection: PeerConnection, hello: PeerHello) -> None:
        self._check(connection, hello)
        for other in self._peers.values():
            session = self.session(other.address)
            if other is not peer and session is not None and session.node == connection.node:
                connection.end("twice", f"its node has a session at {other.address} already")
                return
        last = self.session(peer.address)
        if last is not None and last.node != connection.node:
            connection.end("twice", f"node {last.node} has a session at this address already")
            return
        chooser = self.node < connection.node
        if chooser and last is not None and self._is_better(last, connection, hello):
            connection.end("twice", "there is a session already")
            return
        if peer.session is not None:
            restarted = peer.hello is not None and peer.hello.instance != hello.instance
            text = "the peer's router has started again" if restarted else "the peer dialled again"
            peer.session.end("replaced", text)
            self._tell_down(peer, text)
        self._take(peer, connection, hello)

    def _is_better(self, last: PeerConnection, late: PeerConnection, hello: PeerHello) -> bool:
        """Whether the session that is there goes before the one that has come: both hosts dialled at once.

        Who dialled the first, or dials when both could have known of it, has lost it.
        """
        young = self._loop.now() - last.since < DEADLINE
        return hello.instance == last.instance and last.dialled != late.dialled and young

    def _take(self, peer: _Peer, connection: PeerConnection, hello: PeerHello) -> None:
        source = self._sources.get(peer.address)
        if source is not None:
            source.strangers.pop(connection, None)
        if peer.timer is not None:
            peer.timer.cancel()
        dialled, peer.dialled = peer.dialled, None
        if dialled is not None and dialled is not connection:
            dialled.end("twice", "there is a session already")
        peer.session, peer.hello, peer.reason = connection, hello, ""
        connection.came_up(hello.instance)
        self._begun += 1
        # The chooser's choice; or news, if something has changed since it was said.
        self._say_hello(connection)
        if connection.is_over:
            return
        log.info("session up", peer=str(peer.address), node=hello.node, rdma=hello.rdma)
        peer.told = True
        self._user.up(peer.address, hello)

    def _changed(self, peer: _Peer, connection: PeerConnection, hello: PeerHello) -> None:
        self._check(connection, hello)
        if hello.instance != connection.instance:
            raise WrongMessage("the peer says that it is another router than it was")
        if hello != peer.hello:
            peer.hello = hello
            self._user.message(peer.address, hello)

    def _tell_down(self, peer: _Peer, reason: str) -> None:
        peer.session = peer.hello = None
        peer.reason = reason
        if not peer.told:
            return
        peer.told = False
        log.info("session down", peer=str(peer.address), reason=reason)
        try:
            self._user.down(peer.address, reason)
        except Exception:
            # The session is gone whatever becomes of this.
            self._ended["bug"] += 1
            log.exception("a bug in the router", peer=str(peer.address))


def _plain(text: str) -> IPAddress:
    """As `want` has it: IPv4 in IPv6's clothes is IPv4."""
    ip = ip_address(text)
    if ip.version == 6 and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def _listener(bind: str, port: int) -> socket.socket:
    """Of both families, where the kernel has both."""
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
            # IPv6 is compiled in and turned off.
            made.close()
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(("", port))
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made
