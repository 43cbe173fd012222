"""Connections between containers of two hosts, with the real library, routers and relays.

Over the path `rdma`, where shared memory replaces the device, and over `relay`, TCP between the
relays. Tests with a device are in `tests/vm/test_rdma_hosts.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from msgspec.structs import replace

from dataplane.control import (
    ConnectionFact,
    EncryptionKeys,
    RelayRule,
    RouterSettings,
    RouterSnapshot,
)
from driver.kernel.namespace import in_netns
from testbed.patience import patience, within
from tests.dataplane.places import LIBRARY, compile_c, counts_of
from tests.dataplane.two_hosts import HostBed, blackhole, cut, two_hosts
from tests.unit.swarm_ca import Authority

HERE: Final = Path(__file__).parent
TOP: Final = HERE.parents[1]
STREAM: Final = HERE / "programs/stream.py"
MANY: Final = HERE / "programs/many.py"
STALLED: Final = HERE / "programs/stalled.py"
RELAY: Final = TOP / "build/freeflow-relay-memory"
VIP: Final = "10.78.0.100"
PORT: Final = 7100
PROOFS: Final = ("A" * 128, "B" * 128)
PAUSE: Final = 5.0
"""Seconds after which a connection that has fallen back sends a request again, at least: see
`backoff.h` of the library.
"""
RETURN: Final = 10 * PAUSE
"""Seconds in which it moves again, also if the first request was refused."""
REFUSED: Final = 20.0
"""Seconds in which a request for a host without a router is refused."""
STAYS: Final = RouterSettings(relay_rule=RelayRule(bulk_rate=1 << 40, batch=0))
"""Streams stay on the relay, whatever they carry."""
Hosts = tuple[HostBed, HostBed]

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() or not RELAY.exists(), reason="missing: make library relay"
)


@pytest.fixture(params=["rdma", "relay"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with two_hosts(library=LIBRARY, relay=RELAY, vips={VIP: ("b",)}, path=request.param) as made:
        yield made


@pytest.fixture(params=["rdma", "relay"])
def staying(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Hosts whose streams stay on their path."""
    with two_hosts(library=LIBRARY, relay=RELAY, path=request.param, settings=STAYS) as made:
        yield made


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listed(host: HostBed) -> list[ConnectionFact]:
    return list(host.router.connections().connections)


def is_on_path(host: HostBed, count: int) -> bool:
    return on_path(host) == count


def has_session(host: HostBed, wanted: bool) -> bool:
    return host.peer().session is wanted


def has_sent(host: HostBed, least: int) -> bool:
    return host.router.statistics().rdma.relay.get("bytes_out", 0) > least


def has_granted(host: HostBed, least: int) -> bool:
    return host.counts().granted >= least


def on_path(host: HostBed) -> int:
    return sum(connection.path == host.path for connection in listed(host))


def went_back(host: HostBed) -> bool:
    """Whether all connections of a host went back to TCP, and the router reports it."""
    return {(connection.path, connection.reason) for connection in listed(host)} == {
        ("overlay", "left")
    }


def tell(program: subprocess.Popen[str]) -> None:
    """Give a program a line of input."""
    assert program.stdin is not None
    program.stdin.write("\n")
    program.stdin.flush()


class Streams:
    """Streams of numbers between `a` of one host and `b` of the other.

    They end `seconds` after a call of `ends`.
    """

    def __init__(self, hosts: Hosts, seconds: float, count: int, address: str = "") -> None:
        one, other = hosts
        a, b = one.containers["a"], other.containers["b"]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
        python = [sys.executable, str(STREAM)]
        self.server = b.popen([*python, "server", str(b.ipv4), str(PORT), str(count)], **options)
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "listening\n"
        where = [address or str(b.ipv4), str(PORT)]
        ask = [*python, "client", *where, str(seconds), str(count), "told"]
        self.client = a.popen(ask, stdin=subprocess.PIPE, **options)

    def ends(self, seconds: float = 60) -> list[str]:
        """The results of all ends, "whole" or "reset". Each must have moved some numbers."""
        said = [
            self.client.communicate("now\n", timeout=patience(seconds))[0],
            self.server.communicate(timeout=patience(seconds))[0],
        ]
        lines = [line.split() for line in "".join(said).splitlines() if line != "listening"]
        assert all(int(number) > 0 for _, number in lines), lines
        return [word for word, _ in lines]


