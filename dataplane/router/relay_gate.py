"""Lets requests for connections over the relays' TCP wait until the rule lets them in.

The leader, of two hosts the one with the smaller node ID, matches the requests of both, samples
those that match, and decides (`relay_rule.py`). It tells the follower why requests wait. The
follower says which of its processes a request is from, and whether it holds it back itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from dataplane.router.library_wire import IPAddress
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.peer_wire import MAX_WAITS, Waits
from dataplane.router.reasons import Reason
from dataplane.router.relay_rule import EnterRule, OnRelay, Pair, Pauses, TcpSample
from dataplane.router.relay_sampler import RelaySampler
from dataplane.router.remote_requests import RemoteRequest
from dataplane.router.tcp_counters import TcpCounters


class GateOwner(Protocol):
    """Has the requests and the connections: `remote.Remotes`."""

    def enter(self, requests: Iterable[RemoteRequest]) -> None:
        """Grant these requests, if possible."""

    def relayed(self) -> Mapping[Pair, int]:
        """The connections over the relays' TCP that this host leads, by their two processes."""

    def offloads(self, peer: IPAddress) -> bool:
        """Whether the underlay's devices of both hosts segment UDP tunnels."""

    def tell(self, peer: IPAddress, message: Waits) -> None:
        """Send a message to the router of a host, if it knows it."""


class RelayGate:
    """An `EntryRule`. Only requests for the relays' TCP come here."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        sampler: RelaySampler,
        pauses: Pauses,
        rates: Callable[[], Mapping[int, float]],
    ) -> None:
        """`rates`: messages per second over the relay, of each process."""
        self._pairing = pairing
        self._loop = loop
        self._sampler = sampler
        self._pauses = pauses
        self._rates = rates
        self._rule: EnterRule[RemoteRequest] = EnterRule(pairing.knowledge.settings.relay_rule)
        self._untold: dict[RemoteRequest, None] = {}

    def __len__(self) -> int:
        return len(self._rule)

    # --- `EntryRule`

    def may_enter(self, request: RemoteRequest) -> bool:
        """Leader: whether a matched request may be granted now; if not, `GateOwner.enter` is
        called later.
        """
        assert request.host is not None
        assert request.match is not None
        pair = Pair(request.local.process, request.host.address, request.match.process)
        if self._rule.pair(request) != pair:
            self._rule.add(request, pair, self._loop.now())
        return self._find(request)

    def _find(self, request: RemoteRequest) -> bool:
        """Note why a request waits. Whether it may enter."""
        assert request.match is not None
        held = request.match.held
        request.waits = held or self.held(request) or self._rule.reason(request)
        # The follower knows why it holds its own request back.
        if request.waits is not None and request.waits is not (request.told or held):
            self._untold[request] = None
        return request.waits is None

    def why_waiting(self, request: RemoteRequest) -> Reason:
        return request.waits or Reason.PEER_SHORT

    def held(self, request: RemoteRequest) -> Reason | None:
        """Why this host holds a request back, whatever the rule says; None: it doesn't."""
        assert request.host is not None
        return self._held(Pair(request.local.process, request.host.address, 0))

    def _held(self, pair: Pair) -> Reason | None:
        process = self._pairing.processes.get(pair.process)
        now = self._loop.now()
        of_container = None
        if process is not None:
            of_container = self._pauses.reason(process.namespace, now)
        return of_container or self._pauses.reason((pair.process, pair.peer), now)

    def forget(self, request: RemoteRequest) -> None:
        self._rule.remove(request)
        self._untold.pop(request, None)
        request.waits = request.told = None

    # --- time

    def tick(self, owner: GateOwner) -> None:
        """About once a second."""
        self._rule.rule = self._pairing.knowledge.settings.relay_rule
        if not self._sampler.busy and (due := self._rule.due(self._loop.now())):
            self._sampler.sample(due, self._sampled, lambda: self._decide(owner))
        self._tell(owner)

    def _sampled(self, request: RemoteRequest, counters: TcpCounters | None) -> None:
        if request not in self._rule:
            return
        if counters is None:
            self._pairing.requests.check(request.local)
        else:
            self._rule.sampled(request, TcpSample(self._loop.now(), *counters[:5]))

    def _decide(self, owner: GateOwner) -> None:
        on = OnRelay(owner.relayed(), self._rates())
        changed = self._rule.decide(self._loop.now(), on, self._held, owner.offloads)
        owner.enter([request for request in changed if self._find(request)])

    def _tell(self, owner: GateOwner) -> None:
        """Tell followers why their requests wait, where that has changed."""
        told: defaultdict[tuple[IPAddress, Reason], list[int]] = defaultdict(list)
        for request in self._untold:
            if request.waits is not None and request.host is not None and request.match is not None:
                told[request.host.address, request.waits].append(request.match.number)
                request.told = request.waits
        self._untold.clear()
        for (address, reason), offers in told.items():
            for at in range(0, len(offers), MAX_WAITS):
                owner.tell(address, Waits(reason, tuple(offers[at : at + MAX_WAITS])))
