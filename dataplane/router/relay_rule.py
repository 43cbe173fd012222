"""Which connections go over the TCP connections between two hosts' relays (path `relay`).

A message over the relays wakes three sleepers, and one over TCP wakes one. So the relays are faster
only where one wake-up serves many connections, and slower where it serves one. A connection waits
on TCP until it is in good company (`EnterRule`), and goes back to TCP when its company is gone
(`why_leave`), for a while that grows each time (`Pauses`).

A peer's host says only which of its processes has which connection. So it can harm nothing but
connections with itself. There is no I/O and no clock here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final, Generic, NamedTuple, TypeVar

from dataplane.control import RelayRule
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason

_WRAP: Final = 1 << 32
T = TypeVar("T", bound=Hashable)

SAMPLE: Final = 1.0
"""Seconds between two samples of connections that are near the rule's thresholds."""
SAMPLE_MOST: Final = 8.0
"""The same for others: the pause is doubled up to this."""
ROUND: Final = 2000
"""Connections that are sampled together; the share of the processor doesn't allow for many more."""
SHORTEST: Final = 0.25
"""Seconds that lie between two samples of a connection at least: a rate over less says nothing."""
NEAR: Final = 4
"""A pair with this part of the needed messages is near the threshold; a process with this part of
the messages of one busy connection is idle on the relay."""


class Pair(NamedTuple):
    """Two processes of two hosts that have connections with each other."""

    process: int
    """Of this host."""
    peer: IPAddress
    """The other host."""
    peer_process: int
    """A number that the other host has chosen."""


class TcpSample(NamedTuple):
    """Counters of a TCP connection since it began, from the kernel (struct tcp_info)."""

    at: float
    """Seconds."""
    segments_in: int
    """Segments with data."""
    segments_out: int
    bytes_in: int
    bytes_out: int
    segment: int
    """Bytes of a full segment."""


class Use(NamedTuple):
    """What a process or a link did on the relay, per second."""

    bytes: float = 0.0
    bells: float = 0.0
    """Wake-ups of the relay by the process, and of the process by the relay."""
    slots: float = 0.0
    """Connections that these wake-ups were for, together."""
    messages: float = 0.0
    """Messages between the two relays; a link's alone."""
    blocks: float = 0.0
    """Blocks of connections in them."""


def messages(segments: int, size: int, segment: int) -> float:
    """How many messages a program has sent with so many segments and bytes, as an estimate.

    A message ends with a segment that isn't full. Half a segment is the mean of those.
    """
    if segment <= 0:
        return float(segments)
    return max(0.0, min(segments, 2 * (segments - size / segment)))


def batches(one: float, other: float, rule: RelayRule) -> bool:
    """Whether so many busy connections of two processes let wake-ups serve many of them.

    Their harmonic mean has to reach the setting.
    """
    return one > 0 and other > 0 and rule.connections * (1 / one + 1 / other) <= 2


@dataclass(slots=True, eq=False)
class Flow:
    """A connection that waits for the relay, on TCP."""

    pair: Pair
    sample: TcpSample | None = None
    known: bool = False
    """There have been two samples, so there are rates."""
    messages: float = 0.0
    """Per second."""
    bytes: float = 0.0
    busy: bool = False
    """At the last sample."""
    reason: Reason | None = Reason.FEW
    """Why it waits; None: it may enter."""

    def sampled(self, sample: TcpSample) -> None:
        """Take the next sample."""
        before = self.sample
        if before is None:
            self.sample = sample
            return
        seconds = sample.at - before.at
        if seconds < SHORTEST:
            return
        size_in, size_out = sample.bytes_in - before.bytes_in, sample.bytes_out - before.bytes_out
        seen = (sample.segments_in - before.segments_in) % _WRAP
        sent = (sample.segments_out - before.segments_out) % _WRAP
        count = messages(seen, size_in, sample.segment) + messages(sent, size_out, sample.segment)
        self.sample, self.known = sample, True
        self.messages, self.bytes = count / seconds, (size_in + size_out) / seconds


def is_bulk(size: float, count: float, rule: RelayRule) -> bool:
    """Whether so many bytes per second, in so many messages, are bulk data."""
    return size >= rule.bulk_rate and size >= rule.bulk * count


@dataclass(slots=True, eq=False)
class _End:
    """The waiting connections of a process of one host with the other host."""

    connections: int = 0
    busy: int = 0


_EndKey = tuple[int | None, IPAddress, int]


def _ends_of(pair: Pair) -> tuple[_EndKey, _EndKey]:
    return (pair.process, pair.peer, 0), (None, pair.peer, pair.peer_process)