@contextlib.contextmanager
def streams(
    hosts: Hosts, seconds: float = 2, count: int = 4, address: str = ""
) -> Iterator[Streams]:
    """Streams that are all on the path and have bytes in their rings, so that no end returns to TCP
    alone.
    """
    before = [host.router.statistics().rdma.relay.get("bytes_out", 0) for host in hosts]
    made = Streams(hosts, seconds, count, address)
    for host, sent in zip(hosts, before, strict=True):
        try:
            until(partial(is_on_path, host, count))
            until(partial(has_sent, host, sent + count * (2 << 20)))
        except AssertionError as error:
            raise AssertionError((listed(host), host.log())) from error
    yield made


def nothing_left(hosts: Hosts) -> None:
    """Wait until no memory is registered and no slot is used."""
    for host in hosts:

        def clean(host: HostBed = host) -> bool:
            said = host.router.statistics()
            return not (said.rdma.memory or said.rdma.connections or said.relay.connections)

        until(clean)


def moves_again(hosts: Hosts) -> None:
    """A new connection moves, and afterwards nothing is left of any connection."""
    for host in hosts:
        host.wait_linked()
    with streams(hosts, 1, 1) as made:
        assert made.ends() == ["whole"] * 2
    nothing_left(hosts)


def test_bytes(hosts: Hosts) -> None:
    """Connections between hosts move without loss, and nothing is left of them."""
    with streams(hosts) as made:
        assert [host.counts().connections for host in hosts] == [4, 4]
        registered = 4 * (2 * RouterSettings().remote_ring + 2 * 4096)
        path = hosts[0].path
        rdma = hosts[0].router.statistics().rdma
        assert rdma.memory == (registered if path == "rdma" else 0)
        (peer,) = rdma.hosts
        assert (peer.session, peer.link, peer.transport, peer.connections) == (True, "up", path, 4)
        assert peer.encryption == ("" if path == "rdma" else "messages")
        assert made.ends() == ["whole"] * 8
    nothing_left(hosts)
    for host in hosts:
        until(partial(has_sent, host, 1_000_000))
        assert host.counts().broken == 0


@pytest.mark.parametrize("restless", [False, True])
def test_torture(hosts: Hosts, tmp_path: Path, restless: bool) -> None:
    """No byte is wrong under many threads per connection, forks, signals and kills at both ends,
    also while connections fall back to TCP at random and move again.
    """
    statistics = tmp_path / "statistics"
    more = {"FREEFLOW_STATS": str(statistics), **({"FREEFLOW_RESTLESS": "1"} if restless else {})}
    seconds = int(os.environ.get("TORTURE_SECONDS", "6"))
    program = str(compile_c(HERE / "torture.c", tmp_path / "torture"))
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": more,
    }
    server = b.popen([program, "server", str(b.ipv4), "7000"], **options)
    client = a.popen(
        [program, "client", str(b.ipv4), "7000", str(seconds), "42", "16", "4"], **options
    )
    said = [program.communicate(timeout=seconds + patience(60))[0] for program in (client, server)]
    assert (client.returncode, server.returncode) == (0, 0), "\n".join(said)
    for host in hosts:
        assert host.counts().granted > 20
        assert host.counts().broken == 0
    assert counts_of(statistics)["returned"] >= 5 or not restless
    nothing_left(hosts)


def test_a_service(hosts: Hosts) -> None:
    """A client that knows a service's VIP is paired with the task on the other host."""
    with streams(hosts, 2, 2, VIP) as made:
        assert {connection.remote for connection in listed(hosts[0])} == {f"{VIP}:{PORT}"}
        assert made.ends() == ["whole"] * 4
    nothing_left(hosts)


