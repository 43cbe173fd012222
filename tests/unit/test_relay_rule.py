"""The rule for the relays' TCP, in virtual time: it lets in what gains, and nothing else for long.

The model: a connection has a rate of messages. On TCP each message is a segment. On the relay, the
busy connections of a process share wake-ups.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.control import RelayRule
from dataplane.router.reasons import Reason
from dataplane.router.relay_rule import (
    NEAR,
    SAMPLE,
    SAMPLE_MOST,
    EnterRule,
    OnRelay,
    Pair,
    Pauses,
    TcpSample,
    Use,
    batches,
    messages,
    why_leave,
)

RULE: Final = RelayRule(connections=6)
PEER: Final = IPv4Address("192.0.2.2")
OTHER: Final = IPv4Address("192.0.2.3")
SEGMENT: Final = 1398
SETTLE: Final = 2.0


@dataclass(eq=False)
class Stream:
    """A connection of the model."""

    pair: Pair
    rate: float
    """Messages per second, in both directions together."""
    size: int = 64
    on: bool = False
    since: float = 0.0
    segments: float = 0.0
    bytes: float = 0.0

    def run(self, seconds: float) -> None:
        per_message = -(-self.size // SEGMENT)
        self.segments += self.rate * per_message * seconds
        self.bytes += self.rate * self.size * seconds

    def sample(self, now: float) -> TcpSample:
        half, size = round(self.segments / 2), round(self.bytes / 2)
        return TcpSample(now, half, half, size, size, SEGMENT)


@dataclass
class Model:
    """One host with its connections: leads, samples, lets in and brings back, each second."""

    streams: list[Stream]
    offload: bool = True
    now: float = 1000.0
    rule: EnterRule[Stream] = field(default_factory=lambda: EnterRule(RULE))
    pauses: Pauses = field(default_factory=Pauses)
    entered: Counter[Pair] = field(default_factory=Counter)
    left: list[tuple[float, Pair, Reason]] = field(default_factory=list)
    alone: float = 0.0
    """Seconds that connections spent on the relay though it was no gain."""
    sampled: int = 0

    def __post_init__(self) -> None:
        for stream in self.streams:
            self.rule.add(stream, stream.pair, self.now)

    def run(self, seconds: int) -> Model:
        for _ in range(seconds):
            self._second()
        return self

    def _second(self) -> None:
        for key in self.rule.due(self.now):
            self.sampled += 1
            self.rule.sampled(key, key.sample(self.now))
        on = OnRelay(Counter(each.pair for each in self.streams if each.on), self._rates())
        changed = self.rule.decide(self.now, on, self.held, lambda _: self.offload)
        for stream, reason in changed.items():
            if reason is None:
                self.rule.remove(stream)
                stream.on, stream.since = True, self.now
                self.entered[stream.pair] += 1
        for stream in self.streams:
            if not stream.on:
                stream.run(SAMPLE)
        self.now += SAMPLE
        self._leave()

    def held(self, pair: Pair) -> Reason | None:
        return self.pauses.reason((pair.process, pair.peer), self.now)

    def _rates(self) -> dict[int, float]:
        rates: dict[int, float] = {}
        for stream in self.streams:
            if stream.on and self.now - stream.since >= SAMPLE:
                rates[stream.pair.process] = rates.get(stream.pair.process, 0.0) + stream.rate
        return rates

    def use(self, streams: list[Stream]) -> Use:
        """What processes do that share wake-ups among their busy connections."""
        slots = sum(stream.rate for stream in streams)
        most = max((stream.rate for stream in streams), default=0.0)
        bells = max(most, slots / 50) if streams else 0.0
        size = sum(stream.rate * stream.size for stream in streams)
        return Use(bytes=size, bells=bells, slots=slots, messages=bells, blocks=slots)

    def _leave(self) -> None:
        ends = {(each.pair.process, each.pair.peer) for each in self.streams if each.on}
        for process, peer in ends:
            mine = [each for each in self.streams if each.on and each.pair.process == process]
            there = [each for each in mine if each.pair.peer == peer]
            link = [each for each in self.streams if each.on and each.pair.peer == peer]
            reason = why_leave(self.use(mine), self.use(link), RULE, self.offload)
            if reason is None:
                continue
            self.alone += SAMPLE
            if self.now - min(each.since for each in there) >= SETTLE:
                self.pauses.begin((process, peer), reason, self.now, RULE)
                self.left.append((self.now, there[0].pair, reason))
                for stream in there:
                    stream.on = False
                    self.rule.add(stream, stream.pair, self.now)

    def reasons(self) -> set[Reason | None]:
        return {None if each.on else self.rule.reason(each) for each in self.streams}


def between(count: int, rate: float, process: int = 1, peer_process: int = 1) -> list[Stream]:
    """So many connections between two processes."""
    return [Stream(Pair(process, PEER, peer_process), rate) for _ in range(count)]


@pytest.mark.parametrize("count", [8, 16, 50])
def test_busy_connections_enter(count: int) -> None:
    """Busy connections between two processes are on the relay within two seconds, and stay."""
    model = Model(between(count, 2500)).run(3)
    assert model.reasons() == {None}
    model.run(600)
    assert model.entered == {Pair(1, PEER, 1): count}
    assert not model.left


@pytest.mark.parametrize("count", [1, 4])
def test_few_connections_stay(count: int) -> None:
    """Connections that can't share wake-ups never enter."""
    model = Model(between(count, 20_000)).run(600)
    assert model.reasons() == {Reason.FEW}
    assert not model.entered


