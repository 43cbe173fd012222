"""The real router between real containers: which connections get shared memory, and which do
not.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import ConnectionFact, Limits, RingTraffic, RouterSettings
from dataplane.router import layout
from dataplane.router import library_wire as wire
from dataplane.router.library_wire import Address
from dataplane.router.reasons import Reason
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience, within
from tests.dataplane.library import Library, addresses_of, cookie_of, dial, listen

VIP: Final = "10.78.0.100"
WAIT: Final = 5.0


@dataclass
class Pair:
    """A bed with a process in each of two containers."""

    bed: NamespaceBed
    one: Library
    other: Library
    listener: socket.socket

    def connection(self, address: str | None = None) -> tuple[socket.socket, socket.socket]:
        """A TCP connection from `a` to `b`, at `b`'s address or another."""
        a, b = self.bed.containers["a"], self.bed.containers["b"]
        client = dial(a.namespace, address or str(b.ipv4))
        server, _ = self.listener.accept()
        return client, server

    def upgraded(self) -> tuple[wire.Grant, wire.Grant, int | None]:
        """A new connection's grants, and the memory if it came with the first."""
        client, server = self.connection()
        self.one.ask(client)
        self.other.ask(server)
        grant, memory = self.one.hear(wire.Grant)
        answer, _ = self.other.hear(wire.Grant)
        self.keep = [*getattr(self, "keep", []), client, server]
        return grant, answer, memory


def process_in(made: NamespaceBed, name: str) -> Library:
    """A process of a container that has been welcomed."""
    library = Library.connect(made.shared / "router.sock", made.containers[name].namespace)
    library.hear(wire.Welcome)
    return library


@contextlib.contextmanager
def a_pair(
    *more: str, settings: RouterSettings | None = None, guard: bool = True
) -> Iterator[Pair]:
    with bed("a", "b", *more, vips={VIP: ("b",)}, settings=settings, guard=guard) as made:
        listener = listen(made.containers["b"].namespace, "0.0.0.0")
        yield Pair(made, process_in(made, "a"), process_in(made, "b"), listener)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with a_pair() as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + patience(WAIT)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listed(made: NamespaceBed, container: str) -> list[ConnectionFact]:
    """The connections of one container."""
    found = made.router.connections(made.containers[container].inode)
    return list(found.connections)


# --- pairing


def test_two_ends_of_a_connection(pair: Pair) -> None:
    """Both ends of a real connection are granted one slot, and both processes get the same
    memory.
    """
    client, server = pair.connection()
    pair.one.ask(client)
    assert pair.one.silent()
    pair.other.ask(server)
    grant, memory = pair.one.hear(wire.Grant)
    answer, memory2 = pair.other.hear(wire.Grant)
    assert (grant.arena, grant.slot, grant.incarnation) == (
        answer.arena,
        answer.slot,
        answer.incarnation,
    )
    assert (grant.cookie, answer.cookie) == (cookie_of(client), cookie_of(server))
    assert memory is not None
    assert memory2 is not None
    assert os.fstat(memory).st_ino == os.fstat(memory2).st_ino


