"""Sessions between routers: real TLS over loopback, under all kinds of networks and peers."""

from __future__ import annotations

import errno
import shutil
import socket
import time
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from dataplane.router import sessions
from dataplane.router.identities import Identities, SwarmIdentity, choose
from dataplane.router.peer_wire import Offer, Owns, PeerFrame, PeerHello, PeerPing, Withdraw
from dataplane.router.sessions import Sessions
from tests.unit.session_world import Recorder, World, free_port, session_world
from tests.unit.swarm_ca import Authority, write

world = session_world


def test_a_session(world: World) -> None:
    """Two hosts that want each other have one session, in which each knows the other's node,
    address and abilities.
    """
    one, other = world.pair()
    world.run(0.3)
    assert one.sessions.counts().up == other.sessions.counts().up == 1
    (hello,) = one.user.all("up")
    assert isinstance(hello, PeerHello)
    assert (hello.node, hello.data_path, hello.rdma) == ("node2", "127.0.0.2", True)
    assert hello.instance == other.sessions.instance
    assert one.sessions.hello(other.address) == hello
    assert other.sessions.hello(one.address).node == one.sessions.node == "node1"  # type: ignore[union-attr]
    assert one.sessions.reasons() == {other.address: ""}
    assert one.user.all("down") == other.user.all("down") == []


def test_who_dials(world: World) -> None:
    """The host with the smaller address dials first; the other one dials if that fails."""
    one, other = world.pair()
    world.skip(5)
    assert one.sessions.counts().dialled == other.sessions.counts().accepted == 1
    assert other.sessions.counts().dialled == 0
    three = world.router(3)
    three.sessions.want({one.address, other.address}, three.address)
    one.sessions.want({other.address, three.address})
    other.sessions.want({one.address, three.address}, None)
    world.until("three", lambda: world.joined(one, other, three))


@pytest.mark.parametrize("courtesy", [0.0, 1.0])
def test_both_dial(world: World, monkeypatch: pytest.MonkeyPatch, courtesy: float) -> None:
    """However their dials cross, both hosts end with the same single session, and neither is told
    of two.
    """
    monkeypatch.setattr(sessions, "DIAL_DELAY", courtesy)
    made = [world.router(number) for number in (1, 2, 3, 4)]
    world.acquaint(*made)
    world.until("all sessions", lambda: world.joined(*made))
    world.run(0.3)
    world.skip(3)
    for router in made:
        assert len(router.user.all("up")) == 3
        assert router.user.all("down") == []
        assert router.sessions.counts().up == 3
        router.user.told.clear()
        for other in made:
            if other is not router:
                assert router.sessions.send(other.address, Withdraw(router.address.packed[3]))
    world.until("messages", lambda: all(len(each.user.all("message")) == 3 for each in made))


def test_messages(world: World) -> None:
    """Messages arrive complete, once and in order, in both directions, in any allowed size."""
    one, other = world.pair()
    sent = [PeerFrame(1, bytes([n % 256]) * (n * 977 % 60_000)) for n in range(150)]
    back = [Offer(n, "n1", "10.0.0.1:1", "10.0.0.2:2") for n in range(2000)]
    for message in sent:
        assert one.sessions.send(other.address, message)
        world.round(0)
    for offer in back:
        assert other.sessions.send(one.address, offer)
    world.until("all", lambda: len(one.user.all("message")) == 2000)
    world.until("all", lambda: len(other.user.all("message")) == 150)
    assert other.user.all("message") == sent
    assert one.user.all("message") == back


def test_nobody_there(world: World) -> None:
    """A peer without a router is dialled less and less often; the reason is reported."""
    one = world.router(1)
    nobody = IPv4Address("127.0.0.99")
    one.sessions.want({nobody}, one.address)
    assert not one.sessions.send(nobody, PeerPing())
    world.until("a try", lambda: "refused" in one.sessions.reasons()[nobody])
    world.skip(300)
    assert 8 <= one.sessions.counts().dialled <= 20
    assert one.user.told == []


def test_a_peer_that_starts_later(world: World) -> None:
    """A peer that starts late is found by its own dial; one that comes back is found within
    moments.
    """
    one = world.router(1)
    late = IPv4Address("127.0.0.2")
    one.sessions.want({late}, one.address)
    world.skip(60)
    other = world.router(2)
    world.acquaint(one, other)
    world.until("a session", lambda: world.joined(one, other), 3)
    assert one.sessions.counts().ended["unreachable"] > 3


