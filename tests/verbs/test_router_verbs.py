"""Queue pairs of real processes and a real router: sockets, memory, kills and restarts."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dataplane.control import Limits, RouterSettings
from dataplane.router import library_wire as wire
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import (
    MAX_MESSAGE,
    VERBS_VERSION,
    SlotKind,
    VerbsDevice,
    VerbsGrant,
    VerbsKind,
    VerbsListen,
    VerbsMessage,
    VerbsOpen,
    VerbsQueuePair,
    VerbsRefuse,
)
from testbed.kernel_hosts import new_namespace
from tests.dataplane.library import Library
from tests.verbs.router import TestRouter, router

GID = IPv4Address("10.0.4.1")
RC = 2


class VerbsLibrary:
    """A process with verbs."""

    def __init__(self, path: Path, qpn_first: int = 0, namespace: int | None = None) -> None:
        self.library = Library.connect(path, namespace)
        welcome, _ = self.library.hear(wire.Welcome)
        assert welcome.verbs == VERBS_VERSION
        self.library.say(VerbsOpen(VERBS_VERSION, qpn_first))
        self.devices = [self.library.hear(VerbsDevice)[0]]
        while len(self.devices) < self.devices[0].count:
            self.devices.append(self.library.hear(VerbsDevice)[0])
        self.qpn = self.devices[0].qpn_first

    def ask(self, peer: VerbsLibrary, request: int = 1, *, paired: bool = False) -> None:
        """Request the peer's first queue pair for the own one."""
        to = peer.devices[0].gid
        self.library.say(VerbsQueuePair(request, self.qpn, peer.qpn, 0, RC, paired, to))

    def refused(self) -> tuple[int, int]:
        """Number and reason of a refusal."""
        refuse, _ = self.library.hear(VerbsRefuse)
        assert refuse.refused == VerbsKind.QUEUE_PAIR
        return refuse.number, refuse.reason


@pytest.fixture
def served(tmp_path: Path) -> Iterator[TestRouter]:
    with router(tmp_path) as made:
        yield made


def test_a_pair(served: TestRouter) -> None:
    """Two processes that ask for each other get one slot of one memory, and the bells. When one is
    gone the other is told.
    """
    one, other = VerbsLibrary(served.socket), VerbsLibrary(served.socket)
    assert one.devices[0].gid == GID
    assert one.qpn != other.qpn
    one.ask(other, 7)
    other.ask(one, 8)
    grant, memory = one.library.hear(VerbsGrant)
    answer, memory2 = other.library.hear(VerbsGrant)
    assert (grant.request, answer.request) == (7, 8)
    assert (grant.arena, grant.slot, grant.incarnation) == (
        answer.arena,
        answer.slot,
        answer.incarnation,
    )
    assert memory is not None
    assert memory2 is not None
    assert os.fstat(memory).st_ino == os.fstat(memory2).st_ino
    assert one.library.rings(grant.arena, 1 - grant.side)
    one.library.close()
    assert other.library.rings(grant.arena, 1 - answer.side)
    assert other.refused() == (other.qpn, Reason.PEER_CLOSED)


def test_containers(tmp_path: Path) -> None:
    """A process is who its network namespace says: a container is reached by its own addresses, and
    a process elsewhere has no device.
    """
    spaces = [new_namespace() for _ in range(3)]
    paths = [Path(f"/proc/self/fd/{space}") for space in spaces]
    try:
        containers = {paths[0]: ("10.0.4.1",), paths[1]: ("10.0.4.2",)}
        with router(tmp_path, containers) as made:
            one, other, stranger = (VerbsLibrary(made.socket, 0, space) for space in spaces)
            assert [each.devices[0].count for each in (one, other, stranger)] == [1, 1, 0]
            stranger.ask(other)
            assert stranger.refused() == (0, Reason.NOT_FOUND)
            one.ask(other)
            other.ask(one)
            grant, _ = one.library.hear(VerbsGrant)
            answer, _ = other.library.hear(VerbsGrant)
            assert (grant.arena, grant.slot) == (answer.arena, answer.slot)
            assert answer.peer_gid == one.devices[0].gid
            assert other.library.rings(grant.arena, 1 - answer.side)
            made.learn({paths[1]: ("10.0.4.2",)})
            assert other.refused() == (other.qpn, Reason.PEER_CLOSED)
    finally:
        for space in spaces:
            os.close(space)