def test_one_connection_of_each_client() -> None:
    """A server's many connections don't enter if each leads to another process."""
    streams = [stream for client in range(16) for stream in between(1, 2000, 1, client)]
    assert Model(streams).run(600).reasons() == {Reason.FEW}
    streams = [stream for client in range(16) for stream in between(1, 2000, client, 1)]
    assert Model(streams).run(600).reasons() == {Reason.FEW}


def test_pairs_with_one_connection_each() -> None:
    """Twenty-four pairs of processes with one connection each stay on TCP."""
    streams = [stream for pair in range(24) for stream in between(1, 3000, pair, pair)]
    assert Model(streams).run(600).reasons() == {Reason.FEW}


def test_clients_with_several_connections() -> None:
    """Four client processes with twelve connections each enter."""
    streams = [stream for client in range(4) for stream in between(12, 1000, client, 1)]
    model = Model(streams).run(600)
    assert model.reasons() == {None}
    assert not model.left


def test_slow_connections_stay() -> None:
    """Fifty connections with 2,000 operations per second in all stay on TCP."""
    model = Model(between(50, 80)).run(600)
    assert not model.entered
    assert model.reasons() == {Reason.FEW}


def test_slow_beside_busy_connections() -> None:
    """Quiet connections of a pair that is on the relay stay on TCP."""
    model = Model(between(50, 1000) + between(10, 1)).run(60)
    assert model.reasons() == {None, Reason.SLOW}
    assert model.entered.total() == 50


def test_busy_pair_with_few_messages() -> None:
    """Connections that are just busy, but carry too few messages together, stay on TCP."""
    model = Model(between(8, 300)).run(60)
    assert model.reasons() == {Reason.SLOW}


def test_eight_one_eight() -> None:
    """A pair whose connections fall silent but one goes back to TCP within seconds, and comes again
    after a minute.
    """
    streams = between(8, 2500)
    model = Model(streams).run(10)
    for stream in streams[1:]:
        stream.rate = 0
    model.run(3)
    assert [reason for _, _, reason in model.left] == [Reason.SLOW]
    assert not any(stream.on for stream in streams)
    for stream in streams[1:]:
        stream.rate = 2500
    model.run(50)
    assert model.reasons() == {Reason.SLOW}
    model.run(20)
    assert model.reasons() == {None}


def test_idle_connections_stay() -> None:
    """Connections on the relay that carry nothing stay there."""
    streams = between(8, 2500)
    model = Model(streams).run(10)
    for stream in streams:
        stream.rate = RULE.busy / NEAR / len(streams) - 1
    model.run(3600)
    assert not model.left


def test_a_lone_one_beside_idle_ones() -> None:
    """A connection that becomes busy alone, beside idle ones on the relay, doesn't enter."""
    streams = [*between(8, 2500), *between(1, 0)]
    model = Model(streams).run(10)
    for stream in streams[:8]:
        stream.rate = 0
    model.run(2)
    streams[8].rate = 10_000
    model.run(600)
    assert not streams[8].on


