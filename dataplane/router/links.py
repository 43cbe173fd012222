"""The links between this host's relay and those of its peers: one per peer, made again when it
breaks.

Each relay makes its end of a link, and the routers exchange the addresses of the two ends. The
leader, of two hosts the one with the smaller node ID, offers its end, and the follower answers with
its own. So both always mean the same two ends. A link that broke is made again under the same
number, and its connections go on where they were. If that fails, the relays' bytes go over the
session until every connection is back on TCP. No I/O except through the interfaces that the
constructor takes.

The leader also chooses the link's transport (`link_transport.py`). A link over TCP needs sockets.
The follower makes a ticket for them at once, in its answer; the leader's router dials, and both
give the sockets to their relays. The follower confirms a link that is up by a second answer: the
leader may place connections only on a link that is up at both ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

from dataplane.router import relay_wire as relay
from dataplane.router.library_wire import IPAddress
from dataplane.router.link_deadlines import GIVE_UP, LinkDeadlines
from dataplane.router.link_table import (
    ABSENT,
    NOTHING,
    Link,
    LinkOwner,
    LinkSockets,
    LinkState,
    LinkTable,
)
from dataplane.router.link_transport import has_worked
from dataplane.router.loop import Loop
from dataplane.router.peer_wire import TICKET, LinkAnswer, LinkOffer, LinkRefused, PeerFrame
from dataplane.router.relay_wire import RelayKind
from dataplane.router.remote_events import Transport
from dataplane.router.remote_hosts import PeerSessions

log = structlog.get_logger()

STEP: Final = 5.0
"""Seconds for each step of making a link."""
AGAIN: Final = (0.0, 1.0, 2.0)
"""Seconds before each attempt to make a broken link again."""
LEAST_PAUSE: Final = 1.0
MOST_PAUSE: Final = 60.0
"""Seconds between attempts at a link without connections, doubled each time."""
KINDS: Final = {Transport.RDMA: relay.VERBS, Transport.RELAY: relay.TCP}
"""The relay's numbers of transports."""
_WORDS: Final = {Transport.RDMA: "", Transport.RELAY: "relay"}
_TRANSPORTS: Final = {word: transport for transport, word in _WORDS.items()}
"""How a LinkOffer names a transport. Peers of earlier versions name none."""


