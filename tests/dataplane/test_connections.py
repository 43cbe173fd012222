"""Connections start, have addresses and options, and exist in thousands as on TCP."""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_connect_later(both: Places) -> None:
    """A non-blocking connect returns EINPROGRESS, and is then writable with SO_ERROR 0."""
    both.play("connections", "connect_later")


def test_refused(both: Places) -> None:
    """A refused connect is ECONNREFUSED, at once or by SO_ERROR, and affects no other
    connection.
    """
    both.play("connections", "refused")


def test_names(both: Places) -> None:
    """getsockname, getpeername and accept name the same addresses at both ends."""
    both.play("connections", "names")


def test_options(both: Places) -> None:
    """Options act on the live socket: SO_ERROR, TCP_INFO, TCP_NODELAY, TCP_CORK."""
    both.play("connections", "options")


@pytest.mark.parametrize("scenario", ["kept", "kept_there", "shared"])
def test_cork(both: Places, scenario: str) -> None:
    """TCP_CORK and TCP_NODELAY read as they were set, by whichever process. On a ring the kernel
    does not get them, and after it the kernel has them before it gets a byte.
    """
    both.play("cork", scenario)
    both.upgraded()


def test_more_follows(both: Places) -> None:
    """If a connection moves behind bytes that were sent with MSG_MORE, the kernel does not hold
    them back for 200 ms.
    """
    both.play("cork", "begins")
    both.upgraded(10)


def test_options_apart(both: Places) -> None:
    """Options that rings cannot carry take effect, and no byte is lost."""
    both.play("connections", "options_apart")


def test_wrong_calls(both: Places) -> None:
    """Calls that a connection refuses fail with the same error."""
    both.play("connections", "wrong_calls")


def test_several_listeners(both: Places) -> None:
    """Listeners that share a port (SO_REUSEPORT) keep their connections apart."""
    both.play("connections", "several_listeners")


def test_ports_again(both: Places) -> None:
    """A connection with the ports of one that was just closed gets none of its bytes."""
    both.play("connections", "ports_again")


@pytest.mark.parametrize("everywhere", ["accelerated"], indirect=True)
def test_in_order(both: Places) -> None:
    """epoll reports messages on several connections in the order in which a client sent them.

    The kernel itself does not always do so: it reports an event that arrives while it collects
    events before the others.
    """
    both.play("connections", "in_order")


def test_closed_before(both: Places) -> None:
    """A message that a client sends after it has closed another connection is reported after
    that.
    """
    both.play("connections", "closed_before")


def test_itself(both: Places) -> None:
    """A process with a connection to itself, in one thread, never blocks."""
    both.play("connections", "itself")


def test_thousands(both: Places) -> None:
    """Three thousand connections of two processes carry their own bytes each."""
    both.play("connections", "thousands")


def test_churn(both: Places) -> None:
    """Short connections in several threads never get each other's bytes."""
    both.play("connections", "churn")


def test_not_held_up(both: Places) -> None:
    """Threads that wait in accept, and a repeated listen, delay no other call."""
    both.play("connections", "not_held_up")