@pytest.mark.parametrize("count", [1, 4, 50])
def test_bulk(count: int) -> None:
    """Bulk data enters only where the underlay's device doesn't segment tunnels, and then at once,
    alone too.
    """
    streams = between(count, 5000)
    for stream in streams:
        stream.size = 128 << 10
    assert Model(streams).run(60).reasons() == {Reason.BULK}
    for stream in streams:
        stream.segments = stream.bytes = 0
    model = Model(streams, offload=False).run(3)
    assert model.reasons() == {None}
    model.run(600)
    assert not model.left


def test_bulk_is_no_company() -> None:
    """Bulk streams don't count as busy connections of others."""
    streams = [*between(10, 5000), *between(2, 5000)]
    for stream in streams[:10]:
        stream.size = 128 << 10
    assert Model(streams).run(60).reasons() == {Reason.BULK, Reason.FEW}


def test_becomes_bulk() -> None:
    """A pair on the relay that goes over to bulk data goes back to TCP, where the device segments
    tunnels.
    """
    streams = between(8, 2500)
    model = Model(streams).run(10)
    for stream in streams:
        stream.size = 128 << 10
    model.run(2)
    assert [reason for _, _, reason in model.left] == [Reason.BULK]


@settings(max_examples=25)
@given(low=st.integers(0, 5), period=st.integers(1, 90), high=st.integers(6, 12))
def test_flapping(low: int, period: int, high: int) -> None:
    """However the number of busy connections swings about the threshold, a pair comes and goes a
    few times an hour, and less and less often.
    """
    streams = between(high, 2500)
    model = Model(streams)
    for turn in range(1800 // period):
        for stream in streams[low:]:
            stream.rate = 2500 * (turn % 2)
        model.run(period)
    times = [when for when, _, _ in model.left]
    # One pause each, and pauses of 1, 2, 4, … minutes, or of one minute after a long good stay.
    assert len(times) <= 1800 / RULE.pause
    assert all(later - earlier > RULE.pause for earlier, later in itertools.pairwise(times))
    assert model.alone <= 3 * (len(times) + 1)


Kind = tuple[int, int, int, int]
KINDS: Final = st.tuples(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.sampled_from([0, 50, 300, 3000])
)


@settings(max_examples=40)
@given(
    first=st.lists(KINDS, min_size=1, max_size=6),
    then=st.lists(
        st.lists(st.sampled_from([0, 50, 300, 3000]), min_size=6, max_size=6), max_size=6
    ),
)
def test_never_loses(first: list[Kind], then: list[list[int]]) -> None:
    """Whatever programs do, connections spend three seconds of each minute at most on the relay
    where it is no gain.
    """
    groups = [between(count, rate, process, there) for process, there, count, rate in first]
    model = Model([stream for group in groups for stream in group])
    for rates in [[], *then]:
        for group, rate in zip(groups, rates, strict=False):
            for stream in group:
                stream.rate = rate
        model.run(150)
    rule = model.rule
    for pair, known in rule._groups.items():
        beside = [
            flow
            for flow in rule._flows.values()
            if (flow.pair.process, flow.pair.peer) == (pair.process, pair.peer)
        ]
        counted = (len(beside), sum(flow.busy for flow in beside))
        assert (known.ends[0].connections, known.ends[0].busy) == counted
    minutes = 150 * (len(then) + 1) / 60
    processes = {process for process, *_ in first}
    assert model.alone <= 3 * (minutes + 1) * len(processes)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 4000))
def test_who_enters(own: int, other: int, rate: int) -> None:
    """A pair enters exactly if enough connections of both processes are busy, and carry enough."""
    between_them = min(own, other)
    streams = between(between_them, rate)
    streams += [Stream(Pair(1, PEER, 100 + n), rate) for n in range(own - between_them)]
    streams += [Stream(Pair(100 + n, PEER, 1), rate) for n in range(other - between_them)]
    Model(streams).run(3)
    busy = rate >= RULE.busy
    expected = busy and batches(own, other, RULE) and rate * between_them >= RULE.messages
    assert all(stream.on is expected for stream in streams[:between_them])


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(0, 1 << 32), st.integers(0, 5000)), max_size=20
    ),
    st.integers(1, 20),
)
def test_a_peer_that_lies(lies: list[tuple[int, int, int]], honest: int) -> None:
    """What one host says about its processes changes nothing for connections with others."""
    mine = [Stream(Pair(1, OTHER, 1), 1000) for _ in range(honest)]
    alone = Model(mine).run(3)
    expected = [(stream.on, None if stream.on else alone.rule.reason(stream)) for stream in mine]
    again = [Stream(Pair(1, OTHER, 1), 1000) for _ in range(honest)]
    liars = [Stream(Pair(process, PEER, said), rate) for process, said, rate in lies]
    model = Model(again + liars).run(3)
    assert [(s.on, None if s.on else model.rule.reason(s)) for s in again] == expected


