"""The links between this host's relay and those of its peers: one per peer, made again when it breaks.

Both relays must have made their end, so the routers exchange what the relays say of themselves. Of two hosts the leader (the
smaller node ID) offers, the follower answers; so both never mean different ends. A link that broke is made again under the
same number, and its connections go on where they were. If that can't be had, the relays' bytes go over the session until
every connection is back on TCP. No I/O but through the seams.
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
from dataplane.router.peer_wire import LinkAnswer, LinkOffer, LinkRefused, Message, PeerFrame
from dataplane.router.relay_wire import RelayKind

log = structlog.get_logger()

STEP: Final = 5.0
"""Seconds that each step of making a link may take."""
AGAIN: Final = (0.0, 1.0, 2.0)
"""Seconds before each attempt to make a broken link again."""
LEAST_PAUSE: Final = 1.0
MOST_PAUSE: Final = 60.0
"""Seconds before a link without connections is tried again, doubled each time."""
GIVE_UP: Final = 30.0
"""Seconds after which the connections of a link that can't be had are given up."""
NOTHING: Final = 0
"""In place of a link's number: the speaker has none."""


class State(Enum):
    """What a link is."""

    NONE = "none"
    MAKING = "being made"
    UP = "up"
    DOWN = "down"
    STREAM = "over the session"


class Sessions(Protocol):
    """See `peers.Sessions`."""

    def send(self, peer: IPAddress, message: Message) -> bool:
        """Whether it's on its way."""

    def congested(self, peer: IPAddress) -> bool:
        """Whether what can wait should."""


class Owner(Protocol):
    """Who has connections on links."""

    def has_session(self, peer: IPAddress) -> bool:
        """Whether the two routers speak with each other."""

    def may_link(self, peer: IPAddress) -> bool:
        """Whether both hosts have what a link needs, and a session."""

    def leads(self, peer: IPAddress) -> bool:
        """Whether it's this host that offers."""

    def has_connections(self, peer: IPAddress) -> bool:
        """Whether there are any on the link."""

    def link_up(self, peer: IPAddress) -> None:
        """Connections can be paired."""

    def link_failed(self, peer: IPAddress) -> None:
        """None can be for now; those that wait for it needn't."""

    def link_lost(self, peer: IPAddress) -> None:
        """Its connections can't go on: they are to be dropped before this returns."""

    def link_leaves(self, peer: IPAddress) -> None:
        """All its connections are to go back to TCP."""


@dataclass(slots=True, eq=False)
class Link:
    """One link. `number` is this host's relay's, `shared` the leader's, by which routers speak of it."""

    peer: IPAddress
    number: int = NOTHING
    shared: int = NOTHING
    state: State = State.NONE
    awaited: str = ""
    """What is awaited while it is being made: linked, answer or connected."""
    again: bool = False
    own: bytes = b""
    address: bytes = b""
    unanswered: int = 0
    """Times that the relay was told to make its end: the last answer counts."""
    tries: int = 0
    reason: str = ""
    timer: Timer | None = None
    frames: deque[bytes] = field(default_factory=deque)
    """That wait for a session with room."""
    deadline: Timer | None = None
    """When its connections are given up."""