@dataclass(slots=True, eq=False)
class _Group(Generic[T]):
    """The waiting connections of one pair."""

    ends: tuple[_End, _End]
    flows: dict[T, Flow] = field(default_factory=dict)
    due: float = 0.0
    """When they are sampled next."""
    pause: float = SAMPLE
    messages: float = 0.0
    """Per second, of all of them together."""


@dataclass(frozen=True, slots=True)
class OnRelay:
    """What is on the relay already."""

    connections: Mapping[Pair, int]
    rates: Mapping[int, float]
    """Messages per second of each process; a process without an entry is new there."""

    def busy(self, pair: Pair, rule: RelayRule) -> float:
        """How many of a pair's connections are busy, as far as the process's rate allows."""
        count = self.connections.get(pair, 0)
        rate = self.rates.get(pair.process)
        return count if rate is None else min(count, rate / rule.busy)


class EnterRule(Generic[T]):
    """Decides which waiting connections may enter. `T` identifies a connection."""

    def __init__(self, rule: RelayRule) -> None:
        self.rule = rule
        """The present settings."""
        self._groups: dict[Pair, _Group[T]] = {}
        self._flows: dict[T, Flow] = {}
        self._ends: dict[_EndKey, _End] = {}
        self._asked: list[Pair] = []

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, key: T) -> bool:
        return key in self._flows

    def pair(self, key: T) -> Pair | None:
        """The processes of a connection; None: it doesn't wait."""
        flow = self._flows.get(key)
        return None if flow is None else flow.pair

    def reason(self, key: T) -> Reason | None:
        """Why a connection waits; None: it may enter."""
        return self._flows[key].reason

    def add(self, key: T, pair: Pair, now: float) -> None:
        """A connection waits from now on."""
        self.remove(key)
        group = self._groups.get(pair)
        if group is None:
            one, other = (self._ends.setdefault(end, _End()) for end in _ends_of(pair))
            group = self._groups[pair] = _Group((one, other))
        group.flows[key] = self._flows[key] = Flow(pair)
        for end in group.ends:
            end.connections += 1
        group.due, group.pause = min(group.due, now), SAMPLE

    def remove(self, key: T) -> None:
        """A connection waits no more."""
        flow = self._flows.pop(key, None)
        if flow is not None:
            group = self._groups[flow.pair]
            del group.flows[key]
            for number, end in zip(_ends_of(flow.pair), group.ends, strict=True):
                end.connections -= 1
                end.busy -= flow.busy
                if not end.connections:
                    del self._ends[number]
            if not group.flows:
                del self._groups[flow.pair]

    # --- samples

    def due(self, now: float) -> list[T]:
        """The connections to be sampled now. `decide` is to be called after that.

        `ROUND` at most, but all of a pair. Those that have waited longest come first.
        """
        pairs = [(group.due, pair) for pair, group in self._groups.items() if group.due <= now]
        pairs.sort(key=itemgetter(0))
        self._asked = []
        keys: list[T] = []
        for _, pair in pairs:
            if len(keys) >= ROUND:
                break
            self._asked.append(pair)
            keys += self._groups[pair].flows
        return keys

    def sampled(self, key: T, sample: TcpSample) -> None:
        """A sample of a connection."""
        flow = self._flows.get(key)
        if flow is not None:
            flow.sampled(sample)

    # --- the decision

    def decide(
        self,
        now: float,
        on: OnRelay,
        held: Callable[[Pair], Reason | None],
        offloads: Callable[[IPAddress], bool],
    ) -> dict[T, Reason | None]:
        """Decide for the connections that were due. Those whose reason has changed; None: it may
        enter.

        Args:
            now: seconds.
            on: what is on the relay.
            held: why no connection of a pair may enter for a while; None: they may.
            offloads: whether the devices of this host and of another segment UDP tunnels, so that
                TCP on the overlay carries bulk data as fast as the relays do.
        """
        asked = [pair for pair in self._asked if pair in self._groups]
        self._asked = []
        for pair in asked:
            self._measure(self._groups[pair])
        relayed = self._relayed(on)
        changed: dict[T, Reason | None] = {}
        for pair in asked:
            group, offload = self._groups[pair], offloads(pair.peer)
            rate = group.messages
            if on.connections.get(pair):
                rate += on.rates.get(pair.process, 0.0)
            pause = held(pair)
            why = pause or self._why_not(pair, relayed, rate)
            for key, flow in group.flows.items():
                reason = self._reason(flow, why, pause, offload)
                if reason is not flow.reason:
                    flow.reason = changed[key] = reason
            self._schedule(now, group, self._is_near(pair, relayed, rate, offload))
        return changed

    def _measure(self, group: _Group[T]) -> None:
        """Add up what a group's connections carry."""
        group.messages, more = 0.0, 0
        for flow in group.flows.values():
            is_message = not is_bulk(flow.bytes, flow.messages, self.rule)
            busy = is_message and flow.messages >= self.rule.busy
            more += busy - flow.busy
            flow.busy = busy
            group.messages += flow.messages if is_message else 0.0
        for end in group.ends:
            end.busy += more

    def _relayed(self, on: OnRelay) -> dict[_EndKey, float]:
        """The busy connections of processes that are on the relay."""
        found: defaultdict[_EndKey, float] = defaultdict(float)
        for pair in on.connections:
            for end in _ends_of(pair):
                found[end] += on.busy(pair, self.rule)
        return found

    def _batches(self, pair: Pair, relayed: Mapping[_EndKey, float], *, most: bool) -> bool:
        """Whether the busy connections of a pair's processes batch; `most`: if all were busy."""
        group = self._groups[pair]
        own, other = (
            (end.connections if most else end.busy) + relayed.get(number, 0.0)
            for number, end in zip(_ends_of(pair), group.ends, strict=True)
        )
        return batches(own, other, self.rule)

    def _why_not(self, pair: Pair, relayed: Mapping[_EndKey, float], rate: float) -> Reason | None:
        if not self._batches(pair, relayed, most=False):
            return Reason.FEW
        return None if rate >= self.rule.messages else Reason.SLOW

    def _reason(
        self, flow: Flow, why: Reason | None, held: Reason | None, offload: bool
    ) -> Reason | None:
        """Why a connection waits. `why`: none of its pair's may enter; `held`: nor bulk."""
        if held is not None or not flow.known:
            return held or flow.reason
        if is_bulk(flow.bytes, flow.messages, self.rule):
            return Reason.BULK if offload else None
        if why is None and flow.messages < self.rule.busy:
            return Reason.SLOW
        return why

    def _is_near(
        self, pair: Pair, relayed: Mapping[_EndKey, float], rate: float, offload: bool
    ) -> bool:
        """Whether a pair's connections may be let in soon."""
        group = self._groups[pair]
        if any(not flow.known for flow in group.flows.values()):
            return True
        if self._batches(pair, relayed, most=True) and NEAR * rate >= self.rule.messages:
            return True
        size = max(flow.bytes for flow in group.flows.values())
        return not offload and NEAR * size >= self.rule.bulk_rate

    @staticmethod
    def _schedule(now: float, group: _Group[T], near: bool) -> None:
        group.pause = SAMPLE if near else min(2 * group.pause, SAMPLE_MOST)
        group.due = now + group.pause


