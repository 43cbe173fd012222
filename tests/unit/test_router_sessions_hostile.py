"""Attacks of unauthenticated and hostile peers on sessions: they lose theirs, and the router spends
little.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import pytest

from dataplane.errors import WrongMessage
from dataplane.router import identities, node_identity, session, session_listener
from dataplane.router.library_wire import IPAddress
from dataplane.router.node_identity import Identity
from dataplane.router.peer_wire import (
    MAX_FRAME,
    Frames,
    Message,
    PeerFrame,
    PeerHello,
    PeerPing,
    PeerPong,
    Withdraw,
    pack,
)
from testbed.patience import patience, within
from tests.unit.session_world import BUG, INVALID, Router, World, session_world
from tests.unit.swarm_ca import Authority, Node

T = TypeVar("T")
ADDRESS = "127.0.0.2"
PATIENCE = 8.0


world = session_world


@pytest.fixture
def host(world: World) -> Router:
    """The host that is attacked; it admits 127.0.0.2, which no router uses."""
    made = world.router(1)
    made.sessions.want({world.router(9).address, _ip(ADDRESS)}, made.address)
    return made


def _ip(text: str) -> IPAddress:
    return session_listener.plain_address(text)


def during(world: World, do: Callable[[], T]) -> T:
    """The result of a blocking function while the loop runs."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(do)
        world.until("the other side", future.done, 20)
        return future.result()


def identity_of(world: World, node: Node) -> Identity:
    return node_identity.make(
        world.authority.root,
        node.chain,
        identities.plain_key(node.key_text()),
        identities.SWARM_ROLES,
    )


def call(world: World) -> socket.socket:
    """A TCP connection from the admitted address."""
    made = socket.socket()
    made.settimeout(patience(PATIENCE))
    made.bind((ADDRESS, 0))
    made.connect(("127.0.0.1", world.port))
    return made


def shaken(world: World, node: Node | None = None) -> ssl.SSLSocket:
    """A TLS connection of a node."""
    who = identity_of(world, node or world.authority.node("node2"))
    return during(world, lambda: who.client.wrap_socket(call(world)))


def hello(**other: object) -> PeerHello:
    """A node's first message, with some fields replaced."""
    base = PeerHello(instance="a" * 32, node="node2", data_path="192.0.2.2", rdma=True)
    return msgspec.structs.replace(base, **other)


def listen_to(tls: ssl.SSLSocket) -> list[Message]:
    """All messages until the connection ends."""
    frames, heard = Frames(), list[Message]()
    try:
        while data := tls.recv(1 << 16):
            heard += frames.feed(data)
    except OSError:
        pass
    return heard


def test_the_helpers_get_a_session(world: World, host: Router) -> None:
    """The helpers of these tests get a session if nothing is wrong; otherwise the tests would prove
    nothing.
    """
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("the session", lambda: host.user.all("up"))
    tls.send(pack(Withdraw(1)))
    world.until("a message", lambda: host.user.all("message"))
    tls.close()
    world.until("its end", lambda: host.user.all("down"))
    assert host.user.told[0][2] == hello()