def test_a_liar_gains_nothing() -> None:
    """A host that claims that all of its processes are one doesn't get connections in that are
    alone on this host.
    """
    streams = [stream for process in range(16) for stream in between(1, 5000, process, 1)]
    assert Model(streams).run(600).reasons() == {Reason.FEW}


# --- the parts


@given(st.integers(1, 10_000), st.integers(1, 1 << 17))
def test_estimated_messages(count: int, size: int) -> None:
    """Small messages are counted exactly enough, and large ones as few."""
    segments = count * -(-size // SEGMENT)
    found = messages(segments, count * size, SEGMENT)
    assert 0 <= found <= segments
    if 2 * size <= SEGMENT:
        assert found == count
    if size >= RULE.bulk:
        assert count * size >= RULE.bulk * found * 0.5


def test_counters_that_begin_again() -> None:
    """The kernel counts segments modulo 2³²."""
    rule: EnterRule[str] = EnterRule(RULE)
    rule.add("a", Pair(1, PEER, 1), 0.0)
    wrap = 1 << 32
    for at, segments in ((0.0, wrap - 1000), (1.0, 1000)):
        rule.due(at)
        rule.sampled(
            "a", TcpSample(at, segments, segments, int(at) * 64_000, int(at) * 64_000, 1398)
        )
    flow = rule._flows["a"]
    assert flow.messages == pytest.approx(4000, rel=0.1)


def test_what_is_never_near_is_sampled_rarely() -> None:
    """Connections far from the thresholds are sampled every eight seconds; near ones each
    second.
    """
    lone = Model(between(1, 20_000)).run(800)
    assert lone.sampled <= 800 / SAMPLE_MOST + 6
    near = Model(between(8, 300)).run(800)
    assert near.sampled == 8 * 800


def test_lone_connections_by_setting() -> None:
    """With other numbers, lone connections enter and stay."""
    lone = RelayRule(connections=1, batch=0)
    assert batches(1, 1, lone)
    assert not batches(1, 1, RULE)
    use = Use(bells=9000, slots=9000, messages=9000, blocks=9000)
    assert why_leave(use, use, lone, True) is None
    assert why_leave(use, use, RULE, True) is Reason.SLOW


def test_either_batch_is_enough() -> None:
    """Connections stay if wake-ups of the process or messages between relays serve several."""
    alone = Use(bells=900, slots=900, messages=900, blocks=900)
    together = Use(bells=300, slots=900, messages=300, blocks=900)
    assert why_leave(alone, alone, RULE, True) is Reason.SLOW
    assert why_leave(alone, together, RULE, True) is None
    assert why_leave(together, alone, RULE, True) is None
    # Without a word about the link it is no excuse.
    assert why_leave(alone, Use(), RULE, True) is Reason.SLOW


def test_pauses_grow_and_shrink() -> None:
    """A pause doubles up to an hour, and is short again after a stay as long as the last."""
    pauses = Pauses()
    now, lengths = 0.0, []
    for _ in range(9):
        pauses.begin("a", Reason.SLOW, now, RULE)
        begun = now
        while pauses.reason("a", now) is Reason.SLOW:
            now += 1
        lengths.append(now - begun)
        now += 2
    assert lengths == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    now += 3600
    pauses.begin("a", Reason.SLOW, now, RULE)
    assert pauses.reason("a", now + 59) is Reason.SLOW
    assert pauses.reason("a", now + 60) is None
    pauses.tidy(now + 61, lambda who: True)
    assert len(pauses) == 1
    pauses.tidy(now + 61, lambda who: False)
    assert not len(pauses)


def test_all_is_forgotten() -> None:
    """Nothing is kept of connections that wait no more."""
    model = Model(between(8, 10))
    model.run(5)
    for stream in model.streams:
        assert stream in model.rule
        model.rule.remove(stream)
        model.rule.remove(stream)
    assert not len(model.rule)
    assert not model.rule._groups
    assert not model.rule._ends
    assert not model.rule.due(model.now + 100)
