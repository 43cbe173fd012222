"""What wants a path to another host, and where it waits until both of its ends want one.

These are requests for TCP connections (`remote_requests.py`) and queue pairs of verbs
(`verbs_remote.py`). The follower offers its own to the leader. The leader matches them with its own
ones: what belongs together becomes a connection (`remote_connections.py`). Both keep their offers
and matches as `RemoteUsers` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from dataplane.errors import WrongMessage
from dataplane.router.arenas import Arena
from dataplane.router.library_wire import IPAddress
from dataplane.router.links import Links
from dataplane.router.loop import Timer
from dataplane.router.peer_wire import Decline, Message, Withdraw
from dataplane.router.reasons import Reason
from dataplane.router.remote_events import Transport
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts

OFFERS: Final = 65536
"""Of one host, that wait for a request of this one."""
_REASONS: Final = frozenset(reason.value for reason in Reason)


def reason_of(number: int) -> Reason:
    """A peer's reason. A later version may have more of them."""
    return Reason(number) if number in _REASONS else Reason.REMOTE


class LocalUser(Protocol):
    """What a process of this host wants a path for: a `PairRequest` or a `QueuePairRecord`."""

    process: int
    namespace: int


@dataclass(slots=True, eq=False)
class RemoteUser(ABC):
    """The same, as it waits for its match."""

    local: Any
    host: RemoteHost | None = field(default=None, kw_only=True)
    """Has the peer. None: no host claims its address."""
    offer: int = field(default=0, kw_only=True)
    """Follower: the number under which the leader knows it."""
    connection: int = field(default=0, kw_only=True)
    """That was begun for it; 0: none."""
    timer: Timer | None = field(default=None, kw_only=True)
    match: PeerOffer | None = field(default=None, kw_only=True)
    """Leader: the follower's offer for the same connection, as it was last considered."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """What both ends say of each other, this host's first."""

    @property
    @abstractmethod
    def peer(self) -> tuple[str, IPAddress]:
        """The network, and the peer's address."""

    @property
    def peer_process(self) -> int:
        """Leader: the follower's number of the process at the other end; 0: unknown."""
        return 0 if self.match is None else self.match.process


class PeerOffer(NamedTuple):
    """An offer of the other host."""

    number: int
    process: int = 0
    """The other host's number; 0: unknown."""
    held: Reason | None = None
    """Why it is not to be taken yet."""


UserT = TypeVar("UserT", bound=RemoteUser)


@dataclass(slots=True, eq=False)
class _HostUsers(Generic[UserT]):
    """What waits on this host and on one other, for connections between the two."""

    requests: dict[Hashable, UserT] = field(default_factory=dict)
    """This host's."""
    offered: dict[int, UserT] = field(default_factory=dict)
    """Follower: this host's, by offer."""
    offers: dict[Hashable, PeerOffer] = field(default_factory=dict)
    keys: dict[int, Hashable] = field(default_factory=dict)
    """Leader: the other host's, both ways. Keys have this host's end first."""

    def take(self, offer: int) -> None:
        """An offer isn't open any more."""
        key = self.keys.pop(offer, None)
        if key is not None and (known := self.offers.get(key)) and known.number == offer:
            del self.offers[key]


