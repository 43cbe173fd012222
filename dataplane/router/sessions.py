"""Sessions with the routers of other hosts: one for each peer's address at most.

Both hosts may dial. The one with the smaller node ID chooses: the other says Hello as soon as it
trusts the certificate, the chooser only on the connection that it takes. So both always mean the
same connection. A session that is lost comes back by itself. Only the addresses of hosts that share
a network with this one are dialled or let in.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import structlog

from dataplane.errors import WrongMessage
from dataplane.router.identities import Identities
from dataplane.router.library_wire import IPAddress
from dataplane.router.link_preamble import Preamble
from dataplane.router.loop import Loop, Timer
from dataplane.router.node_identity import Identity
from dataplane.router.peer_wire import PEER_VERSION, Message, PeerHello, PeerPing, PeerPong, ip_of
from dataplane.router.session import DEADLINE, Ending, PeerConnection
from dataplane.router.session_listener import SessionListener

log = structlog.get_logger()

TICK: Final = 1.0
"""Seconds between two pings of a peer."""
SILENCE: Final = 5
"""Ticks without a byte of the peer after which a session is dead. Ticks, not seconds: a router that
was stopped for a while first reads what has come, and judges then."""
LEAST_PAUSE: Final = 1.0
MOST_PAUSE: Final = 30.0
"""Seconds between two dials of a peer, doubled each time."""
STABLE: Final = 10.0
"""Seconds after which a session counts as good: its loss is no failed dial."""
DIAL_DELAY: Final = 1.0
"""Seconds that the host with the greater address waits before it dials, so that not both dial."""
_INFORMATIVE: Final = ("certificate", "protocol", "bug")
"""Words of an incoming connection's end that say something about its peer. Other failures may be
anybody's."""


class SessionUser(Protocol):
    """The user of the sessions is called from the loop, never from inside a call to `Sessions`."""

    def up(self, peer: IPAddress, hello: PeerHello) -> None:
        """There is a session. The node is the certificate's; the rest is the peer's word."""

    def down(self, peer: IPAddress, reason: str) -> None:
        """The session is gone: once for each `up`. What was sent last may not have arrived."""

    def message(self, peer: IPAddress, message: Message) -> None:
        """A message has come; a Hello if a field of it has changed.

        WrongMessage ends the session.
        """

    def eased(self, peer: IPAddress) -> None:
        """The session was congested and is no longer."""


TakeSocket = Callable[[PeerConnection, Preamble], None]


def _refuse(connection: PeerConnection, _: Preamble) -> None:
    connection.end("ticket", "there are no links")


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
    """Whether the user has been told of the session."""
    dialled: PeerConnection | None = None
    any_source: bool = False
    """Whether the kernel chooses the address of this host from which the next dial goes out."""
    timer: Timer | None = None
    """The next dial."""
    reason: str = "not dialled yet"