# --- leaving


def why_leave(process: Use, link: Use, rule: RelayRule, offload: bool) -> Reason | None:
    """Why the connections of a process with a peer's host have to go back to TCP; None: they stay.

    Idle ones cost nothing, and stay.

    Args:
        process: what the process did on the relay in the last second.
        link: what the link between the two relays did.
        rule: the settings.
        offload: whether both hosts' devices segment UDP tunnels.
    """
    if is_bulk(process.bytes, process.blocks, rule):
        return Reason.BULK if offload else None
    if NEAR * process.blocks < rule.busy:
        return None
    of_process = process.slots >= rule.batch * process.bells
    of_link = link.messages > 0 and link.blocks >= rule.batch * link.messages
    return None if of_process or of_link else Reason.SLOW


@dataclass(slots=True)
class _Pause:
    until: float
    length: float
    reason: Reason


class Pauses:
    """For how long nobody may enter, by whom it concerns: a process and a host, or a container.

    The first pause has the setting's length. One that begins before as much time has passed since
    the last is twice as long as that, up to the longest.
    """

    def __init__(self) -> None:
        self._pauses: dict[Hashable, _Pause] = {}

    def __len__(self) -> int:
        return len(self._pauses)

    def running(self, now: float) -> dict[Hashable, Reason]:
        """Who may not enter now, and why."""
        return {who: each.reason for who, each in self._pauses.items() if now < each.until}

    def begin(self, who: Hashable, reason: Reason, now: float, rule: RelayRule) -> None:
        """Begin a pause, unless one runs."""
        last = self._pauses.get(who)
        if last is not None and now < last.until:
            return
        length = float(rule.pause)
        if last is not None and now < last.until + last.length:
            length = min(2 * last.length, float(rule.pause_most))
        self._pauses[who] = _Pause(now + length, length, reason)

    def reason(self, who: Hashable, now: float) -> Reason | None:
        """Why nobody may enter; None: there is no pause."""
        pause = self._pauses.get(who)
        return None if pause is None or now >= pause.until else pause.reason

    def tidy(self, now: float, alive: Callable[[Hashable], bool]) -> None:
        """Forget pauses that have no effect any more, and those of whom is not alive."""
        self._pauses = {
            who: pause
            for who, pause in self._pauses.items()
            if now < pause.until + pause.length and alive(who)
        }
