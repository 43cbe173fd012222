"""The table of links: the state of each, and which transport it uses or would use.

One link per peer. `links.py` changes their state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from dataplane.router.library_wire import IPAddress
from dataplane.router.link_transport import LASTS, HostTrials
from dataplane.router.loop import Loop, Timer
from dataplane.router.remote_events import Transport

NOTHING: Final = 0
"""In place of a link's number: the sender has no link."""


ABSENT: Final = {
    None: "this host doesn't know the transport",
    Transport.RDMA: "this host has no RDMA device now",
    Transport.RELAY: "this host's relay takes no TCP now",
}
"""Why an offer of a link is refused."""


LOSSES: Final = 4
"""How often in a row a link over RDMA may be lost soon after it came up before that counts."""


class LinkState(Enum):
    """What a link is."""

    NONE = "none"
    MAKING = "being made"
    UP = "up"
    DOWN = "down"
    """It is made again if its connections need it."""
    STREAM = "over the session"
    """Without a transport: only until its connections are back on TCP."""


class LinkOwner(Protocol):
    """Has the connections on the links, and decides whether there may be one: `remote.Remotes`."""

    def has_session(self, peer: IPAddress) -> bool:
        """Whether there is a session between the two routers."""

    def transports(self, peer: IPAddress) -> Set[Transport]:
        """The transports that both hosts have; none without a session."""

    def opens_rdma(self, peer: IPAddress) -> bool:
        """Whether this host's RDMA device is being opened, and the peer has one."""

    def leads(self, peer: IPAddress) -> bool:
        """Whether this host makes the link."""

    def has_connections(self, peer: IPAddress) -> bool:
        """Whether there are connections on the link that go on if it is made again."""

    def is_empty(self, peer: IPAddress) -> bool:
        """Whether nothing is left of any connection on the link."""

    def link_up(self, peer: IPAddress) -> None:
        """Connections can be paired."""

    def link_failed(self, peer: IPAddress) -> None:
        """Connections can't be paired for now: refuse the requests that wait for the link."""

    def link_lost(self, peer: IPAddress) -> None:
        """The connections can't go on: drop all of them before this returns."""

    def link_leaves(self, peer: IPAddress) -> None:
        """Bring all connections back to TCP."""


class LinkSockets(Protocol):
    """Makes the TCP connections of links: `link_sockets.LinkSockets`.

    Ends with `Links.sockets_ready` or `Links.sockets_failed`, called from the loop, or with
    `cancel`.
    """

    def dial(self, peer: IPAddress, number: int, ticket: bytes) -> None:
        """Leader: dial the peer's router."""

    def expect(self, peer: IPAddress, number: int) -> bytes:
        """Follower: wait for the leader's router to dial. The ticket that it has to show."""

    def cancel(self, number: int) -> None:
        """Close what there is for a link."""


@dataclass(slots=True, eq=False)
class Link:
    """One link. `number` is that of this host's relay, `shared` that of the leader's relay, which
    the routers use in their messages."""

    peer: IPAddress
    number: int = NOTHING
    shared: int = NOTHING
    state: LinkState = LinkState.NONE
    awaited: str = ""
    """The next event while it is being made: "linked", "answer", "sockets", "connected" or
    "confirmation"."""
    transport: Transport = Transport.RDMA
    trials: HostTrials = field(default_factory=HostTrials)
    attempt: int = 0
    """The leader's number of the last offer: what is said about earlier ones comes too late."""
    confirmed: bool = False
    """Leader, over TCP: the follower's end is up."""
    since: float = 0.0
    """When it came up."""
    losses: int = 0
    """Over RDMA: how often in a row it was lost soon after that."""
    worked: bool = False
    """Over TCP: bytes got through before it was lost."""
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
    deadlines: dict[int, Timer] = field(default_factory=dict)
    """When those that use it are reset, or checked next, by who they are."""