def test_a_router_that_starts_again(world: World) -> None:
    """A restart of the peer's router is reported as the end of the last session and a new one."""
    one, other = world.pair()
    other.sessions.close()
    again = world.router(2)
    world.acquaint(one, again)
    world.until("a session", lambda: len(one.user.all("up")) == 2)
    kinds = [kind for kind, _, _ in one.user.told]
    assert kinds == ["up", "down", "up"]
    first, second = one.user.all("up")
    assert isinstance(first, PeerHello)
    assert isinstance(second, PeerHello)
    assert first.instance != second.instance
    assert first.node == second.node


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_a_host_that_lost_its_power(world: World, numbers: tuple[int, int]) -> None:
    """A peer that restarts without having closed its connection gets a new session at once,
    whichever node ID is smaller.
    """
    one, other = world.pair(*numbers)
    lost = other.sessions._peers[one.address].session
    assert lost is not None
    # As if its packets went nowhere from now on.
    world.loop.forget(lost._socket.fileno())  # type: ignore[union-attr]
    other.sessions.listener.close()
    other.sessions._peers.clear()
    again = world.router(numbers[1])
    again.sessions.want({one.address}, again.address)
    world.until("a session", lambda: len(one.user.all("up")) == 2, 3)
    assert "started again" in str(one.user.all("down")[0])


def test_a_dead_peer(world: World) -> None:
    """A peer that falls silent without closing loses its session after some ticks; otherwise the
    session stays.
    """
    one, other = world.pair()
    world.skip(30)
    assert world.joined(one, other)
    assert one.user.all("down") == []
    stuck = other.sessions.session(one.address)
    assert stuck is not None
    world.loop.forget(stuck._socket.fileno())  # type: ignore[union-attr]
    other.sessions._ticks.cancel()  # type: ignore[union-attr]
    world.skip(8)
    assert "nothing was heard" in str(one.user.all("down")[0])


def test_a_clock_that_jumps(world: World) -> None:
    """A router that was stopped for minutes first reads what has come, so no session is lost."""
    one, other = world.pair()
    for jump in (10, 1000, 100_000):
        world.skipped += jump
        world.run(0.1)
        assert one.sessions.send(other.address, Withdraw(jump))
        world.until("it", lambda: Withdraw(jump) in other.user.all("message"))  # noqa: B023
    assert one.user.all("down") == other.user.all("down") == []


def test_unwanted(world: World) -> None:
    """A peer that shares no network any more loses its session; the port is closed when no peer is
    left.
    """
    one, other = world.pair()
    one.sessions.want(set(), one.address)
    assert not one.sessions.send(other.address, PeerPing())
    world.until("the end", lambda: one.user.all("down") and other.user.all("down"))
    world.skip(5)
    assert one.sessions.session(other.address) is None
    assert "can't be reached" in other.sessions.reasons()[one.address]
    world.acquaint(one, other)
    world.skip(40)
    world.until("a session again", lambda: world.joined(one, other))


def test_wanted_again_at_once(world: World) -> None:
    """A peer that is forgotten and wanted again at once is reported down and up in that order."""
    one, other = world.pair()
    one.sessions.want(set(), one.address)
    one.sessions.want({other.address}, one.address)
    world.until("the end", lambda: one.user.all("down"))
    world.until("a session again", lambda: world.joined(one, other))
    assert [kind for kind, _, _ in one.user.told] == ["up", "down", "up"]


def test_who_is_not_wanted_is_not_let_in(world: World) -> None:
    """A node of the Swarm that shares no network with this host gets no session, whatever its
    certificate.
    """
    one, other, third = (world.router(number) for number in (1, 2, 3))
    world.acquaint(one, other)
    third.sessions.want({one.address}, third.address)
    world.until("a try", lambda: one.sessions.counts().ended.get("foreign"))
    world.until("its reason", lambda: "may not share" in third.sessions.reasons()[one.address])
    assert third.address not in one.user.sessions


def test_another_address_of_this_host(world: World) -> None:
    """If peers know this host by another address than it does, dials alternate between its own and
    the kernel's choice.
    """
    one, other = world.router(1), world.router(2)
    # The kernel's choice is 127.0.0.1.
    one.sessions.want({other.address}, IPv4Address("127.0.0.77"))
    other.sessions.want({one.address}, IPv4Address("127.0.0.66"))
    one.sessions.listener.close()
    world.skip(6)
    world.until("a session", lambda: world.joined(one, other))
    assert other.sessions.counts().ended["foreign"] > 0


def test_too_long(world: World) -> None:
    """A message that the peer wouldn't take isn't sent, and has no other effect."""
    one, other = world.pair()
    assert not one.sessions.send(other.address, Owns({"n1": ("10.0.0.1" * 5,) * 4000}))
    assert one.sessions.send(other.address, Withdraw(1))
    world.until("a message", lambda: other.user.all("message"))
    assert one.user.all("down") == []


