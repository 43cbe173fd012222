"""Connections on rings end as those on TCP do: the kernel provides FIN, RST and death."""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_half_close(both: Places) -> None:
    """After shutdown of its writes the client still gets all that the server sends."""
    both.play("ends", "half_close")


def test_half_close_by_the_server(both: Places) -> None:
    """The end follows all data of its direction, and of that direction alone."""
    both.play("ends", "half_close_other")


def test_data_before_the_end(both: Places) -> None:
    """Everything that was written before close is read, then the end, as often as the program
    reads.
    """
    both.play("ends", "data_then_end")


def test_broken_pipe(both: Places) -> None:
    """Writes after the peer's close are EPIPE with SIGPIPE, without the signal with
    MSG_NOSIGNAL.
    """
    both.play("ends", "broken_pipe")


def test_own_shutdown(both: Places) -> None:
    """Writes after a shutdown of the own writes are EPIPE with SIGPIPE, and reads continue."""
    both.play("ends", "own_shutdown")


def test_shut_read(both: Places) -> None:
    """After shutdown of its reads a socket reads the end, and still writes."""
    both.play("ends", "shut_read")


def test_killed_holder(both: Places) -> None:
    """Bytes that a forked process wrote before SIGKILL arrive, then the end, then EPIPE."""
    both.play("ends", "killed")


def test_killed(both: Places) -> None:
    """Bytes that a process wrote before SIGKILL arrive, then the end, then EPIPE, even if it waits
    in read.
    """
    both.play("ends", "killed_whole")


@pytest.mark.parametrize("means", ["poll", "select", "epoll", "edge", "nested"])
def test_killed_reader(both: Places, means: str) -> None:
    """A writer that waits for room is woken when the only reader is killed."""
    both.play("ends", f"{means}_without_reader")


def test_reset_by_linger(both: Places) -> None:
    """Close with SO_LINGER of 0 resets: ECONNRESET once, then the end."""
    both.play("ends", "reset_by_linger")


def test_reset_by_unread(both: Places) -> None:
    """Close with unread data resets: ECONNRESET once, then the end."""
    both.play("ends", "reset_by_unread")


def test_reset_by_exit(both: Places) -> None:
    """A program that ends with unread data resets too."""
    both.play("ends", "reset_by_exit")


def test_events_of_the_end(both: Places) -> None:
    """poll and epoll distinguish the peer's close from the end of both directions."""
    both.play("ends", "events_of_the_end")


def test_lingering_close(both: Places) -> None:
    """Close with SO_LINGER and many unsent bytes delivers all of them."""
    both.play("ends", "lingering_close")


def test_shutdown_wakes(both: Places) -> None:
    """A shutdown by one thread ends the read of another."""
    both.play("ends", "shutdown_wakes")