class Sessions:
    """`start` it, tell it which peers to `want`, and `introduce` this host."""

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
        self._wall = wall
        self._jitter = jitter
        self.take_socket: TakeSocket = _refuse
        """Takes incoming connections that begin with the preamble of a link, or ends them."""
        self._said = PeerHello(instance=instance, node="0", data_path="", rdma=False, build=build)
        self._identity: Identity | None = None
        self._source: IPAddress | None = None
        self._peers: dict[IPAddress, _Peer] = {}
        self._ticks: Timer | None = None
        self._dialled = self._begun = 0
        self._ended: Counter[str] = Counter()
        self.listener = SessionListener(
            loop,
            self,
            lambda address: address in self._peers,
            port=port,
            bind=bind,
            ended=self._ended,
        )

    # --- the user's calls

    def start(self) -> None:
        """Read the identity, and begin to tick."""
        self._tick()

    def introduce(self, **fields: object) -> None:
        """Set fields of the Hello that peers are told; those with sessions are told at once."""
        said = msgspec.structs.replace(self._said, **fields)
        if said == self._said:
            return
        self._said = said
        for peer in self._peers.values():
            if peer.session is not None:
                self._say_hello(peer.session)

    def want(self, peers: Set[IPAddress], source: IPAddress | None = None) -> None:
        """Set the addresses with which there shall be sessions; `source` is this host's own."""
        self._source = source
        for address in [address for address in self._peers if address not in peers]:
            self._forget(self._peers.pop(address))
        for address in peers:
            if address not in self._peers and address != source:
                peer = self._peers[address] = _Peer(address)
                self._dial_in(peer, self._dial_delay(address))
        self._open_or_close_port()

    def listen(self, port: int) -> None:
        """Set the port, which is the same on all hosts."""
        if port != self.listener.port:
            self.listener.close()
            self.listener.port = port
            self._open_or_close_port()

    def use(self, identities: Identities) -> None:
        """Set the source of this host's identity."""
        self._identities = identities
        self._apply_identity()

    def send(self, peer: IPAddress, message: Message) -> bool:
        """Send a message. Whether it is on its way.

        False: there is no session, or the message is too long, or the peer is too slow; in the last
        case the session ends and `down` is called.
        """
        session = self.session(peer)
        if session is None:
            return False
        try:
            return session.send(message)
        except WrongMessage as error:
            log.error("a message can't be sent", peer=str(peer), reason=str(error))
            return False

    def close(self) -> None:
        """End everything. The user is not called any more."""
        self.listener.close()
        if self._ticks is not None:
            self._ticks.cancel()
        for peer in self._peers.values():
            peer.told = False
            if peer.timer is not None:
                peer.timer.cancel()
        for connection in self._connections():
            connection.end("local", "this host's router ends")
        self._peers.clear()

    # --- the state of sessions

    @property
    def node(self) -> str:
        """This host's node ID; "" without an identity."""
        return "" if self._identity is None else self._identity.own.node

    @property
    def instance(self) -> str:
        """A random number of this router's start."""
        return self._said.instance

    @property
    def reason(self) -> str:
        """Why there are no sessions at all; "" if there may be."""
        if self._identity is None:
            return self._identities.reason or "the identity isn't read yet"
        return self.listener.reason

    def session(self, peer: IPAddress) -> PeerConnection | None:
        """The session with a peer, if one is up."""
        known = self._peers.get(peer)
        session = None if known is None else known.session
        return None if session is None or session.is_over else session

    def hello(self, peer: IPAddress) -> PeerHello | None:
        """The last Hello of a peer with a session."""
        return None if self.session(peer) is None else self._peers[peer].hello

    def congested(self, peer: IPAddress) -> bool:
        """Whether messages that can wait should, until `SessionUser.eased`."""
        session = self.session(peer)
        return session is not None and session.congested

    def reasons(self) -> dict[IPAddress, str]:
        """For each wanted peer why there is no session; "" if there is one."""
        return {
            address: "" if self.session(address) is not None else self.reason or peer.reason
            for address, peer in self._peers.items()
        }

    def counts(self) -> SessionCounts:
        """The counters of sessions and connections."""
        return SessionCounts(
            up=sum(self.session(address) is not None for address in self._peers),
            dialled=self._dialled,
            accepted=self.listener.accepted,
            begun=self._begun,
            ended=dict(self._ended),
        )

    # --- each second

    def _tick(self) -> None:
        self._ticks = self._loop.after(TICK, self._tick)
        self._apply_identity()
        self._open_or_close_port()
        now = self._wall()
        for peer in list(self._peers.values()):
            session = peer.session
            if session is None or session.is_over:
                continue
            session.silent += not session.is_resting
            if session.silent > SILENCE:
                session.end("silent", f"nothing was heard for {SILENCE * TICK:g} s")
            elif now >= session.expires:
                session.end("certificate", "the peer's certificate has expired")
            else:
                session.send(PeerPing())
        self.listener.tick()

    def _apply_identity(self) -> None:
        """Apply a new identity: sessions of the old one end, and peers are dialled again."""
        identity = self._identities.current()
        if identity is self._identity:
            return
        self._identity = identity
        text = "this host's certificate has changed" if identity else self._identities.reason
        for connection in self._connections():
            connection.end("identity", text)
        if identity is None:
            log.warning("no sessions with other hosts", reason=self._identities.reason)
            self.listener.close()
            return
        log.info("sessions with other hosts", node=identity.own.node, role=identity.own.role)
        self._said = msgspec.structs.replace(self._said, node=identity.own.node)
        for peer in self._peers.values():
            peer.pause = LEAST_PAUSE
            self._dial_in(peer, self._dial_delay(peer.address))
        self._open_or_close_port()

    def _connections(self) -> list[PeerConnection]:
        """All connections that are not over."""
        connections = list(self.listener.connections())
        for peer in self._peers.values():
            connections += [each for each in (peer.session, peer.dialled) if each is not None]
        return connections

    def _open_or_close_port(self) -> None:
        """The port is open only while there are peers."""
        if self._identity is None or not self._peers:
            self.listener.close()
        else:
            self.listener.open(self._identity)

    # --- dialling

    def _dial_delay(self, address: IPAddress) -> float:
        source = self._source
        first = source is None or (source.version, source.packed) < (
            address.version,
            address.packed,
        )
        return 0.0 if first else DIAL_DELAY

    def _dial_in(self, peer: _Peer, seconds: float) -> None:
        if peer.timer is not None:
            peer.timer.cancel()
        peer.timer = self._loop.after(seconds, lambda: self._dial(peer))

    def _dial(self, peer: _Peer) -> None:
        if self._identity is None or peer.session is not None or peer.dialled is not None:
            return
        self._dialled += 1
        peer.dialled = PeerConnection(self._loop, self, self._identity, peer.address, dialled=True)
        peer.dialled.dial(self.listener.port, None if peer.any_source else self._source)

    def _dial_again(self, peer: _Peer) -> None:
        """Dial once more after a failure, with a pause that doubles each time."""
        self._dial_in(peer, peer.pause * (0.75 + self._jitter() / 2))
        peer.pause = min(peer.pause * 2, MOST_PAUSE)

    def _forget(self, peer: _Peer) -> None:
        """End everything with a peer that is not wanted any more."""
        if peer.timer is not None:
            peer.timer.cancel()
        for connection in (peer.session, peer.dialled):
            if connection is not None:
                connection.end("unwanted", "no network is shared any more")
        for connection in self.listener.connections_of(peer.address):
            connection.end("unwanted", "no network is shared any more")
        if peer.session is not None:
            # When the connection's end is reported, the peer isn't known any more.
            self._loop.after(0, lambda: self._tell_down(peer, "no network is shared any more"))

    # --- events of connections

    def opened(self, connection: PeerConnection) -> bool:
        return self.listener.may_handshake(connection)

    def showed_ticket(self, connection: PeerConnection, preamble: Preamble) -> None:
        self.take_socket(connection, preamble)

    def authenticated(self, connection: PeerConnection) -> None:
        if self.node > connection.node:
            self._say_hello(connection)

    def heard(self, connection: PeerConnection, message: Message) -> None:
        peer = self._peers.get(connection.peer)
        if peer is None:
            return
        if connection is not peer.session:
            if not isinstance(message, PeerHello):
                raise WrongMessage("its first message is no Hello")
            self._take_or_end(peer, connection, message)
        elif isinstance(message, PeerPing):
            connection.send(PeerPong())
        elif isinstance(message, PeerHello):
            self._changed(peer, connection, message)
        elif not isinstance(message, PeerPong):
            self._user.message(connection.peer, message)

    def eased(self, connection: PeerConnection) -> None:
        if self.session(connection.peer) is connection:
            self._user.eased(connection.peer)

    def over(self, connection: PeerConnection, ending: Ending) -> None:
        self._ended[ending.word] += 1
        self.listener.release(connection)
        peer = self._peers.get(connection.peer)
        if peer is None:
            return
        if connection is peer.session:
            if self._loop.now() - connection.since >= STABLE:
                peer.pause = LEAST_PAUSE
            self._tell_down(peer, ending.text)
        elif peer.session is not None:
            if connection is peer.dialled:
                peer.dialled = None
            return
        elif connection is peer.dialled:
            peer.dialled = None
            if ending.word == "refused":
                # The peer admits the address that its engine knows of this host. It may differ
                # from the one that this host knows.
                peer.any_source = not peer.any_source
            self._explain(peer, ending.text)
        else:
            if ending.word in _INFORMATIVE:
                self._explain(peer, ending.text)
            return
        if ending.word == "identity":
            # The other host doesn't know that a dial may succeed now.
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

    def _take_or_end(self, peer: _Peer, connection: PeerConnection, hello: PeerHello) -> None:
        _check(connection, hello)
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
        """Whether the present session is kept in favour of a new one: both hosts dialled at once.

        If the same host dialled both, or the session is older than a handshake may take, the other
        host has lost it.
        """
        young = self._loop.now() - last.since < DEADLINE
        return hello.instance == last.instance and last.dialled != late.dialled and young

    def _take(self, peer: _Peer, connection: PeerConnection, hello: PeerHello) -> None:
        self.listener.release(connection)
        if peer.timer is not None:
            peer.timer.cancel()
        dialled, peer.dialled = peer.dialled, None
        if dialled is not None and dialled is not connection:
            dialled.end("twice", "there is a session already")
        peer.session, peer.hello, peer.reason = connection, hello, ""
        connection.came_up(hello.instance)
        self._begun += 1
        # The chooser's Hello is its choice. The other host sends one if it has changed meanwhile.
        self._say_hello(connection)
        if connection.is_over:
            return
        log.info("session up", peer=str(peer.address), node=hello.node, rdma=hello.rdma)
        peer.told = True
        self._user.up(peer.address, hello)

    def _changed(self, peer: _Peer, connection: PeerConnection, hello: PeerHello) -> None:
        _check(connection, hello)
        if hello.instance != connection.instance:
            raise WrongMessage("the peer's Hello names another start of its router than before")
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
            # A bug of the user must not keep the session alive.
            self._ended["bug"] += 1
            log.exception("a bug in the router", peer=str(peer.address))


def _check(connection: PeerConnection, hello: PeerHello) -> None:
    """Check a Hello. Raises WrongMessage."""
    if hello.version != PEER_VERSION:
        raise WrongMessage(
            f"the peer speaks version {hello.version}, this host {PEER_VERSION}",
            remedy="run one version of the plugin on all hosts",
        )
    if hello.node != connection.node:
        raise WrongMessage("the peer's Hello and its certificate name different nodes")
    if hello.data_path:
        ip_of(hello.data_path)
