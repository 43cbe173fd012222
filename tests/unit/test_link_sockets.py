"""The TCP connections of links: one with the ticket becomes the link's, others cost nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from dataplane.errors import WrongMessage
from dataplane.router import link_preamble, session, session_listener
from dataplane.router.link_preamble import ACCEPTED, SIZE, SOCKETS, Preamble
from dataplane.router.link_sockets import LinkSockets
from dataplane.router.peer_wire import TICKET
from testbed.patience import patience, within
from tests.unit.session_world import Router, World, session_world

NUMBER: Final = 7
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
TEXT: Final = b"the relay's first bytes"


@dataclass
class Links:
    """A `LinkUser` that keeps what it is given. Its relay writes and reads at once."""

    ready: dict[int, list[socket.socket]] = field(default_factory=dict)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def sockets_ready(self, number: int, descriptors: Sequence[int]) -> None:
        assert number not in self.ready
        self.ready[number] = [socket.socket(fileno=os.dup(one)) for one in descriptors]
        for one in self.ready[number]:
            one.send(TEXT)

    def sockets_failed(self, number: int, text: str) -> None:
        self.failed.append((number, text))

    def close(self) -> None:
        for sockets in self.ready.values():
            for one in sockets:
                one.close()


@dataclass
class Host:
    """A router with sockets for links."""

    router: Router
    links: Links
    sockets: LinkSockets


world = session_world


@pytest.fixture
def hosts(world: World) -> Iterator[tuple[Host, Host]]:
    """Two hosts with a session: the first dials, the second is dialled. Nothing stays open."""
    before = descriptors()
    made = []
    for router in world.pair():
        links = Links()
        made.append(Host(router, links, LinkSockets(world.loop, router.sessions, links)))
    yield made[0], made[1]
    for host in made:
        host.sockets.cancel(NUMBER)
        host.links.close()
    for router in world.routers:
        router.sessions.close()
    world.run(0.05)
    assert descriptors() <= before


def descriptors() -> int:
    """How many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def during(world: World, do: Callable[[], object]) -> None:
    """Run a blocking function while the loop runs."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        world.until("the other side", future.done, 20)
        future.result()


def call(world: World, hosts: tuple[Host, Host], source: str = "") -> socket.socket:
    """A TCP connection to the second host, from the first one's address."""
    made = socket.socket()
    made.settimeout(patience(8))
    made.bind((source or str(hosts[0].router.address), 0))
    made.connect((str(hosts[1].router.address), world.port))
    return made


def expect(hosts: tuple[Host, Host]) -> bytes:
    return hosts[1].sockets.expect(hosts[0].router.address, NUMBER)


def ended(host: Host, word: str) -> int:
    return host.router.sessions.counts().ended.get(word, 0)


def answer(made: socket.socket) -> bytes:
    """What a router answers before it ends the connection, or the first byte."""
    try:
        return made.recv(1)
    except ConnectionError:
        return b""


def make_link(world: World, hosts: tuple[Host, Host]) -> None:
    """Both hosts get the sockets of a link, each of them the other's of the same index."""
    one, other = hosts
    one.sockets.dial(other.router.address, NUMBER, expect(hosts))
    world.until("the sockets", lambda: NUMBER in one.links.ready and NUMBER in other.links.ready)
    assert len(one.links.ready[NUMBER]) == SOCKETS
    for here, there in zip(one.links.ready[NUMBER], other.links.ready[NUMBER], strict=True):
        assert here.getsockname() == there.getpeername()
        assert here.getpeername() == there.getsockname()
        for end in (here, there):
            end.settimeout(patience(5))
            assert end.recv(1000) == TEXT
    assert not one.links.failed


# --- what works


def test_sockets_of_a_link(world: World, hosts: tuple[Host, Host]) -> None:
    """Both relays get all connections of a link, the bytes of each relay reach the other from the
    first one on, and the session is not affected.
    """
    make_link(world, hosts)
    assert world.joined(hosts[0].router, hosts[1].router)
    assert ended(hosts[1], "link") == SOCKETS


def test_the_other_way_round(world: World, hosts: tuple[Host, Host]) -> None:
    """The router that was dialled for the session can dial for a link."""
    make_link(world, (hosts[1], hosts[0]))


def test_a_preamble_byte_by_byte(world: World, hosts: tuple[Host, Host]) -> None:
    """A preamble may come in pieces of any size."""
    ticket = expect(hosts)

    def drip() -> None:
        for index in range(SOCKETS):
            with call(world, hosts) as made:
                for byte in link_preamble.pack(Preamble(index, ticket)):
                    made.send(bytes([byte]))
                    time.sleep(0.002)
                assert answer(made) == ACCEPTED

    during(world, drip)
    assert len(hosts[1].links.ready[NUMBER]) == SOCKETS