class Links:
    """All of them."""

    def __init__(
        self,
        loop: Loop,
        say: Callable[[relay.Message], None],
        sessions: Sessions,
        owner: Owner,
    ) -> None:
        self._loop = loop
        self._say = say
        self._sessions = sessions
        self._send = sessions.send
        self._owner = owner
        self._links: dict[IPAddress, Link] = {}
        self._numbers: dict[int, Link] = {}
        self._next = itertools.count(1)

    def link(self, peer: IPAddress) -> Link:
        """A peer's, whatever there is of it."""
        found = self._links.get(peer)
        if found is None:
            found = self._links[peer] = Link(peer)
        return found

    @property
    def idle(self) -> bool:
        """Whether the relay has none."""
        return not self._numbers

    @property
    def works(self) -> bool:
        """Whether any is up."""
        return any(link.state is State.UP for link in self._links.values())

    @property
    def tries(self) -> int:
        """Attempts at the one that is the hardest to have."""
        return max((link.tries for link in self._links.values()), default=0)

    # --- what happens around them

    def wake(self, peer: IPAddress) -> None:
        """A session is up, or both hosts have what is needed now: see that there is a link."""
        link = self.link(peer)
        if not self._owner.has_session(peer):
            return
        if link.state is State.DOWN:
            link.tries = 0
            self._recover(link)
        elif link.state is State.NONE and self._owner.may_link(peer):
            if self._owner.leads(peer):
                link.tries = 0
                self._make(link)
            else:
                # For a leader that takes it for up.
                self._send(peer, LinkRefused(NOTHING, "there is no link"))

    def session_down(self, peer: IPAddress) -> None:
        """What was under way comes to nothing; what works goes on working."""
        link = self.link(peer)
        self._cancel(link)
        if link.state is State.STREAM:
            # What was on its way over the session is lost.
            self._lose(link, "the session was lost, and there was no RDMA")
        elif link.state is State.MAKING:
            self._break(link, "the session was lost")

    def relay_died(self) -> None:
        """There are no links any more, nor connections."""
        for link in self._links.values():
            self._cancel(link)
            self._forget_number(link)
            self._set(link, State.NONE)
            link.reason = "the relay ended"

    def forget(self, peer: IPAddress) -> None:
        """No network is shared with the peer, or its router knows nothing of the link: it goes, with its connections."""
        link = self.link(peer)
        self._lose(link, "")
        del self._links[peer]

    def emptied(self, peer: IPAddress) -> None:
        """No connection is on the link any more."""
        link = self.link(peer)
        if link.state in (State.STREAM, State.DOWN):
            self._unlink(link)
            self._retry(link)

    # --- what the relay says

    def linked(self, message: relay.Offered) -> None:
        """Its end is made, or can't be."""
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
            self._say(relay.RelayAccept(RelayKind.CONNECT, link.number, 0, link.address))

    def connected(self, message: relay.RelayOutcome) -> None:
        """Both ends know each other, or can't."""
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
        self._set(link, State.UP)
        self._owner.link_up(link.peer)

    def down(self, message: relay.RelayOutcome) -> None:
        """It doesn't work any more."""
        link = self._numbers.get(message.number)
        if link is None or link.state in (State.NONE, State.DOWN, State.STREAM):
            return
        log.warning("link down", peer=str(link.peer), reason=message.text)
        if link.state is State.MAKING:
            self._failed(link, message.text)
            return
        link.tries = 0
        shared = link.shared
        self._break(link, message.text)
        self._mend(link, shared)

    def frame(self, message: relay.RelayFrame) -> None:
        """Bytes for the peer's relay."""
        link = self._numbers.get(message.link)
        if link is not None and link.state is State.STREAM:
            link.frames.append(message.data)
            self._flush(link)

    def eased(self, peer: IPAddress) -> None:
        """Its session has room again."""
        self._flush(self.link(peer))

    def _flush(self, link: Link) -> None:
        while link.frames and not self._sessions.congested(link.peer):
            self._send(link.peer, PeerFrame(link.shared, link.frames.popleft()))

    # --- what the peer's router says

    def offered(self, peer: IPAddress, message: LinkOffer) -> None:
        """The leader's relay has made its end."""
        link = self.link(peer)
        if self._owner.leads(peer):
            return
        known = link.number and link.shared == message.link and link.state is not State.STREAM
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
        """The follower's has too, and knows ours."""
        link = self.link(peer)
        if link.awaited == "answer" and message.link == link.number:
            self._await(link, "connected")
            self._say(relay.RelayAccept(RelayKind.CONNECT, link.number, 0, message.address))

    def refused(self, peer: IPAddress, message: LinkRefused) -> None:
        """The follower has no end of the link, or one that doesn't work."""
        link = self.link(peer)
        if not self._owner.leads(peer):
            return
        if message.link == NOTHING and link.state is State.NONE:
            # It has what it needs by now.
            self.wake(peer)
        elif message.link == NOTHING:
            if link.state in (State.UP, State.DOWN, State.STREAM) or (
                link.state is State.MAKING and link.again
            ):
                self._lose(link, message.text)
                self._retry(link)
        elif message.link != link.number:
            return
        elif link.awaited == "answer":
            self._failed(link, message.text)
        elif link.state is State.UP:
            link.tries = 0
            self._break(link, message.text)
            self._mend(link)

    def framed(self, peer: IPAddress, message: PeerFrame) -> None:
        """Bytes of the peer's relay: it has given up RDMA."""
        link = self.link(peer)
        if not link.number or message.link != link.shared:
            return
        if link.state is not State.STREAM:
            self._stream(link)
        self._say(relay.RelayFrame(link.number, message.data))

    # --- making one

    def _make(self, link: Link) -> None:
        """The leader's first step."""
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
        self._set(link, State.MAKING)
        self._await(link, "linked")
        self._say(relay.Number(RelayKind.LINK, link.number))

    def _await(self, link: Link, what: str) -> None:
        self._cancel(link)
        link.awaited = what
        link.timer = self._loop.after(STEP, lambda: self._failed(link, f"no word of it: {what}"))

    def _mend(self, link: Link, shared: int = NOTHING) -> None:
        """After `_break`. `shared`: what the leader called it."""
        if link.state is State.DOWN:
            self._recover(link)
        elif self._owner.leads(link.peer):
            self._retry(link)
        else:
            self._send(link.peer, LinkRefused(shared, _plain(link.reason)))

    def _recover(self, link: Link) -> None:
        """Another attempt for a link with connections, or the end of attempts. Without a session: not now."""
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
        elif link.state is State.DOWN:
            self._recover(link)

    def _failed(self, link: Link, text: str) -> None:
        if text != link.reason:
            log.info("no link", peer=str(link.peer), reason=text)
        shared = link.shared
        self._break(link, text)
        self._owner.link_failed(link.peer)
        self._mend(link, shared)

    def _retry(self, link: Link) -> None:
        """A link that carries nothing has time."""
        if not self._owner.leads(link.peer):
            return
        pause = min(LEAST_PAUSE * 2.0**link.tries, MOST_PAUSE)
        link.tries += 1
        self._cancel(link)
        link.timer = self._loop.after(pause, lambda: self._make_if_possible(link))

    # --- losing one

    def _break(self, link: Link, text: str) -> None:
        """It doesn't work; if it has connections it may be made again."""
        self._cancel(link)
        link.reason = text
        if self._owner.has_connections(link.peer):
            self._set(link, State.DOWN)
        else:
            self._unlink(link)

    def _stream(self, link: Link) -> None:
        """Finish without RDMA."""
        self._cancel(link)
        log.warning("no RDMA: connections go back to TCP", peer=str(link.peer), reason=link.reason)
        self._set(link, State.STREAM)
        self._say(relay.Number(RelayKind.STREAM, link.number))
        self._owner.link_failed(link.peer)
        self._owner.link_leaves(link.peer)

    def _lose(self, link: Link, text: str) -> None:
        """Its connections go with it."""
        self._cancel(link)
        link.reason = text or link.reason
        self._owner.link_lost(link.peer)
        self._unlink(link)

    def _give_up(self, link: Link) -> None:
        log.error("link given up", peer=str(link.peer), reason=link.reason)
        self._lose(link, link.reason)
        self._retry(link)

    def _unlink(self, link: Link) -> None:
        if link.number:
            self._say(relay.Number(RelayKind.UNLINK, link.number))
            self._forget_number(link)
        self._set(link, State.NONE)

    def _forget_number(self, link: Link) -> None:
        self._numbers.pop(link.number, None)
        link.number = link.shared = NOTHING

    def _set(self, link: Link, state: State) -> None:
        link.state = state
        if state is not State.STREAM:
            link.frames.clear()
        if state is not State.MAKING:
            link.awaited = ""
        broken = state in (State.DOWN, State.STREAM)
        if state in (State.NONE, State.UP) and link.deadline is not None:
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
    """As a message may have it."""
    return "".join(each if " " <= each <= "~" else "?" for each in text)[:200]
