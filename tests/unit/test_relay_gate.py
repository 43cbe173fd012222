"""Requests wait for the relays' TCP until the rule lets them in, and connections leave that are not
worth it, on both hosts.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Sequence

import pytest

from dataplane.control import RelayRule
from dataplane.router import library_wire as wire
from dataplane.router import peer_wire, relay_use
from dataplane.router.arenas import RELAY_SIDE
from dataplane.router.loop import Bugs, EpollLoop
from dataplane.router.pair_requests import PairRequest
from dataplane.router.reasons import Reason
from dataplane.router.relay_sampler import AT_A_TIME, PROCESSOR, RelaySampler
from dataplane.router.remote_events import Transport
from dataplane.router.remote_requests import RemoteRequest
from dataplane.router.seams import SocketEnd
from dataplane.router.socket_table import AT_ONCE
from dataplane.router.tcp_counters import TcpCounters
from tests.unit.remote_world import Host, Tcp, World, started
from tests.unit.router_world import FakeKernel, at

A, B = (0, 1), (1, 1)
RULE = RelayRule(connections=6)
SECOND = 1.0


class Traffic:
    """What programs do on connections that are on TCP, each second."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rates: dict[Tcp, tuple[float, int]] = {}
        self.uses: Callable[[Host], None] = lambda host: None
        world.loop.after(0.5, self.step)

    def step(self) -> None:
        """One second of traffic."""
        for tcp, (rate, size) in self.rates.items():
            for side in (0, 1):
                host, _, _, _, cookie = tcp.ends[side]
                before = host.kernel.traffic.get(cookie, TcpCounters(0, 0, 0, 0, 1398))
                count = int(rate / 2)
                segments = count * -(-size // 1398)
                host.kernel.traffic[cookie] = TcpCounters(
                    before.segments_in + segments,
                    before.segments_out + segments,
                    before.bytes_in + count * size,
                    before.bytes_out + count * size,
                    1398,
                )
        for host in self.world.hosts:
            self.uses(host)
        self.world.loop.after(SECOND, self.step)


@pytest.fixture
def world() -> World:
    return started(cards=(), tcp=range(2), ruled=True, relay_rule=RULE)


@pytest.fixture
def traffic(world: World) -> Traffic:
    return Traffic(world)


def busy(
    world: World, traffic: Traffic, count: int, rate: float = 2500, size: int = 64
) -> list[Tcp]:
    """Connections between two processes that have sent requests."""
    made = [world.connect(A, B) for _ in range(count)]
    for tcp in made:
        traffic.rates[tcp] = (rate, size)
        for side in (0, 1):
            world.request(tcp, side)
    return made


def waits(world: World, tcp: Tcp) -> list[Reason]:
    """The reasons that both hosts give for a request that waits."""
    found = []
    for host, container, _, _, cookie in tcp.ends:
        request = host.pairing.containers[host.namespace(container)].waiting[cookie]
        found.append(host.remotes.why_waiting(request))
    return found


def left(host: Host) -> list[int]:
    """Why connections left whose processes still hold their slots."""
    return [
        slot.why_left
        for arena in host.pairing.arenas.values()
        for slot in arena.slots.values()
        if arena.ring and slot.ends[RELAY_SIDE] is None
    ]


def granted(world: World, made: list[Tcp]) -> int:
    return sum(
        world.remote(tcp, 0) is not None and world.remote(tcp, 1) is not None for tcp in made
    )


def counters(host: Host, **per_connection: int) -> None:
    """The relay of a host reports what each arena and each link has done, since the start."""
    for arena in host.pairing.arenas.values():
        if arena.ring:
            values = getattr(host, "reported", {}).get(arena.id, {})
            values = {name: values.get(name, 0) + more for name, more in per_connection.items()}
            host.reported = {**getattr(host, "reported", {}), arena.id: values}  # type: ignore[attr-defined]
            host.ruling.use.counted(arena.id, 0, values)
    host.ruling.use.answered()


@pytest.mark.parametrize("count", [8, 50])
def test_busy_connections_enter(world: World, traffic: Traffic, count: int) -> None:
    """Busy connections between two processes are granted, seconds after their requests."""
    made = busy(world, traffic, count)
    world.loop.run(1)
    assert granted(world, made) == 0
    world.loop.run(4)
    assert granted(world, made) == count
    one = world.remote(made[0], 0)
    assert one is not None
    assert one.state.transport is Transport.RELAY
    assert not any(len(host.ruling.gate) for host in world.hosts)
    world.check()


@pytest.mark.parametrize(
    ("count", "rate", "size", "reason"),
    [
        (4, 20_000, 64, Reason.FEW),
        (1, 20_000, 64, Reason.FEW),
        (50, 80, 64, Reason.FEW),
        (8, 300, 64, Reason.SLOW),
        (8, 5000, 128 << 10, Reason.BULK),
    ],
)
def test_others_wait(
    world: World, traffic: Traffic, count: int, rate: float, size: int, reason: Reason
) -> None:
    """Other connections wait, are not refused, and both hosts say why."""
    made = busy(world, traffic, count, rate, size)
    world.loop.run(30)
    for tcp in made:
        assert waits(world, tcp) == [reason, reason]
        assert not world.refusals(tcp, 0)
    assert granted(world, made) == 0


def test_only_the_leader_samples(world: World, traffic: Traffic) -> None:
    """The follower reads no counters, and the leader none of requests without a counterpart."""
    lonely = world.connect(A, B)
    world.request(lonely, 0)
    world.loop.run(10)
    assert world.hosts[0].kernel.sampled == 0
    busy(world, traffic, 1)
    world.loop.run(10)
    assert world.hosts[0].kernel.sampled > 0
    assert world.hosts[1].kernel.sampled == 0


def test_a_request_whose_socket_is_gone(world: World, traffic: Traffic) -> None:
    """A request whose socket has closed without a word doesn't stay."""
    made = busy(world, traffic, 4)
    world.loop.run(3)
    host, container, local, remote, cookie = made[0].ends[0]
    del host.kernel.sockets[host.namespace(container), local, remote]
    world.loop.run(10)
    assert cookie not in host.pairing.containers[host.namespace(container)].waiting
    assert len(host.ruling.gate) == 3
    # The follower's is withdrawn by its own checks.
    assert len(host.remotes.requests) == 3


def test_withdrawn(world: World, traffic: Traffic) -> None:
    """When either end's request is gone, or the session, nothing is sampled for it any more."""
    made = busy(world, traffic, 4)
    world.loop.run(3)
    world.close(made[0], 1)
    world.close(made[1], 0)
    world.loop.run(1)
    leader = world.hosts[0]
    assert len(leader.ruling.gate) == 2
    world.lose(*world.hosts)
    assert len(leader.ruling.gate) == 0
    world.connect_all()
    world.loop.run(3)
    assert len(leader.ruling.gate) == 2
    assert waits(world, made[2]) == [Reason.FEW, Reason.FEW]


@pytest.mark.parametrize("who", [0, 1])
def test_leaving(world: World, traffic: Traffic, who: int) -> None:
    """Whichever host finds that wake-ups serve one connection each, the pair goes back to TCP on
    both, unharmed; requests wait for a minute, for the same reason on both hosts; then they are
    let in again.
    """
    made = busy(world, traffic, 8)
    world.loop.run(5)
    assert granted(world, made) == 8
    world.loop.run(10)
    assert granted(world, made) == 8
    traffic.uses = lambda host: (
        counters(host, bells_in=1000, slots_in=1000, blocks_in=1000) if host.number == who else None
    )
    world.loop.run(5)
    assert granted(world, made) == 0
    assert not any(host.severed for host in world.hosts)
    assert [left(host) for host in world.hosts] == [[Reason.SLOW] * 8] * 2
    traffic.uses = lambda host: None
    again = busy(world, traffic, 8)
    world.loop.run(30)
    assert granted(world, again) == 0
    for tcp in again:
        assert waits(world, tcp) == [Reason.SLOW, Reason.SLOW]
    world.loop.run(40)
    assert granted(world, again) == 8


def test_staying(world: World, traffic: Traffic) -> None:
    """Connections whose wake-ups serve several stay on the relay."""
    made = busy(world, traffic, 8)
    traffic.uses = lambda host: counters(
        host, bells_in=1000, slots_in=8000, blocks_in=8000, bytes_in=64 * 8000
    )
    world.loop.run(60)
    assert granted(world, made) == 8


@pytest.mark.parametrize("who", [0, 1])
def test_bulk_without_offload(traffic: Traffic, world: World, who: int) -> None:
    """Where the device of one of the hosts doesn't segment tunnels, a bulk stream enters alone, and
    stays.
    """
    world.hosts[who].pairing.knowledge.offload = False
    world.hello_again(world.hosts[who])
    made = busy(world, traffic, 1, 5000, 128 << 10)
    world.loop.run(5)
    assert granted(world, made) == 1
    traffic.uses = lambda host: counters(
        host, bells_in=3000, slots_in=3000, blocks_in=3000, bytes_in=300_000_000
    )
    world.loop.run(30)
    assert granted(world, made) == 1


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    ("quota", "uses", "leaves"),
    [(0.5, 0.6, True), (0.5, 0.4, False), (None, 0.9, False), (4.0, 0.9, False)],
)
def test_processor(
    world: World, traffic: Traffic, who: int, quota: float | None, uses: float, leaves: bool
) -> None:
    """A container for which the relay uses more of the processor than `--cpus` allows has its
    connections brought back to TCP, and its requests wait, with the same reason on both hosts.
    """
    world.quota = quota
    made = busy(world, traffic, 8)
    world.loop.run(5)
    spent = int(uses * 1e9)
    traffic.uses = lambda host: (
        counters(host, bells_in=1000, slots_in=8000, blocks_in=8000, cpu=spent)
        if host.number == who
        else None
    )
    world.loop.run(30)
    assert granted(world, made) == (0 if leaves else 8)
    if leaves:
        traffic.uses = lambda host: None
        late = busy(world, traffic, 8)
        world.loop.run(5)
        assert waits(world, late[0]) == [Reason.LIMIT, Reason.LIMIT]
    namespace = world.hosts[who].namespace(1)
    assert world.hosts[who].pairing.containers[namespace].relay_cpu > 1.0