def test_without_a_session(hosts: Hosts) -> None:
    """Without a session connections go on, and new ones stay on TCP until there is one again. The
    same cut ends a link over TCP: its connections go on afterwards.
    """
    with streams(hosts, 2, 2) as made:
        cut(hosts[0])
        for host in hosts:
            until(partial(has_session, host, False))
            assert host.path == "relay" or host.peer().link == "up"
        a, b = hosts[0].containers["a"], hosts[1].containers["b"]
        server = b.popen(["iperf3", "-s", "-1", "-p", "7300"])
        time.sleep(0.5)
        client = a.popen(["iperf3", "-c", str(b.ipv4), "-p", "7300", "-t", f"{within(2):.0f}"])
        until(lambda: any(connection.reason == "no-session" for connection in listed(hosts[0])))
        assert (client.wait(patience(20)), server.wait(patience(20))) == (0, 0)
        assert on_path(hosts[0]) == 2
        cut(hosts[0], up=True)
        assert made.ends() == ["whole"] * 4
    for host in hosts:
        until(partial(has_session, host, True))
    with streams(hosts, 1, 1) as made:
        assert made.ends() == ["whole"] * 2


def has_refused(host: HostBed, reason: str, least: int) -> bool:
    return host.router.statistics().refused.get(reason, 0) >= least


def refusals(host: HostBed) -> int:
    """How many requests its router has refused."""
    return sum(host.router.statistics().refused.values())


def test_connections_that_were_refused(hosts: Hosts) -> None:
    """Connections that were refused for want of a session move when there is one again."""
    cut(hosts[0])
    for host in hosts:
        until(partial(has_session, host, False))
    made = Streams(hosts, 1, 2)
    for host in hosts:
        until(partial(has_refused, host, "no-session", 2), REFUSED)
    cut(hosts[0], up=True)
    for host in hosts:
        until(partial(is_on_path, host, 2), RETURN)
    assert made.ends() == ["whole"] * 4
    nothing_left(hosts)


def ups(host: HostBed, what: str) -> int:
    """How many sessions or links a host's router has had."""
    return host.log().count(f"{what} up")


def has_had_sessions(host: HostBed, count: int) -> bool:
    return ups(host, "session") >= count


@pytest.mark.parametrize("path", ["rdma", "relay"])
def test_certificates_renewed_under_load(path: str) -> None:
    """New certificates replace the session; the link, and streams over it, go on."""
    with two_hosts(
        library=LIBRARY, relay=RELAY, path=path, authority=Authority(), settings=STAYS
    ) as made:
        with streams(made, 2, 4) as running:
            links = [ups(host, "link") for host in made]
            for number, host in enumerate(made, 2):
                host.renew()
                for each in made:
                    until(partial(has_had_sessions, each, number), 20)
                    until(partial(has_session, each, True))
                    assert on_path(each) == 4
            assert [ups(host, "link") for host in made] == links
            assert running.ends() == ["whole"] * 8
        assert [host.counts().broken for host in made] == [0, 0]
        moves_again(made)


def lose_packets(hosts: Hosts, ways: tuple[int, ...], until_then: Callable[[], object]) -> float:
    """Lose all packets in these ways for a time; how many seconds it was."""
    begin = time.monotonic()
    for way in ways:
        blackhole(hosts[way], hosts[1 - way])
    until_then()
    for way in ways:
        blackhole(hosts[way], hosts[1 - way], ends=True)
    return time.monotonic() - begin


def all_downs(hosts: Hosts) -> list[int]:
    return [downs(host) for host in hosts]


