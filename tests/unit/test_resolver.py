"""Queries to Docker's embedded DNS for active tasks, and which answers count."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver import dns
from driver import resolver as resolver_module
from driver.model import Service, Task
from driver.ports import TaskAnswers
from driver.resolver import (
    LONGEST,
    SMALL,
    TIMEOUT,
    WINDOW,
    EmbeddedDns,
    answer_size,
    ask,
    fits,
)
from testbed.patience import patience, within
from tests.unit.dns_server import DnsServer, answer

VIP = IPv4Address("10.0.4.2")
OUTSIDE = IPv4Address("203.0.113.9")


def at(number: int) -> IPv4Address:
    return IPv4Address(f"10.0.4.{number}")


def service(name: str, *tasks: int) -> Service:
    return Service(name, VIP, tuple(Task(f"{name}.{n}", at(n), "e") for n in tasks))


@pytest.fixture
def server() -> Iterator[DnsServer]:
    made = DnsServer()
    yield made
    made.close()


@contextlib.contextmanager
def channel(server: DnsServer) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.connect(server.address)
        yield made


# --- questions and answers


def test_many_names_at_once(server: DnsServer) -> None:
    """Many names are queried together, and each gets its own answer."""
    names = [f"tasks.s{n}.net" for n in range(3 * WINDOW)]
    server.records = {name: [at(n % 200 + 1)] for n, name in enumerate(names)}
    with channel(server) as asking:
        answers = ask(asking, [*names, *names])
    assert answers == {name: frozenset(found) for name, found in server.records.items()}
    assert len(server.asked) == len(names)


def test_unknown_name_and_silence(server: DnsServer) -> None:
    """A name unknown to the server has no addresses; one without an answer is absent."""
    server.records, server.silent = {"a": [at(7)]}, {"c"}
    with channel(server) as asking:
        assert ask(asking, ["a", "b", "c"], timeout=0.1) == {"a": {at(7)}, "b": frozenset()}


def test_silence_is_bounded(server: DnsServer) -> None:
    """However many names a server does not answer, the resolver waits once per window."""
    server.silent = {f"n{n}" for n in range(WINDOW)}
    begin = time.monotonic()
    with channel(server) as asking:
        assert ask(asking, sorted(server.silent), timeout=0.1) == {}
    assert time.monotonic() - begin < within(2)


def test_cut_answers(server: DnsServer) -> None:
    """A truncated answer doesn't mean that a task is gone."""
    server.records, server.truncated = {"a": [at(7)]}, {"a"}
    with channel(server) as asking:
        assert ask(asking, ["a"]) == {"a": None}


def test_noise_is_ignored(server: DnsServer) -> None:
    """A message that is no answer to our query changes nothing."""
    other = answer(dns.encode_query(1, "other"), [OUTSIDE])
    server.records = {"a": [at(7)]}
    server.noise = [b"", b"x", b"\0" * 12, other, os.urandom(60)]
    with channel(server) as asking:
        assert ask(asking, ["a"]) == {"a": frozenset({at(7)})}


@pytest.mark.parametrize("name", ["", "a..b", "a" * 64, ".".join(["a" * 60] * 5)])
def test_names_that_dns_cannot_carry(server: DnsServer, name: str) -> None:
    """A name that can't be encoded isn't queried, and prevents no other query."""
    server.records = {"good": [at(7)]}
    with channel(server) as asking:
        assert ask(asking, [name, "good"]) == {"good": frozenset({at(7)})}


def test_no_server() -> None:
    """A missing server is an error at once."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        address = unused.getsockname()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect(address)
        begin = time.monotonic()
        with pytest.raises(OSError, match="refused"):
            ask(asking, ["a"], timeout=5)
        assert time.monotonic() - begin < within(2)


QUERY = dns.encode_query(7, "tasks.web.backend")


def test_answer_of_another_name() -> None:
    """An answer about another name isn't accepted, though its identifier fits."""
    with pytest.raises(dns.MalformedAnswerError):
        dns.decode_answer(answer(QUERY, [at(7)]), "tasks.db.backend")


def test_answer_in_another_case() -> None:
    """DNS is case-insensitive."""
    assert dns.decode_answer(answer(QUERY, [at(7)]), "Tasks.WEB.backend") == frozenset({at(7)})


def test_other_records_are_skipped() -> None:
    """Records of other types than addresses are skipped, not misread."""
    whole = answer(QUERY, [at(7), at(8)])
    alias = struct.pack("!HHHIH", 0xC00C, 5, 1, 600, 2) + b"\xc0\x0c"
    start = len(whole) - 32
    mixed = whole[:6] + struct.pack("!H", 3) + whole[8:start] + alias + whole[start:]
    assert dns.decode_answer(mixed, "tasks.web.backend") == frozenset({at(7), at(8)})


