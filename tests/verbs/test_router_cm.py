"""Connections of rdma_cm between real processes and a real router: kills, restarts, and processes
that don't read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from msgspec.structs import replace

from dataplane.router.reasons import Reason
from dataplane.router.verbs_connections import Reject, plain
from dataplane.router.verbs_wire import (
    Step,
    VerbsConnection,
    VerbsKind,
    VerbsListen,
    VerbsRefuse,
)
from testbed.patience import patience
from tests.verbs.router import TestRouter, router
from tests.verbs.test_router_verbs import VerbsLibrary

GID = IPv4Address("10.0.4.1")
TCP, PORT = 0x0106, 7471


@pytest.fixture
def served(tmp_path: Path) -> Iterator[TestRouter]:
    with router(tmp_path) as made:
        yield made


def listen(process: VerbsLibrary, number: int, port: int = PORT) -> int:
    """Have an id listen; its port."""
    process.library.say(VerbsListen(VerbsKind.LISTEN, number, TCP, port, 1024, False, None))
    answer, _ = process.library.hear(VerbsListen)
    return answer.port


def ask(process: VerbsLibrary, number: int, port: int = PORT) -> None:
    """Request a connection."""
    message = replace(plain(Step.REQUEST), id=number, space=TCP, port=port, peer_gid=GID)
    process.library.say(message)


def say(process: VerbsLibrary, step: Step, number: int, connection: int) -> None:
    """Any other step."""
    message = replace(plain(step), id=number, connection=connection, peer_gid=GID)
    process.library.say(message)


def hear(process: VerbsLibrary) -> VerbsConnection:
    message, _ = process.library.hear(VerbsConnection)
    return message


def connect(one: VerbsLibrary, other: VerbsLibrary) -> int:
    """Connect id 1 of a process to id 101 of one that listens; the connection's number."""
    ask(one, 1)
    number = hear(other).connection
    say(other, Step.REPLY, 101, number)
    assert hear(one).step is Step.REPLY
    say(one, Step.READY, 1, number)
    assert hear(other).step is Step.READY
    return number


def test_a_connection(served: TestRouter) -> None:
    """Two processes connect; when one is gone, the other one is disconnected, and its port is
    another's.
    """
    one, other = VerbsLibrary(served.socket), VerbsLibrary(served.socket)
    listen(other, 100)
    one.library.say(VerbsListen(VerbsKind.LISTEN, 7, TCP, PORT, 1, False, None))
    assert one.library.hear(VerbsRefuse)[0].reason == Reason.SHARED
    number = connect(one, other)
    other.library.close()
    left = hear(one)
    assert (left.step, left.id, left.connection) == (Step.DISCONNECT, 1, number)
    assert listen(one, 7) == PORT
    ask(one, 8, PORT + 1)
    assert hear(one).reject == Reject.NO_SERVICE


def test_a_new_router(served: TestRouter) -> None:
    """After a router's restart both ends resume their connection, and one hears of the other."""
    one, other = VerbsLibrary(served.socket), VerbsLibrary(served.socket)
    listen(other, 100)
    number = connect(one, other)
    served.restart()
    again, other_again = (VerbsLibrary(served.socket, each.qpn) for each in (one, other))
    say(again, Step.RESUME, 1, number)
    say(other_again, Step.RESUME, 101, number)
    say(again, Step.DISCONNECT, 1, number)
    heard = hear(other_again)
    assert (heard.step, heard.id) == (Step.DISCONNECT, 101)
    say(other_again, Step.DISCONNECTED, 101, number)
    assert hear(again).step is Step.DISCONNECTED


def test_a_process_that_does_not_read(served: TestRouter) -> None:
    """Requests don't fill the socket of a process that doesn't read: who asks is refused, and
    the process keeps its connection to the router and all that it has.
    """
    busy, asks = VerbsLibrary(served.socket), VerbsLibrary(served.socket)
    listen(busy, 100)
    number = connect(asks, busy)
    until, asked = time.monotonic() + patience(10), 1
    refused: VerbsRefuse | VerbsConnection | None = None
    while refused is None and time.monotonic() < until:
        asked += 1
        ask(asks, asked)
        say(asks, Step.REJECT, asked, 0)
        if not asks.library.silent(0.001):
            refused, _ = asks.library.hear(VerbsRefuse)
    assert isinstance(refused, VerbsRefuse)
    assert refused.reason == Reason.LIMIT
    assert asked < 200
    for _ in range(refused.number - 2):
        assert hear(busy).step is Step.REQUEST
        assert hear(busy).step is Step.REJECT
    say(busy, Step.DISCONNECT, 101, number)
    heard = asks.library.hear_all()[0]
    while isinstance(heard, VerbsRefuse):
        # What was asked before the first refusal was read.
        heard = asks.library.hear_all()[0]
    assert isinstance(heard, VerbsConnection)
    assert heard.step is Step.DISCONNECT
    assert served.client.statistics().dropped == 0