@pytest.mark.parametrize("ways", [(0,), (1,), (0, 1)], ids=["there", "back", "both"])
def test_a_blackholed_peer(ways: tuple[int, ...]) -> None:
    """If packets to or from the other host are lost without a word, streams stall; a link that is
    lost for it is made again afterwards, and no byte is lost. A short time of it costs no link.
    """
    with two_hosts(library=LIBRARY, relay=RELAY, path="relay", settings=STAYS) as made:

        def spares_the_link() -> bool:
            """On a busy machine a short time may become a long one, which shows nothing."""
            before = all_downs(made)
            was_short = lose_packets(made, ways, lambda: time.sleep(1)) < 2
            for host in made:
                host.wait_linked()
            assert all_downs(made) == before or not was_short
            return was_short

        with streams(made, 2, 4) as running:
            until(spares_the_link, 30)
            before = all_downs(made)
            until_lost = partial(until, lambda: all_downs(made) != before, 15)
            assert lose_packets(made, ways, until_lost) > 4
            for host in made:
                host.wait_linked()
            assert running.ends() == ["whole"] * 8
        assert [host.counts().broken for host in made] == [0, 0]
        moves_again(made)


@pytest.mark.parametrize("with_device", [0, 1])
def test_a_host_with_a_device_and_one_without(with_device: int) -> None:
    """A host with a device and one without use TCP between their relays, and say why."""
    devices = (with_device == 0, with_device == 1)
    with two_hosts(library=LIBRARY, relay=RELAY, path="relay", devices=devices) as made:
        with streams(made, 1, 2) as running:
            peers = [host.peer() for host in made]
            assert [peer.transport for peer in peers] == ["relay", "relay"]
            assert [peer.rdma for peer in peers] == [devices[1], devices[0]]
            assert all(peer.why_not_rdma for peer in peers), peers
            assert running.ends() == ["whole"] * 4
        nothing_left(made)


def downs(host: HostBed) -> int:
    return host.router.statistics().rdma.relay.get("downs", 0)


def kill_socket(host: HostBed, number: int) -> None:
    """Destroy one of the TCP connections of a host's link (`ss -K`)."""
    there = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{host.namespace}"]
    relay = f"pid={host.relay_pid()},"
    listing = [*there, "ss", "-Htnp", "state", "established"]
    lines = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.splitlines()
    ends = [line.split()[2:4] for line in lines if relay in line]
    if ends:
        local, remote = ends[number % len(ends)]
        # It may be gone by now.
        killing = [*there, "ss", "-K", "src", local, "dst", remote]
        subprocess.run(killing, check=True, capture_output=True)


