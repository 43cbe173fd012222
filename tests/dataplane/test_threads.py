"""Several threads in one epoll instance, or on one connection: no thread misses a wake-up because
of another.
"""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_full_by_another(both: Places) -> None:
    """A thread that sleeps in epoll is told of room after another thread has used up all that there
    was.
    """
    both.play("threads", "full_by_another")


def test_moves_while_polled(both: Places) -> None:
    """A connection that moves to a ring while threads poll it is still reported, in all
    instances.
    """
    both.play("threads", "moves_while_polled")


def test_woken_by_another(both: Places) -> None:
    """A thread that polls without waiting doesn't consume another thread's wake-up."""
    both.play("threads", "woken_by_another")


def test_once_before_it_moves(both: Places) -> None:
    """A one-shot event that was reported on TCP isn't reported again on the ring."""
    both.play("threads", "once_before_it_moves")


@pytest.mark.parametrize("scenario", ["moves_under_poll", "moves_under_instance"])
def test_moves_under_waiters(both: Places, scenario: str) -> None:
    """A thread that waits in poll, select or an outer instance is told of a connection that moves
    meanwhile.
    """
    both.play("threads", scenario)


def test_nested_once(both: Places) -> None:
    """An instance in another, registered with EPOLLONESHOT, is reported once."""
    both.play("threads", "nested_once")


def test_unknown_instance(both: Places) -> None:
    """A connection in an epoll instance that the library did not see made stays on TCP."""
    both.play("threads", "unknown_instance")