class RemoteUsers(ABC, Generic[UserT]):
    """All that wait, of one kind. Subclasses say what is different for each kind."""

    kind: int
    """Of the relay's: `relay_wire.CONNECTION` or `QUEUE_PAIR`."""

    def __init__(
        self, sessions: PeerSessions, hosts: RemoteHosts, links: Links, numbers: Iterator[int]
    ) -> None:
        """`numbers`: of offers."""
        self._sessions = sessions
        self._hosts = hosts
        self._links = links
        self._numbers = numbers
        self._waiting: dict[Any, UserT] = {}
        self._of: defaultdict[IPAddress, _HostUsers[UserT]] = defaultdict(_HostUsers)

    def __len__(self) -> int:
        return len(self._waiting)

    # --- what is different for each kind

    @abstractmethod
    def refuse(self, request: UserT, reason: Reason) -> None:
        """There is no path for it."""

    @abstractmethod
    def why_not(self, user: Any) -> Reason | None:
        """Why it gets no path: its process has ended it, for instance; None: it may."""

    @abstractmethod
    def reserve(self, user: Any, ring: int, connection: int) -> tuple[Arena, int]:
        """Take a slot, with rings of so many bytes. Its process is not told yet.

        Raises:
            KernelRefused: there is no memory for it.
        """

    @abstractmethod
    def fail(self, user: Any, reason: Reason) -> None:
        """A connection comes to nothing. What it was begun for may be gone."""

    def enter_relay(self, user: Any) -> int:
        """It is about to get a slot of the relay: the relay's number of what uses it."""
        return self.kind

    @abstractmethod
    def is_held(self, end: Any) -> bool:
        """Whether processes still have the end of one that has hung up."""

    @abstractmethod
    def _tell(self, user: Any, arena: Arena, slot: int) -> None:
        """Tell its process that it may use the slot."""

    @abstractmethod
    def _offer_of(self, request: UserT) -> Message:
        """What the leader is told of it."""

    def _may_match(self, request: UserT, transport: Transport) -> bool:
        """Leader: whether a connection may begin; `request.match` is there. If not, the subclass
        asks again.
        """
        return True

    # --- what waits on this host

    def cancel(self, user: Any) -> int:
        """It doesn't wait any more. The connection that was begun for it, or 0."""
        request = self._waiting.pop(user, None)
        if request is None:
            return 0
        connection = request.connection
        self._detach(request)
        return connection

    def grant(self, user: Any, arena: Arena, slot: int) -> None:
        """A connection is granted."""
        request = self._waiting.pop(user)
        if request.host is not None:
            # It was accepted, not withdrawn.
            self._of[request.host.address].offered.pop(request.offer, None)
        self._detach(request)
        self._tell(user, arena, slot)

    def retry(self, user: Any) -> None:
        """A connection comes to nothing, and what it was begun for goes on waiting."""
        request = self._waiting.get(user)
        if request is not None:
            request.connection = request.offer = 0

    def _attach(self, request: UserT, host: RemoteHost) -> None:
        """Assign it to the host that has its peer."""
        request.host = host
        self._of[host.address].requests[request.key] = request
        if not self._hosts.leads(host):
            self._offer(host, request)

    def _detach(self, request: UserT) -> None:
        """Take it from the host to which it was assigned."""
        self._stop_timer(request)
        request.connection = 0
        host, request.host = request.host, None
        if host is not None:
            of_host = self._of[host.address]
            if of_host.requests.get(request.key) is request:
                del of_host.requests[request.key]
            offered = of_host.offered.pop(request.offer, None) is not None
            if offered and host.hello is not None:
                self._sessions.send(host.address, Withdraw(request.offer))
            request.offer = 0

    def _stop_timer(self, request: UserT) -> None:
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None

    # --- offers

    def _offer(self, host: RemoteHost, request: UserT) -> None:
        """Offer it to the leader, or later if much waits to be sent: whoever asks again and again
        fills no session, which all containers use.
        """
        if self._sessions.congested(host.address):
            return
        request.offer = next(self._numbers)
        self._of[host.address].offered[request.offer] = request
        self._sessions.send(host.address, self._offer_of(request))

    def eased(self, host: RemoteHost) -> None:
        """Follower: the session has room again for offers that were held back."""
        if not self._hosts.leads(host):
            for request in list(self._of[host.address].requests.values()):
                if not request.offer and not request.connection:
                    self._offer(host, request)

    def offered(self, host: RemoteHost, offer: int) -> UserT | None:
        """Follower: what was offered under a number."""
        return self._of[host.address].offered.get(offer)

    def _take_offer(
        self, host: RemoteHost, key: Hashable, offer: PeerOffer, reason: Reason | None = None
    ) -> Match | None:
        """Leader: keep an offer, and match it if possible. `reason`: decline it.

        Raises:
            WrongMessage: the host is not the follower.
        """
        if not self._hosts.leads(host):
            raise WrongMessage("the leader sends no offers")
        of_host = self._of[host.address]
        if of_host.keys.get(offer.number, key) != key:
            self.withdrawn(host, offer.number)
        if reason is None and len(of_host.keys) >= OFFERS and offer.number not in of_host.keys:
            reason = Reason.LIMIT
        if reason is not None:
            self._sessions.send(host.address, Decline(offer.number, reason))
            return None
        old = of_host.offers.get(key)
        if old is not None:
            of_host.take(old.number)
        of_host.offers[key] = offer
        of_host.keys[offer.number] = key
        return self._match(host, key)

    def withdrawn(self, host: RemoteHost, offer: int) -> None:
        """Leader: an offer isn't open any more."""
        self._of[host.address].take(offer)

    # --- matches (leader)

    def match_of(self, request: UserT) -> Match | None:
        """The match of one that waits, if there is one by now."""
        return None if request.host is None else self._match(request.host, request.key)

    def _match(self, host: RemoteHost, key: Hashable) -> Match | None:
        """Both ends of one connection, if there are both and it may begin."""
        of_host = self._of[host.address]
        request, offer = of_host.requests.get(key), of_host.offers.get(key)
        if request is None or offer is None or request.connection:
            return None
        network, ip = request.peer
        if not self._hosts.owns(host, network, ip) or not self._links.is_up(host.address):
            return None
        transport = self._links.link(host.address).transport
        if not self._hosts.may_use(network, transport):
            return None
        request.match = offer
        if not self._may_match(request, transport):
            return None
        of_host.take(offer.number)
        return Match(self, host, request, offer.number)

    def matches(self, host: RemoteHost) -> Iterator[Match]:
        """What can be matched by now: a link is up, or the host has claimed addresses."""
        for key in list(self._of[host.address].requests):
            match = self._match(host, key)
            if match is not None:
                yield match

    @abstractmethod
    def reassign(self, host: RemoteHost) -> Iterator[Match]:
        """A host claims other addresses than before. Matches that are possible now."""

    # --- sessions

    def session_up(self, host: RemoteHost) -> None:
        """The leader of a new session knows no offers."""
        if not self._hosts.leads(host):
            for request in list(self._of[host.address].requests.values()):
                self._offer(host, request)

    def session_down(self, host: RemoteHost) -> None:
        """Offers end with the session; what was offered waits for the next."""
        of_host = self._of[host.address]
        for request in of_host.requests.values():
            request.offer = 0
        of_host.offers.clear()
        of_host.keys.clear()
        of_host.offered.clear()

    def forget(self, host: RemoteHost) -> None:
        """No network is shared with the host any more."""
        for request in list(self._of[host.address].requests.values()):
            self._detach(request)
        self._of.pop(host.address, None)


class Match(NamedTuple):
    """Both ends of what is to become a connection. `offer` is the follower's number of its
    request.
    """

    users: RemoteUsers[Any]
    host: RemoteHost
    request: Any
    offer: int
