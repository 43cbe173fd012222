"""What each arena and each link uses of the relay: R_USAGE."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from dataplane.router.relay_wire import USES
from testbed.patience import patience
from testbed.relays import TCP, End, Relay, connect, drop, link, more, pair, relays, result

pytestmark = pytest.mark.usefixtures("transport")


Values = dict[tuple[int, int], dict[str, int]]
"""By arena and link."""


def at_once(relay: Relay) -> tuple[Values, dict[str, int]]:
    """The values for what was in use since the last time, and the relay's counters of the same
    moment: the relay answers both to one request.
    """
    counts = relay.counts()
    # The values come before the next answer.
    relay.counts()
    found = {}
    while any(message.kind == "USAGE" for message in relay.received):
        message = relay.expect("USAGE")
        found[message.state, message.number] = dict(zip(USES, message.values, strict=True))
    return found, counts


def uses(relay: Relay) -> Values:
    """The values alone."""
    return at_once(relay)[0]


def cpu(relay: Relay) -> int:
    """Nanoseconds of the relay's only thread."""
    return int(time.clock_gettime_ns(~relay.process.pid << 3 | 2))


def send(binary: Path, one: End, two: End, size: int) -> None:
    """Send so many bytes from one end to the other."""
    first = one.popen(binary, f"send={size}", "message=1000")
    second = two.popen(binary, f"receive={size}", "seed=2", "peer_seed=1")
    assert result(second)["received"] == size
    result(first)


def test_arena_and_link_have_their_counters(binary: Path, end: Path) -> None:
    """The counters of an arena and of its link are those of the relay, if it has no others."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        send(end, one, two, 500_000)
        for relay, of, count in (a, one, "bytes_out"), (b, two, "bytes_in"):
            found, counts = at_once(relay)
            arena, over = found[of.arena, 0], found[0, 1]
            assert arena[count] == over[count] == counts[count] == 500_000
            assert over["messages_out"] == counts["messages_out"] > 0
            assert over["messages_in"] == counts["messages_in"] > 0
            assert arena["messages_out"] == over["bells_out"] == 0
            assert arena["bells_out"] == counts["bells"]
            assert arena["slots_out"] >= arena["bells_out"]


def test_the_processor_is_divided_by_work(binary: Path, end: Path) -> None:
    """The shares of all arenas together are the processor time of the relay, and one that does
    several times the work of another has several times its share.
    """
    with relays(binary) as (a, b):
        link(a, b)
        busy, quiet = connect(a, b), connect(a, b)
        first, before = uses(a), cpu(a)
        send(end, *quiet, 200_000)
        send(end, *busy, 4_000_000)
        last, spent = uses(a), cpu(a) - before

        def share(arena: int, number: int) -> int:
            return last[arena, number]["cpu"] - first.get((arena, number), {}).get("cpu", 0)

        much, little = share(busy[0].arena, 0), share(quiet[0].arena, 0)
        assert 0.5 * spent < much + little < 1.5 * spent + 1_000_000
        assert much > 3 * little > 0
        assert abs(share(0, 1) - much - little) < 1000


def undisturbed(*processes: subprocess.Popen[Any]) -> None:
    """Let other programs of the machine take no processor from these (sched(7)), if we may."""
    with suppress(PermissionError):
        for process in processes:
            os.sched_setscheduler(process.pid, os.SCHED_FIFO, os.sched_param(1))


def test_waiting_counts_for_nobody(binary: Path, end: Path, transport: int) -> None:
    """What a relay without RDMA spends on waiting for more before it sleeps is no container's. With
    RDMA, where it spins for its processes, it is.
    """
    with relays(binary, spin=1000) as (a, b):
        link(a, b)
        trips = ("rounds=300", "message=100", "check=0")
        until = time.monotonic() + patience(20)
        # A relay whose core is busy with something else does not wait.
        undisturbed(a.process, b.process)
        while True:
            one, two = connect(a, b)
            first, before = uses(a), cpu(a)
            client, server = one.popen(end, *trips), two.popen(end, *trips, "server=1")
            undisturbed(client, server)
            assert client.wait(patience(30)) == server.wait(patience(30)) == 0
            last, spent = uses(a), cpu(a) - before
            share = last[one.arena, 0]["cpu"] - first.get((one.arena, 0), {}).get("cpu", 0)
            assert share <= 1.1 * spent
            if transport != TCP:
                assert share >= 0.9 * spent
                return
            if share < 0.8 * spent:
                return
            assert time.monotonic() < until


def test_what_is_idle_is_not_reported(binary: Path, end: Path) -> None:
    """Arenas without work cost no message, and those that are gone none either."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        send(end, one, two, 1000)
        assert (one.arena, 0) in uses(a)
        drop(one)
        drop(two)
        uses(a)
        assert uses(a) == {}


def test_slots_of_one_arena_share_its_counters(binary: Path, end: Path) -> None:
    """Connections of one arena are counted together."""
    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        third, fourth = more(one, 1), more(two, 1)
        for near, far in (third, fourth), (fourth, third):
            assert not pair(near, far).error
        uses(a)
        send(end, one, two, 10_000)
        first = third.popen(end, "send=20000", "first=2")
        second = fourth.popen(end, "receive=20000", "seed=2", "peer_seed=1", "first=2")
        assert result(second)["received"] == 20_000
        result(first)
        assert uses(a)[one.arena, 0]["bytes_out"] == 30_000