def _expired(folder: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> SwarmIdentity:
    """A host that keeps a certificate which was valid when it was read, and has expired since."""
    for seconds in (1, 4, 16):
        write(folder, authority.root, authority.node("node2", lasts=timedelta(seconds=seconds)))
        origin = SwarmIdentity(folder)
        kept = origin.current()
        # On a busy machine it may have expired before it was read.
        if kept is not None:
            break
    assert kept is not None
    time.sleep(seconds + 0.1)
    monkeypatch.setattr(origin, "current", lambda: kept)
    return origin


@pytest.mark.parametrize(
    ("what", "here", "there"),
    [
        ("another root", "certificate is invalid", "certificate is invalid"),
        ("another Swarm", "of another Swarm", ""),
        ("another role", "'swarm-ca'", ""),
        ("this node", "own certificate", "own certificate"),
        ("expired", "certificate is invalid: certificate has expired", ""),
    ],
)
def test_certificates_that_are_not_taken(
    world: World, monkeypatch: pytest.MonkeyPatch, what: str, here: str, there: str
) -> None:
    """A peer without a valid certificate of another node of this Swarm gets no session, and both
    sides report why.
    """
    one = world.router(1)
    authority = Authority() if what == "another root" else world.authority
    node = {
        "another root": authority.node("node2"),
        "another Swarm": authority.node("node2", cluster="another"),
        "another role": authority.node("node2", "swarm-ca"),
        "this node": authority.node("node1"),
        "expired": None,
    }[what]
    folder = world.folder / "host2"
    if node is None:
        origin: Identities = _expired(folder, authority, monkeypatch)
    else:
        write(folder, authority.root, node)
        origin = choose(folder)
    assert origin.current() is not None
    other = world.router(2, identities=origin)
    world.acquaint(one, other)
    world.skip(12)
    assert one.user.told == other.user.told == []
    assert here in one.sessions.reasons()[other.address]
    assert there in other.sessions.reasons()[one.address]
    assert one.sessions.counts().ended.get("certificate", 0) > 0


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_a_renewed_certificate(world: World, numbers: tuple[int, int]) -> None:
    """A changed certificate replaces the sessions of the old one within moments, on whichever
    host.
    """
    one, other = world.pair(*numbers)
    renewed = world.authority.node(f"node{numbers[0]}", "swarm-manager")
    write(one.folder, world.authority.root, renewed)
    world.until("the end", lambda: one.user.all("down"), 3)
    begin = world.loop.now()
    world.until("a session", lambda: world.joined(one, other))
    assert world.loop.now() - begin < 0.7
    world.skip(4)
    assert [kind for kind, _, _ in other.user.told] == ["up", "down", "up"]
    assert one.user.all("down") == ["this host's certificate has changed"]
    assert one.sessions.counts().begun == 2


def test_leaving_the_swarm(world: World) -> None:
    """A host that leaves the Swarm ends its sessions and closes the port; after it has joined again
    it is another node.
    """
    one, other = world.pair()
    shutil.rmtree(one.folder / "certificates")
    world.skip(3)
    assert "join it to one" in str(one.user.all("down")[0])
    assert "join it to one" in one.sessions.reason
    assert one.sessions.node == ""
    assert other.user.all("down")
    assert "refused" in other.sessions.reasons()[one.address]
    write(one.folder, world.authority.root, world.authority.node("node7"))
    world.skip(40)
    world.until("a session", lambda: world.joined(one, other))
    assert one.sessions.reason == ""
    assert [hello.node for hello in other.user.all("up") if isinstance(hello, PeerHello)] == [
        "node1",
        "node7",
    ]


def test_rotation_of_the_root(world: World) -> None:
    """When hosts change to a new root one by one, sessions come back after each step."""
    one, other = world.pair()
    old, new = world.authority, Authority()
    both, crossed = old.root + new.root, old.cross(new)
    steps = [(both, old, ""), (both, new, crossed), (new.root, new, "")]
    for root, authority, above in steps:
        for number, router in enumerate((one, other), start=1):
            write(router.folder, root, authority.node(f"node{number}", above=above))
            begun = router.sessions.counts().begun
            world.skip(2)
            world.until(
                "a session of the new identity",
                lambda r=router, b=begun: (
                    r.sessions.counts().begun > b and world.joined(one, other)
                ),  # type: ignore[misc]
            )


def test_the_end_of_a_certificate(world: World) -> None:
    """A session does not outlive the peer's certificate."""
    now = [time.time()]
    one = world.router(1, wall=lambda: now[0])
    other = world.router(2, world.authority.node("node2", lasts=timedelta(hours=1)))
    world.acquaint(one, other)
    world.until("a session", lambda: world.joined(one, other))
    now[0] += 3590
    world.skip(3)
    assert one.user.all("down") == []
    now[0] += 20
    world.skip(2)
    assert one.user.all("down") == ["the peer's certificate has expired"]


def test_a_shared_secret(world: World) -> None:
    """Hosts outside a Swarm that share a secret have sessions; a host with another secret has
    none.
    """
    one, other, third = (
        world.router(number, identities=choose(None, secret * 32))
        for number, secret in ((1, "s"), (2, "s"), (3, "t"))
    )
    world.acquaint(one, other, third)
    world.until("a session", lambda: world.joined(one, other))
    world.skip(5)
    assert third.user.told == []
    assert "certificate is invalid" in third.sessions.reasons()[one.address]


def test_another_identity_by_setting(world: World) -> None:
    """A secret that is set later applies to all sessions."""
    one, other = world.pair()
    one.sessions.use(choose(None, "s" * 32))
    world.skip(2)
    assert not world.joined(one, other)
    other.sessions.use(choose(None, "s" * 32))
    world.skip(20)
    world.until("a session", lambda: world.joined(one, other))
    one.sessions.use(choose(None))
    world.until("the end", lambda: len(one.user.all("down")) == 2)
    assert "SESSION_KEY" in one.sessions.reason
    assert one.sessions.reasons() == {other.address: one.sessions.reason}


def test_introduction(world: World) -> None:
    """Changes of this host's Hello reach its peers at once, with or without a session before."""
    one, other = world.pair()
    one.sessions.introduce(data_path="127.0.0.1", rdma=True)
    world.run(0.1)
    assert other.user.all("message") == []
    one.sessions.introduce(data_path="192.0.2.1", rdma=False)
    world.until("news", lambda: other.user.all("message"))
    (hello,) = other.user.all("message")
    assert isinstance(hello, PeerHello)
    assert (hello.data_path, hello.rdma) == ("192.0.2.1", False)
    assert other.sessions.hello(one.address) == hello


@pytest.mark.parametrize("numbers", [(1, 2), (2, 1)])
def test_introduction_in_between(world: World, numbers: tuple[int, int]) -> None:
    """A session that is about to begin gets the change as well."""
    one, other = (world.router(number) for number in numbers)
    world.acquaint(one, other)
    for number in range(60):
        one.sessions.introduce(data_path=f"192.0.2.{number}", rdma=False)
        world.round(0.001)
    world.until("a session", lambda: world.joined(one, other))
    world.until(
        "the last word",
        lambda: other.sessions.hello(one.address).data_path == "192.0.2.59",  # type: ignore[union-attr]
    )


def test_the_port(world: World) -> None:
    """A port in use by another program is reported, and taken once it is free; another port can be
    set.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", world.port))
        taken.listen()
        one = world.router(1)
        one.sessions.want({IPv4Address("127.0.0.2")}, one.address)
        assert f"TCP port {world.port} can't be listened on" in one.sessions.reason
        assert "SESSION_PORT" in one.sessions.reason
    world.skip(2)
    assert one.sessions.reason == ""
    other = world.router(2)
    world.acquaint(one, other)
    world.until("a session", lambda: world.joined(one, other))
    port = free_port()
    one.sessions.listen(port)
    other.sessions.listen(port)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", world.port)) == errno.ECONNREFUSED
        assert probe.connect_ex(("127.0.0.1", port)) == 0


def test_ipv6(world: World) -> None:
    """Underlays may be IPv6; an IPv4 peer uses the same port over IPv4."""
    user = Recorder()
    write(world.folder, world.authority.root, world.authority.node("node5"))
    port = free_port()
    both = Sessions(world.loop, choose(world.folder), user, instance="5" * 32, port=port)
    both.start()
    six, four = IPv6Address("::1"), IPv4Address("127.0.0.6")
    both.want({six, four}, None)
    other = world.router(6)
    other.sessions.listen(port)
    other.sessions.want({IPv4Address("127.0.0.1")}, other.address)
    world.until("IPv4", lambda: user.sessions == {four})
    # To itself: as far as the certificate.
    world.until("IPv6", lambda: "own certificate" in both.reasons()[six])
    both.close()


def test_many_peers(world: World) -> None:
    """A dozen hosts that start at once all get sessions with each other."""
    made = [world.router(number) for number in range(1, 13)]
    world.acquaint(*made)
    world.until("all sessions", lambda: world.joined(*made), 60)
    world.run(0.2)
    assert {len(router.user.all("up")) for router in made} == {11}
    assert not any(router.user.all("down") for router in made)


def test_nothing_is_left(world: World) -> None:
    """Routers that end leave no descriptor behind."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    one, other = world.pair()
    one.sessions.close()
    other.sessions.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