def test_the_memory(pair: Pair) -> None:
    """No process can resize the memory; its header is right, and it costs three pages."""
    grant, _, memory = pair.upgraded()
    assert memory is not None
    seals = fcntl.fcntl(memory, fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert os.fstat(memory).st_size == layout.ARENA_SIZE
    for size in (0, layout.ARENA_SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)
    assert os.pread(memory, 20, 0) == layout.HEADER.pack(
        layout.MAGIC, layout.VERSION, layout.RING_SIZE, 0
    )
    for direction in range(layout.SIDES):
        page = os.pread(memory, layout.PAGE, layout.ring_offset(grant.slot, direction))
        expected = bytearray(layout.PAGE)
        struct.pack_into("=Q", expected, layout.INCARNATION_OFFSET, grant.incarnation)
        assert page == expected
    assert os.fstat(memory).st_blocks * 512 <= 3 * layout.PAGE


def test_a_slot_is_clean_when_it_is_used_again(pair: Pair) -> None:
    """A connection finds no bytes of the slot's last connection, even in pages mapped before."""
    pair.upgraded()
    grant, answer, memory = pair.upgraded()
    assert memory is not None
    ring, bulk = layout.ring_offset(grant.slot, 1), layout.bulk_offset(grant.slot, 1)
    with mmap.mmap(memory, layout.ARENA_SIZE) as mapped:
        mapped[ring : ring + layout.PAGE] = b"x" * layout.PAGE
        mapped[bulk + 8192 : bulk + 8192 + 5] = b"bytes"
        before = os.fstat(memory).st_blocks
        for library, each in ((pair.one, grant), (pair.other, answer)):
            library.say(wire.Release(each.slot, each.arena, each.incarnation, each.token))
        until(lambda: os.fstat(memory).st_blocks < before)
        mapped[ring : ring + 8] = b"too late"
        again, _, _ = pair.upgraded()
        assert (again.arena, again.slot) == (grant.arena, grant.slot)
        assert again.incarnation != grant.incarnation
        assert mapped[bulk + 8192 : bulk + 8192 + 5] == bytes(5)
        header = bytearray(layout.PAGE)
        struct.pack_into("=Q", header, layout.INCARNATION_OFFSET, again.incarnation)
        assert mapped[ring : ring + layout.PAGE] == header


def test_behind_a_vip(pair: Pair) -> None:
    """A client that knows only the VIP is paired with the task that nftables chose."""
    client, server = pair.connection(VIP)
    assert addresses_of(client)[1].ip == ip_address(VIP)
    pair.other.ask(server)
    pair.one.ask(client)
    grant, _ = pair.one.hear(wire.Grant)
    answer, _ = pair.other.hear(wire.Grant)
    assert grant.incarnation == answer.incarnation


def test_ipv6() -> None:
    """IPv6 connections are paired, and IPv4 connections of a dual-stack listener as well."""
    with bed("a", "b") as made:
        a, b = made.containers.values()
        one, other = process_in(made, "a"), process_in(made, "b")
        listener = listen(b.namespace, "::")
        for address in (str(b.ipv6), str(b.ipv4)):
            client = dial(a.namespace, address)
            server, _ = listener.accept()
            one.ask(client)
            other.ask(server)
            grant, _ = one.hear(wire.Grant)
            answer, _ = other.hear(wire.Grant)
            assert grant.incarnation == answer.incarnation


def test_within_a_container(pair: Pair) -> None:
    """Two processes of one container, and one process with itself, are paired like any others."""
    b = pair.bed.containers["b"]
    second = process_in(pair.bed, "b")
    for asker in (second, pair.other):
        client = dial(b.namespace, str(b.ipv4))
        server, _ = pair.listener.accept()
        asker.ask(client)
        pair.other.ask(server)
        grant, _ = asker.hear(wire.Grant)
        answer, _ = pair.other.hear(wire.Grant)
        assert grant.incarnation == answer.incarnation
        assert {grant.side, answer.side} == {0, 1}


def test_bells(pair: Pair) -> None:
    """Bell 0 comes with the grant, others on request. The router rings a bell for a process that
    does not have it, and hands it out.
    """
    grant, answer, _ = pair.upgraded()
    with socket.socket(fileno=pair.one.hearing[grant.arena, grant.side]) as bell:
        os.write(pair.other.rings(grant.arena, grant.side), b"x")
        assert bell.recv(2, socket.MSG_DONTWAIT) == b"x"
    pair.one.say(wire.Bell(7, grant.arena, grant.token, grant.side))
    hear, hears = pair.one.hear(wire.Hear)
    assert (hear.index, hear.side) == (7, grant.side)
    assert hears is not None
    pair.other.say(wire.Fetch(7, answer.arena, answer.token, grant.side))
    ring, theirs = pair.other.hear(wire.Ring)
    assert (ring.index, ring.side) == (7, grant.side)
    assert theirs is not None
    with socket.socket(fileno=hears) as bell:
        assert bell.recv(2, socket.MSG_DONTWAIT) == b"!"
        os.write(theirs, b"x")
        assert bell.recv(2, socket.MSG_DONTWAIT) == b"x"


def test_nothing_goes_the_other_way(pair: Pair) -> None:
    """A process with the hearing end of a bell can put nothing into the ringing end, so closing the
    ringing end never waits.
    """
    grant, _, _ = pair.upgraded()
    with socket.socket(fileno=pair.one.hearing[grant.arena, grant.side]) as bell:
        with pytest.raises(BrokenPipeError):
            bell.send(b"x")
        with pytest.raises(BrokenPipeError):
            socket.send_fds(bell, [b"x"], [0])


def test_an_unknown_bell(pair: Pair) -> None:
    """A request for a bell that does not exist is answered at once."""
    grant, answer, _ = pair.upgraded()
    pair.other.rings(grant.arena, grant.side)
    pair.other.say(wire.Fetch(9, answer.arena, answer.token, grant.side))
    ring, theirs = pair.other.hear(wire.Ring)
    assert (ring.index, theirs) == (9, None)


# --- who gets nothing


def test_somebody_elses_connection(pair: Pair) -> None:
    """A request with another process's cookie or addresses, or from another container, is refused:
    the kernel does not know the socket there.
    """
    client, server = pair.connection()
    second, _ = pair.connection()
    pair.one.ask(client, cookie=cookie_of(second))
    pair.one.ask(client, cookie=cookie_of(server))
    local, remote = addresses_of(client)
    pair.one.ask(client, local=Address(local.ip, local.port ^ 1))
    reasons = [pair.one.hear(wire.Refuse)[0].reason for _ in range(3)]
    assert reasons == [Reason.NOT_FOUND] * 3
    # A local address that is not its own. Of a remote one nothing is said unless there is a
    # connection with it.
    pair.other.ask(client)
    pair.one.ask(client, local=Address(ip_address("10.78.0.99"), local.port))
    pair.one.ask(client, remote=Address(ip_address("10.99.0.9"), remote.port))
    pair.one.ask(client, remote=Address(ip_address("10.78.0.99"), remote.port))
    assert pair.other.hear(wire.Refuse)[0].reason == Reason.FOREIGN
    reasons = [pair.one.hear(wire.Refuse)[0].reason for _ in range(3)]
    assert reasons == [Reason.FOREIGN, Reason.NOT_FOUND, Reason.NOT_FOUND]


def test_a_listener_is_no_connection(pair: Pair) -> None:
    """A listening socket's cookie does not stand for a connection to its port."""
    client, server = pair.connection()
    pair.other.ask(server, cookie=cookie_of(pair.listener))
    assert pair.other.hear(wire.Refuse)[0].reason == Reason.NOT_FOUND
    client.close()


def test_a_third_container(pair: Pair) -> None:
    """A container without an end of the connection can't speak for its arena, whatever it knows."""
    with a_pair("c") as three:
        grant, answer, _ = three.upgraded()
        for message in (
            wire.Fetch(0, grant.arena, grant.token, answer.side),
            wire.Release(grant.slot, grant.arena, grant.incarnation, grant.token),
        ):
            outsider = process_in(three.bed, "c")
            outsider.say(message)
            assert outsider.closed()
        assert "token is of neither side" in three.bed.log()
        assert three.bed.router.statistics().connections == 1


def test_another_network() -> None:
    """Containers of different networks are not paired, even though one bridge carries both."""
    with bed("a", "b", networks={"b": "n2"}) as made:
        a, b = made.containers.values()
        listener = listen(b.namespace, "0.0.0.0")
        one, other = process_in(made, "a"), process_in(made, "b")
        client = dial(a.namespace, str(b.ipv4))
        server, _ = listener.accept()
        one.ask(client)
        other.ask(server)
        assert one.hear(wire.Refuse)[0].reason == Reason.REMOTE
        assert other.hear(wire.Refuse)[0].reason == Reason.REMOTE


def test_no_container_at_all(pair: Pair) -> None:
    """A process of the host is welcomed late, and told that nothing is accelerated for it. It is
    refused for now: the driver might come to know of its namespace.
    """
    outsider = Library.connect(pair.bed.shared / "router.sock", None)
    welcome, _ = outsider.hear(wire.Welcome)
    assert not welcome.enabled
    client, _ = pair.connection()
    outsider.ask(client)
    refused = outsider.hear(wire.Refuse)[0]
    assert (refused.reason, refused.passes) == (Reason.REMOTE, True)


def test_acceleration_off(pair: Pair) -> None:
    """When acceleration is turned off, processes are told and requests are refused; when it is
    turned on again, they are told that too.
    """
    client, _ = pair.connection()
    pair.bed.learn(settings=RouterSettings(acceleration=False))
    assert not pair.one.hear(wire.Welcome)[0].enabled
    pair.one.ask(client)
    assert pair.one.hear(wire.Refuse)[0].reason == Reason.OFF
    pair.bed.learn()
    assert pair.one.hear(wire.Welcome)[0].enabled


# --- wrong messages


def test_wrong_messages_end_their_sender(pair: Pair) -> None:
    """An invalid message ends the connection that it came over, and no other."""
    note = wire.pack(wire.Note(5, 1))
    wrong: list[bytes] = [
        b"x",
        b"",
        b"x" * 5000,
        note[:-1],
        note + b"x",
        wire.pack(wire.Refuse(1, 1, 1)),
        wire.pack(wire.Hello(2, 2)),
    ]
    for data in wrong:
        bad = process_in(pair.bed, "a")
        bad.raw(data)
        assert bad.closed(), data
    found = pair.bed.router.statistics()
    # An empty packet can't be told from the end.
    assert found.wrong_messages == len(wrong) - 1
    pair.upgraded()


def test_log_is_quiet(pair: Pair) -> None:
    """A container that sends invalid messages all the time does not fill the log."""
    for _ in range(100):
        bad = Library.connect(
            pair.bed.shared / "router.sock", pair.bed.containers["a"].namespace, hello=False
        )
        bad.raw(b"garbage")
        assert bad.closed()
    assert pair.bed.log().count("wrong message") <= 5
    assert pair.bed.router.statistics().wrong_messages == 100


# --- flooding


def test_a_process_that_takes_no_answers(pair: Pair) -> None:
    """A process that sends requests and never reads loses its connection; others are not
    affected.
    """
    client, _ = pair.connection()
    bad = process_in(pair.bed, "a")
    bad.connection.setblocking(False)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(20_000):
            try:
                bad.ask(client, cookie=1)
            except BlockingIOError:
                time.sleep(0.001)
    assert pair.bed.router.statistics().dropped == 1
    pair.upgraded()


def test_a_container_that_floods() -> None:
    """A container that sends as much as it can has to wait; meanwhile another container's
    connection is granted at once.
    """
    settings = RouterSettings(limits=Limits(messages=1000))
    with a_pair("c", settings=settings) as made:
        flooders = [process_in(made.bed, "c") for _ in range(4)]
        note = wire.pack(wire.Note(5, 1))
        for flooder in flooders:
            flooder.connection.setblocking(False)
        end = time.monotonic() + 1.0
        worst = 0.0
        while time.monotonic() < end:
            for flooder in flooders:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(100):
                        flooder.raw(note)
            time.sleep(0.02)
            begin = time.monotonic()
            made.upgraded()
            worst = max(worst, time.monotonic() - begin)
        assert worst < within(0.5)
        assert made.bed.router.statistics().noted[Reason.NOT_FOUND.word] < 4000
        # They weren't thrown out, and are heard again when they have calmed down.
        assert made.bed.router.statistics().processes == 2 + len(flooders)


def test_limit_of_processes() -> None:
    """A container's connections to the router over the limit are closed at once; another
    container's are not.
    """
    with a_pair(settings=RouterSettings(limits=Limits(processes=3))) as made:
        more = [process_in(made.bed, "a") for _ in range(2)]
        refused = Library.connect(
            made.bed.shared / "router.sock", made.bed.containers["a"].namespace, hello=False
        )
        assert refused.closed()
        more.append(process_in(made.bed, "b"))
        more[0].close()
        until(lambda: made.bed.router.statistics().processes == 4)
        more.append(process_in(made.bed, "a"))


def test_limit_of_memory() -> None:
    """A container that uses more shared memory than it may gets no more until it has released
    some.
    """
    with a_pair(settings=RouterSettings(limits=Limits(memory=1 << 20))) as made:
        grant, answer, memory = made.upgraded()
        assert memory is not None
        with mmap.mmap(memory, layout.ARENA_SIZE) as mapped:
            offset = layout.bulk_offset(grant.slot)
            mapped[offset : offset + (1 << 20)] = b"x" * (1 << 20)
        until(lambda: made.bed.router.statistics().memory > 1 << 20)
        client, server = made.connection()
        made.one.ask(client)
        made.other.ask(server)
        # Both ends are told.
        for library in (made.one, made.other):
            assert library.hear(wire.Refuse)[0].reason == Reason.LIMIT
        for library, each in ((made.one, grant), (made.other, answer)):
            library.say(wire.Release(each.slot, each.arena, each.incarnation, each.token))
        until(lambda: made.bed.router.statistics().memory < 1 << 20)
        made.upgraded()


# --- life and death


def test_death_of_the_router(pair: Pair) -> None:
    """A killed and restarted router pairs new connections; the memory of old ones is untouched."""
    before, _, memory = pair.upgraded()
    assert memory is not None
    os.pwrite(memory, b"alive", layout.ring_offset(0, 0) + layout.PAGE - 5)
    pair.bed.kill_router()
    former = pair.one
    assert former.closed()
    pair.bed.start_router()
    pair.one, pair.other = process_in(pair.bed, "a"), process_in(pair.bed, "b")
    after, _, fresh = pair.upgraded()
    assert fresh is not None
    assert after.arena != before.arena
    assert os.fstat(fresh).st_ino != os.fstat(memory).st_ino
    assert os.pread(memory, 5, layout.ring_offset(0, 0) + layout.PAGE - 5) == b"alive"


def test_nobody_is_told_half(pair: Pair) -> None:
    """A router without a snapshot does not listen, so no process is told that nothing is
    accelerated.
    """
    with bed("a", router=False) as made:
        assert not (made.shared / "router.sock").exists()
        made.start_router()
        welcome, _ = Library.connect(
            made.shared / "router.sock", made.containers["a"].namespace
        ).hear(wire.Welcome)
        assert welcome.enabled


def test_end(pair: Pair) -> None:
    """A router that is told to end does so at once and removes its sockets, but not those of a
    newer router.
    """
    first = pair.bed.process
    assert first is not None
    path = pair.bed.shared / "router.sock"
    before = path.stat().st_ino
    pair.bed.start_router()

    def replaced() -> bool:
        pair.bed.learn()
        return path.stat().st_ino != before

    until(replaced)
    first.terminate()
    assert first.wait(patience(5)) == 0
    process_in(pair.bed, "a")
    second = pair.bed.process
    assert second is not None
    assert second.stdin is not None
    second.stdin.close()
    assert second.wait(patience(5)) == 0
    assert not path.exists()


def test_namespaces_are_let_go(pair: Pair) -> None:
    """The router keeps nothing of a container whose processes have ended, so its namespace can
    go.
    """
    process = pair.bed.process
    assert process is not None
    inode = pair.bed.containers["a"].inode

    def held() -> bool:
        for each in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(each) == f"net:[{inode}]":
                    return True
        return False

    assert held()
    pair.one.close()
    until(lambda: not held())


# --- what is said


def test_connections(pair: Pair) -> None:
    """Each connection is listed with its path, and those on TCP with the reason."""
    client, _ = pair.connection()
    (entry,) = listed(pair.bed, "a")
    assert (entry.path, entry.reason, entry.container) == ("overlay", "short", "a")
    assert (entry.local, entry.remote) == tuple(map(str, addresses_of(client)))
    pair.one.ask(client)
    until(lambda: listed(pair.bed, "a")[0].reason == "peer-short")
    pair.one.say(wire.Note(Reason.OPTION, cookie_of(client)))
    until(lambda: listed(pair.bed, "a")[0].reason == "option")
    client.close()
    pair.upgraded()
    until(lambda: [each.path for each in listed(pair.bed, "a")] == ["shm"])
    assert [each.path for each in listed(pair.bed, "b") if each.path == "shm"] == ["shm"]
    pair.other.close()
    plain = pair.connection()
    until(lambda: "peer-no-library" in {each.reason for each in listed(pair.bed, "a")})
    assert {each.reason for each in listed(pair.bed, "b")} == {"no-library"}
    assert all(each.fileno() > 0 for each in plain)
    said = pair.bed.router.connections().reasons
    assert said["peer-no-library"] == Reason.PEER_NO_LIBRARY.sentence


def test_statistics(pair: Pair) -> None:
    """The statistics count what there is: processes, libraries, connections, memory."""
    pair.upgraded()
    until(lambda: pair.bed.router.statistics().memory > 0)
    found = pair.bed.router.statistics()
    assert (found.processes, found.connections, found.granted, found.arenas) == (2, 1, 1, 1)
    by_name = {each.container: each for each in found.containers}
    assert by_name["a"].builds == {"0123abcd": 1}
    assert by_name["a"].memory == by_name["b"].memory == found.memory == 3 * layout.PAGE


def test_admin_socket_is_roots(pair: Pair) -> None:
    """An invalid request gets an error, and only root can use the control socket."""
    path = pair.bed.folder / "control.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b'{"type":"learn","endpoints":[{"id":1}]}\ninvalid\n')
        answers = b""
        while answers.count(b"\n") < 2:
            answers += connection.recv(4096)
    assert answers.count(b'"type":"failed"') == 2
    pair.upgraded()


def test_what_a_ring_carries_is_bounded(pair: Pair) -> None:
    """The router reads a ring's words at both ends, and believes only what is possible."""
    grant, _, memory = pair.upgraded()
    assert memory is not None

    def rings() -> list[RingTraffic | None]:
        found = pair.bed.router.traffic().connections
        assert {each.path for each in found} == {"shm"}
        assert all(each.tcp is not None for each in found)
        return [each.ring for each in found]

    def write(tail: int, messages: int) -> None:
        start = layout.ring_offset(grant.slot, grant.side)
        os.pwrite(memory, struct.pack("=Q", tail), start)
        os.pwrite(memory, struct.pack("=Q", messages), start + layout.MESSAGES_OFFSET)

    until(lambda: len(rings()) == 2)
    write(500, 5)
    one, other = rings()
    assert one is not None
    assert other is not None
    assert {(each.bytes_in, each.bytes_out) for each in (one, other)} == {(500, 0), (0, 500)}
    assert {(each.messages_in, each.messages_out) for each in (one, other)} == {(5, 0), (0, 5)}
    for tail in ((1 << 64) - 1, 1 << 63, 1 << 60):
        write(tail, tail)
        assert rings() == [None, None]
    assert pair.bed.router.statistics().bugs == 0
