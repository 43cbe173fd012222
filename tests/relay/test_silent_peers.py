"""What waits for a peer's host that says nothing any more, and how a relay finds that out."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Final

import pytest

from dataplane.router.relay_wire import CONNECTION
from testbed.relays import RING, Relay, link, relays
from tests.relay.test_faults import cut
from tests.relay.test_queue_pair_slots import (
    READY,
    TAIL,
    connected,
    expire,
    is_broken,
    wait_until,
    wake_relay,
)

HEAD: Final = 64
RECEIVED: Final = 280
"""Offsets in struct ring, of the library."""


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("taken", [RING // 4, RING], ids=["waits", "idle"])
def test_all_has_arrived(binary: Path, taken: int) -> None:
    """Without a link, a connection is reset if the peer's process has not taken all that was sent,
    though all has arrived: a process that waits for room would wait for ever.
    """
    with relays(binary) as (a, b):
        one, two = connected(a, b, CONNECTION)
        two.write(1, READY, 1, 4)
        wake_relay(two)
        wait_until(lambda: one.word(0, READY, 4) == 1)
        one.write(0, TAIL, RING)
        wake_relay(one)
        wait_until(lambda: two.word(1, TAIL) == RING)
        two.write(1, HEAD, taken)
        wake_relay(two)
        wait_until(lambda: (one.word(0, HEAD), one.word(0, RECEIVED)) == (taken, RING))
        cut(a, b)
        for count in range(3):
            assert not is_broken(one), count
            expire(a, CONNECTION)
            # By its answer it has looked.
            a.counts()
        assert a.counts()["broken"] == is_broken(one) == (taken != RING)
        assert not is_broken(two)


def messages(relay: Relay) -> tuple[int, int]:
    """How many messages went to the other relay, and came from it."""
    counts = relay.counts()
    return counts["messages_out"], counts["messages_in"]


@pytest.mark.usefixtures("transport")
def test_a_peer_that_is_asked(binary: Path) -> None:
    """A check of a link that is up makes the peer's relay say something, once."""
    with relays(binary) as (a, b):
        link(a, b)
        for count in range(1, 4):
            assert messages(a) == messages(b) == (count - 1, count - 1)
            expire(a, CONNECTION)
            wait_until(lambda count=count: messages(a) == messages(b) == (count, count))  # type: ignore[misc]
        assert a.silent("DOWN")


def test_a_peer_that_does_not_answer(binary: Path) -> None:
    """A link is down when the peer's relay has said nothing for ten seconds after it was asked,
    though no transport reports anything.
    """
    with relays(binary) as (a, b):
        link(a, b)
        b.process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            expire(a, CONNECTION)
        assert a.expect("DOWN", number=1).text == "the peer's relay does not answer"
        b.kill()
