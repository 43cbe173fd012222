"""Several threads in one epoll instance, or on one connection: nobody sleeps over what another has done."""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_full_by_another(both: Places) -> None:
    """Who sleeps in epoll hears of room after another thread has taken all that there was."""
    both.play("threads", "full_by_another")


def test_moves_while_looked_at(both: Places) -> None:
    """A connection that moves to a ring while it is looked at is still reported, in all instances."""
    both.play("threads", "moves_while_looked_at")


def test_woken_by_another(both: Places) -> None:
    """A thread that looks without waiting doesn't take another's wake-up."""
    both.play("threads", "woken_by_another")


def test_once_before_it_moves(both: Places) -> None:
    """A one-shot event that was told on TCP isn't told again on the ring."""
    both.play("threads", "once_before_it_moves")


@pytest.mark.parametrize("scenario", ["moves_under_poll", "moves_under_instance"])
def test_moves_under_waiters(both: Places, scenario: str) -> None:
    """Who already waits by poll, select or an instance around it hears of a connection that moves meanwhile."""
    both.play("threads", scenario)


def test_nested_once(both: Places) -> None:
    """An instance in another is reported once if it was registered so."""
    both.play("threads", "nested_once")


def test_unknown_instance(both: Places) -> None:
    """A connection in an epoll instance that was made past the library stays on TCP."""
    both.play("threads", "unknown_instance")
