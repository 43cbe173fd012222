"""The requests that wait for the other end of their connection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dataplane.router.agenda import RARELY, Agenda
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import Address
from dataplane.router.pair_requests import Key, PairRequest
from dataplane.router.registry import Registry
from dataplane.router.seams import SocketTable

REQUEST_AGE: Final = 5.0
"""Seconds until the first check whether the socket of a waiting request is still open."""


class RequestTable:
    """Waiting requests by the addresses of their connections."""

    def __init__(self, registry: Registry, sockets: SocketTable) -> None:
        self._registry = registry
        self._sockets = sockets
        self._requests: dict[Key, PairRequest] = {}
        self._checks: Agenda[PairRequest] = Agenda(REQUEST_AGE, RARELY)

    def __iter__(self) -> Iterator[PairRequest]:
        return iter(list(self._requests.values()))

    @property
    def checks(self) -> int:
        """Entries of the schedule of checks."""
        return len(self._checks)

    def add(self, request: PairRequest) -> None:
        """Let a request wait, in place of older ones of the same socket or the same addresses."""
        cookie = request.message.cookie
        container = self._registry.containers[request.namespace]
        for old in (container.waiting.get(cookie), self._requests.get(request.key)):
            if old is not None:
                self.remove(old)
        self._requests[request.key] = request
        self._registry.processes[request.process].waiting[cookie] = request
        container.waiting[cookie] = request
        self._checks.add(request, request.since)

    def remove(self, request: PairRequest) -> None:
        """A request does not wait any more."""
        cookie = request.message.cookie
        self._checks.forget(request)
        process = self._registry.processes.get(request.process)
        if process is not None and process.waiting.get(cookie) is request:
            del process.waiting[cookie]
        container = self._registry.containers.get(request.namespace)
        if container is not None and container.waiting.get(cookie) is request:
            del container.waiting[cookie]
        if self._requests.get(request.key) is request:
            del self._requests[request.key]
        if request.is_remote:
            self._registry.remote.cancel(request)

    def partners(self, request: PairRequest, network: KnownNetwork) -> Iterator[PairRequest]:
        """The requests that may come from the other end of the connection."""
        local, peer = request.message.local, request.peer
        seen_as = [local, *(Address(vip, local.port) for vip in network.vips.get(local.ip, ()))]
        for remote in seen_as:
            partner = self._requests.get((network.id, peer, remote))
            if partner is not None and partner is not request and partner.peer == local:
                yield partner

    def sweep(self, now: float, most: int) -> None:
        """Remove requests whose sockets are gone; check so many at most."""
        self._checks.check(now, most, self.check)

    def check(self, waiting: PairRequest) -> bool:
        """Remove a request if its socket is gone. Whether it still waits."""
        if self._requests.get(waiting.key) is not waiting:
            return False
        request = waiting.message
        if self._sockets.is_open(waiting.namespace, request.local, request.remote, request.cookie):
            return True
        self.remove(waiting)
        return False
