"""Connections to containers of other hosts: who is paired with whom, over which relay, and what becomes of it.

Both ends ask, each its own router, and the routers compare: of two hosts the leader (the smaller node ID) matches what the
follower offers with what waits here. Then

    follower                          leader
    Offer           ->                          a process has asked
                    <-                Place     a slot of the leader's relay is ready
    Accept          ->                          so is one of the follower's, which knows the other; its process is granted
                    <-                Paired    both know each other; the leader's process is granted

Every step may be the last that the other host takes. What keeps that harmless: no end uses a ring before the other has said
in it that it looks, so an end whose peer was never granted can be sent back to TCP; and it is, unless nobody can say any more
whether the peer was, when its router came back as another one: then both see a reset. Only the memory of a connection that
its relay has let go of is used again. Who owns an address is what the peer's router says, and only for networks that this
host shares with it; each router asks its own kernel about its own end, when it asks and when it is granted. No I/O but
through the seams.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

import structlog

from dataplane.control import OWNED
from dataplane.errors import KernelRefused, WrongMessage
from dataplane.router import layout
from dataplane.router import peer_wire as peers
from dataplane.router import relay_wire as relay
from dataplane.router.arenas import Arena, ConnectionEnd
from dataplane.router.knowledge import Knowledge, Network
from dataplane.router.library_wire import Address, IPAddress
from dataplane.router.links import Links, State
from dataplane.router.loop import Loop, Timer
from dataplane.router.pair_requests import PairRequest
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.relay_wire import RelayKind
from dataplane.router.seams import ArenaMemory, SocketTable

log = structlog.get_logger()

CONNECTIONS: Final = 4096
"""Of one link."""
OFFERS: Final = 65536
"""Of one peer, that wait for an end of this host."""
OWNER_PATIENCE: Final = 2.0
"""Seconds for which an ask waits for a host that says it has the address: its container may just have come."""
STEP: Final = 10.0
"""Seconds for each step of pairing two ends, the relay's and the peer's."""
SESSION_PATIENCE: Final = 30.0
"""Seconds for which asks wait for a session that was lost."""
ORPHAN_LEAST: Final = 0.05
ORPHAN_MOST: Final = 2.0
"""Seconds between two looks at whether anybody still has the socket of a process that has hung up."""
_PER_SLOT: Final = layout.SIDES * layout.PAGE
_REASONS: Final = frozenset(reason.value for reason in Reason)
_REMEMBERED: Final = 65536

Key = tuple[str, Address, Address]
"""Network, and both ends, this host's first."""


class Peers(Protocol):
    """See `peers.Sessions`."""

    def send(self, peer: IPAddress, message: peers.Message) -> bool:
        """Whether it's on its way."""
        ...

    def congested(self, peer: IPAddress) -> bool:
        """Whether what can wait should."""
        ...


class Phase(Enum):
    """How far a connection is. It only goes on."""

    PLACING = 0
    """Our relay makes its place."""
    OFFERED = 1
    """Leader: the follower has our place."""
    PAIRING = 2
    """Our relay has the peer's place."""
    GRANTED = 3
    DROPPING = 4
    """Our relay lets go of it."""


@dataclass(slots=True, eq=False)
class Remote:
    """One end, here, of a connection to another host. `number` is our relay's."""

    number: int
    peer: Peer
    leads: bool
    offer: int
    waiting: PairRequest
    end: ConnectionEnd
    arena: Arena
    slot: int
    peer_number: int = 0
    place: bytes = b""
    phase: Phase = Phase.PLACING
    confirmed: bool = False
    """The peer's end was granted too."""
    closed: bool = False
    """No process here has it any more, and the relay knows."""
    finished: bool = False
    ended: bool = False
    """The relay has sent all and got all, or it's broken."""
    leaves: bool = False
    abandoned: bool = False
    """Leader: its process has gone while the relay paired it. The follower's end is granted already, so this one is closed
    as soon as it's paired."""
    timer: Timer | None = None

    @property
    def bytes(self) -> int:
        """What is registered for it."""
        return layout.SIDES * self.arena.ring + _PER_SLOT


@dataclass(slots=True, eq=False)
class Ask:
    """An ask that waits here for an end elsewhere."""

    waiting: PairRequest
    network: str
    server: Address
    """Where it really leads."""
    peer: Peer | None = None
    offer: int = 0
    remote: Remote | None = None
    timer: Timer | None = None

    @property
    def key(self) -> Key:
        return self.network, self.waiting.request.local, self.server


