"""Brings connections back to TCP for which the relay is no gain, or whose container uses too much
of it.

The relay counts what each arena and each link does (`struct relay_usage` of
`dataplane/relay/relay_protocol.h`), and is asked about once a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

from dataplane.router.library_wire import IPAddress
from dataplane.router.limits import Share
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.queue_pair_shares import BURST, QueuePairShares, QueuePairUse
from dataplane.router.reasons import Reason
from dataplane.router.relay_rule import Pauses, Use, why_leave
from dataplane.router.remote_connections import RemoteConnection

log = structlog.get_logger()

SETTLE: Final = 2.0
"""Seconds from a pair's first connection on the relay until it is judged: connections enter one
after the other."""
GATHER: Final = 0.1
"""Seconds from the relay's first answer to the last."""
COUNTED: Final = 65536
"""Arenas and links whose counters are kept, though they do nothing."""
QUOTA_AGE: Final = 30.0
"""Seconds for which a container's quota of the processor is not read again."""
LEAST: Final = 0.25
"""Seconds that lie between two answers of the relay at least, for rates: late ones come together.
"""


class UseOwner(Protocol):
    """Has the connections: `remote.Remotes`."""

    def over_relay(self) -> Iterable[RemoteConnection]:
        """The connections over the relays' TCP that programs use."""

    def offloads(self, peer: IPAddress) -> bool:
        """Whether the underlay's devices of both hosts segment UDP tunnels."""

    def link_number(self, peer: IPAddress) -> int:
        """The relay's number of the link to a host."""

    def queue_pairs(self) -> Iterable[RemoteConnection]:
        """The queue pairs over the relays' TCP."""

    def share(self, arena: int, part: int) -> None:
        """Have the relay work for an arena in so many thousandths of the time."""

    def leave_relay(self, connections: Iterable[RemoteConnection], reason: Reason) -> None:
        """Bring connections back to TCP, and tell the other host why."""


@dataclass(slots=True)
class _Counter:
    """The counters of an arena or a link."""

    last: Mapping[str, int] = field(default_factory=dict)
    """At the answer before."""
    now: Mapping[str, int] = field(default_factory=dict)


_Rates = Mapping[tuple[int, int], Mapping[str, float]]
"""What arenas and links did per second, by arena and link; one of the two is 0."""


def _per_second(counter: _Counter, seconds: float) -> Mapping[str, float]:
    return {
        name: max(0, value - counter.last.get(name, 0)) / seconds
        for name, value in counter.now.items()
    }


def use_of(counts: Iterable[Mapping[str, float]]) -> Use:
    """What several arenas did together, by names of the relay's counters."""
    total: defaultdict[str, float] = defaultdict(float)
    for one in counts:
        for name, value in one.items():
            total[name] += value
    return Use(
        bytes=total["bytes_in"] + total["bytes_out"],
        bells=total["bells_in"] + total["bells_out"],
        slots=total["slots_in"] + total["slots_out"],
        messages=total["messages_in"] + total["messages_out"],
        blocks=total["blocks_in"] + total["blocks_out"],
    )


