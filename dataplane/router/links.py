"""The links between this host's relay and those of its peers: one per peer, made again when it
breaks.

Each relay makes its end of a link, and the routers exchange the addresses of the two ends. The
leader, of two hosts the one with the smaller node ID, offers its end, and the follower answers with
its own. So both always mean the same two ends. A link that broke is made again under the same
number, and its connections go on where they were. If that fails, the relays' bytes go over the
session until every connection is back on TCP. No I/O except through the interfaces that the
constructor takes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

import structlog

from dataplane.router import relay_wire as relay
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop, Timer
from dataplane.router.peer_wire import LinkAnswer, LinkOffer, LinkRefused, PeerFrame
from dataplane.router.relay_wire import RelayKind
from dataplane.router.remote_hosts import PeerSessions

log = structlog.get_logger()

STEP: Final = 5.0
"""Seconds for each step of making a link."""
AGAIN: Final = (0.0, 1.0, 2.0)
"""Seconds before each attempt to make a broken link again."""
LEAST_PAUSE: Final = 1.0
MOST_PAUSE: Final = 60.0
"""Seconds between attempts at a link without connections, doubled each time."""
GIVE_UP: Final = 30.0
"""Seconds without a link after which its connections are reset."""
NOTHING: Final = 0
"""In place of a link's number: the sender has no link."""


class LinkState(Enum):
    """What a link is."""

    NONE = "none"
    MAKING = "being made"
    UP = "up"
    DOWN = "down"
    """It is made again if its connections need it."""
    STREAM = "over the session"
    """Without RDMA: only until its connections are back on TCP."""


class LinkOwner(Protocol):
    """Has the connections on the links, and decides whether there may be one: `remote.Remotes`."""

    def has_session(self, peer: IPAddress) -> bool:
        """Whether there is a session between the two routers."""

    def may_link(self, peer: IPAddress) -> bool:
        """Whether both hosts have a device, and there is a session."""

    def leads(self, peer: IPAddress) -> bool:
        """Whether this host makes the link."""

    def has_connections(self, peer: IPAddress) -> bool:
        """Whether there are connections on the link."""

    def link_up(self, peer: IPAddress) -> None:
        """Connections can be paired."""

    def link_failed(self, peer: IPAddress) -> None:
        """Connections can't be paired for now: refuse the requests that wait for the link."""

    def link_lost(self, peer: IPAddress) -> None:
        """The connections can't go on: drop all of them before this returns."""

    def link_leaves(self, peer: IPAddress) -> None:
        """Bring all connections back to TCP."""


@dataclass(slots=True, eq=False)
class Link:
    """One link. `number` is that of this host's relay, `shared` that of the leader's relay, which
    the routers use in their messages."""

    peer: IPAddress
    number: int = NOTHING
    shared: int = NOTHING
    state: LinkState = LinkState.NONE
    awaited: str = ""
    """The next message while it is being made: "linked", "answer" or "connected"."""
    again: bool = False
    own: bytes = b""
    address: bytes = b""
    unanswered: int = 0
    """How often the relay was told to make its end, without an answer yet. Only the last counts."""
    tries: int = 0
    reason: str = ""
    timer: Timer | None = None
    frames: deque[bytes] = field(default_factory=deque)
    """Wait until the session has room."""
    deadline: Timer | None = None
    """When its connections are reset."""


