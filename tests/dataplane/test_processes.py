"""Processes, replaced programs and descriptors share connections on rings as those on TCP."""

from __future__ import annotations

from tests.dataplane.places import Places


def test_fork_in_turn(both: Places) -> None:
    """Parent and child use a connection in turn, and the child's end does not end the
    connection.
    """
    both.play("processes", "fork_in_turn")


def test_fork_at_once(both: Places) -> None:
    """The parent writes while the child reads."""
    both.play("processes", "fork_at_once")


def test_orphan(both: Places) -> None:
    """A child continues a connection after its parent, which opened it, has ended."""
    both.play("processes", "orphan")


def test_share_epoll(both: Places) -> None:
    """Parent and child that wait in one epoll instance answer whatever comes, whichever of them the
    kernel wakes.
    """
    both.play("processes", "share_epoll")


def test_fork_per_connection(both: Places) -> None:
    """A server that forks for each connection serves them all."""
    both.play("processes", "fork_per_connection")


def test_exec(both: Places) -> None:
    """A program that replaces another one gets the connection as standard input and output."""
    both.play("processes", "exec")


def test_exec_late(both: Places) -> None:
    """The new program reads bytes that arrived before exec."""
    both.play("processes", "exec_late")


def test_exec_static(both: Places) -> None:
    """A static program without the library gets the connection and all its bytes."""
    both.play("processes", "exec_static", STATIC_CAT=str(both.programs / "static-cat"))


def test_fork_exec(both: Places) -> None:
    """A child becomes another program with the connection."""
    both.play("processes", "fork_exec")


def test_vfork_exec(both: Places) -> None:
    """A child of vfork becomes another program with the connection."""
    both.play("processes", "vfork_exec")


def test_spawn(both: Places) -> None:
    """posix_spawn hands a connection over."""
    both.play("processes", "spawn")


def test_system_beside(both: Places) -> None:
    """Programs get a connection only if it is not close-on-exec, and it continues beside them."""
    both.play("processes", "system_beside")


def test_pass_away(both: Places) -> None:
    """A connection passed over a unix socket works for the receiver, also when it is passed
    back.
    """
    both.play("processes", "pass_away")


def test_pass_and_keep(both: Places) -> None:
    """A connection passed over a unix socket works for both holders."""
    both.play("processes", "pass_and_keep")


def test_duplicates(both: Places) -> None:
    """dup, dup2, dup3 and F_DUPFD give descriptors of the same connection, with their flags."""
    both.play("processes", "duplicates")


def test_number_again(both: Places) -> None:
    """A closed connection's number belongs to the next file that gets it."""
    both.play("processes", "number_again")


def test_written_over(both: Places) -> None:
    """dup2 onto a connection's number closes that descriptor alone."""
    both.play("processes", "written_over")


def test_lowest_number(both: Places) -> None:
    """A connection uses one number, the lowest free one, and releases it."""
    both.play("processes", "lowest_number")


def test_close_unknown(both: Places) -> None:
    """Programs that close all unknown descriptors keep the connections that they know."""
    both.play("processes", "close_unknown")


def test_range_at_exec(both: Places) -> None:
    """close_range with CLOSE_RANGE_CLOEXEC leaves connections open until exec."""
    both.play("processes", "range_at_exec")