class Links(LinkTable):
    """Makes the links, and makes them again."""

    def __init__(
        self,
        loop: Loop,
        tell_relay: Callable[..., None],
        sessions: PeerSessions,
        owner: LinkOwner,
        sockets: Callable[[Links], LinkSockets],
        kinds: Mapping[Transport, int] = KINDS,
    ) -> None:
        """`sockets` makes the sockets of links, for their user."""
        super().__init__(loop, owner)
        self._tell_relay = tell_relay
        self._sessions = sessions
        self._send = sessions.send
        self._sockets = sockets(self)
        self._deadlines = LinkDeadlines(loop, tell_relay, self._reset)
        self._kinds = kinds
        self._next = itertools.count(1)
        self._attempts = itertools.count(1)

    # --- sessions, devices, connections

    def wake(self, peer: IPAddress) -> None:
        """A session is up, or both hosts have a device: make a link if there is none."""
        link = self.link(peer)
        if not self._owner.has_session(peer):
            return
        self._deadlines.check_no_more(link)
        if link.state is LinkState.DOWN:
            link.tries = 0
            self._recover(link)
        elif self.is_missing(link):
            if self._owner.leads(peer):
                link.tries = 0
                self._make(link)
            else:
                # The leader may take the link for up.
                self._send(peer, LinkRefused(NOTHING, "there is no link"))

    def tick(self) -> None:
        """Make the links that have become possible, and others in place of those that are
        superfluous. To be called about once a second."""
        for link in list(self._links.values()):
            if self.is_superfluous(link):
                self._unlink(link)
            if self.is_missing(link) and link.timer is None and self._owner.leads(link.peer):
                self._make(link)

    def session_down(self, peer: IPAddress) -> None:
        """A link that is being made fails. A link that is up stays up if the peer is there."""
        link = self.link(peer)
        self.cancel(link)
        if link.state is LinkState.STREAM:
            # The bytes that were under way over the session are lost.
            self._lose(link, "the session was lost, and there was no link")
        elif link.state is LinkState.MAKING:
            self._break(link, "the session was lost")
        self._deadlines.check(link)

    def relay_died(self) -> None:
        """All links are gone, with their connections."""
        for link in self._links.values():
            self.cancel(link)
            self._set(link, LinkState.NONE)
            self.forget_number(link)
            link.reason = "the relay ended"

    def forget(self, peer: IPAddress) -> None:
        """Delete a link with its connections: no network is shared with the peer any more, or its
        router was restarted and doesn't know the link."""
        link = self.link(peer)
        self._lose(link, "")
        del self._links[peer]

    def emptied(self, peer: IPAddress) -> None:
        """The last connection on a link is gone."""
        link = self.link(peer)
        if link.state in (LinkState.STREAM, LinkState.DOWN):
            self._unlink(link)
            self._retry(link)

    # --- what the relay reports

    def linked(self, message: relay.Offered) -> None:
        """The relay has made its end, or can't."""
        link = self._numbers.get(message.number)
        if link is None:
            return
        link.unanswered -= 1
        if link.unanswered or link.awaited != "linked":
            return
        if message.error:
            self._failed(link, message.text)
            return
        link.own = message.words
        if self._owner.leads(link.peer):
            self._await(link, "answer")
            link.attempt = next(self._attempts)
            word = _WORDS[link.transport]
            offer = LinkOffer(link.number, message.words, link.again, word, link.attempt)
            self._send(link.peer, offer)
        elif link.transport is Transport.RELAY:
            self._await(link, "sockets")
            ticket = self._sockets.expect(link.peer, link.number)
            self._send(link.peer, LinkAnswer(link.shared, link.own, ticket, link.attempt))
        else:
            self._connect(link)

    def _connect(self, link: Link) -> None:
        self._await(link, "connected")
        self._tell_relay(relay.RelayAccept(RelayKind.CONNECT, link.number, 0, link.address))

    def sockets_ready(self, number: int, descriptors: Sequence[int]) -> None:
        """The TCP connections of a link are there. The descriptors stay the caller's."""
        link = self._numbers.get(number)
        if link is None or link.awaited != "sockets":
            return
        for index, descriptor in enumerate(descriptors):
            message = relay.Number(RelayKind.SOCKET, number, index)
            self._tell_relay(message, (descriptor,))
        self._connect(link)

    def sockets_failed(self, number: int, text: str) -> None:
        """The TCP connections of a link can't be made."""
        link = self._numbers.get(number)
        if link is not None and link.awaited == "sockets":
            self._failed(link, text)

    def connected(self, message: relay.RelayOutcome) -> None:
        """The relay has connected its end with the peer's, or can't."""
        link = self._numbers.get(message.number)
        if link is None or link.awaited != "connected":
            return
        if message.error:
            self._failed(link, message.text)
            return
        if not self._owner.leads(link.peer):
            self._send(link.peer, LinkAnswer(link.shared, link.own, b"", link.attempt))
        elif link.transport is Transport.RELAY and not link.confirmed:
            self._await(link, "confirmation")
            return
        self._up(link)

    def _up(self, link: Link) -> None:
        log.info("link up", peer=str(link.peer), transport=link.transport.value, again=link.again)
        self.cancel(link)
        link.tries = 0
        link.reason = ""
        link.since = self._loop.now()
        # They may contain keys.
        link.own = link.address = b""
        self._set(link, LinkState.UP)
        self._owner.link_up(link.peer)

    def down(self, message: relay.RelayOutcome) -> None:
        """The relay can't reach the peer's relay any more."""
        link = self._numbers.get(message.number)
        if link is None or link.state in (LinkState.NONE, LinkState.DOWN, LinkState.STREAM):
            return
        log.warning("link down", peer=str(link.peer), reason=message.text)
        if link.state is LinkState.MAKING:
            self._failed(link, message.text)
            return
        link.worked = has_worked(message)
        self.note_loss(link, message.text, len(AGAIN))
        shared = link.shared
        self._break(link, message.text)
        self._mend(link, shared)

    def frame(self, message: relay.RelayFrame) -> None:
        """The relay has bytes for the peer's relay, to be sent over the session."""
        link = self._numbers.get(message.link)
        if link is not None and link.state is LinkState.STREAM:
            link.frames.append(message.data)
            self.eased(link.peer)

    def eased(self, peer: IPAddress) -> None:
        """Send the frames that wait, as far as the session with a peer has room."""
        link = self.link(peer)
        while link.frames and not self._sessions.congested(link.peer):
            self._send(link.peer, PeerFrame(link.shared, link.frames.popleft()))

    # --- what the peer's router reports

    def offered(self, peer: IPAddress, message: LinkOffer) -> None:
        """Follower: the leader's relay has made its end."""
        link = self.link(peer)
        if self._owner.leads(peer):
            return
        transport = _TRANSPORTS.get(message.transport)
        if message.again and not _is_known(link, message):
            self._send(peer, LinkRefused(NOTHING, "there is no such link"))
            return
        if transport is None or transport not in self._owner.transports(peer):
            self._send(peer, _absent(message, transport))
            return
        self.cancel(link)
        if not message.again:
            self._lose(link, "the peer made a new link")
        link.transport = transport
        link.shared, link.address, link.again = message.link, message.address, message.again
        link.attempt = message.attempt
        self._link(link)

    def answered(self, peer: IPAddress, message: LinkAnswer) -> None:
        """Leader: the follower's relay has made its end; over RDMA it knows ours. The second answer
        over TCP: its end is up."""
        link = self.link(peer)
        if not self._owner.leads(peer) or not _is_current(link, message):
            return
        if link.awaited == "answer":
            link.address = message.address
            if link.transport is Transport.RDMA:
                self._connect(link)
            elif len(message.ticket) == TICKET:
                # If not, it is the confirmation of an earlier attempt.
                self._await(link, "sockets")
                self._sockets.dial(peer, link.number, message.ticket)
        elif link.awaited and not message.ticket:
            link.confirmed = link.awaited in ("sockets", "connected", "confirmation")
            if link.awaited == "confirmation":
                self._up(link)

    def refused(self, peer: IPAddress, message: LinkRefused) -> None:
        """Leader: the follower has no end of the link, or one that doesn't work."""
        link = self.link(peer)
        if not self._owner.leads(peer):
            return
        if message.link == NOTHING and link.state is LinkState.NONE:
            # The follower has a device now.
            self.wake(peer)
        elif message.link == NOTHING:
            if link.state is not LinkState.MAKING or link.again:
                self._lose(link, message.text)
                self._retry(link)
        elif not _is_current(link, message):
            return
        elif link.awaited not in ("", "linked"):
            # After the answer too: the follower's new end may fail at once.
            self._failed(link, message.text)
        elif link.state is LinkState.UP:
            link.worked = message.worked
            self.note_loss(link, message.text, len(AGAIN))
            self._break(link, message.text)
            self._mend(link)

    def framed(self, peer: IPAddress, message: PeerFrame) -> None:
        """Bytes of the peer's relay, which has given up the link's transport."""
        link = self.link(peer)
        if not link.number or message.link != link.shared:
            return
        if link.state is not LinkState.STREAM:
            self._stream(link)
        self._tell_relay(relay.RelayFrame(link.number, message.data))

    # --- making one

    def _make(self, link: Link) -> None:
        """Leader: make our end. A link with connections keeps its transport."""
        link.again = self.continues(link)
        if not link.again:
            self._unlink(link)
            link.transport = self.choose(link) or link.transport
        self._link(link)
        link.shared = link.number

    def _link(self, link: Link) -> None:
        if not link.number:
            link.number = next(self._next)
            self._numbers[link.number] = link
            link.unanswered = 0
        link.unanswered += 1
        link.confirmed = False
        self._set(link, LinkState.MAKING)
        self._await(link, "linked")
        kind = self._kinds[link.transport]
        self._tell_relay(relay.Number(RelayKind.LINK, link.number, kind))

    def _await(self, link: Link, what: str) -> None:
        self.cancel(link)
        link.awaited = what
        link.timer = self._loop.after(
            STEP, lambda: self._failed(link, f"no answer within {STEP:g} s: {what}")
        )

    def _mend(self, link: Link, shared: int = NOTHING) -> None:
        """After `_break`: make the link again. `shared`: the leader's number for it."""
        if link.state is LinkState.DOWN:
            self._recover(link)
        elif self._owner.leads(link.peer):
            self._retry(link)
        else:
            self._refuse(link, shared)

    def _refuse(self, link: Link, shared: int) -> None:
        """Follower: our end doesn't work."""
        self._send(link.peer, LinkRefused(shared, _plain(link.reason), link.worked, link.attempt))

    def _recover(self, link: Link) -> None:
        """A link with connections: try again, or give its transport up after the last attempt.
        Without a session: do nothing until there is one."""
        if not self._owner.has_session(link.peer):
            return
        if not self._owner.leads(link.peer):
            self._refuse(link, link.shared)
        elif link.tries >= len(AGAIN) or not self.may_make(link):
            self._stream(link)
        else:
            pause = AGAIN[link.tries]
            link.tries += 1
            self.cancel(link)
            link.timer = self._loop.after(pause, lambda: self._make_if_possible(link))

    def _make_if_possible(self, link: Link) -> None:
        # Without a transport now, `tick` makes a link that is missing.
        link.timer = None
        if self.may_make(link):
            self._make(link)
        elif link.state is LinkState.DOWN:
            self._recover(link)

    def _failed(self, link: Link, text: str) -> None:
        if text != link.reason:
            log.info("link can't be made", peer=str(link.peer), reason=text)
        shared = link.shared
        self._break(link, text)
        self.count_failure(link, text)
        if not self.may_change(link):
            self._owner.link_failed(link.peer)
        self._mend(link, shared)

    def _retry(self, link: Link) -> None:
        """A link without connections: try again later."""
        if not self._owner.leads(link.peer):
            return
        pause = min(LEAST_PAUSE * 2.0**link.tries, MOST_PAUSE)
        link.tries += 1
        self.cancel(link)
        link.timer = self._loop.after(pause, lambda: self._make_if_possible(link))

    # --- losing one

    def _break(self, link: Link, text: str) -> None:
        """A link doesn't work. It keeps its number if it has connections."""
        self.cancel(link)
        link.reason = text
        if self._owner.has_connections(link.peer):
            self._set(link, LinkState.DOWN)
        else:
            self._unlink(link)

    def _stream(self, link: Link) -> None:
        """Bring the connections back to TCP, with the session in place of the link's transport."""
        self.cancel(link)
        log.warning("link lost; back to TCP", peer=str(link.peer), reason=link.reason)
        # However long there was no link, now they need a moment.
        self._deadlines.stop(link)
        self._set(link, LinkState.STREAM)
        self._tell_relay(relay.Number(RelayKind.STREAM, link.number))
        self._owner.link_failed(link.peer)
        self._owner.link_leaves(link.peer)

    def _lose(self, link: Link, text: str) -> None:
        """Delete a link, with its connections."""
        self.cancel(link)
        link.reason = text or link.reason
        self._owner.link_lost(link.peer)
        self._unlink(link)

    def _reset(self, link: Link) -> None:
        """There was no link for too long."""
        log.error(
            "link can't be made again; its connections are reset",
            peer=str(link.peer),
            reason=link.reason,
            seconds=GIVE_UP[link.transport],
        )
        self._lose(link, link.reason)
        self._retry(link)

    def _unlink(self, link: Link) -> None:
        self._set(link, LinkState.NONE)
        if link.number:
            self._tell_relay(relay.Number(RelayKind.UNLINK, link.number))
            self.forget_number(link)

    def _set(self, link: Link, state: LinkState) -> None:
        link.state = state
        self._sockets.cancel(link.number)
        if state is not LinkState.STREAM:
            link.frames.clear()
        if state is not LinkState.MAKING:
            link.awaited = ""
        if state in (LinkState.NONE, LinkState.UP):
            self._deadlines.stop(link)
        elif state is not LinkState.MAKING and not link.deadlines:
            self._deadlines.start(link)


def _is_known(link: Link, offer: LinkOffer) -> bool:
    """Whether the link that an offer is about can be made again."""
    return (
        link.number != NOTHING
        and link.shared == offer.link
        and link.state is not LinkState.STREAM
        and _WORDS[link.transport] == offer.transport
    )


def _absent(offer: LinkOffer, transport: Transport | None) -> LinkRefused:
    """The hosts don't share the transport of an offer; None: this router doesn't know it."""
    return LinkRefused(offer.link, ABSENT[transport], attempt=offer.attempt)


def _is_current(link: Link, message: LinkAnswer | LinkRefused) -> bool:
    """Leader: whether the follower means the last offer of this link."""
    return message.link == link.number and message.attempt in (0, link.attempt)


def _plain(text: str) -> str:
    """A reason, with the characters and the length that a message may have."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:200]