@dataclass(slots=True, eq=False)
class Peer:
    """Another host."""

    address: IPAddress
    hello: peers.PeerHello | None = None
    """While there is a session."""
    instance: str = ""
    node: str = ""
    """Of the last session."""
    owned: dict[str, frozenset[IPAddress]] = field(default_factory=dict)
    told: dict[str, tuple[str, ...]] | None = None
    """What it was told that we own."""
    asks: dict[Key, Ask] = field(default_factory=dict)
    by_offer: dict[int, Ask] = field(default_factory=dict)
    """Follower: what we have offered."""
    offers: dict[Key, int] = field(default_factory=dict)
    keys: dict[int, Key] = field(default_factory=dict)
    """Leader: what it has offered, both ways; keys have our end first."""
    taken: dict[int, Remote] = field(default_factory=dict)
    """Leader: offers that are being paired, or are."""
    broken: dict[int, None] = field(default_factory=dict)
    """Leader: offers that were granted here and then lost: a follower that doesn't know may not go back to TCP."""
    remotes: dict[int, Remote] = field(default_factory=dict)
    timer: Timer | None = None


@dataclass(slots=True)
class Counts:
    """Since the start."""

    granted: int = 0
    broken: int = 0
    undone: int = 0
    """Ends whose peer was never granted."""
    left: int = 0
    """Went back to TCP."""
    refused: Counter[int] = field(default_factory=Counter)


