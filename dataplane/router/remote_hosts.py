"""The other hosts, and which of them owns an address.

A host owns an address if its router claims it for a network that both hosts share. If two hosts
claim the same address, neither owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from dataplane.control import OWNED
from dataplane.router.knowledge import Knowledge, KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Timer
from dataplane.router.peer_wire import Message, Owns, PeerHello, ip_of
from dataplane.router.remote_events import Transport

log = structlog.get_logger()


class PeerSessions(Protocol):
    """The sessions with the routers of other hosts: `sessions.Sessions`."""

    @property
    def node(self) -> str:
        """This host's node ID; "" without one."""

    def send(self, peer: IPAddress, message: Message) -> bool:
        """Whether the message is on its way."""

    def congested(self, peer: IPAddress) -> bool:
        """Whether messages that can wait should."""


@dataclass(slots=True, eq=False)
class RemoteHost:
    """Another host, from the first session with it on."""

    address: IPAddress
    hello: PeerHello | None = None
    """None without a session."""
    instance: str = ""
    node: str = ""
    """Of the last session."""
    owned: dict[str, frozenset[IPAddress]] = field(default_factory=dict)
    """Network to the addresses that it claims."""
    told: dict[str, tuple[str, ...]] | None = None
    """The addresses that this host has claimed in the session."""
    timer: Timer | None = None
    """Runs without a session."""

    @property
    def transports(self) -> frozenset[Transport]:
        """The transports that it has, as far as it says; none without a session."""
        hello = self.hello
        if hello is None:
            return frozenset()
        has = {Transport.RDMA: hello.rdma, Transport.RELAY: hello.relay}
        return frozenset(transport for transport in Transport if has[transport])

    def stop_timer(self) -> None:
        """There is a session, or nobody waits for one."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class RemoteHosts:
    """The table of other hosts."""

    def __init__(self, sessions: PeerSessions, knowledge: Callable[[], Knowledge]) -> None:
        self._sessions = sessions
        self._knowledge = knowledge
        self._hosts: dict[IPAddress, RemoteHost] = {}

    def __iter__(self) -> Iterator[RemoteHost]:
        return iter(list(self._hosts.values()))

    def get(self, address: IPAddress) -> RemoteHost | None:
        """The host with this address in the underlay."""
        return self._hosts.get(address)

    def add(self, address: IPAddress) -> RemoteHost:
        """The host with this address, new if there is none."""
        return self._hosts.setdefault(address, RemoteHost(address))

    def remove(self, host: RemoteHost) -> None:
        """Forget a host."""
        host.stop_timer()
        del self._hosts[host.address]

    def leads(self, host: RemoteHost) -> bool:
        """Whether this host leads, of the two: it matches requests, and makes links."""
        return self._sessions.node < host.node

    # --- networks and addresses

    def sharing(self, *transports: Transport) -> frozenset[IPAddress]:
        """The hosts that share a network whose connections may use one of these transports."""
        return frozenset(
            peer
            for network in self._knowledge().networks.values()
            if any(map(network.may_use, transports))
            for peer in network.peers
        )

    def may_use(self, network: str, transport: Transport) -> bool:
        """Whether connections of a network may use a transport."""
        known = self._knowledge().networks.get(network)
        return known is not None and known.may_use(transport)

    def transports(self, host: RemoteHost) -> frozenset[Transport]:
        """The transports that a host has, for connections of a network that it shares."""
        shared = [
            network
            for network in self._knowledge().networks.values()
            if host.address in network.peers
        ]
        return frozenset(
            transport
            for transport in host.transports
            if any(network.may_use(transport) for network in shared)
        )

    def owner(self, network: str, ip: IPAddress) -> RemoteHost | None:
        """The only host with a session that owns an address."""
        owners = [host for host in self if host.hello and self.owns(host, network, ip)]
        return owners[0] if len(owners) == 1 else None

    def owns(self, host: RemoteHost, network: str, ip: IPAddress) -> bool:
        """Whether a host claims an address, of a network that it shares."""
        return ip in host.owned.get(network, ()) and self.shares(host, network)

    def shares(self, host: RemoteHost, network: str) -> bool:
        """Whether something of a network can get to a host that shares it."""
        return self._shares(self._knowledge().networks.get(network), host)

    def _shares(self, network: KnownNetwork | None, host: RemoteHost) -> bool:
        return (
            network is not None
            and any(map(network.may_use, Transport))
            and host.address in network.peers
        )

    def claim(self, host: RemoteHost, message: Owns) -> bool:
        """A host claims addresses. Whether these are others than before.

        Networks are checked when the claim is used: our snapshot may have a network later.

        Raises:
            WrongMessage: an address is invalid.
        """
        owned = {
            network: frozenset(map(ip_of, texts)) for network, texts in message.networks.items()
        }
        changed = owned != host.owned
        host.owned = owned
        return changed

    def tell_owned(self, host: RemoteHost) -> None:
        """Claim the addresses of this host's containers, as far as they are news for the peer."""
        if host.hello is None:
            return
        own: dict[str, tuple[str, ...]] = {}
        room, untold = OWNED, 0
        for network in self._knowledge().networks.values():
            if self._shares(network, host):
                own[network.id] = network.own[:room]
                room -= len(own[network.id])
                untold += len(network.own) - len(own[network.id])
        if own != host.told and self._sessions.send(host.address, Owns(own)):
            host.told = own
            if untold:
                log.warning(
                    "peer not told of all local addresses; connections to the rest stay on TCP",
                    peer=str(host.address),
                    untold=untold,
                    limit=OWNED,
                )