class RelayUse:
    """See the module."""

    def __init__(
        self,
        pairing: Pairing,
        loop: Loop,
        pauses: Pauses,
        quota: Callable[[int], float | None],
    ) -> None:
        """`quota`: how many processors a process's container may use; None: no limit."""
        self._pairing = pairing
        self._loop = loop
        self.owner: UseOwner | None = None
        self._pauses = pauses
        self._quota = quota
        self._counters: dict[tuple[int, int], _Counter] = {}
        """By arena and link; one of the two is 0."""
        self._dropped = False
        """Some idle counters were dropped for room. They may come back with their totals."""
        self._answered = loop.now()
        self._since: dict[tuple[int, IPAddress], float] = {}
        """When connections of a process with a host came to the relay."""
        self._shares: dict[int, Share] = {}
        self._queue_pairs = QueuePairShares()
        self._quotas: dict[int, tuple[float, float | None]] = {}
        """Of containers, with the time at which they were read."""
        self.rates: dict[int, float] = {}
        """Messages per second over the relay, of each process."""

    def forget_relay(self) -> None:
        """The relay has ended, with its counters."""
        self._counters.clear()
        self._dropped = False
        self.rates.clear()
        self._queue_pairs.forget()

    def counted(self, arena: int, link: int, values: Mapping[str, int]) -> None:
        """The relay's counters of an arena (`link` is 0) or of a link (`arena` is 0)."""
        key = arena, link
        if key not in self._counters:
            self._counters[key] = _Counter(values if self._dropped else {})
        self._counters[key].now = values

    def answered(self) -> None:
        """The relay begins to answer: what has changed since its last answer follows at once."""
        now = self._loop.now()
        seconds, self._answered = now - self._answered, now
        self._loop.after(GATHER, lambda: self._judge(max(seconds, LEAST)))

    # --- once a second

    def _judge(self, seconds: float) -> None:
        now, owner = self._loop.now(), self.owner
        if owner is None:
            return
        pairs: defaultdict[tuple[int, IPAddress], list[RemoteConnection]] = defaultdict(list)
        for connection in owner.over_relay():
            pairs[connection.end.process, connection.host.address].append(connection)
        self._since = {pair: self._since.get(pair, now) for pair in pairs}
        rates = {key: _per_second(counter, seconds) for key, counter in self._counters.items()}
        self._next()
        uses = self._uses(rates)
        self.rates = {process: use.blocks for process, use in uses.items()}
        for pair, connections in pairs.items():
            use = use_of([rates.get((0, owner.link_number(pair[1])), {})])
            reason = None
            if now - self._since[pair] >= SETTLE:
                rule = self._pairing.knowledge.settings.relay_rule
                process = uses.get(pair[0], Use())
                reason = why_leave(process, use, rule, owner.offloads(pair[1]))
            if reason is not None:
                self._leave(owner, pair, connections, reason)
        self._limit(owner, pairs.values(), rates, seconds)

    def _uses(self, rates: _Rates) -> dict[int, Use]:
        """What each process does per second."""
        found: defaultdict[int, list[Mapping[str, float]]] = defaultdict(list)
        for (arena, _), of_arena in rates.items():
            known = self._pairing.arenas.get(arena)
            if known is not None and known.ring and not known.has_queue_pairs:
                found[known.pair[0]].append(of_arena)
        return {process: use_of(arenas) for process, arenas in found.items()}

    def _leave(
        self,
        owner: UseOwner,
        who: Hashable,
        connections: Iterable[RemoteConnection],
        reason: Reason,
    ) -> None:
        rule = self._pairing.knowledge.settings.relay_rule
        self._pauses.begin(who, reason, self._loop.now(), rule)
        owner.leave_relay(connections, reason)

    def _next(self) -> None:
        """Prepare for the next answer."""
        for key, counter in list(self._counters.items()):
            is_gone = key[0] and key[0] not in self._pairing.arenas
            is_old = len(self._counters) > COUNTED and counter.last == counter.now
            if is_gone or is_old:
                del self._counters[key]
                self._dropped = self._dropped or not is_gone
            counter.last = counter.now

    # --- the processor

    def _limit(
        self,
        owner: UseOwner,
        pairs: Iterable[list[RemoteConnection]],
        rates: _Rates,
        seconds: float,
    ) -> None:
        """Bring back the connections of containers for which the relay works too much."""
        by_container: defaultdict[int, list[RemoteConnection]] = defaultdict(list)
        for connections in pairs:
            for connection in connections:
                by_container[connection.end.namespace].append(connection)
        spent: defaultdict[int, float] = defaultdict(float)
        by_queue_pairs: defaultdict[int, float] = defaultdict(float)
        for (arena, _), of_arena in rates.items():
            known = self._pairing.arenas.get(arena)
            if known is not None:
                used = of_arena.get("cpu", 0.0) * seconds / 1e9
                spent[known.sides[0].namespace] += used
                if known.has_queue_pairs:
                    by_queue_pairs[known.sides[0].namespace] += used
        self._hold_back(owner, spent, by_queue_pairs, seconds)
        self._shares = {who: share for who, share in self._shares.items() if who in by_container}
        kept = {*by_container, *by_queue_pairs}
        self._quotas = {who: quota for who, quota in self._quotas.items() if who in kept}
        for namespace, used in spent.items():
            container = self._pairing.containers.get(namespace)
            if container is not None:
                container.relay_cpu += used
            connections = by_container.get(namespace, [])
            if connections and self._is_too_much(namespace, connections[0], used):
                log.warning(
                    "the relay works too much for a container; its connections go back to TCP",
                    namespace=namespace,
                    connections=len(connections),
                )
                del self._shares[namespace]
                self._leave(owner, namespace, connections, Reason.LIMIT)

    def _hold_back(
        self,
        owner: UseOwner,
        spent: Mapping[int, float],
        by_queue_pairs: Mapping[int, float],
        seconds: float,
    ) -> None:
        """Have the relay rest for queue pairs for which it works too much."""
        found: defaultdict[int, list[RemoteConnection]] = defaultdict(list)
        for one in owner.queue_pairs():
            found[one.end.namespace].append(one)
        uses = {}
        for namespace, some in found.items():
            limit, used = self._limit_of(namespace, some[0].end.process), by_queue_pairs[namespace]
            others = (spent[namespace] - used) / seconds
            arenas = frozenset(one.arena.id for one in some)
            uses[namespace] = QueuePairUse(max(limit - others, limit / 4), used, arenas)
        parts = self._queue_pairs.divide(uses, seconds, self._loop.now())
        for arena, part in parts.items():
            owner.share(arena, part)

    def _is_too_much(self, namespace: int, one: RemoteConnection, used: float) -> bool:
        now = self._loop.now()
        limit = self._limit_of(namespace, one.end.process)
        share = self._shares.get(namespace)
        if share is None:
            share = self._shares[namespace] = Share.full(limit, limit * BURST, now)
        share.rate, share.most = limit, limit * BURST
        share.spend(used, now)
        return share.left < 0

    def _limit_of(self, namespace: int, process: int) -> float:
        """How many processors the relay may use for a container."""
        now = self._loop.now()
        known = self._quotas.get(namespace)
        if known is None or now - known[0] >= QUOTA_AGE:
            record = self._pairing.processes.get(process)
            quota = None if record is None else self._quota(record.pid)
            known = self._quotas[namespace] = (now, quota)
        limit = self._pairing.knowledge.settings.relay_rule.cpu / 100
        return limit if known[1] is None else min(limit, known[1])
