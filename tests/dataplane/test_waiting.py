"""A wait for a connection on a ring behaves as on TCP, by every call, with signals and
cancellation.
"""

from __future__ import annotations

import pytest

from tests.dataplane.places import Places


def test_epoll_level(both: Places) -> None:
    """Level-triggered epoll reports until all is read."""
    both.play("waiting", "epoll_level")


def test_epoll_edge(both: Places) -> None:
    """Edge-triggered epoll reports each arrival once, and does not report what was left unread."""
    both.play("waiting", "epoll_edge")


def test_epoll_edge_both(both: Places) -> None:
    """Edge-triggered epoll for both directions reports both when bytes arrive."""
    both.play("waiting", "epoll_edge_both")


def test_epoll_once(both: Places) -> None:
    """EPOLLONESHOT reports once, and again when it is armed again."""
    both.play("waiting", "epoll_once")


def test_epoll_changed(both: Places) -> None:
    """A thread's change of a registration wakes another that waits; a removed one reports
    nothing.
    """
    both.play("waiting", "epoll_changed")


def test_epoll_twice(both: Places) -> None:
    """A connection in two epoll instances is reported by both; twice in one is EEXIST."""
    both.play("waiting", "epoll_twice")


def test_epoll_duplicate(both: Places) -> None:
    """A registration holds until the connection's last descriptor is closed."""
    both.play("waiting", "epoll_duplicate")


def test_epoll_nested(both: Places) -> None:
    """An epoll instance in another, in poll and in select is ready when its connection is."""
    both.play("waiting", "epoll_nested")


def test_epoll_timed(both: Places) -> None:
    """epoll_pwait and epoll_pwait2 keep their time-outs and wait without any."""
    both.play("waiting", "epoll_timed")


def test_epoll_before(both: Places) -> None:
    """A registration made before connect is valid after the connection has moved to a ring."""
    both.play("waiting", "epoll_before")


def test_epoll_calls(both: Places) -> None:
    """A program that waits for several connections makes one system call for each sleep."""
    both.play("waiting", "epoll_calls")
    both.upgraded(2)


def test_select_large(both: Places) -> None:
    """select() takes sets of more descriptors than FD_SETSIZE."""
    both.play("waiting", "select_large")


def test_poll_and_select(both: Places) -> None:
    """poll, ppoll, select and pselect wait, see bytes and keep their time-outs."""
    both.play("waiting", "poll_and_select")


def test_poll_among_others(both: Places) -> None:
    """poll counts pipes, negative and invalid descriptors beside a connection."""
    both.play("waiting", "poll_among_others")


def test_high_descriptor(both: Places) -> None:
    """Descriptors above 1024 and above 65536 work like others."""
    both.play("waiting", "high_descriptor")


def test_back_pressure(both: Places) -> None:
    """A write to a full connection fails with EAGAIN; the connection is writable again when the
    peer has read.
    """
    both.play("waiting", "back_pressure")


def test_timeout_later(both: Places) -> None:
    """A wait in epoll that began before its connection was upgraded still ends at its time-out."""
    both.play("waiting", "timeout_later")


def test_receive_timeout(both: Places) -> None:
    """SO_RCVTIMEO ends a read that waits."""
    both.play("waiting", "receive_timeout")


def test_send_timeout(both: Places) -> None:
    """SO_SNDTIMEO ends a write that waits."""
    both.play("waiting", "send_timeout")


def test_interrupted(both: Places) -> None:
    """A signal ends reads without SA_RESTART, and poll, select and epoll_wait always."""
    both.play("waiting", "interrupted")


def test_restarted(both: Places) -> None:
    """With SA_RESTART a read continues after the signal."""
    both.play("waiting", "restarted")


def test_masked(both: Places) -> None:
    """ppoll delivers the signals that its mask permits."""
    both.play("waiting", "masked")


def test_jumped(both: Places) -> None:
    """A connection works after a handler has jumped out of a read or a poll."""
    both.play("waiting", "jumped")


def test_cancelled(both: Places) -> None:
    """A thread can be cancelled in read and poll, and the connection works for others."""
    both.play("waiting", "cancelled")


def test_handler_writes(both: Places) -> None:
    """A handler may write to the connection on which its thread is writing."""
    both.play("waiting", "handler_writes")


def test_many_wait(both: Places) -> None:
    """One byte wakes all waiting threads, whichever call each of them uses."""
    both.play("waiting", "many_wait")


def test_idle(both: Places) -> None:
    """Waiting takes no CPU time."""
    both.play("waiting", "idle")


@pytest.mark.parametrize("scenario", ["poll_and_select", "poll_among_others"])
def test_fortified(both: Places, scenario: str) -> None:
    """Programs built with the C library's checked calls (_FORTIFY_SOURCE) wait the same."""
    both.play("waiting-fortified", scenario)


def test_wait_for_ages(both: Places) -> None:
    """The longest time-out that a type can express does not end the wait."""
    both.play("waiting", "wait_for_ages")


def test_small_stack(both: Places) -> None:
    """A thread with the smallest stack may wait by select, poll and epoll."""
    both.play("waiting", "small_stack")


def test_thread_memory(both: Places) -> None:
    """A thread that has waited for many descriptors frees its memory when it ends."""
    both.play("waiting", "thread_memory")