class Links:
    """The table of links."""

    def __init__(
        self,
        loop: Loop,
        tell_relay: Callable[[relay.Message], None],
        sessions: PeerSessions,
        owner: LinkOwner,
    ) -> None:
        self._loop = loop
        self._tell_relay = tell_relay
        self._sessions = sessions
        self._send = sessions.send
        self._owner = owner
        self._links: dict[IPAddress, Link] = {}
        self._numbers: dict[int, Link] = {}
        self._next = itertools.count(1)
        self.transport = relay.VERBS
        """Of the links that are made from now on."""

    def link(self, peer: IPAddress) -> Link:
        """The link to a peer, in whatever state."""
        link = self._links.get(peer)
        if link is None:
            link = self._links[peer] = Link(peer)
        return link

    def is_up(self, peer: IPAddress) -> bool:
        """Whether connections with a peer can be paired."""
        return self.link(peer).state is LinkState.UP

    def has_failed(self, peer: IPAddress) -> bool:
        """Whether there is no link, after at least two attempts."""
        link = self.link(peer)
        return link.state is not LinkState.UP and link.tries > 1

    @property
    def idle(self) -> bool:
        """Whether the relay has no links."""
        return not self._numbers

    @property
    def works(self) -> bool:
        """Whether at least one link is up."""
        return any(link.state is LinkState.UP for link in self._links.values())

    @property
    def tries(self) -> int:
        """The most failed attempts at one link."""
        return max((link.tries for link in self._links.values()), default=0)

    # --- sessions, devices, connections

    def wake(self, peer: IPAddress) -> None:
        """A session is up, or both hosts have a device: make a link if there is none."""
        link = self.link(peer)
        if not self._owner.has_session(peer):
            return
        if link.state is LinkState.DOWN:
            link.tries = 0
            self._recover(link)
        elif link.state is LinkState.NONE and self._owner.may_link(peer):
            if self._owner.leads(peer):
                link.tries = 0
                self._make(link)
            else:
                # The leader may take the link for up.
                self._send(peer, LinkRefused(NOTHING, "there is no link"))

    def session_down(self, peer: IPAddress) -> None:
        """A link that is being made fails. A link that is up stays up."""
        link = self.link(peer)
        self._cancel(link)
        if link.state is LinkState.STREAM:
            # The bytes that were under way over the session are lost.
            self._lose(link, "the session was lost, and there was no RDMA")
        elif link.state is LinkState.MAKING:
            self._break(link, "the session was lost")

    def relay_died(self) -> None:
        """All links are gone, with their connections."""
        for link in self._links.values():
            self._cancel(link)
            self._forget_number(link)
            self._set(link, LinkState.NONE)
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
            self._send(link.peer, LinkOffer(link.number, message.words, link.again))
        else:
            self._await(link, "connected")
            self._tell_relay(relay.RelayAccept(RelayKind.CONNECT, link.number, 0, link.address))

    def connected(self, message: relay.RelayOutcome) -> None:
        """The relay has connected its end with the peer's, or can't."""
        link = self._numbers.get(message.number)
        if link is None or link.awaited != "connected":
            return
        if message.error:
            self._failed(link, message.text)
            return
        if not self._owner.leads(link.peer):
            self._send(link.peer, LinkAnswer(link.shared, link.own))
        log.info("link up", peer=str(link.peer), again=link.again)
        self._cancel(link)
        link.tries = 0
        link.reason = ""
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
        link.tries = 0
        shared = link.shared
        self._break(link, message.text)
        self._mend(link, shared)

    def frame(self, message: relay.RelayFrame) -> None:
        """The relay has bytes for the peer's relay, to be sent over the session."""
        link = self._numbers.get(message.link)
        if link is not None and link.state is LinkState.STREAM:
            link.frames.append(message.data)
            self._flush(link)

    def eased(self, peer: IPAddress) -> None:
        """The session with a peer has room again."""
        self._flush(self.link(peer))

    def _flush(self, link: Link) -> None:
        while link.frames and not self._sessions.congested(link.peer):
            self._send(link.peer, PeerFrame(link.shared, link.frames.popleft()))

    # --- what the peer's router reports

    def offered(self, peer: IPAddress, message: LinkOffer) -> None:
        """Follower: the leader's relay has made its end."""
        link = self.link(peer)
        if self._owner.leads(peer):
            return
        known = link.number and link.shared == message.link and link.state is not LinkState.STREAM
        if message.again and not known:
            self._send(peer, LinkRefused(NOTHING, "there is no such link"))
            return
        if not self._owner.may_link(peer):
            self._send(peer, LinkRefused(message.link, "this host has no RDMA device now"))
            return
        self._cancel(link)
        if not message.again:
            self._lose(link, "the peer made a new link")
        link.shared, link.address, link.again = message.link, message.address, message.again
        self._link(link)

    def answered(self, peer: IPAddress, message: LinkAnswer) -> None:
        """Leader: the follower's relay has made its end, and knows ours."""
        link = self.link(peer)
        if link.awaited == "answer" and message.link == link.number:
            self._await(link, "connected")
            self._tell_relay(relay.RelayAccept(RelayKind.CONNECT, link.number, 0, message.address))

    def refused(self, peer: IPAddress, message: LinkRefused) -> None:
        """Leader: the follower has no end of the link, or one that doesn't work."""
        link = self.link(peer)
        if not self._owner.leads(peer):
            return
        if message.link == NOTHING and link.state is LinkState.NONE:
            # The follower has a device now.
            self.wake(peer)
        elif message.link == NOTHING:
            if link.state in (LinkState.UP, LinkState.DOWN, LinkState.STREAM) or (
                link.state is LinkState.MAKING and link.again
            ):
                self._lose(link, message.text)
                self._retry(link)
        elif message.link != link.number:
            return
        elif link.awaited in ("answer", "connected"):
            # After the answer too: the follower's new end may fail at once.
            self._failed(link, message.text)
        elif link.state is LinkState.UP:
            link.tries = 0
            self._break(link, message.text)
            self._mend(link)

    def framed(self, peer: IPAddress, message: PeerFrame) -> None:
        """Bytes of the peer's relay, which has given up RDMA."""
        link = self.link(peer)
        if not link.number or message.link != link.shared:
            return
        if link.state is not LinkState.STREAM:
            self._stream(link)
        self._tell_relay(relay.RelayFrame(link.number, message.data))

    # --- making one

    def _make(self, link: Link) -> None:
        """Leader: make our end."""
        link.again = bool(link.number) and self._owner.has_connections(link.peer)
        if not link.again:
            self._unlink(link)
        self._link(link)
        link.shared = link.number

    def _link(self, link: Link) -> None:
        if not link.number:
            link.number = next(self._next)
            self._numbers[link.number] = link
            link.unanswered = 0
        link.unanswered += 1
        self._set(link, LinkState.MAKING)
        self._await(link, "linked")
        self._tell_relay(relay.Number(RelayKind.LINK, link.number, self.transport))

    def _await(self, link: Link, what: str) -> None:
        self._cancel(link)
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
            self._send(link.peer, LinkRefused(shared, _plain(link.reason)))

    def _recover(self, link: Link) -> None:
        """A link with connections: try again, or give RDMA up after the last attempt. Without a
        session: do nothing until there is one."""
        if not self._owner.has_session(link.peer):
            return
        if not self._owner.leads(link.peer):
            self._send(link.peer, LinkRefused(link.shared, _plain(link.reason)))
        elif link.tries >= len(AGAIN) or not self._owner.may_link(link.peer):
            self._stream(link)
        else:
            pause = AGAIN[link.tries]
            link.tries += 1
            self._cancel(link)
            link.timer = self._loop.after(pause, lambda: self._make_if_possible(link))

    def _make_if_possible(self, link: Link) -> None:
        if self._owner.may_link(link.peer):
            self._make(link)
        elif link.state is LinkState.DOWN:
            self._recover(link)

    def _failed(self, link: Link, text: str) -> None:
        if text != link.reason:
            log.info("link can't be made", peer=str(link.peer), reason=text)
        shared = link.shared
        self._break(link, text)
        self._owner.link_failed(link.peer)
        self._mend(link, shared)

    def _retry(self, link: Link) -> None:
        """A link without connections: try again later."""
        if not self._owner.leads(link.peer):
            return
        pause = min(LEAST_PAUSE * 2.0**link.tries, MOST_PAUSE)
        link.tries += 1
        self._cancel(link)
        link.timer = self._loop.after(pause, lambda: self._make_if_possible(link))

    # --- losing one

    def _break(self, link: Link, text: str) -> None:
        """A link doesn't work. It keeps its number if it has connections."""
        self._cancel(link)
        link.reason = text
        if self._owner.has_connections(link.peer):
            self._set(link, LinkState.DOWN)
        else:
            self._unlink(link)

    def _stream(self, link: Link) -> None:
        """Bring the connections back to TCP, with the session in place of RDMA."""
        self._cancel(link)
        log.warning(
            "link can't be made again; its connections go back to TCP",
            peer=str(link.peer),
            reason=link.reason,
        )
        self._set(link, LinkState.STREAM)
        self._tell_relay(relay.Number(RelayKind.STREAM, link.number))
        self._owner.link_failed(link.peer)
        self._owner.link_leaves(link.peer)

    def _lose(self, link: Link, text: str) -> None:
        """Delete a link, with its connections."""
        self._cancel(link)
        link.reason = text or link.reason
        self._owner.link_lost(link.peer)
        self._unlink(link)

    def _give_up(self, link: Link) -> None:
        log.error(
            "link can't be made again; its connections are reset",
            peer=str(link.peer),
            reason=link.reason,
            seconds=GIVE_UP,
        )
        self._lose(link, link.reason)
        self._retry(link)

    def _unlink(self, link: Link) -> None:
        if link.number:
            self._tell_relay(relay.Number(RelayKind.UNLINK, link.number))
            self._forget_number(link)
        self._set(link, LinkState.NONE)

    def _forget_number(self, link: Link) -> None:
        self._numbers.pop(link.number, None)
        link.number = link.shared = NOTHING

    def _set(self, link: Link, state: LinkState) -> None:
        link.state = state
        if state is not LinkState.STREAM:
            link.frames.clear()
        if state is not LinkState.MAKING:
            link.awaited = ""
        broken = state in (LinkState.DOWN, LinkState.STREAM)
        if state in (LinkState.NONE, LinkState.UP) and link.deadline is not None:
            link.deadline.cancel()
            link.deadline = None
        elif broken and link.deadline is None:
            link.deadline = self._loop.after(GIVE_UP, lambda: self._give_up(link))

    def _cancel(self, link: Link) -> None:
        link.awaited = ""
        if link.timer is not None:
            link.timer.cancel()
            link.timer = None


def _plain(text: str) -> str:
    """A reason, with the characters and the length that a message may have."""
    return "".join(char if " " <= char <= "~" else "?" for char in text)[:200]
