"""Connections begin, name themselves, take options and come in thousands as those on TCP do."""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_connect_later(both: Places) -> None:
    """A connect that doesn't wait says EINPROGRESS, then is writable with SO_ERROR 0."""
    both.play("connections", "connect_later")


def test_refused(both: Places) -> None:
    """A refused connect is ECONNREFUSED at once or by SO_ERROR, and disturbs no other
    connection.
    """
    both.play("connections", "refused")


def test_names(both: Places) -> None:
    """getsockname, getpeername and accept name the same addresses at both ends."""
    both.play("connections", "names")


def test_options(both: Places) -> None:
    """Options are the live socket's: SO_ERROR, TCP_INFO, TCP_NODELAY, TCP_CORK."""
    both.play("connections", "options")


def test_options_apart(both: Places) -> None:
    """Options that rings can't carry hold, and no byte is lost."""
    both.play("connections", "options_apart")


def test_wrong_calls(both: Places) -> None:
    """Calls that a connection refuses are refused with the same error."""
    both.play("connections", "wrong_calls")


def test_several_listeners(both: Places) -> None:
    """Listeners that share a port (SO_REUSEPORT) keep their connections apart."""
    both.play("connections", "several_listeners")


def test_ports_again(both: Places) -> None:
    """A connection with the same ports as one just closed gets nothing of that one."""
    both.play("connections", "ports_again")


@pytest.mark.parametrize("everywhere", ["accelerated"], indirect=True)
def test_in_order(both: Places) -> None:
    """What a client says on several connections is heard in that order by who waits for all of them
    in epoll.

    The kernel itself doesn't always keep it: what comes while it collects events is put before the
    rest.
    """
    both.play("connections", "in_order")


def test_closed_before(both: Places) -> None:
    """What a client says after it has closed another connection is heard after that."""
    both.play("connections", "closed_before")


def test_itself(both: Places) -> None:
    """A process connected to itself, in one thread, stalls nowhere."""
    both.play("connections", "itself")


def test_thousands(both: Places) -> None:
    """Three thousand connections of two processes each carry their own bytes."""
    both.play("connections", "thousands")


def test_churn(both: Places) -> None:
    """Short connections in several threads are never mixed up."""
    both.play("connections", "churn")


def test_not_held_up(both: Places) -> None:
    """Threads that wait in accept, and a listen that repeats, hold up no other call."""
    both.play("connections", "not_held_up")