def test_thousand_tasks_fit() -> None:
    """The answer for a service of a thousand tasks is decoded as a whole."""
    many = [IPv4Address("10.1.0.0") + n for n in range(1000)]
    assert dns.decode_answer(answer(QUERY, many), "tasks.web.backend") == frozenset(many)


@given(st.binary(max_size=120))
def test_random_bytes_are_no_answer(message: bytes) -> None:
    """Random bytes are refused, and never crash."""
    with contextlib.suppress(dns.MalformedAnswerError):
        dns.decode_answer(message, "tasks.web.backend")


@given(st.integers(0, 200), st.integers(0, 255), st.integers(0, 200))
def test_damaged_answers(where: int, value: int, length: int) -> None:
    """A damaged or shortened answer gives a subset of addresses, none, or is refused."""
    whole = bytearray(answer(QUERY, [at(7), at(8), at(9)]))
    whole[where % len(whole)] = value
    with contextlib.suppress(dns.MalformedAnswerError):
        found = dns.decode_answer(bytes(whole[: len(whole) - length % 10]), "tasks.web.backend")
        assert found is None or len(found) <= 3


# --- services, from inside a namespace

OWN = Path("/proc/self/ns/net")
inside = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to enter a network namespace")


@pytest.fixture
def resolver(server: DnsServer) -> Iterator[EmbeddedDns]:
    made = EmbeddedDns(server.address, timeout=0.1)
    yield made
    made.close()


def names(server: DnsServer, **records: list[IPv4Address]) -> None:
    """The names of services on the network `backend`."""
    server.records = {
        f"{name.replace('tasks_', 'tasks.')}.backend": found for name, found in records.items()
    }


@inside
def test_active_tasks(server: DnsServer, resolver: EmbeddedDns) -> None:
    """The result has, for each service, the addresses that DNS gives for its tasks on the
    network."""
    names(server, tasks_web=[at(7), at(8)], tasks_db=[at(9)])
    found = resolver.tasks(OWN, "backend", [service("web", 7, 8), service("db", 9)])
    assert found.known == {"web": {at(7), at(8)}, "db": {at(9)}}


@inside
def test_service_without_tasks(server: DnsServer, resolver: EmbeddedDns) -> None:
    """A service whose own name resolves to its VIP, and whose `tasks.` name doesn't exist, has no
    active task."""
    names(server, web=[VIP])
    assert resolver.tasks(OWN, "backend", [service("web", 7)]) == TaskAnswers({"web": frozenset()})


@inside
def test_service_that_dns_does_not_know(server: DnsServer, resolver: EmbeddedDns) -> None:
    """A service that this container's DNS does not know is absent: nothing is concluded."""
    names(server, other=[VIP])
    assert resolver.tasks(OWN, "backend", [service("web", 7)]) == TaskAnswers({})


@inside
@pytest.mark.parametrize("own", [[OUTSIDE], []])
def test_names_known_outside_only(
    server: DnsServer, resolver: EmbeddedDns, own: list[IPv4Address]
) -> None:
    """Answers of external servers for a service's name don't count as tasks."""
    names(server, tasks_web=[OUTSIDE], web=own)
    assert resolver.tasks(OWN, "backend", [service("web", 7)]) == TaskAnswers({})


@inside
def test_lost_and_cut_answers(server: DnsServer, resolver: EmbeddedDns) -> None:
    """Lost and truncated answers have no effect."""
    names(server, tasks_cut=[at(7)])
    server.truncated = {"tasks.cut.backend"}
    server.silent = {"tasks.lost.backend", "lost.backend"}
    assert resolver.tasks(OWN, "backend", [service("cut", 7), service("lost", 8)]) == TaskAnswers(
        {}
    )


@inside
@pytest.mark.parametrize("length", [17, 55])
def test_many_large_answers_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty-two services of two hundred tasks each are read at each poll, when all answers arrive
    at once.
    """
    # What fits the sockets' buffers is tested here, not the time.
    monkeypatch.setattr(resolver_module, "LONGEST", patience(LONGEST))
    many = [IPv4Address("10.1.0.0") + n for n in range(200)]
    tasks = tuple(Task(f"t.{address}", address, "e") for address in many)
    services = [Service(f"s{n}".ljust(length - 14, "x"), VIP, tasks) for n in range(32)]
    server = DnsServer(burst=True)
    made = EmbeddedDns(server.address, timeout=patience(TIMEOUT))
    try:
        for item in services:
            server.records[f"tasks.{item.name}.backend"] = many
            server.records[f"{item.name}.backend"] = [VIP]
        for _ in range(5):
            found = made.tasks(OWN, "backend", services)
            assert found.known == {item.name: frozenset(many) for item in services}
    finally:
        made.close()
        server.close()


@inside
def test_large_answers_are_not_asked_for(server: DnsServer, resolver: EmbeddedDns) -> None:
    """A service whose answer does not fit a datagram is not queried: nothing is concluded, and
    Docker has no work.
    """
    tasks = tuple(Task("t", IPv4Address("10.1.0.0") + n, "e") for n in range(4000))
    large = Service("web", VIP, tasks)
    names(server, web=[VIP], tasks_web=[at(1)])
    assert not fits(large, "backend")
    assert resolver.tasks(OWN, "backend", [large]) == TaskAnswers({})
    assert server.asked == []


def test_size_of_an_answer() -> None:
    """The size of Docker's answer is known before the query."""
    tasks = tuple(Task("t", IPv4Address("10.1.0.0") + n, "e") for n in range(100))
    item = Service("web", VIP, tasks)
    query = dns.encode_query(1, "tasks.web.backend")
    real = len(answer(query, [task.address for task in tasks], whole=True))
    assert real <= answer_size(item, "backend") <= real + 100