class LinkTable:
    """See the module."""

    def __init__(self, loop: Loop, owner: LinkOwner) -> None:
        self._loop = loop
        self._owner = owner
        self._links: dict[IPAddress, Link] = {}
        self._numbers: dict[int, Link] = {}

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
        """Whether there is no link, after at least two attempts, or while all transports rest."""
        link = self.link(peer)
        failed = link.state is not LinkState.UP and (link.tries > 1 or self.rests(link))
        return failed and not self.may_change(link)

    def transport(self, peer: IPAddress) -> Transport | None:
        """What the link to a peer uses, or would use; None: the hosts share no transport."""
        link = self.link(peer)
        if link.number:
            return link.transport
        return self.choose(link) or (Transport.RELAY if self.rests(link) else None)

    def idle(self, transport: Transport) -> bool:
        """Whether the relay has no links of a transport."""
        return not any(link.transport is transport for link in self._numbers.values())

    def works(self, transport: Transport) -> bool:
        """Whether at least one link of a transport is up."""
        return any(
            link.state is LinkState.UP and link.transport is transport
            for link in self._links.values()
        )

    def tries(self, transport: Transport) -> int:
        """The most failed attempts at one link of a transport."""
        links = (link for link in self._links.values() if link.transport is transport)
        return max((link.tries for link in links), default=0)

    def continues(self, link: Link) -> bool:
        """Whether the link has connections that go on if it is made again."""
        return bool(link.number) and self._owner.has_connections(link.peer)

    def choose(self, link: Link) -> Transport | None:
        """The transport of the next new link; None: the hosts share none, or all rest."""
        return link.trials.choose(self._owner.transports(link.peer), self._loop.now())

    def rests(self, link: Link) -> bool:
        """Leader: whether no link is tried for now. What the hosts share has failed."""
        return bool(self._owner.transports(link.peer)) and self.choose(link) is None

    def may_make(self, link: Link) -> bool:
        """Whether the hosts have the transport that an attempt needs."""
        if self.continues(link):
            return link.transport in self._owner.transports(link.peer)
        return self.choose(link) is not None

    def is_superfluous(self, link: Link) -> bool:
        """Leader: whether a link over TCP without connections is to end: RDMA may be possible, or
        TCP isn't any more.
        """
        return (
            link.state is LinkState.UP
            and link.transport is Transport.RELAY
            and self._owner.leads(link.peer)
            and self._owner.has_session(link.peer)
            and self._owner.is_empty(link.peer)
            and self.choose(link) is not Transport.RELAY
        )

    def is_missing(self, link: Link) -> bool:
        """Whether there is no link, and one can be made. It waits for a device that is being
        opened: a link over TCP would be in the way of one over RDMA.
        """
        return (
            link.state is LinkState.NONE
            and self.choose(link) is not None
            and not self._owner.opens_rdma(link.peer)
        )

    def device_changed(self, peer: IPAddress) -> None:
        """One of the hosts has another RDMA device: what is known of the devices is void."""
        self.link(peer).trials.rdma.worked()

    def count_failure(self, link: Link, text: str) -> None:
        """Leader: note a failure of RDMA. A device that isn't there says nothing about the way."""
        if (
            link.transport is Transport.RDMA
            and text != ABSENT[Transport.RDMA]
            and self._owner.leads(link.peer)
        ):
            link.trials.rdma.failed(text, self._loop.now())
            if link.state is LinkState.NONE and self.choose(link) is Transport.RELAY:
                link.tries = 0

    def note_loss(self, link: Link, text: str, attempts: int) -> None:
        """A link that was up is lost. If that happens again and again soon after it comes up,
        something on the way doesn't let its bytes through. `attempts`: how many failed ones bring
        its connections back to TCP.
        """
        lasted = self._loop.now() - link.since >= LASTS
        if link.transport is Transport.RELAY:
            self._note_loss_of_tcp(link, text, lasted)
            link.tries = attempts if self._loop.now() < link.trials.tcp.until else 0
            return
        link.losses = 1 if lasted else link.losses + 1
        link.tries = max(0, link.losses - LOSSES)
        if lasted:
            link.trials.rdma.worked()
        else:
            self.count_failure(link, text)

    def _note_loss_of_tcp(self, link: Link, text: str, lasted: bool) -> None:
        """Neither killed connections nor a long outage says anything about the way."""
        if lasted and link.worked:
            link.trials.tcp.worked()
        elif not lasted and not link.worked and self._owner.leads(link.peer):
            link.trials.tcp.failed(text, self._loop.now())

    def may_change(self, link: Link) -> bool:
        """Whether a link whose attempts fail will use TCP soon. Requests may wait for that."""
        return (
            link.transport is Transport.RDMA
            and Transport.RELAY in self._owner.transports(link.peer)
            and self._loop.now() >= link.trials.tcp.until
        )

    def cancel(self, link: Link) -> None:
        """Nothing is awaited for a link."""
        link.awaited = ""
        if link.timer is not None:
            link.timer.cancel()
            link.timer = None

    def forget_number(self, link: Link) -> None:
        """The relay has no end of a link any more."""
        link.own = link.address = b""
        self._numbers.pop(link.number, None)
        link.number = link.shared = NOTHING
