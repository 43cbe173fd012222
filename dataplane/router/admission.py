"""Which requests may be paired, and where a connection to a VIP leads.

A client that connects to a VIP sees another address than its server does. Only the connection
tracking of the client's own namespace says which task such a connection leads to: a socket in a
task's namespace proves nothing, since the task's root can make one with any addresses. Without that
answer the connection stays on TCP. One source port may also serve two connections, one to a task
and one to its VIP. Then the kernel can't tell them apart, and both stay on TCP.
"""

from __future__ import annotations

from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import Address, Request
from dataplane.router.pair_requests import PairRequest
from dataplane.router.reasons import Reason
from dataplane.router.registry import ProcessRecord, Registry
from dataplane.router.seams import SocketTable


class Admission:
    """Checks requests with the snapshot, the container's limits and the kernel."""

    def __init__(self, registry: Registry, sockets: SocketTable) -> None:
        self._registry = registry
        self._sockets = sockets

    def admit(
        self, process: ProcessRecord, request: Request
    ) -> tuple[KnownNetwork, Address | None] | Reason:
        """The connection's network, and its server if it leads to a VIP; or why it is refused."""
        container = self._registry.containers[process.namespace]
        network = self._registry.knowledge.network_of(process.namespace, request.local.ip)
        if network is None:
            return self._why_unknown(process.namespace, request.local)
        if not network.accelerated:
            return Reason.OFF
        if not container.request_rate.take(self._registry.clock(), self._registry.limits.asks):
            return Reason.LIMIT
        # First: later answers would tell the process about addresses that it has no connection to.
        if not self._sockets.is_open(
            process.namespace, request.local, request.remote, request.cookie
        ):
            return Reason.NOT_FOUND
        peer = request.remote.ip
        if peer in network.balanced:
            return Reason.BALANCED
        if peer not in network.everywhere and peer not in network.owners and peer not in network:
            return Reason.FOREIGN
        server = None
        if peer in network.everywhere:
            server = self._behind_vip(process.namespace, request, network)
            if server is None:
                return Reason.UNTRACKED
            peer = server.ip
        if (
            peer not in network.owners
            and (reason := self._registry.remote.why_not(network)) is not None
        ):
            return reason
        # The limit of connections is checked when both ends have sent requests, so that both hear.
        if len(container.waiting) >= self._registry.limits.waiting:
            return Reason.LIMIT
        if request.cookie in container.ends:
            return Reason.SHARED
        return network, server

    def _behind_vip(
        self, namespace: int, request: Request, network: KnownNetwork
    ) -> Address | None:
        """The task that a client's connection to a VIP leads to.

        The connection tracking of the client's own namespace says so; None: it does not.
        """
        translated = self._sockets.translated(namespace, request.local, request.remote)
        if translated is None:
            return None
        server, client = translated
        is_task = (
            server.ip in network.everywhere[request.remote.ip]
            and server.port == request.remote.port
        )
        return server if is_task and client == request.local else None

    def is_sure(self, one: PairRequest, other: PairRequest, network: KnownNetwork) -> bool:
        """Whether two requests can only be the two ends of one connection."""
        return all(
            server.message.local.ip not in network.vips
            or server.message.remote.ip not in network.owners
            or self._clients(server.message, network) <= 1
            for server in (one, other)
        )

    def why_apart(self, network: KnownNetwork, *ends: PairRequest) -> Reason | None:
        """Why requests that fit may not be the ends of one connection; None: they are.

        One request, if the other is on another host, whose router asks about it.

        FreeFlow's networks have nothing between two containers, their VIPs are known, and the
        driver knows at once who has left. On another driver's a container's namespace may translate
        connections, and so may the host's, if that is between the two. Then each could have another
        peer. And a moment ago the container may have ended, or the engine may have given its
        address to another one.
        """
        if not network.foreign:
            return None
        for end in ends:
            if not (
                self._sockets.is_listed(end.namespace)
                and self._sockets.has_address(end.namespace, end.message.local.ip)
            ):
                return Reason.NO_ENDPOINT
            if self._sockets.is_translated(end.namespace, end.message.local, end.message.remote):
                return Reason.INTERCEPTED
        message = ends[0].message
        if len({end.namespace for end in ends}) < len(ends):
            # Of one container with itself: the host isn't between them.
            return None
        if not network.bridge or self._sockets.is_carried(
            network.bridge, message.local, message.remote, trusted=network.trusted
        ):
            return None
        return Reason.INTERCEPTED

    def _why_unknown(self, namespace: int, local: Address) -> Reason:
        """Why an address is none of its container's on any network.

        What the driver says comes late, but for FreeFlow's own networks. So the container may have
        got the address a moment ago, or be another one. A connection that may last for days is not
        refused for good because of that.
        """
        knowledge = self._registry.knowledge
        may_come = knowledge.is_expected(namespace, local.ip) or (
            any(each.foreign for each in knowledge.networks_of(namespace))
            and not self._sockets.is_listed(namespace)
        )
        return Reason.NO_ENDPOINT if may_come else Reason.FOREIGN

    def _clients(self, request: Request, network: KnownNetwork) -> int:
        """How many sockets of the client lead to this server, by its address or by a VIP."""
        leading = [request.local]
        leading += [
            Address(vip, request.local.port) for vip in network.vips.get(request.local.ip, ())
        ]
        namespace = network.owners[request.remote.ip]
        return sum(self._sockets.exists(namespace, request.remote, remote) for remote in leading)


def why_not(network: KnownNetwork | None, before: KnownNetwork | None) -> Reason:
    """Why a connection stays on TCP whose network is another one now, or isn't accelerated."""
    if network is not None and not network.accelerated:
        return Reason.OFF
    # What the driver says of other drivers' networks comes late, and may change again.
    if any(each is not None and each.foreign for each in (network, before)):
        return Reason.NO_ENDPOINT
    return Reason.FOREIGN if network is None else Reason.OFF