def test_a_new_router(served: TestRouter) -> None:
    """After a router's restart processes keep their numbers, and hear of the end of peers with
    which an earlier router paired them.
    """
    one, other = VerbsLibrary(served.socket), VerbsLibrary(served.socket)
    served.restart()
    again, other_again = (VerbsLibrary(served.socket, each.qpn) for each in (one, other))
    assert (again.qpn, other_again.qpn) == (one.qpn, other.qpn)
    again.ask(other_again, paired=True)
    other_again.ask(again, paired=True)
    assert again.library.silent()
    other_again.library.close()
    assert again.refused() == (again.qpn, Reason.PEER_CLOSED)


def test_a_flood(tmp_path: Path) -> None:
    """Requests that come too fast are answered later, not refused: none is lost, and the container
    gets no more answers than its rate allows.
    """
    rate, requests = 100, 60
    settings = RouterSettings(limits=Limits(messages=rate))
    with router(tmp_path, settings=settings) as made:
        one = VerbsLibrary(made.socket)
        begin = time.monotonic()
        for request in range(requests):
            ask = VerbsQueuePair(request, one.qpn, 9, 0, RC, False, IPv4Address("10.0.4.99"))
            one.library.say(ask)
        answers = [one.library.hear(VerbsRefuse)[0] for _ in range(requests)]
        assert [answer.request for answer in answers] == list(range(requests))
        assert time.monotonic() - begin > (5 * requests - rate) / rate - 0.5


def test_many_ends_at_once(tmp_path: Path) -> None:
    """A process that is busy while thousands of its queue pairs are paired, and while their peer
    dies, misses no message, and keeps its other queue pairs.
    """
    many = 3000
    settings = RouterSettings(limits=Limits(queue_pairs=8000))
    with router(tmp_path, settings=settings) as made:
        one, other, third = (VerbsLibrary(made.socket) for _ in range(3))

        def ask(process: VerbsLibrary, own: int, peer: VerbsLibrary, peers: int) -> None:
            message = VerbsQueuePair(1, process.qpn + own, peer.qpn + peers, 0, RC, False, GID)
            process.library.say(message)

        for number in range(many):
            ask(one, number, other, number)
        ask(one, many, third, 0)
        ask(third, 0, one, many)
        for number in range(many):
            ask(other, number, one, number)
            # Without room for descriptors: the kernel closes them.
            while other.library.connection.recv(MAX_MESSAGE)[0] != VerbsKind.GRANT:
                pass
        other.library.close()
        third.library.hear(VerbsGrant)
        time.sleep(0.5)
        counted: Counter[type] = Counter()
        while counted[VerbsRefuse] < many:
            counted[type(wire.codec.unpack(one.library.connection.recv(MAX_MESSAGE)))] += 1
        assert counted[VerbsGrant] == many + 1
        assert made.client.statistics().dropped == 0
        assert [each.path for each in made.client.verbs().queue_pairs].count("shm") == 2


@pytest.mark.parametrize(
    "message",
    [
        VerbsOpen(VERBS_VERSION),
        VerbsListen(VerbsKind.LISTENING, 1, 1, 1, 1, False, None),
        VerbsRefuse(34, 1, 1, 1),
        VerbsGrant(1, 1, 1, SlotKind.CONNECTED, 0, 0, 0, 1, 1, 1, GID),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_out_of_place(served: TestRouter, message: VerbsMessage) -> None:
    """A process that sends what it may not loses its connection, and its peer is told."""
    one, other = VerbsLibrary(served.socket), VerbsLibrary(served.socket)
    one.ask(other)
    other.ask(one)
    grant, _ = other.library.hear(VerbsGrant)
    assert other.library.rings(grant.arena, 1 - grant.side)
    one.library.say(message)
    assert one.library.closed()
    assert other.refused() == (other.qpn, Reason.PEER_CLOSED)


@pytest.mark.parametrize("change", [-4, 4, 1000])
def test_sizes(served: TestRouter, change: int) -> None:
    """A message of another size than its kind has ends the connection."""
    one = VerbsLibrary(served.socket)
    data = wire.codec.pack(VerbsQueuePair(1, one.qpn, 9, 0, RC, False, GID))
    cut = data[:change] if change < 0 else data + bytes(change)
    one.library.raw(cut[:2] + len(cut).to_bytes(2, "little") + cut[4:])
    assert one.library.closed()
