"""Slots of queue pairs: where a connection would fall back to TCP, they break, at both ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from dataplane.router import layout
from dataplane.router.relay_wire import CONNECTION, QUEUE_PAIR
from testbed.patience import patience
from testbed.relays import BROKEN, End, Relay, give_arena, give_bells, link, pair, place, relays

TAIL: Final = 0
BUSY: Final = 32
READY: Final = 72
SENDERS: Final = 192
"""Offsets in struct ring, of the library."""
DIRTY: Final = layout.DIRTY_OFFSET + 64 + 8 * layout.BELLS
"""Offset in struct arena: the slots that the relay has to check."""

pytestmark = pytest.mark.usefixtures("transport")


def connected(a: Relay, b: Relay, user: int) -> tuple[End, End]:
    """Two slots that are paired, of this user."""
    link(a, b)
    ends = give_arena(a), give_arena(b)
    for end in ends:
        give_bells(end)
        assert not (answer := place(end, user=user)).error, answer
    for one, two in (ends, ends[::-1]):
        assert not (answer := pair(one, two)).error, answer
    return ends


def is_broken(end: End) -> bool:
    """Whether both rings of a slot say so."""
    return all(end.word(direction, layout.BROKEN_OFFSET, 4) == 1 for direction in range(2))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon."""
    until = time.monotonic() + patience(10)
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def wake_relay(end: End) -> None:
    """Say, as the process of an end, that something has happened in its slot."""
    os.pwrite(end.memory, (1 << end.slot).to_bytes(8, "little"), DIRTY)
    assert end.rings_relay is not None
    end.rings_relay.send(b"!")


def leave(one: End) -> None:
    """The router wants it."""
    one.relay.number("LEAVE", one.number)


def stop(one: End) -> None:
    """The process that has the ring wants it."""
    one.write(1, layout.STOP_OFFSET, 1, 4)
    wake_relay(one)


@pytest.mark.parametrize("how", [leave, stop])
def test_leaving(binary: Path, how: Callable[[End], None]) -> None:
    """A queue pair that is to fall back is broken at both ends, and both routers hear of it."""
    with relays(binary) as (a, b):
        one, two = connected(a, b, QUEUE_PAIR)
        how(one)
        wait_until(lambda: is_broken(one) and is_broken(two))
        for end in (one, two):
            assert end.relay.expect("ENDED", number=end.number).state == BROKEN
            end.relay.number("DROP", end.number)
            end.relay.expect("DROPPED", number=end.number)


def test_relay_ends(binary: Path) -> None:
    """A relay that is told to end breaks queue pairs at both ends, and doesn't wait for them."""
    with relays(binary) as (a, b):
        one, two = connected(a, b, QUEUE_PAIR)
        a.process.send_signal(signal.SIGTERM)
        assert a.process.wait(patience(10)) == 0
        assert is_broken(one)
        wait_until(lambda: is_broken(two))


def test_ready_wakes(binary: Path) -> None:
    """A process that waits until the other side is ready is woken by that."""
    with relays(binary) as (a, b):
        one, two = connected(a, b, QUEUE_PAIR)
        one.waits[0].settimeout(patience(10))
        # It comes with the bell itself.
        assert one.waits[0].recv(1)
        one.write(0, SENDERS + 8, 1)
        one.write(0, SENDERS, 1, 4)
        two.write(1, READY, 1, 4)
        wake_relay(two)
        assert one.waits[0].recv(1)
        assert one.word(0, READY, 4) == 1


def expire(relay: Relay, user: int) -> None:
    """Ask which of a link's users have waited for the peer, at three of these in a row."""
    relay.number("EXPIRE", 1, 3 | user << 16)


@pytest.mark.parametrize("waits", [True, False], ids=["waits", "idle"])
def test_long_outage(binary: Path, waits: bool) -> None:
    """Without a link, a queue pair with open requests is broken at the last check, unless there is
    none at one in between. An idle one stays, whatever it has put into its ring.
    """
    with relays(binary) as (a, b):
        one, two = connected(a, b, QUEUE_PAIR)
        two.write(1, READY, 1, 4)
        wake_relay(two)
        wait_until(lambda: one.word(0, READY, 4) == 1)
        b.process.kill()
        b.process.wait()
        a.expect("DOWN", number=1)
        one.write(0, TAIL, 64)
        wake_relay(one)
        for busy in (1, 0, 1, 1):
            one.write(0, BUSY, busy and waits, 4)
            expire(a, QUEUE_PAIR)
            # By its answer it has looked.
            a.counts()
        for _ in range(4):
            expire(a, CONNECTION)
        a.counts()
        assert not is_broken(one)
        expire(a, QUEUE_PAIR)
        assert a.counts()["broken"] == waits
        assert is_broken(one) == waits


def test_long_outage_of_a_closed_one(binary: Path) -> None:
    """Without a link, a queue pair that nobody has any more ends, too."""
    with relays(binary) as (a, b):
        one, _ = connected(a, b, QUEUE_PAIR)
        b.process.kill()
        b.process.wait()
        a.expect("DOWN", number=1)
        a.number("CLOSE", one.number)
        for _ in range(3):
            expire(a, QUEUE_PAIR)
        assert a.expect("FINISHED", number=one.number).state == BROKEN


def test_connections_leave_in_order(binary: Path) -> None:
    """A connection, under the same conditions, is asked to stop, not broken."""
    with relays(binary) as (a, b):
        one, two = connected(a, b, CONNECTION)
        leave(one)
        wait_until(lambda: one.word(0, layout.STOP_OFFSET, 4) == 1)
        wait_until(lambda: two.word(0, layout.STOP_OFFSET, 4) == 1)
        assert not is_broken(one)
        assert not is_broken(two)