GARBAGE = {
    "nothing": b"",
    "zeros": bytes(5000),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a frame": pack(hello()),
    "a record that never ends": b"\x16\x03\x01\xff\xff" + bytes(100_000),
    "a handshake of 16 MiB": b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(16379),
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage(world: World, host: Router, what: str) -> None:
    """Bytes that are no handshake end their connection; there is no session and no state."""

    def send() -> bytes:
        made = call(world)
        try:
            made.sendall(GARBAGE[what])
            made.shutdown(socket.SHUT_WR)
            return made.recv(1000)
        except OSError:
            return b""
        finally:
            made.close()

    during(world, send)
    world.until("its end", lambda: not host.sessions.listener.sources[_ip(ADDRESS)].connections)
    assert host.user.told == []


def test_silence(world: World, host: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that sends nothing, or bytes one by one, or half a handshake, is closed after a
    while.
    """
    monkeypatch.setattr(session, "DEADLINE", 0.5)
    begin = time.monotonic()

    def quiet() -> bytes:
        with call(world) as made:
            try:
                return made.recv(1)
            except ConnectionResetError:
                return b""

    assert during(world, quiet) == b""

    def drip() -> None:
        with call(world) as made:
            try:
                for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500):
                    made.send(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                return
            raise AssertionError("never let go")

    during(world, drip)
    shy = shaken(world)
    assert during(world, lambda: listen_to(shy)) == []
    assert 1.4 < time.monotonic() - begin < within(6)
    world.until("all to be counted", lambda: host.sessions.counts().ended["silent"] == 3)


def test_flood(world: World, host: Router) -> None:
    """Hundreds of connections cost no more than a few at a time. Meanwhile a session is not
    affected, and a peer with the same address gets one.
    """
    friend = world.routers[1]
    friend.sessions.want({host.address}, friend.address)
    world.until("a session", lambda: world.joined(host, friend))
    flood = []
    most = 0
    for _ in range(300):
        made = socket.socket()
        made.setblocking(False)
        made.bind((ADDRESS, 0))
        made.connect_ex(("127.0.0.1", world.port))
        flood.append(made)
        world.round(0)
        most = max(most, len(host.sessions.listener.sources[_ip(ADDRESS)].connections))
    world.run(0.2)
    assert most == session_listener.UNAUTHENTICATED_EACH
    counts = host.sessions.counts()
    assert counts.ended["limit"] >= 280
    assert friend.sessions.send(host.address, Withdraw(5))
    world.until("a message", lambda: Withdraw(5) in host.user.all("message"))
    assert host.user.all("down") == []
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("the peer", lambda: len(host.user.all("up")) == 2)
    tls.close()
    for made in flood:
        made.close()


SIEGE = {
    "silent": b"",
    "garbage": bytes(range(200)),
    "half a ClientHello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
}


@pytest.mark.parametrize("what", SIEGE)
def test_siege(world: World, host: Router, what: str) -> None:
    """Endless connections from a host's address can't keep the host from a session."""
    stop = False
    made: list[socket.socket] = []

    def besiege() -> None:
        while not stop:
            one = socket.socket()
            one.setblocking(False)
            one.bind((ADDRESS, 0))
            one.connect_ex(("127.0.0.1", world.port))
            time.sleep(0.005)
            with contextlib.suppress(OSError):
                one.send(SIEGE[what])
            made.append(one)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(besiege)
        try:
            world.run(1)
            tls = shaken(world)
            tls.send(pack(hello()))
            world.until("the peer", lambda: host.user.all("up"))
            tls.close()
        finally:
            stop = True
            future.result()
            for each in made:
                each.close()


def test_many_handshakes(world: World, host: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handshakes with one address that lead to no session begin at a limited rate."""
    monkeypatch.setattr(session_listener, "HANDSHAKES", 5.0)
    context = _plain_context()

    def shake() -> None:
        for _ in range(40):
            with contextlib.suppress(OSError), call(world) as made:
                context.wrap_socket(made)

    begin = time.monotonic()
    during(world, shake)
    ended = host.sessions.counts().ended
    allowed = 5 + 5 * (time.monotonic() - begin)
    assert 40 - allowed <= ended["rate"] < 40


def test_many_sources(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of unauthenticated peers is limited, too."""
    monkeypatch.setattr(session_listener, "UNAUTHENTICATED", 6)
    host = world.router(1)
    host.sessions.want({_ip(f"127.0.1.{n}") for n in range(1, 20)}, None)
    calls = []
    for number in range(1, 20):
        made = socket.socket()
        made.setblocking(False)
        made.bind((f"127.0.1.{number}", 0))
        made.connect_ex(("127.0.0.1", world.port))
        calls.append(made)
    world.run(0.2)
    assert sum(len(each.connections) for each in host.sessions.listener.sources.values()) == 6
    assert host.sessions.counts().ended["limit"] == 13
    for made in calls:
        made.close()


def _refused(world: World, context: ssl.SSLContext) -> str:
    """The result of a handshake, and of waiting for an answer after it."""

    def try_it() -> str:
        try:
            with context.wrap_socket(call(world)) as tls:
                tls.send(pack(hello()))
                return repr(tls.recv(1 << 16))
        except OSError as error:
            return str(error)

    return during(world, try_it)


def _plain_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([node_identity.PROTOCOL])
    return context


def test_no_certificate(world: World, host: Router) -> None:
    """Without a certificate nothing follows the handshake."""
    said = _refused(world, _plain_context())
    # How much of the reason arrives before the end does is chance.
    assert (
        any(word in said for word in ("REQUIRED", "reset", "EOF", "Broken pipe")) or said == "b''"
    )
    world.until("its end", lambda: host.sessions.counts().ended.get("tls"))
    assert host.user.told == []


def test_an_old_protocol(world: World, host: Router) -> None:
    """TLS 1.2 is refused."""
    who = identity_of(world, world.authority.node("node2"))
    who.client.minimum_version = ssl.TLSVersion.TLSv1_2
    who.client.maximum_version = ssl.TLSVersion.TLSv1_2
    said = _refused(world, who.client)
    assert "PROTOCOL_VERSION" in said
    assert host.user.told == []


@pytest.mark.parametrize("protocols", [[], ["h2"]])
def test_another_service(world: World, host: Router, protocols: list[str]) -> None:
    """A connection of the engine, which has the same certificates, is not taken for a router's."""
    node = world.authority.node("node2")
    folder = world.folder
    (folder / "c").write_text(node.chain)
    (folder / "k").write_text(node.key_text(headers=False))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=world.authority.root)
    context.load_cert_chain(folder / "c", folder / "k")
    if protocols:
        context.set_alpn_protocols(protocols)
    _refused(world, context)
    world.until("its end", lambda: host.sessions.counts().ended.get("protocol"))
    assert host.user.told == []


def test_another_swarm(world: World, host: Router) -> None:
    """A certificate of another root ends the handshake."""
    other = Authority()
    who = identity_of(world, world.authority.node("node2"))
    node = other.node("node2")
    (world.folder / "c").write_text(node.chain)
    (world.folder / "k").write_text(node.key_text(headers=False))
    who.client.load_cert_chain(world.folder / "c", world.folder / "k")
    _refused(world, who.client)
    world.until("its end", lambda: host.sessions.counts().ended.get("certificate"))
    assert host.user.told == []


FIRST: dict[str, bytes] = {
    "no Hello": pack(PeerPing()),
    "no message": struct.pack(">I", 3) + b"abc",
    "no frame": bytes(4),
    "too long": struct.pack(">I", MAX_FRAME + 1),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another node": pack(hello(node="node3")),
    "this node": pack(hello(node="node1")),
    "no address": pack(hello(data_path="host")),
    "another version": pack(hello(version=2)),
    "no instance": pack(hello(instance="A" * 32)),
}


@pytest.mark.parametrize("what", FIRST)
def test_first_messages(world: World, host: Router, what: str) -> None:
    """A node whose first message is invalid gets no session, and the reason is reported."""
    tls = shaken(world)
    tls.send(FIRST[what])
    during(world, lambda: listen_to(tls))
    world.until("its end", lambda: host.sessions.counts().ended.get("protocol"))
    assert host.user.told == []
    reason = host.sessions.reasons()[_ip(ADDRESS)]
    if what == "another version":
        assert "version 2" in reason


LATER: dict[str, bytes] = {
    "invalid": pack(INVALID),
    "a bug": pack(BUG),
    "another instance": pack(hello(instance="b" * 32)),
    "another node": pack(hello(node="node3")),
    "no message": struct.pack(">I", 3) + b"abc",
    "no frame": bytes(4),
    "too long": struct.pack(">I", MAX_FRAME + 1),
}


@pytest.mark.parametrize("what", LATER)
def test_later_messages(world: World, host: Router, what: str) -> None:
    """A peer that sends an invalid message loses its session; earlier messages count, later ones do
    not.
    """
    world.bugs = int(what == "a bug")
    tls = shaken(world)
    tls.send(pack(hello()) + pack(Withdraw(1)) + LATER[what] + pack(Withdraw(2)))
    during(world, lambda: listen_to(tls))
    world.until("its end", lambda: host.user.all("down"))
    assert [kind for kind, _, _ in host.user.told] == ["up", "message", "down"]


def test_dropped(world: World, host: Router) -> None:
    """A session whose user refuses a message passes on no more of them."""
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("the session", lambda: host.user.all("up"))
    told = host.user.message

    def drop(peer: IPAddress, message: Message) -> None:
        told(peer, message)
        raise WrongMessage("lies")

    host.user.message = drop  # type: ignore[method-assign]
    tls.send(pack(Withdraw(1)) * 100)
    world.until("its end", lambda: host.user.all("down"))
    assert host.user.all("message") == [Withdraw(1)]
    assert host.user.all("down") == ["lies"]


def test_hello_again(world: World, host: Router) -> None:
    """A peer's changed Hello is passed on; its session stays."""
    tls = shaken(world)
    changed = hello(data_path="192.0.2.9", rdma=False)
    tls.send(pack(hello()) + pack(changed))
    world.until("news", lambda: host.user.all("message"))
    assert host.user.all("message") == [changed]
    assert host.sessions.hello(_ip(ADDRESS)) == changed
    tls.close()


def test_cut_in_the_middle(world: World, host: Router) -> None:
    """Half a message is not passed on."""
    tls = shaken(world)
    whole = pack(PeerFrame(1, bytes(50_000)))
    tls.send(pack(hello()) + whole[:30_000])
    world.until("the session", lambda: host.user.all("up"))
    tls.close()
    world.until("its end", lambda: host.user.all("down"))
    assert host.user.all("message") == []


def test_who_does_not_read(world: World, host: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that doesn't read costs limited memory; then its session ends."""
    monkeypatch.setattr(session, "MOST_UNSENT", 3 << 20)
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("the session", lambda: host.user.all("up"))
    kept = host.sessions.session(_ip(ADDRESS))
    assert kept is not None
    sent = most = 0
    while host.sessions.send(_ip(ADDRESS), PeerFrame(1, bytes(60_000))):
        world.round(0)
        sent += 1
        most = max(most, len(kept._unsent))
        assert sent < 1000
    assert session.MANY_UNSENT < most <= 3 << 20
    assert host.user.all("down") == []
    world.until("its end", lambda: host.user.all("down"))
    assert host.user.all("down") == ["doesn't read what it is sent"]
    assert not kept._unsent
    tls.close()


def test_congestion(world: World, host: Router) -> None:
    """A peer that is slow for a while is reported as congested, and then as eased; nothing is
    lost.
    """
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("the session", lambda: host.user.all("up"))
    sent = 0
    while not host.sessions.congested(_ip(ADDRESS)):
        assert host.sessions.send(_ip(ADDRESS), PeerFrame(sent, bytes(60_000)))
        sent += 1
    assert host.user.all("eased") == []
    # Nothing else shall wake what waits.
    host.sessions._ticks.cancel()  # type: ignore[union-attr]
    frames, heard = Frames(), list[Message]()

    def read() -> None:
        while sum(isinstance(each, PeerFrame) for each in heard) < sent:
            heard.extend(frames.feed(tls.recv(1 << 16)))

    during(world, read)
    world.until("ease", lambda: host.user.all("eased"))
    assert [each.link for each in heard if isinstance(each, PeerFrame)] == list(range(sent))
    assert len(host.user.all("eased")) == 1
    assert not host.sessions.congested(_ip(ADDRESS))
    tls.close()


def test_a_flood_of_messages(world: World, host: Router) -> None:
    """A peer that sends without end does not block the loop: a round stays short, and others are
    served.
    """
    friend = world.routers[1]
    friend.sessions.want({host.address}, friend.address)
    world.until("a session", lambda: world.joined(host, friend))
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("both", lambda: len(host.user.all("up")) == 2)
    stop = False

    def flood() -> None:
        data = (pack(PeerPing()) + pack(PeerPong())) * 2000
        try:
            while not stop:
                tls.send(data)
        except OSError:
            return

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(flood)
        longest = 0.0
        for number in range(20):
            assert friend.sessions.send(host.address, Withdraw(number))
            begin = time.monotonic()
            world.round(0.001)
            longest = max(longest, time.monotonic() - begin)
        world.until(
            "all messages", lambda: len(host.user.all("message")) == 20 or future.done(), 10
        )
        stop = True
        world.until("the flood's end", future.done)
    assert len(host.user.all("message")) == 20
    assert longest < within(2)
    tls.close()


def test_dear_messages(world: World, host: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer with expensive messages gets its share of the router's time and no more; no message is
    lost.
    """
    tls = shaken(world)
    tls.send(pack(hello()))
    world.until("the session", lambda: host.user.all("up"))
    hear = host.user.message

    def dear(peer: IPAddress, message: Message) -> None:
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
        hear(peer, message)

    monkeypatch.setattr(host.user, "message", dear)
    tls.send(b"".join(pack(Withdraw(number)) for number in range(150)))
    begin, cpu = time.monotonic(), time.thread_time()
    longest = 0.0
    while len(host.user.all("message")) < 150:
        turn = time.thread_time()
        world.round()
        longest = max(longest, time.thread_time() - turn)
        assert time.monotonic() - begin < within(60)
    used = time.thread_time() - cpu
    assert host.user.all("message") == [Withdraw(number) for number in range(150)]
    assert longest < 0.1
    assert used - session.BURST <= 1.2 * session.SHARE * (time.monotonic() - begin)
    assert host.user.all("down") == []
    tls.close()


def test_one_node_at_two_addresses(world: World, host: Router) -> None:
    """A node has one session, at the address that it used first, as long as that session lives."""
    friend = world.routers[1]
    friend.sessions.want({host.address}, friend.address)
    world.until("a session", lambda: world.joined(host, friend))
    tls = shaken(world, world.authority.node("node9"))
    tls.send(pack(hello(node="node9")))
    assert during(world, lambda: listen_to(tls)) == []
    world.until("its count", lambda: host.sessions.counts().ended.get("twice") == 1)
    assert len(host.user.all("up")) == 1


def test_two_nodes_at_one_address(world: World, host: Router) -> None:
    """A second node at the address of a session has to wait until that session ends."""
    first = shaken(world)
    first.send(pack(hello()))
    world.until("the session", lambda: host.user.all("up"))
    second = shaken(world, world.authority.node("node3"))
    second.send(pack(hello(node="node3")))
    during(world, lambda: listen_to(second))
    world.until("its count", lambda: host.sessions.counts().ended.get("twice") == 1)
    first.close()
    world.until("its end", lambda: host.user.all("down"))
    third = shaken(world, world.authority.node("node3"))
    third.send(pack(hello(node="node3")))
    world.until("the other", lambda: len(host.user.all("up")) == 2)
    third.close()


def test_no_descriptors(world: World, host: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor for a new connection the router continues, and accepts it once there is
    one.
    """
    listener = host.sessions.listener._socket
    assert listener is not None

    class Exhausted:
        """A listener in a process that has used up its descriptors."""

        def accept(self) -> object:
            raise OSError(24, "Too many open files")

        def fileno(self) -> int:
            assert listener is not None
            return listener.fileno()

    monkeypatch.setattr(host.sessions.listener, "_socket", Exhausted())
    waiting = call(world)
    world.run(0.1)
    assert host.sessions.counts().accepted == 0
    monkeypatch.setattr(host.sessions.listener, "_socket", listener)
    world.skip(2)
    world.until("it", lambda: host.sessions.counts().accepted == 1)
    waiting.close()