def test_link_killed() -> None:
    """A link over TCP whose connections are destroyed again and again, from either side, loses no
    byte, and no connection is reset.
    """
    kills = int(os.environ.get("LINK_KILLS", "4"))
    with two_hosts(library=LIBRARY, relay=RELAY, path="relay") as made:
        with streams(made, 3, 4) as running:
            number = itertools.count()

            def killed_often() -> bool:
                """Kill one more, and count. A link that is being made has no socket to kill."""
                turn = next(number)
                kill_socket(made[turn % 2], turn // 2)
                time.sleep(0.05 * (turn % 10))
                return min(map(downs, made)) >= kills

            until(killed_often, 30 + kills)
            for host in made:
                host.wait_linked()
            assert running.ends() == ["whole"] * 8
        assert [host.counts().broken for host in made] == [0, 0]
        nothing_left(made)


@pytest.mark.parametrize("dies", [0, 1])
def test_router_killed(hosts: Hosts, dies: int) -> None:
    """If a router is killed, its relay brings connections back to TCP without loss."""
    with streams(hosts) as made:
        hosts[dies].kill_router()
        until(lambda: went_back(hosts[1 - dies]), 3)
        hosts[dies].start_router()
        assert made.ends() == ["whole"] * 8
    moves_again(hosts)


@pytest.mark.parametrize(
    ("dies", "refused"),
    [pytest.param(0, False, marks=pytest.mark.long), (1, False), (1, True)],
)
def test_connections_return_after_a_restart(hosts: Hosts, dies: int, refused: bool) -> None:
    """After a router's restart connections that went back to TCP move again, without loss; also if
    their requests were refused while it was away.
    """
    with streams(hosts) as made:
        before = refusals(hosts[1 - dies])
        hosts[dies].kill_router()
        until(lambda: went_back(hosts[1 - dies]), 3)
        left = time.monotonic()
        if refused:
            until(lambda: refusals(hosts[1 - dies]) >= before + 4, REFUSED)
        hosts[dies].start_router()
        # They may leave again soon, by the rule for the relay.
        for host in hosts:
            least = 4 if host is hosts[dies] else 8
            until(partial(has_granted, host, least), RETURN + REFUSED)
        assert time.monotonic() - left > PAUSE - 1
        assert made.ends() == ["whole"] * 8
    nothing_left(hosts)


def full_ring(hosts: Hosts) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """A sender that waits for room in its ring, and its peer, which reads nothing until it gets a
    line of input.
    """
    a, b = hosts[0].containers["a"], hosts[1].containers["b"]
    command = [sys.executable, str(STALLED)]
    where = [str(b.ipv4), str(PORT)]
    options: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    server = b.popen([*command, "server", *where], **options)
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    client = a.popen([*command, "client", *where], **options)
    for host in hosts:
        until(partial(is_on_path, host, 1))
    tell(server)
    # Until the ring is full and the sender sleeps.
    time.sleep(2)
    return client, server


def test_router_killed_under_a_full_ring(hosts: Hosts) -> None:
    """A sender that waits for room in its ring goes on over TCP when its peer's router is
    killed.
    """
    client, server = full_ring(hosts)
    hosts[1].kill_router()
    until(lambda: went_back(hosts[0]), 3)
    # From now on no relay reports what the peer reads.
    time.sleep(1)
    tell(client)
    tell(server)
    counts = [program.communicate(timeout=patience(20))[0] for program in (client, server)]
    assert counts[0] == counts[1]


def test_host_stands_still() -> None:
    """If nothing comes from the other host any more while nothing is on the way to it, a sender
    that waits for room in its ring is reset after a while. So is its peer when it goes on.
    """
    with two_hosts(library=LIBRARY, relay=RELAY) as hosts:
        client, server = full_ring(hosts)
        assert hosts[1].process is not None
        processes = hosts[1].process.pid, hosts[1].relay_pid()
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        _, said = client.communicate(timeout=patience(75))
        assert "Connection reset by peer" in said
        for process in processes:
            os.kill(process, signal.SIGCONT)
        _, said = server.communicate("now\n", timeout=patience(30))
        assert "Connection reset by peer" in said
        assert hosts[0].counts().broken == 1
        moves_again(hosts)


@pytest.mark.parametrize("dies", [0, 1])
def test_relay_killed(staying: Hosts, dies: int) -> None:
    """If a relay is killed, its connections are reset at both ends. New connections move again."""
    with streams(staying, 20) as made:
        os.kill(staying[dies].relay_pid(), signal.SIGKILL)
        assert set(made.ends(30)) == {"reset"}
    moves_again(staying)


def test_relay_stopped(staying: Hosts) -> None:
    """If a relay is stopped, its connections are reset after a while. New connections move
    again.
    """
    with streams(staying, 60) as made:
        os.kill(staying[1].relay_pid(), signal.SIGSTOP)
        assert set(made.ends(60)) == {"reset"}
    moves_again(staying)


@pytest.mark.parametrize("path", ["rdma", "relay"])
def test_a_thousand(path: str) -> None:
    """A thousand connections share one link, and every answer is right."""
    with two_hosts(
        library=LIBRARY, relay=RELAY, settings=RouterSettings(remote_ring=65536), path=path
    ) as made:
        a, b = made[0].containers["a"], made[1].containers["b"]
        options: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "text": True,
        }
        server = b.popen([sys.executable, str(MANY), "server", str(b.ipv4), str(PORT)], **options)
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        asking = [sys.executable, str(MANY), "client", str(b.ipv4), str(PORT), "1000"]
        client = a.popen(asking, **options)
        until(lambda: on_path(made[0]) == on_path(made[1]) == 1000, 120)
        said, _ = client.communicate("now\n", timeout=patience(60))
        assert said == "whole 1000\n"
        assert server.wait(patience(30)) == 0
        nothing_left(made)