class Remotes:
    """`remote_pairing.RemotePairing`, `sessions.SessionUser` and `links.Owner` in one: the registry of connections to other hosts."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sessions: Peers,
        say: Callable[..., None],
        kernel: SocketTable,
        memory: ArenaMemory,
        node: Callable[[], str],
    ) -> None:
        """`say`: tells the relay, `relay.RelayProcess.say`. `node`: this host's node ID, "" without one."""
        self._pairing = pairing
        self._loop = loop
        self._sessions = sessions
        self._say = say
        self._kernel = kernel
        self._memory = memory
        self._node = node
        self.links = Links(loop, say, sessions, self)
        self.peers: dict[IPAddress, Peer] = {}
        self.remotes: dict[int, Remote] = {}
        self.counts = Counts()
        self.registered = 0
        """Bytes."""
        self.why = "it is being looked for"
        """Why the relay has no device; "" if it has one."""
        self._asks: dict[PairRequest, Ask] = {}
        self._homeless: dict[PairRequest, Ask] = {}
        """Asks for addresses that no host has claimed."""
        self._lent: set[int] = set()
        """Arenas that the relay has."""
        self._numbers = itertools.count(1)
        self._offer_numbers = itertools.count(1)
        pairing.use_remote(self)

    # --- what is known

    @property
    def ready(self) -> bool:
        """Whether this host's relay has a device."""
        return not self.why

    @property
    def knowledge(self) -> Knowledge:
        """What the driver said."""
        return self._pairing.knowledge

    def wanted(self) -> frozenset[IPAddress]:
        """The hosts with whom there shall be sessions: those that share a network, and that have a connection left."""
        sharing = {
            peer
            for network in self.knowledge.networks.values()
            if network.accelerated and network.rdma
            for peer in network.peers
        }
        return frozenset(sharing | {each.address for each in self.peers.values() if each.remotes})

    def hellos(self) -> list[peers.PeerHello]:
        """What those say of themselves with whom there are sessions."""
        return [peer.hello for peer in self.peers.values() if peer.hello is not None]

    def learned(self) -> None:
        """The driver knows something new, or some time has passed."""
        wanted = self.wanted()
        for address in [each for each in self.peers if each not in wanted]:
            self._forget_peer(self.peers[address])
        for ask in [each for each in self._asks.values() if each.remote is None]:
            network = self.knowledge.networks.get(ask.network)
            if network is None or not network.rdma:
                self._refuse(ask, Reason.RDMA_OFF)
        for peer in self.peers.values():
            self._tell_owns(peer)

    def device(self, why: str) -> None:
        """The relay has a device now, or why it has none."""
        before, self.why = self.ready, why
        if self.ready and not before:
            for peer in self.peers.values():
                self.links.wake(peer.address)
        elif before and not self.ready:
            for ask in [each for each in self._asks.values() if each.remote is None]:
                self._refuse(ask, Reason.NO_RDMA)

    def _owners(self, network: str, ip: IPAddress) -> list[Peer]:
        known = self.knowledge.networks.get(network)
        return [
            peer
            for peer in self.peers.values()
            if peer.hello is not None
            and ip in peer.owned.get(network, ())
            and self._shares(known, peer)
        ]

    def _shares(self, network: Network | None, peer: Peer) -> bool:
        return (
            network is not None
            and network.accelerated
            and network.rdma
            and peer.address in network.peers
        )

    def _tell_owns(self, peer: Peer) -> None:
        if peer.hello is None:
            return
        own: dict[str, tuple[str, ...]] = {}
        left, untold = OWNED, 0
        for network in self.knowledge.networks.values():
            if self._shares(network, peer):
                own[network.id] = network.own[:left]
                left -= len(own[network.id])
                untold += len(network.own) - len(own[network.id])
        if own != peer.told and self._sessions.send(peer.address, peers.Owns(own)):
            peer.told = own
            if untold:
                log.warning(
                    "a host isn't told of all addresses here; connections to the others stay on the overlay",
                    host=str(peer.address),
                    untold=untold,
                )

    # --- asks (`remote_pairing.RemotePairing`)

    def why_not(self, network: Network) -> Reason | None:
        """See `RemotePairing`."""
        if not network.rdma:
            return Reason.RDMA_OFF
        if not network.peers:
            return Reason.REMOTE
        if not self.ready:
            return Reason.NO_RDMA
        known = [
            peer.hello
            for each in network.peers
            if (peer := self.peers.get(each)) is not None and peer.hello is not None
        ]
        if not known:
            return Reason.NO_SESSION
        return None if any(hello.rdma for hello in known) else Reason.PEER_NO_RDMA

    def pair(self, waiting: PairRequest, network: Network) -> None:
        """See `RemotePairing`."""
        if not self._is_only_one(waiting, network):
            waiting.ambiguous = True
            self._pairing.refuse(waiting, Reason.AMBIGUOUS)
            return
        ask = Ask(waiting, network.id, waiting.peer)
        self._asks[waiting] = ask
        if not self._settle(ask):
            self._wait_for_owner(ask)

    def _is_only_one(self, waiting: PairRequest, network: Network) -> bool:
        """Whether no other connection of this container leads from the same port to the same server."""
        local, server = waiting.request.local, waiting.peer
        leading = [
            server,
            *(Address(vip, server.port) for vip in network.leading.get(server.ip, ())),
        ]
        return not any(
            each != waiting.request.remote and self._kernel.exists(waiting.namespace, local, each)
            for each in leading
        )

    def _settle(self, ask: Ask) -> bool:
        """Give an ask to the host that has its other end; false if that isn't known."""
        owners = self._owners(ask.network, ask.server.ip)
        if len(owners) != 1:
            return False
        peer = owners[0]
        assert peer.hello is not None
        self._homeless.pop(ask.waiting, None)
        self._stop(ask)
        if not peer.hello.rdma:
            self._refuse(ask, Reason.PEER_NO_RDMA)
            return True
        if self._fails(peer):
            self._refuse(ask, Reason.NO_LINK)
            return True
        ask.peer = peer
        peer.asks[ask.key] = ask
        if self.leads(peer.address):
            self._match(peer, ask.key)
        else:
            self._offer(peer, ask)
        return True

    def _wait_for_owner(self, ask: Ask) -> None:
        self._homeless[ask.waiting] = ask
        ask.timer = self._loop.after(OWNER_PATIENCE, lambda: self._refuse(ask, Reason.REMOTE))

    def _refuse(self, ask: Ask, reason: Reason) -> None:
        self.counts.refused[reason] += 1
        self._pairing.refuse(ask.waiting, reason)

    def cancel(self, waiting: PairRequest) -> None:
        """See `RemotePairing`."""
        ask = self._asks.pop(waiting, None)
        if ask is None:
            return
        remote = ask.remote
        self._detach(ask)
        if remote is not None:
            self._fail(remote, Reason.NOT_FOUND)

    def _detach(self, ask: Ask) -> None:
        """It is with no host any more."""
        self._stop(ask)
        self._homeless.pop(ask.waiting, None)
        peer, ask.peer = ask.peer, None
        ask.remote = None
        if peer is None:
            return
        if peer.asks.get(ask.key) is ask:
            del peer.asks[ask.key]
        if peer.by_offer.pop(ask.offer, None) is not None and peer.hello is not None:
            self._sessions.send(peer.address, peers.Withdraw(ask.offer))
        ask.offer = 0

    def _stop(self, ask: Ask) -> None:
        if ask.timer is not None:
            ask.timer.cancel()
            ask.timer = None

    # --- offers

    def _offer(self, peer: Peer, ask: Ask) -> None:
        ask.offer = next(self._offer_numbers)
        peer.by_offer[ask.offer] = ask
        local, server = ask.waiting.request.local, ask.server
        message = peers.Offer(ask.offer, ask.network, str(local), str(server))
        self._sessions.send(peer.address, message)

    def _offered(self, peer: Peer, message: peers.Offer) -> None:
        if not self.leads(peer.address):
            raise WrongMessage("an offer of the host that takes offers")
        key = (message.network, peers.end_of(message.remote), peers.end_of(message.local))
        reason = self._why_no_offer(peer)
        if reason is not None:
            self._sessions.send(peer.address, peers.Decline(message.offer, reason))
            return
        old = peer.offers.get(key)
        if old is not None:
            peer.keys.pop(old, None)
        peer.offers[key] = message.offer
        peer.keys[message.offer] = key
        self._match(peer, key)

    def _why_no_offer(self, peer: Peer) -> Reason | None:
        if not self.ready:
            return Reason.PEER_NO_RDMA
        if self._fails(peer):
            return Reason.NO_LINK
        return Reason.LIMIT if len(peer.keys) >= OFFERS else None

    def _fails(self, peer: Peer) -> bool:
        """Whether a link with the peer has been tried, and tried again."""
        link = self.links.link(peer.address)
        return link.state is not State.UP and link.tries > 1

    def _withdrawn(self, peer: Peer, message: peers.Withdraw) -> None:
        self._take_offer(peer, message.offer)
        remote = peer.taken.get(message.offer)
        if remote is not None and remote.phase is not Phase.GRANTED:
            self._fail(remote, Reason.NOT_FOUND, tell=False)

    def _take_offer(self, peer: Peer, offer: int) -> None:
        key = peer.keys.pop(offer, None)
        if key is not None and peer.offers.get(key) == offer:
            del peer.offers[key]

    def _declined(self, peer: Peer, message: peers.Decline) -> None:
        ask = peer.by_offer.get(message.offer)
        reason = Reason(message.reason) if message.reason in _REASONS else Reason.REMOTE
        if ask is not None:
            self._refuse(ask, reason)
            return
        for remote in [each for each in peer.remotes.values() if each.offer == message.offer]:
            if not remote.leads and not remote.confirmed:
                self._undo(remote)

    # --- pairing: the leader

    def _match(self, peer: Peer, key: Key) -> None:
        """Pair an ask of ours with an offer, if there are both."""
        ask, offer = peer.asks.get(key), peer.offers.get(key)
        if ask is None or offer is None or ask.remote is not None:
            return
        network, _, server = key
        if not self._shares(self.knowledge.networks.get(network), peer):
            return
        if server.ip not in peer.owned.get(network, ()):
            return
        if self.links.link(peer.address).state is not State.UP:
            return
        self._take_offer(peer, offer)
        reason = self._begin(peer, ask, offer, leads=True)
        if reason is not None:
            self._sessions.send(peer.address, peers.Decline(offer, reason))
            self._refuse(ask, reason)

    def _begin(
        self, peer: Peer, ask: Ask, offer: int, *, leads: bool, number: int = 0, place: bytes = b""
    ) -> Reason | None:
        """Have our relay make a place for a connection; or why not."""
        waiting = ask.waiting
        assert peer.hello is not None
        ring = min(peer.hello.ring, self.knowledge.settings.remote_ring)
        if ring < layout.REMOTE_RING_LEAST or ring & (ring - 1):
            return Reason.PEER_NO_RDMA
        cost = layout.SIDES * ring + _PER_SLOT
        if (
            len(peer.remotes) >= CONNECTIONS
            or self.registered + cost > self.knowledge.settings.remote_memory
            or self._pairing.is_full(waiting.namespace)
        ):
            return Reason.LIMIT
        if not self._is_open(waiting):
            return Reason.NOT_FOUND
        connection = next(self._numbers)
        try:
            arena, slot = self._pairing.place(waiting, ring, connection)
        except KernelRefused:
            return Reason.MEMORY
        end = arena.slots[slot].ends[0]
        assert end is not None
        remote = Remote(connection, peer, leads, offer, waiting, end, arena, slot, number, place)
        ask.remote = remote
        self.remotes[connection] = remote
        peer.remotes[connection] = remote
        self.registered += remote.bytes
        if leads:
            peer.taken[offer] = remote
        self._await(remote)
        link = self.links.link(peer.address).number
        incarnation = arena.slots[slot].incarnation
        self._say(relay.RelaySlot(connection, link, slot, arena.id, incarnation))
        return None

    def _is_open(self, waiting: PairRequest) -> bool:
        ask = waiting.request
        return self._kernel.is_open(waiting.namespace, ask.local, ask.remote, ask.cookie)

    def _await(self, remote: Remote) -> None:
        self._rest(remote)
        remote.timer = self._loop.after(STEP, lambda: self._too_late(remote))

    def _rest(self, remote: Remote) -> None:
        if remote.timer is not None:
            remote.timer.cancel()
            remote.timer = None

    def _too_late(self, remote: Remote) -> None:
        if remote.phase is Phase.GRANTED:
            # The leader owes us its word, and says it again.
            self._ask_again(remote)
        elif remote.phase is not Phase.DROPPING:
            log.warning("pairing takes too long", peer=str(remote.peer.address))
            self._fail(remote, Reason.NO_LINK)

    def _ask_again(self, remote: Remote) -> None:
        self._await(remote)
        if remote.peer.hello is not None:
            message = peers.PeerAccept(remote.offer, remote.number, remote.place)
            self._sessions.send(remote.peer.address, message)

    def _accepted(self, peer: Peer, message: peers.PeerAccept) -> None:
        remote = peer.taken.get(message.offer)
        if remote is None or remote.phase is Phase.DROPPING:
            reason = Reason.BROKEN if message.offer in peer.broken else Reason.NOT_FOUND
            self._sessions.send(peer.address, peers.Drop(message.connection, reason))
        elif remote.phase is Phase.OFFERED:
            remote.peer_number, remote.place = message.connection, message.place
            if not self._is_open(remote.waiting):
                self._fail(remote, Reason.NOT_FOUND)
                return
            remote.phase = Phase.PAIRING
            self._await(remote)
            self._pair(remote, message.place)
        elif remote.phase is Phase.GRANTED and remote.peer_number == message.connection:
            self._sessions.send(peer.address, peers.Paired(message.connection))

    def _pair(self, remote: Remote, place: bytes) -> None:
        self._say(relay.RelayAccept(RelayKind.PAIR, remote.number, remote.peer_number, place))

    # --- pairing: the follower

    def _placed_there(self, peer: Peer, message: peers.Placement) -> None:
        ask = peer.by_offer.get(message.offer)
        reason: Reason | None = Reason.NOT_FOUND
        if ask is not None and ask.remote is None:
            reason = Reason.NO_LINK
            if self.links.link(peer.address).state is State.UP:
                reason = self._begin(
                    peer,
                    ask,
                    message.offer,
                    leads=False,
                    number=message.connection,
                    place=message.place,
                )
        if reason is not None:
            self._sessions.send(peer.address, peers.Drop(message.connection, reason))
            if ask is not None and ask.remote is None:
                self._refuse(ask, reason)

    def _paired_there(self, peer: Peer, message: peers.Paired) -> None:
        remote = self.remotes.get(message.connection)
        if remote is not None and remote.peer is peer and not remote.leads:
            remote.confirmed = True
            self._rest(remote)

    # --- what the relay says

    def relay_said(self, message: relay.Message) -> None:
        """See `relay.Owner`."""
        match message:
            case relay.Offered(kind=RelayKind.PLACED):
                self._placed(message)
            case relay.Offered():
                self.links.linked(message)
            case relay.RelayOutcome(kind=RelayKind.PAIRED):
                self._paired(message)
            case relay.RelayOutcome(kind=RelayKind.DOWN):
                self.links.down(message)
            case relay.RelayOutcome():
                self.links.connected(message)
            case relay.RelayFrame():
                self.links.frame(message)
            case relay.Number():
                self._over(message)

    def _placed(self, message: relay.Offered) -> None:
        remote = self.remotes.get(message.number)
        if remote is None or remote.phase is not Phase.PLACING:
            return
        if message.error:
            log.warning("the relay has no place for a connection", reason=message.text)
            self._fail(remote, Reason.MEMORY)
        elif remote.leads:
            remote.phase = Phase.OFFERED
            self._await(remote)
            place = peers.Placement(remote.offer, remote.number, message.words)
            self._sessions.send(remote.peer.address, place)
        else:
            theirs, remote.place = remote.place, message.words
            remote.phase = Phase.PAIRING
            self._await(remote)
            self._pair(remote, theirs)

    def _paired(self, message: relay.RelayOutcome) -> None:
        remote = self.remotes.get(message.number)
        if remote is None or remote.phase is not Phase.PAIRING:
            return
        if message.error:
            log.warning("the relay can't pair a connection", reason=message.text)
            self._fail(remote, Reason.NO_LINK)
            return
        peer = remote.peer.address
        if remote.leads:
            answer: peers.Message = peers.Paired(remote.peer_number)
            remote.confirmed = True
        else:
            if not self._is_open(remote.waiting):
                self._fail(remote, Reason.NOT_FOUND)
                return
            answer = peers.PeerAccept(remote.offer, remote.number, remote.place)
        if not self._sessions.send(peer, answer) and not remote.leads:
            # The leader never hears of it.
            self._fail(remote, Reason.NO_SESSION)
        elif remote.abandoned:
            remote.phase = Phase.GRANTED
            self._rest(remote)
            self.released(remote.number)
        else:
            self._grant(remote)

    def _grant(self, remote: Remote) -> None:
        ask = self._asks.pop(remote.waiting)
        remote.peer.by_offer.pop(ask.offer, None)
        ask.offer = 0
        self._detach(ask)
        remote.phase = Phase.GRANTED
        self._rest(remote)
        if not remote.confirmed:
            self._await(remote)
        self.counts.granted += 1
        self._pairing.grant(remote.waiting, remote.arena, remote.slot)

    def _over(self, message: relay.Number) -> None:
        remote = self.remotes.get(message.number)
        if remote is None:
            return
        if message.kind == RelayKind.DROPPED:
            self._dropped(remote)
        elif remote.phase is Phase.DROPPING:
            return
        elif message.kind == RelayKind.LEFT:
            self.counts.left += not (remote.closed or remote.ended)
            remote.confirmed = True
            self._drop(remote)
        elif message.kind in (RelayKind.ENDED, RelayKind.FINISHED):
            # Only a peer's end that was granted says so.
            remote.confirmed = True
            if message.state == relay.BROKEN and not (remote.ended and remote.finished):
                self._count_broken(remote)
                remote.ended = remote.finished = True
            elif message.kind == RelayKind.ENDED:
                remote.ended = True
            else:
                remote.finished = True
            self._drop_if_done(remote)

    def _drop_if_done(self, remote: Remote) -> None:
        if remote.closed and remote.ended and remote.finished:
            self._drop(remote)

    # --- the ends of connections

    def released(self, connection: int) -> None:
        """See `RemotePairing`."""
        remote = self.remotes.get(connection)
        if remote is None or remote.phase is not Phase.GRANTED or remote.closed:
            return
        remote.closed = True
        if remote.ended and remote.finished:
            self._drop(remote)
        else:
            self._say(relay.Number(RelayKind.CLOSE, connection))

    def orphaned(self, connection: int) -> None:
        """See `RemotePairing`."""
        remote = self.remotes.get(connection)
        if remote is not None:
            self._look_at_orphan(remote, ORPHAN_LEAST)

    def _look_at_orphan(self, remote: Remote, pause: float) -> None:
        end = remote.end
        if self._kernel.is_held(end.namespace, end.local, end.remote, end.cookie):
            later = min(pause * 2, ORPHAN_MOST)
            self._loop.after(pause, lambda: self._look_at_orphan(remote, later))
        else:
            self._give_back(remote)

    def _give_back(self, remote: Remote) -> None:
        """The process's side of the slot is free."""
        slot = remote.arena.slots.get(remote.slot)
        if slot is not None and slot.connection == remote.number and slot.ends[0] is remote.end:
            self._pairing.end(remote.arena, remote.slot, 0)

    def leave(self, connection: int) -> None:
        """See `RemotePairing`."""
        remote = self.remotes.get(connection)
        if remote is None or remote.leaves:
            return
        remote.leaves = True
        if remote.phase is Phase.GRANTED:
            self._say(relay.Number(RelayKind.LEAVE, connection))
        elif remote.phase is not Phase.DROPPING:
            self._fail(remote, Reason.RDMA_OFF)

    def bell_made(self, arena: int, index: int, descriptor: int) -> None:
        """See `RemotePairing`."""
        if arena in self._lent:
            self._say(relay.RelayArena(RelayKind.BELL, arena, index), (descriptor,))

    def arena_made(self, arena: Arena, bell: int) -> None:
        """See `RemotePairing`."""
        try:
            self._lent.add(arena.id)
            self._say(relay.RelayArena(RelayKind.ARENA, arena.id, arena.ring), (arena.memory, bell))
        finally:
            self._memory.close_hearing(bell)

    def arena_closed(self, arena: Arena) -> None:
        """See `RemotePairing`."""
        if arena.id in self._lent:
            self._lent.remove(arena.id)
            self._say(relay.RelayArena(RelayKind.DISCARD, arena.id))

    # --- what goes wrong

    def _fail(self, remote: Remote, reason: Reason, *, tell: bool = True) -> None:
        """Before the grant: both stay on TCP."""
        if remote.phase in (Phase.GRANTED, Phase.DROPPING) or remote.abandoned:
            return
        ask = self._asks.pop(remote.waiting, None)
        if ask is not None:
            self._detach(ask)
            self.counts.refused[reason] += 1
            self._pairing.refuse(remote.waiting, reason)
        if remote.leads and remote.phase is Phase.PAIRING and reason is Reason.NOT_FOUND:
            remote.abandoned = True
            self._give_back(remote)
            return
        if tell and remote.peer.hello is not None:
            message: peers.Message = peers.Decline(remote.offer, reason)
            if remote.peer_number:
                message = peers.Drop(remote.peer_number, reason)
            self._sessions.send(remote.peer.address, message)
        self._drop(remote)
        self._give_back(remote)

    def _undo(self, remote: Remote) -> None:
        """After the grant: the peer's end never was granted, so nothing is in the rings. This one goes back to TCP."""
        if remote.phase is not Phase.GRANTED:
            self._fail(remote, Reason.NOT_FOUND, tell=False)
            return
        self.counts.undone += 1
        self._drop(remote)
        self._memory.finish(remote.arena.memory, remote.slot)
        self._alarm(remote.arena)

    def _break(self, remote: Remote, *, tell: bool = False) -> None:
        """Bytes may be lost: both ends see a reset."""
        if remote.phase is not Phase.GRANTED:
            self._fail(remote, Reason.NO_LINK, tell=tell)
            return
        self._count_broken(remote)
        if tell and remote.peer.hello is not None and remote.peer_number:
            self._sessions.send(remote.peer.address, peers.Drop(remote.peer_number, Reason.BROKEN))
        self._drop(remote, relay.BROKEN)

    def _count_broken(self, remote: Remote) -> None:
        if not remote.closed:
            self.counts.broken += 1
        if remote.leads:
            remote.peer.broken[remote.offer] = None
            if len(remote.peer.broken) > _REMEMBERED:
                del remote.peer.broken[next(iter(remote.peer.broken))]

    def _drop(self, remote: Remote, state: int = relay.WHOLE) -> None:
        self._rest(remote)
        remote.phase = Phase.DROPPING
        if remote.leads and remote.peer.taken.get(remote.offer) is remote:
            del remote.peer.taken[remote.offer]
        self._say(relay.Number(RelayKind.DROP, remote.number, state))

    def _dropped(self, remote: Remote) -> None:
        """The relay has let go of it."""
        if self.remotes.pop(remote.number, None) is None:
            return
        self.registered -= remote.bytes
        peer = remote.peer
        peer.remotes.pop(remote.number, None)
        self._pairing.end(remote.arena, remote.slot, 1)
        if not peer.remotes:
            self.links.emptied(peer.address)

    def _alarm(self, arena: Arena) -> None:
        self._memory.alarm(arena.memory)
        for descriptor in arena.sides[0].bells.values():
            self._memory.ring(descriptor)

    def _dropped_there(self, peer: Peer, message: peers.Drop) -> None:
        remote = self.remotes.get(message.connection)
        if remote is None or remote.peer is not peer or remote.phase is Phase.DROPPING:
            return
        if remote.phase is not Phase.GRANTED:
            reason = Reason(message.reason) if message.reason in _REASONS else Reason.REMOTE
            self._fail(remote, reason, tell=False)
        elif remote.confirmed or message.reason == Reason.BROKEN:
            self._break(remote)
        else:
            self._undo(remote)

    def relay_started(self) -> None:
        """See `relay.Owner`."""

    def relay_died(self) -> None:
        """See `relay.Owner`: what was in its hands can't be delivered any more."""
        self.device("the relay ended; it is started again")
        self._lent.clear()
        dead = list(self.remotes.values())
        arenas: dict[int, Arena] = {}
        for remote in dead:
            self._rest(remote)
            arenas[remote.arena.id] = remote.arena
            granted = remote.phase is Phase.GRANTED
            if remote.phase is not Phase.DROPPING:
                if granted:
                    self._count_broken(remote)
                    # The reset is for those who may have bytes in it; all others have left it.
                    self._memory.sever(remote.arena.memory, remote.slot)
                self._tell_dead(remote)
            ask = self._asks.pop(remote.waiting, None)
            if ask is not None:
                self._detach(ask)
                self._pairing.refuse(remote.waiting, Reason.NO_RDMA)
            remote.phase = Phase.DROPPING
            remote.peer.taken.pop(remote.offer, None)
            if not granted:
                self._give_back(remote)
        for arena in arenas.values():
            self._alarm(arena)
        for arena in [each for each in self._pairing.arenas.values() if each.ring]:
            self._pairing.deafen(arena)
        self.links.relay_died()
        for remote in dead:
            self._dropped(remote)
        self._pairing.retire_remote()
        for peer in self.peers.values():
            self.links.wake(peer.address)

    def _tell_dead(self, remote: Remote) -> None:
        peer = remote.peer
        if peer.hello is None:
            return
        if remote.peer_number:
            message: peers.Message = peers.Drop(remote.peer_number, Reason.BROKEN)
        elif remote.leads:
            message = peers.Decline(remote.offer, Reason.PEER_NO_RDMA)
        else:
            return
        self._sessions.send(peer.address, message)

    # --- links (`links.Owner`)

    def has_session(self, peer: IPAddress) -> bool:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        return found is not None and found.hello is not None

    def may_link(self, peer: IPAddress) -> bool:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        return self.ready and found is not None and found.hello is not None and found.hello.rdma

    def leads(self, peer: IPAddress) -> bool:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        return found is not None and self._node() < found.node

    def has_connections(self, peer: IPAddress) -> bool:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        return found is not None and any(
            remote.phase is not Phase.DROPPING for remote in found.remotes.values()
        )

    def link_up(self, peer: IPAddress) -> None:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        if found is not None:
            for key in list(found.asks):
                self._match(found, key)

    def link_failed(self, peer: IPAddress) -> None:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        if found is None:
            return
        self._refuse_all(found, Reason.NO_LINK)
        for offer in list(found.keys):
            self._take_offer(found, offer)
            self._sessions.send(peer, peers.Decline(offer, Reason.NO_LINK))

    def link_lost(self, peer: IPAddress) -> None:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        for remote in [] if found is None else list(found.remotes.values()):
            if remote.phase is not Phase.DROPPING:
                self._break(remote, tell=True)

    def link_leaves(self, peer: IPAddress) -> None:
        """See `links.Owner`."""
        found = self.peers.get(peer)
        for remote in [] if found is None else list(found.remotes.values()):
            self.leave(remote.number)

    def _refuse_all(self, peer: Peer, reason: Reason) -> None:
        for ask in [each for each in peer.asks.values() if each.remote is None]:
            self._refuse(ask, reason)

    # --- sessions (`sessions.SessionUser`)

    def up(self, address: IPAddress, hello: peers.PeerHello) -> None:
        """See `sessions.SessionUser`."""
        peer = self.peers.get(address)
        if peer is None:
            peer = self.peers[address] = Peer(address)
        if peer.timer is not None:
            peer.timer.cancel()
            peer.timer = None
        if peer.instance and (peer.instance, peer.node) != (hello.instance, hello.node):
            # Its relay ended with it. What is left of it knows nothing of us.
            self.links.forget(address)
            peer.broken.clear()
        peer.hello, peer.instance, peer.node = hello, hello.instance, hello.node
        self._tell_owns(peer)
        for remote in list(peer.remotes.values()):
            if remote.phase is Phase.GRANTED and not remote.confirmed:
                self._ask_again(remote)
        if not self.leads(address):
            for ask in list(peer.asks.values()):
                self._offer(peer, ask)
        self.links.wake(address)

    def down(self, address: IPAddress, reason: str) -> None:
        """See `sessions.SessionUser`."""
        peer = self.peers.get(address)
        if peer is None or peer.hello is None:
            return
        peer.hello = None
        peer.told = None
        peer.offers.clear()
        peer.keys.clear()
        peer.by_offer.clear()
        for remote in list(peer.remotes.values()):
            # A leader that has been accepted goes on: the follower's end is granted.
            if remote.phase in (Phase.PLACING, Phase.OFFERED) or (
                remote.phase is Phase.PAIRING and not remote.leads
            ):
                self._abandon(remote)
        self.links.session_down(address)
        peer.timer = self._loop.after(SESSION_PATIENCE, lambda: self._no_session(peer))

    def _abandon(self, remote: Remote) -> None:
        """The session is gone in the middle of pairing: the leader doesn't grant, and the follower hasn't."""
        ask = self._asks.get(remote.waiting)
        if ask is not None:
            # It goes on waiting.
            ask.remote = None
            ask.offer = 0
        self._drop(remote)
        self._give_back(remote)

    def _no_session(self, peer: Peer) -> None:
        peer.timer = None
        self._refuse_all(peer, Reason.NO_SESSION)
        for remote in list(peer.remotes.values()):
            if remote.phase is Phase.GRANTED and not remote.confirmed:
                # Whether the peer's end was granted, nobody can say.
                self._break(remote)

    def message(self, address: IPAddress, message: peers.Message) -> None:
        """See `sessions.SessionUser`."""
        peer = self.peers.get(address)
        if peer is None or peer.hello is None:
            return
        match message:
            case peers.Offer():
                self._offered(peer, message)
            case peers.Withdraw():
                self._withdrawn(peer, message)
            case peers.Decline():
                self._declined(peer, message)
            case peers.Placement():
                self._placed_there(peer, message)
            case peers.PeerAccept():
                self._accepted(peer, message)
            case peers.Paired():
                self._paired_there(peer, message)
            case peers.Drop():
                self._dropped_there(peer, message)
            case peers.Owns():
                self._owns(peer, message)
            case peers.PeerHello():
                self._changed(peer, message)
            case peers.LinkOffer():
                self.links.offered(address, message)
            case peers.LinkAnswer():
                self.links.answered(address, message)
            case peers.LinkRefused():
                self.links.refused(address, message)
            case peers.PeerFrame():
                self.links.framed(address, message)

    def eased(self, address: IPAddress) -> None:
        """See `sessions.SessionUser`."""
        self.links.eased(address)

    def _changed(self, peer: Peer, hello: peers.PeerHello) -> None:
        peer.hello = hello
        if not hello.rdma:
            self._refuse_all(peer, Reason.PEER_NO_RDMA)
        self.links.wake(peer.address)

    def _owns(self, peer: Peer, message: peers.Owns) -> None:
        # Whether it may say so of a network is looked at where it's used: we may hear of the network later.
        owned = {
            network: frozenset(map(peers.ip_of, texts))
            for network, texts in message.networks.items()
        }
        if owned != peer.owned:
            peer.owned = owned
            self._resettle(peer)

    def _resettle(self, peer: Peer) -> None:
        """Asks whose address has moved, or has been claimed now."""
        moved = [
            ask
            for ask in peer.asks.values()
            if ask.remote is None and ask.server.ip not in peer.owned.get(ask.network, ())
        ]
        for ask in moved:
            self._detach(ask)
            self._wait_for_owner(ask)
        for ask in list(self._homeless.values()):
            self._settle(ask)
        for key in list(peer.asks):
            self._match(peer, key)

    def _forget_peer(self, peer: Peer) -> None:
        """No network is shared with it any more."""
        if peer.timer is not None:
            peer.timer.cancel()
        self._refuse_all(peer, Reason.REMOTE)
        self.links.forget(peer.address)
        del self.peers[peer.address]


def words(counts: Iterable[tuple[int, int]]) -> dict[str, int]:
    """By the words of reasons."""
    return {Reason(number).word: count for number, count in counts}