def test_cancel(world: World, hosts: tuple[Host, Host]) -> None:
    """When a link isn't made any more, its connections are closed at both ends, and nobody is told
    that they are ready.
    """
    one, other = hosts
    ticket = expect(hosts)
    made: list[socket.socket] = []

    def show() -> None:
        made.append(call(world, hosts))
        made[0].send(link_preamble.pack(Preamble(0, ticket)))
        assert answer(made[0]) == ACCEPTED

    during(world, show)
    other.sockets.cancel(NUMBER)
    assert answer(made[0]) == b""
    made[0].close()
    one.sockets.dial(other.router.address, NUMBER, expect(hosts))
    one.sockets.cancel(NUMBER)
    world.run(0.3)
    assert not one.links.ready
    assert not one.links.failed
    assert not other.links.ready


# --- what fails


def test_a_closed_port(world: World, hosts: tuple[Host, Host]) -> None:
    """If the peer's router doesn't take the connections, the link is told once, from the loop."""
    one, other = hosts
    other.router.sessions.listener.close()
    one.sockets.dial(other.router.address, NUMBER, bytes(TICKET))
    assert not one.links.failed
    world.until("the failure", lambda: one.links.failed)
    world.run(0.2)
    assert len(one.links.failed) == 1
    assert one.links.failed[0][0] == NUMBER


def test_an_event_of_an_earlier_socket(world: World, hosts: tuple[Host, Host]) -> None:
    """An event that says of a connection too early that it is there does no harm."""
    one, other = hosts
    ticket = expect(hosts)
    listener = other.router.sessions.listener._socket
    assert listener is not None
    # Nothing that arrives is accepted, so the first packets are lost.
    nothing = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))
    listener.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, ctypes.addressof(nothing))
    )
    one.sockets.dial(other.router.address, NUMBER, ticket)
    for making in one.sockets._dialled.values():
        for dialled in making.sockets.values():
            assert world.loop.serve(dialled.fileno(), select.EPOLLOUT)
    listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    world.until("the sockets", lambda: NUMBER in one.links.ready and NUMBER in other.links.ready)
    assert not one.links.failed


def test_a_ticket_that_the_peer_does_not_know(world: World, hosts: tuple[Host, Host]) -> None:
    """A peer that doesn't wait for a link refuses its connections."""
    one, other = hosts
    one.sockets.dial(other.router.address, NUMBER, bytes(TICKET))
    world.until("the failure", lambda: one.links.failed)
    assert not other.links.ready
    world.until("all of them", lambda: ended(other, "ticket") >= 1)


def test_without_a_session(world: World, hosts: tuple[Host, Host]) -> None:
    """Without a session nobody is dialled."""
    one, other = hosts
    one.router.sessions.want(set(), one.router.address)
    world.run(0.1)
    one.sockets.dial(other.router.address, NUMBER, bytes(TICKET))
    assert not one.links.failed, "told from inside the call"
    world.until("the failure", lambda: one.links.failed)


def test_a_router_without_links(world: World) -> None:
    """Sessions that nobody uses for links refuse tickets."""
    a, b = world.pair()
    with ThreadPoolExecutor(1) as pool:
        made = socket.socket()
        made.settimeout(patience(8))
        made.bind((str(a.address), 0))
        made.connect((str(b.address), world.port))
        made.send(link_preamble.pack(Preamble(0, bytes(TICKET))))
        future = pool.submit(answer, made)
        world.until("its end", future.done)
        assert future.result() == b""
        made.close()


# --- what a hostile host does

