"""The router's event loop: callbacks for descriptors, and timers."""

from __future__ import annotations

import select
import socket
from pathlib import Path

import pytest

from dataplane.router.clients import Clients
from dataplane.router.loop import BUGS_WITHIN, MOST_BUGS, Bugs, EpollLoop
from dataplane.router.router_server import RouterServer


class Clock:
    """Time that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_events() -> None:
    """The callback of a descriptor gets its events until it is forgotten."""
    epoll = select.epoll()
    loop = EpollLoop(epoll)
    one, other = socket.socketpair()
    seen: list[int] = []
    loop.watch(one.fileno(), select.EPOLLIN, seen.append)
    other.send(b"x")
    for descriptor, events in epoll.poll(1):
        assert loop.serve(descriptor, events)
    assert seen == [select.EPOLLIN]
    loop.modify(one.fileno(), select.EPOLLOUT)
    assert epoll.poll(1) == [(one.fileno(), select.EPOLLOUT)]
    loop.forget(one.fileno())
    loop.forget(one.fileno())
    assert epoll.poll(0) == []
    assert not loop.serve(one.fileno(), select.EPOLLIN)
    epoll.close()


def test_times() -> None:
    """Timers that are due run in order and once, unless they were cancelled; a wait ends when the
    next one is due.
    """
    clock = Clock()
    epoll = select.epoll()
    loop = EpollLoop(epoll, clock)
    done: list[str] = []
    late = loop.after(2, lambda: done.append("late"))
    loop.after(1, lambda: done.append("soon"))
    never = loop.after(0.5, lambda: done.append("never"))
    never.cancel()
    assert loop.timeout(60) == 1
    assert loop.timeout(0.1) == 0.1
    loop.fire()
    assert done == []
    clock.now += 1
    assert loop.timeout(60) == 0
    loop.fire()
    assert done == ["soon"]
    assert late.pending
    clock.now += 5
    loop.fire()
    loop.fire()
    assert done == ["soon", "late"]
    assert not late.pending
    assert loop.timeout(60) == 60
    epoll.close()


def test_a_round_ends() -> None:
    """A timer that schedules itself again at once doesn't keep the loop from its descriptors."""
    epoll = select.epoll()
    loop = EpollLoop(epoll)
    done: list[int] = []

    def again() -> None:
        done.append(1)
        loop.after(0, again)

    again()
    loop.fire()
    loop.fire()
    assert len(done) == 3
    epoll.close()


def test_cancelled_by_another() -> None:
    """A timer that an earlier callback of the round cancels does not run."""
    epoll = select.epoll()
    loop = EpollLoop(epoll)
    done: list[str] = []
    loop.after(0, lambda: second.cancel())
    second = loop.after(0, lambda: done.append("second"))
    loop.fire()
    assert done == []
    epoll.close()


def fail() -> None:
    raise KeyError("a bug")


def test_a_bug_costs_one_callback(capsys: pytest.CaptureFixture[str]) -> None:
    """A callback or timer that ends by an exception doesn't keep others from running; the bug is
    logged with its traceback, and counted.
    """
    clock, epoll = Clock(), select.epoll()
    bugs = Bugs(clock)
    loop = EpollLoop(epoll, clock, bugs.guard)
    one, other = socket.socketpair()
    done: list[str] = []
    loop.watch(one.fileno(), select.EPOLLIN, lambda _: fail())
    other.send(b"x")
    for descriptor, events in epoll.poll(1):
        assert loop.serve(descriptor, events)
    loop.after(0, fail)
    loop.after(0, lambda: done.append("after it"))
    loop.fire()
    assert done == ["after it"]
    assert bugs.count == 2
    said = capsys.readouterr().out
    assert said.count("a bug in the router") == 2
    assert "in fail" in said
    epoll.close()


def test_bugs_that_do_not_stop_end_the_router() -> None:
    """A callback that fails again and again is not called for ever; old bugs don't count."""
    clock, epoll = Clock(), select.epoll()
    loop = EpollLoop(epoll, clock, Bugs(clock).guard)
    for _ in range(2):
        clock.now += BUGS_WITHIN
        for _ in range(MOST_BUGS):
            loop.after(0, fail)
        loop.fire()
    loop.after(0, fail)
    with pytest.raises(KeyError):
        loop.fire()
    epoll.close()


def test_a_bug_while_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug while a client's connection is closed doesn't end the router."""
    server = RouterServer(tmp_path / "router.sock", tmp_path / "control.sock")
    bugs = iter([KeyError("a bug")])

    def close(_: Clients) -> None:
        for bug in bugs:
            raise bug

    monkeypatch.setattr(Clients, "close_scheduled", close)
    server.loop.after(0.05, server.stop)
    server.run()
    assert server.statistics().bugs == 1