def test_counters_that_were_forgotten(
    world: World, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If there are so many counters that idle ones are forgotten, one that comes back doesn't count
    all that it has done since the beginning as the work of one second.
    """
    monkeypatch.setattr(relay_use, "COUNTED", 0)
    made = busy(world, traffic, 8)
    world.loop.run(5)
    works = True
    traffic.uses = lambda host: (
        counters(host, slots_in=800, blocks_in=800, cpu=100_000_000) if works else None
    )
    world.loop.run(300)
    works = False
    for host in world.hosts:
        for _ in range(3):
            host.ruling.use.answered()
            world.loop.run(1)
        assert not host.ruling.use.rates
    works = True
    world.loop.run(30)
    assert granted(world, made) == 8


def test_offers_are_looked_through_when_a_pause_begins_or_ends(
    world: World, traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause costs nothing while it lasts, however many offers there are."""
    made = busy(world, traffic, 8)
    traffic.uses = lambda host: (
        counters(host, bells_in=1000, slots_in=1000, blocks_in=1000) if host.number else None
    )
    world.loop.run(10)
    assert granted(world, made) == 0
    looks: list[float] = []
    requests = world.hosts[1].remotes.requests
    monkeypatch.setattr(requests, "offer_again", lambda: looks.append(world.loop.now()))
    traffic.uses = lambda host: None
    world.loop.run(RULE.pause + 60)
    assert len(looks) == 1


def test_a_relay_that_ends(world: World, traffic: Traffic) -> None:
    """A new relay's counters begin at zero, and harm nothing."""
    made = busy(world, traffic, 8)
    world.loop.run(5)
    assert granted(world, made) == 8
    world.hosts[0].ruling.use.forget_relay()
    counters(world.hosts[0], bells_in=10, slots_in=100)
    world.loop.run(2)
    assert granted(world, made) == 8


def test_messages_of_a_hostile_peer(world: World, traffic: Traffic) -> None:
    """A peer may offer one number for many connections, the same connection under many numbers, and
    give reasons for offers that don't exist: nothing grows, and nothing enters by that.
    """
    leader, follower = world.hosts
    made = busy(world, traffic, 4)
    world.loop.run(2)
    requests = leader.remotes.requests
    for port in range(1, 2000):
        offer = peer_wire.Offer(7, "n1", "10.0.4.21:80", f"10.0.4.11:{port}", port, port)
        leader.remotes.message(follower.address, offer)
        again = peer_wire.Offer(1000 + port, "n1", "10.0.4.21:80", "10.0.4.11:9", 1, 0)
        leader.remotes.message(follower.address, again)
    of_host = requests._of[follower.address]
    assert len(of_host.offers) == len(of_host.keys) <= len(made) + 2
    follower.remotes.message(leader.address, peer_wire.Waits(99_999, tuple(range(4096))))
    leader.remotes.message(follower.address, peer_wire.Waits(4, (1, 2, 3)))
    world.loop.run(5)
    assert granted(world, made) == 0
    assert waits(world, made[0])[0] is Reason.FEW


def test_old_peers_get_no_new_message() -> None:
    """A router whose Hello has no relay is sent no `Waits`."""
    sent = []
    made = World(cards=(), tcp=range(2), ruled=True, relay_rule=RULE)
    carry = made.carry

    def spy(source: Host, target: Host, message: peer_wire.Message) -> bool:
        sent.append(message)
        return carry(source, target, message)

    made.carry = spy  # type: ignore[method-assign]
    made.connect_all()
    made.loop.run(1)
    traffic = Traffic(made)
    busy(made, traffic, 4)
    made.loop.run(5)
    assert [message for message in sent if isinstance(message, peer_wire.Waits)]
    told = len(sent)
    made.loop.run(60)
    assert len(sent) == told, "only changes are told"


def test_a_request_before_the_other(world: World, traffic: Traffic) -> None:
    """A note that ends a request ends its sampling too."""
    made = busy(world, traffic, 1)
    world.loop.run(2)
    host, container, _, _, cookie = made[0].ends[0]
    assert len(host.ruling.gate) == 1
    host.pairing.note(host.processes[container], wire.Note(Reason.NONE, cookie))
    assert len(host.ruling.gate) == 0


def waiting_requests(count: int) -> list[RemoteRequest]:
    return [
        RemoteRequest(
            PairRequest(1, 101, wire.Request(n, n, at("10.0.4.1:1"), at("10.0.4.2:2")), "n1", 0.0),
            "n1",
            at("10.0.4.2:2"),
        )
        for n in range(count)
    ]


def test_a_bug_in_a_round() -> None:
    """A bug in one step costs that step: the round is finished, and the next one begins."""
    bugs = Bugs()
    epoll = select.epoll()
    now = 100.0
    loop = EpollLoop(epoll, lambda: now, bugs.guard)
    sampler = RelaySampler(loop, FakeKernel(), lambda: 0.0)
    seen: list[RemoteRequest] = []

    def each(request: RemoteRequest, _: TcpCounters | None) -> None:
        seen.append(request)
        if len(seen) == 1:
            raise KeyError(request)

    rounds: list[int] = []
    for _ in range(2):
        sampler.sample(waiting_requests(3 * AT_ONCE), each, lambda: rounds.append(len(seen)))
        for _ in range(10):
            loop.fire()
            now += 1
        assert not sampler.busy
    assert bugs.count == 1
    assert rounds == [1 + 2 * AT_ONCE, 1 + 5 * AT_ONCE]
    epoll.close()


def test_the_share_of_the_processor() -> None:
    """However many connections wait, reading their counters takes no more of the processor than its
    share, in steps of a few dozen, and each round is finished.
    """
    made = World(cards=(), tcp=range(2), ruled=True, relay_rule=RULE)
    spent = 0.0

    def cpu() -> float:
        return spent

    class Slow(FakeKernel):
        def counters(self, namespace: int, ends: Sequence[SocketEnd]) -> list[TcpCounters | None]:
            nonlocal spent
            spent += 0.001 * len(ends)
            assert len(ends) <= AT_ONCE
            return super().counters(namespace, ends)

    loop = made.loop
    sampler = RelaySampler(loop, Slow(), cpu)
    waiting = waiting_requests(1000)
    seen: list[RemoteRequest] = []
    rounds = []
    began = loop.now()
    for _ in range(200):
        if not sampler.busy:
            sampler.sample(
                waiting, lambda request, _: seen.append(request), lambda: rounds.append(len(seen))
            )
        loop.run(1)
    assert spent <= PROCESSOR * (loop.now() - began) + AT_A_TIME + 0.001 * AT_ONCE
    assert spent >= 0.8 * PROCESSOR * (loop.now() - began)
    assert rounds == [1000 * (1 + n) for n in range(len(rounds))]
    assert len(rounds) >= 3
