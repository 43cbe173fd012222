"""Calls that move bytes do on a ring what they do on TCP."""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_peek(both: Places) -> None:
    """MSG_PEEK returns what the next read returns, and takes nothing."""
    both.play("bytes", "peek")


def test_wait_all(both: Places) -> None:
    """MSG_WAITALL waits for all bytes, or for the end."""
    both.play("bytes", "wait_all")


def test_dont_wait(both: Places) -> None:
    """MSG_DONTWAIT never waits, on a socket that does."""
    both.play("bytes", "dont_wait")


def test_truncate(both: Places) -> None:
    """MSG_TRUNC discards the bytes that it counts."""
    both.play("bytes", "truncate")


def test_urgent(both: Places) -> None:
    """Urgent data arrives as such, and the bytes around it in order."""
    both.play("bytes", "urgent")


def test_vectors(both: Places) -> None:
    """Vectors and several messages at once: readv, writev, sendmsg, recvmsg, sendmmsg, recvmmsg."""
    both.play("bytes", "vectors")


def test_count_unread(both: Places) -> None:
    """FIONREAD counts readable bytes, and TIOCOUTQ counts sent ones down."""
    both.play("bytes", "count_unread")


def test_sendfile(both: Places) -> None:
    """sendfile sends a file's bytes and moves the given offset, or the file's."""
    both.play("bytes", "sendfile")


def test_splice_out(both: Places) -> None:
    """Bytes spliced from a pipe arrive complete."""
    both.play("bytes", "splice_out")


def test_splice_in(both: Places) -> None:
    """splice into a pipe gets what was sent, and does not wait if it must not."""
    both.play("bytes", "splice_in")


def test_nothing(both: Places) -> None:
    """Reads and writes of no bytes return at once and are no end of the stream."""
    both.play("bytes", "nothing")


def test_stdio(both: Places) -> None:
    """The C library's streams work on a connection that earlier calls have used."""
    both.play("bytes", "stdio")


def test_both_ways(both: Places) -> None:
    """Megabytes pass in both directions at once, unchanged."""
    both.play("bytes", "both_ways")


@pytest.mark.parametrize(
    "scenario", ["peek", "wait_all", "dont_wait", "vectors", "nothing", "both_ways"]
)
def test_fortified(both: Places, scenario: str) -> None:
    """Programs built with the C library's checked calls (_FORTIFY_SOURCE) behave the same."""
    both.play("bytes-fortified", scenario)