def test_limit() -> None:
    """One container gets seven eighths of the registered memory. Beyond that its connections stay
    on TCP, and none loses a byte.
    """
    allowed = RouterSettings(remote_ring=65536, remote_memory=40 * (2 * 65536 + 2 * 4096))
    with two_hosts(library=LIBRARY, relay=RELAY, settings=allowed) as made:
        running = Streams(made, 2, 60)
        until(lambda: on_path(made[0]) == 35)
        until(lambda: sum(connection.reason == "limit" for connection in listed(made[0])) == 25)
        assert running.ends() == ["whole"] * 120
        nothing_left(made)


def test_encrypted_network() -> None:
    """On an encrypted network sessions are wanted though nothing is accelerated, keys get through,
    and the relays encrypt everything, whatever the setting says: no byte of a stream is seen
    between the hosts. A link that was made before is not used for it.
    """
    settings = RouterSettings(relay_encryption="off")
    keys = [("A" * 43 + "=", "B" * 42 + "A="), ("C" * 42 + "A=", "D" * 42 + "A=")]
    with two_hosts(library=LIBRARY, relay=RELAY, path="relay", settings=settings) as hosts:
        assert hosts[0].peer().encryption == "off"
        with _captured(hosts[0]) as frames, streams(hosts, 1, 1) as made:
            assert made.ends() == ["whole"] * 2
        assert any(map(_has_numbers, frames))
        for host, pair in zip(hosts, keys, strict=True):
            host.router.replace_snapshot(_secret(host, pair))
        until(lambda: all(host.peer().encryption == "all" for host in hosts))
        for host, other, pair in zip(hosts, reversed(hosts), reversed(keys), strict=True):
            until(partial(_knows, host, other.address, pair))
        for host in hosts:
            host.wait_linked()
        with _captured(hosts[0]) as frames, streams(hosts, 1, 1) as made:
            assert made.ends() == ["whole"] * 2
        assert any(len(frame) > 1000 for frame in frames)
        assert not any(map(_has_numbers, frames))
        for host in hosts:
            host.router.replace_snapshot(_secret(host, (), acceleration=False))
            assert host.peer().session


def _has_numbers(frame: bytes) -> bool:
    """Whether a frame has the numbers that streams send: most of their bytes are 0."""
    return frame.count(bytes(4)) >= 16


def _secret(host: HostBed, keys: tuple[str, ...], **changes: Any) -> RouterSnapshot:
    facts = host.facts()
    networks = tuple(replace(one, encrypted=True, **changes) for one in facts.networks)
    told = None
    if keys:
        told = EncryptionKeys(keys=(keys[0], keys[1]), proofs=PROOFS, slot=1, port=4797)
    return replace(facts, networks=networks, encryption=told)


def _knows(host: HostBed, address: str, keys: tuple[str, ...]) -> bool:
    found = host.router.encryption()
    told = [(peer.address, peer.keys, peer.proofs, peer.slot) for peer in found.peers]
    return told == [(address, keys, PROOFS, 1)]


@contextlib.contextmanager
def _captured(host: HostBed) -> Iterator[list[bytes]]:
    """All frames on the hosts' cable meanwhile."""
    frames: list[bytes] = []

    def make() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.bind(("cable", 3))
        made.settimeout(0.1)
        return made

    stopped = threading.Event()

    def read(packets: socket.socket) -> None:
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                frames.append(packets.recv(1 << 16))

    with in_netns(host.namespace, make) as packets:
        reader = threading.Thread(target=read, args=(packets,), daemon=True)
        reader.start()
        yield frames
        stopped.set()
        reader.join()