HOSTILE: Final[dict[str, Callable[[bytes], bytes]]] = {
    "a wrong ticket": lambda ticket: link_preamble.pack(Preamble(0, bytes(TICKET))),
    "a ticket with one wrong bit": lambda ticket: link_preamble.pack(
        Preamble(0, ticket[:-1] + bytes([ticket[-1] ^ 1]))
    ),
    "an index too large": lambda ticket: link_preamble.pack(Preamble(SOCKETS, ticket)),
    "another version": lambda ticket: (lambda good: good[:8] + b"\x02" + good[9:])(
        link_preamble.pack(Preamble(0, ticket))
    ),
    "other magic": lambda ticket: b"\xffGGRELAY" + bytes(SIZE - 8),
    "only the first byte of it": lambda ticket: b"\xff" + bytes(SIZE),
    "bytes before the answer": lambda ticket: link_preamble.pack(Preamble(0, ticket)) + b"x",
    "much more": lambda ticket: link_preamble.pack(Preamble(0, ticket)) + bytes(100_000),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_preambles(world: World, hosts: tuple[Host, Host], what: str) -> None:
    """A connection with anything but a right preamble is ended without an answer, and the link is
    made nevertheless.
    """
    ticket = expect(hosts)

    def attack() -> None:
        with call(world, hosts) as made:
            with contextlib.suppress(ConnectionError):
                made.sendall(HOSTILE[what](ticket))
            assert answer(made) == b""

    during(world, attack)
    assert not hosts[1].links.ready
    hosts[0].sockets.dial(hosts[1].router.address, NUMBER, ticket)
    world.until("the sockets", lambda: NUMBER in hosts[1].links.ready)
    assert world.joined(hosts[0].router, hosts[1].router)


def test_an_index_twice(world: World, hosts: tuple[Host, Host]) -> None:
    """Each connection of a link is taken once; a second one with its index is ended."""
    ticket = expect(hosts)
    made: list[socket.socket] = []

    def show(index: int) -> bytes:
        made.append(call(world, hosts))
        made[-1].send(link_preamble.pack(Preamble(index, ticket)))
        return answer(made[-1])

    def attack() -> None:
        assert show(1) == ACCEPTED
        assert show(1) == b""
        assert [show(index) for index in (0, 2, 3)] == [ACCEPTED] * 3
        # The ticket is used up.
        assert [show(index) for index in range(SOCKETS)] == [b""] * SOCKETS

    during(world, attack)
    ready = hosts[1].links.ready[NUMBER]
    assert [one.getpeername() for one in ready] == [made[n].getsockname() for n in (2, 0, 3, 4)]
    for one in made:
        one.close()


def test_a_late_ticket(world: World, hosts: tuple[Host, Host]) -> None:
    """A ticket of an attempt that is over, or that another one has replaced, is worth nothing."""
    old = expect(hosts)
    new = expect(hosts)
    hosts[1].sockets.cancel(NUMBER)

    def attack() -> None:
        for ticket in (old, new):
            with call(world, hosts) as made:
                made.send(link_preamble.pack(Preamble(0, ticket)))
                assert answer(made) == b""

    during(world, attack)


def test_a_ticket_of_another_host(world: World, hosts: tuple[Host, Host]) -> None:
    """A ticket is good only from the address of the host that got it."""
    third = world.router(3)
    world.acquaint(hosts[0].router, hosts[1].router, third)
    ticket = expect(hosts)

    def attack() -> None:
        with call(world, hosts, str(third.address)) as made:
            made.send(link_preamble.pack(Preamble(0, ticket)))
            assert answer(made) == b""

    during(world, attack)
    make_link(world, hosts)


def test_half_a_preamble(
    world: World, hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that doesn't finish its preamble is ended as soon as one that doesn't finish its
    ClientHello, however slowly it sends.
    """
    monkeypatch.setattr(session, "OPENING", 0.5)
    ticket = expect(hosts)
    begin = time.monotonic()

    def attack() -> None:
        with call(world, hosts) as made:
            try:
                for byte in link_preamble.pack(Preamble(0, ticket))[:-1]:
                    made.send(bytes([byte]))
                    time.sleep(0.05)
                assert answer(made) == b""
            except ConnectionError:
                return

    during(world, attack)
    assert time.monotonic() - begin < within(1.9)
    assert ended(hosts[1], "silent") == 1


SIEGE: Final = {
    "silent": b"",
    "half preambles": link_preamble.pack(Preamble(0, bytes(TICKET)))[:20],
    "wrong tickets": link_preamble.pack(Preamble(0, bytes(TICKET))),
}


@pytest.mark.parametrize("what", SIEGE)
def test_flood(world: World, hosts: tuple[Host, Host], what: str) -> None:
    """Hundreds of connections from the peer's address cost no more than a few at a time, and
    neither the session nor the making of a link is affected.
    """
    one, other = hosts
    flood = []
    most = 0
    for number in range(300):
        made = socket.socket()
        made.setblocking(False)
        made.bind((str(one.router.address), 0))
        made.connect_ex((str(other.router.address), world.port))
        flood.append(made)
        world.round(0)
        with contextlib.suppress(OSError):
            made.send(SIEGE[what])
        if number == 200:
            one.sockets.dial(other.router.address, NUMBER, expect(hosts))
        source = other.router.sessions.listener.sources.get(one.router.address)
        most = max(most, len(source.connections) if source is not None else 0)
    world.until("the sockets", lambda: NUMBER in one.links.ready or one.links.failed)
    assert NUMBER in other.links.ready
    assert most <= session_listener.UNAUTHENTICATED_EACH
    assert world.joined(one.router, other.router)
    for made in flood:
        made.close()


def test_preamble() -> None:
    """A preamble is incomplete in all its parts, and its first byte begins no TLS record."""
    good = link_preamble.pack(Preamble(3, bytes(range(TICKET))))
    for length in range(1, len(good)):
        assert link_preamble.begins(good[:length])
        assert link_preamble.parse(good[:length]) is None
    assert link_preamble.parse(good) == Preamble(3, bytes(range(TICKET)))
    for content_type in range(20, 25):
        assert not link_preamble.begins(bytes([content_type]) + good[1:])
    with pytest.raises(WrongMessage):
        link_preamble.parse(good + b"x")
