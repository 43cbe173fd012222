"""Connections of rdma_cm between processes of two hosts: both routers keep the connection, and tell
each other what its ends say.

A host that is lost for a while may come back: then both say which connections they still have, and
what the other one doesn't have any more has ended. What was lost on the way is said again by the
libraries, as on a network that loses packets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from msgspec.structs import replace

from dataplane.errors import WrongMessage
from dataplane.router.arenas import RELAY
from dataplane.router.knowledge import Knowledge, KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.peer_wire import MAX_ALIVE, MAX_PRIVATE, VerbsAlive, VerbsStep, ip_of
from dataplane.router.reasons import Reason
from dataplane.router.remote_hosts import PeerSessions, RemoteHost, RemoteHosts
from dataplane.router.verbs_cm import VerbsConnections
from dataplane.router.verbs_connections import (
    CmConnection,
    CmStage,
    ConnectionSide,
    nobody,
    plain,
)
from dataplane.router.verbs_wire import Step, VerbsConnection

OF_HOST: Final = 16384
"""Connections with one other host."""
_NEVER: Final = frozenset({Reason.REMOTE, Reason.REMOTE_OFF})
"""Why no process of a network can be asked on another host. What else is missing may come."""
_SAME: Final = (
    "space",
    "port",
    "from_port",
    "qpn",
    "psn",
    "qkey",
    "reject",
    "responder_resources",
    "initiator_depth",
    "flow_control",
    "retry",
    "rnr_retry",
    "srq",
)
"""Fields with the same name in `VerbsStep` and `VerbsConnection`."""
_REQUESTS: Final = frozenset({Step.REQUEST, Step.RESOLVE})


class FarConnections:
    """See the module. `FarEnds`."""

    def __init__(
        self,
        connections: VerbsConnections,
        sessions: PeerSessions,
        hosts: RemoteHosts,
        knowledge: Callable[[], Knowledge],
        why_not: Callable[[KnownNetwork], Reason | None],
    ) -> None:
        """`why_not`: why nothing of a network can get to another host; None: some may."""
        self._connections = connections
        self._table = connections.table
        self._sessions = sessions
        self._hosts = hosts
        self._knowledge = knowledge
        self._why_not = why_not
        self._alive: defaultdict[IPAddress, set[tuple[bool, int]]] = defaultdict(set)
        """What a host has said so far of the connections that it has: whether this host asked, and
        the number."""
        connections.far = self

    # --- what ends of this host say (`FarEnds`)

    def host_of(self, network: KnownNetwork, gid: IPAddress) -> IPAddress | Reason:
        host = self._hosts.owner(network.id, gid)
        if host is None:
            return Reason.REMOTE if self._why_not(network) in _NEVER else Reason.LIMIT
        if host.hello is None or not host.hello.verbs_cm:
            return Reason.REMOTE
        return host.address

    def has(self, host: IPAddress, network: str, gid: IPAddress) -> bool:
        known, there = self._knowledge().networks.get(network), self._hosts.get(host)
        return (
            known is not None
            and known.verbs
            and there is not None
            and self._hosts.owns(there, network, gid)
        )

    def has_room(self, host: IPAddress) -> bool:
        return not self._sessions.congested(host)

    def tell(self, connection: CmConnection, side: int, message: VerbsConnection) -> None:
        far, near = connection.sides[side], connection.sides[1 - side]
        assert far.host is not None
        step = VerbsStep(
            number=connection.far_number,
            asks=side == 1,
            step=message.step,
            network=connection.network,
            gid=str(near.gid),
            peer_gid=str(far.gid),
            **_said(message),
        )
        self._sessions.send(far.host, step)

    # --- what ends of other hosts say

    def take(self, host: RemoteHost, message: VerbsStep) -> None:
        """Pass on what an end of another host says.

        Raises:
            WrongMessage: a GID is invalid, or a host asks that is asked.
        """
        connection = self._table.far.get((host.address, not message.asks, message.number))
        step = Step(message.step)
        if step in _REQUESTS:
            if not message.asks:
                raise WrongMessage("a request from who was asked")
            if connection is None:
                self._ask(host, message)
            else:
                self._connections.repeat(connection)
        elif connection is not None:
            side = connection.far_side
            assert side is not None
            self._connections.say(connection, side, _heard(message))
        elif step is Step.DISCONNECT:
            self._answer(host, message, plain(Step.DISCONNECTED))

    def _ask(self, host: RemoteHost, message: VerbsStep) -> None:
        """A new request. One that can't be passed on for now has no answer: it is repeated."""
        gid, peer_gid = ip_of(message.gid), ip_of(message.peer_gid)
        network = self._knowledge().networks.get(message.network)
        if network is None or not self.has(host.address, network.id, gid):
            return
        if (
            peer_gid not in network.owners
            or len(self._table.of_host.get(host.address, ())) >= OF_HOST
        ):
            return
        request = _heard(message)
        found = self._connections.listener(network, (peer_gid,), request, host.address)
        if found is None:
            self._answer(host, message, nobody(request))
        elif not isinstance(found, Reason):
            listener, target = found
            self._connections.begin(
                network.id,
                ConnectionSide(RELAY, RELAY, gid, 0, host.address),
                ConnectionSide(listener.process, listener.namespace, target, 0),
                request,
                listener,
                message.number,
            )

    def _answer(self, host: RemoteHost, message: VerbsStep, answer: VerbsConnection) -> None:
        """Answer a host about what this one has no connection for."""
        step = VerbsStep(
            number=message.number,
            asks=not message.asks,
            step=answer.step,
            network=message.network,
            gid=message.peer_gid,
            peer_gid=message.gid,
            **_said(answer),
        )
        self._sessions.send(host.address, step)

    # --- hosts and sessions

    def session_up(self, host: RemoteHost) -> None:
        """There is a session. The other router may be a new one: then it has no connections."""
        self._alive.pop(host.address, None)
        if host.hello is None or not host.hello.verbs_cm:
            self.end_all(host)
            return
        of_host = list(self._table.of_host.get(host.address, ()))
        asking = [each.far_number for each in of_host if each.far_side == 1]
        asked = [each.far_number for each in of_host if each.far_side == 0]
        most = max(len(asking), len(asked), 1)
        for first in range(0, most, MAX_ALIVE):
            end = first + MAX_ALIVE
            message = VerbsAlive(tuple(asking[first:end]), tuple(asked[first:end]), end >= most)
            self._sessions.send(host.address, message)

    def alive(self, host: RemoteHost, message: VerbsAlive) -> None:
        """A host says which connections it has. Others have ended, but requests that may have been
        lost.

        Raises:
            WrongMessage: it says more than it can have.
        """
        said = self._alive[host.address]
        said.update((True, number) for number in message.asked)
        said.update((False, number) for number in message.asking)
        if len(said) > 2 * OF_HOST:
            raise WrongMessage("too many connections")
        if not message.last:
            return
        del self._alive[host.address]
        for connection in list(self._table.of_host.get(host.address, ())):
            this_asked = connection.far_side == 1
            is_request = this_asked and connection.stage is CmStage.ASKED
            if not is_request and (this_asked, connection.far_number) not in said:
                self._end(connection)

    def reassign(self, host: RemoteHost) -> None:
        """A host claims other addresses than before."""
        for connection in list(self._table.of_host.get(host.address, ())):
            self._connections.review(connection)

    def end_all(self, host: RemoteHost) -> None:
        """A host is gone."""
        self._alive.pop(host.address, None)
        for connection in list(self._table.of_host.get(host.address, ())):
            self._end(connection)

    def _end(self, connection: CmConnection) -> None:
        side = connection.far_side
        assert side is not None
        self._connections.say_last_word(connection, 1 - side)
        self._table.forget(connection)


def _said(message: VerbsConnection) -> dict[str, Any]:
    """What is in both kinds of messages."""
    same = {name: getattr(message, name) for name in _SAME}
    return {**same, "service": message.type, "private": message.private[: message.private_size]}


def _heard(message: VerbsStep) -> VerbsConnection:
    same = {name: getattr(message, name) for name in _SAME}
    return replace(
        plain(Step(message.step)),
        **same,
        type=message.service,
        private_size=len(message.private),
        private=message.private.ljust(MAX_PRIVATE, b"\0"),
    )