@inside
@pytest.mark.parametrize("count", [3, 100, 400])
def test_only_an_answer_says_none(server: DnsServer, resolver: EmbeddedDns, count: int) -> None:
    """A service whose own name is answered, while the answer for its tasks is lost, is not taken
    for one without tasks.
    """
    item = service("web", *range(count)) if count < 200 else None
    if item is None:
        tasks = tuple(Task("t", IPv4Address("10.1.0.0") + n, "e") for n in range(count))
        item = Service("web", VIP, tasks)
    names(server, web=[VIP])
    server.silent = {"tasks.web.backend"}
    told = resolver.tasks(OWN, "backend", [item])
    assert told.known == {}
    assert told.silent == ({"web"} if answer_size(item, "backend") <= SMALL else frozenset())


@inside
def test_refusal_is_an_answer(server: DnsServer, resolver: EmbeddedDns) -> None:
    """Docker's DNS answers SERVFAIL for names that it doesn't know when it has no external server:
    the service has no tasks then."""
    names(server, web=[VIP])
    server.refusal = 2
    assert resolver.tasks(OWN, "backend", [service("web", 7)]) == TaskAnswers({"web": frozenset()})


@inside
def test_patience(server: DnsServer, resolver: EmbeddedDns) -> None:
    """A service without an answer gets a longer time-out, and then its answer counts."""
    names(server, tasks_web=[at(7)], web=[VIP])
    server.late = {"tasks.web.backend": 0.5}
    assert resolver.tasks(OWN, "backend", [service("web", 7)]).known == {}
    time.sleep(1.0)
    told = resolver.tasks(OWN, "backend", [service("web", 7)], patient=True)
    assert told.known == {"web": {at(7)}}


@inside
def test_dripping_answers(server: DnsServer, resolver: EmbeddedDns) -> None:
    """A server that answers one query after the other, each just in time, delays the resolver only
    briefly.
    """
    services = [service(f"s{n}", 7) for n in range(100)]
    for number, item in enumerate(services):
        name = f"tasks.{item.name}.backend"
        server.records[name] = [at(7)]
        server.late[name] = 0.08 * (number % 32 + 1)
    begin = time.monotonic()
    told = resolver.tasks(OWN, "backend", services, patient=True)
    assert time.monotonic() - begin < within(4)
    assert told.slow
    assert 0 < len(told.known) < 100


@inside
def test_namespace_that_is_gone(resolver: EmbeddedDns, tmp_path: Path) -> None:
    """A container that has ended, or whose namespace is not mounted yet, answers nothing."""
    assert resolver.tasks(tmp_path / "none", "backend", [service("web", 7)]) == TaskAnswers({})
    empty = tmp_path / "empty"
    empty.touch()
    assert resolver.tasks(empty, "backend", [service("web", 7)]) == TaskAnswers({})


@inside
def test_late_answers_are_not_mixed_up(server: DnsServer, resolver: EmbeddedDns) -> None:
    """A late answer isn't taken for the answer to a later query."""
    names(server, tasks_web=[at(7)])
    server.delay = 0.3
    assert resolver.tasks(OWN, "backend", [service("web", 7)]) == TaskAnswers({})
    time.sleep(1.0)
    server.delay = 0.0
    names(server, tasks_web=[at(8)])
    assert resolver.tasks(OWN, "backend", [service("web", 8)]) == TaskAnswers(
        {"web": frozenset({at(8)})}
    )


def _sockets() -> set[str]:
    """The open sockets of this process, by inode; earlier tests' sockets may still be closed
    meanwhile.
    """
    links = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.add(str(entry.readlink()))
    return {link for link in links if link.startswith("socket:")}


@inside
def test_sockets_are_kept_for_a_while_only(server: DnsServer, resolver: EmbeddedDns) -> None:
    """Between polls one socket per container is kept, and closed with the resolver."""
    names(server, tasks_web=[at(7)])
    before = _sockets()
    resolver.tasks(OWN, "backend", [service("web", 7)])
    kept = _sockets() - before
    assert len(kept) == 1
    for _ in range(20):
        resolver.tasks(OWN, "backend", [service("web", 7)])
    assert _sockets() - before == kept
    resolver.close()
    assert not _sockets() & kept
