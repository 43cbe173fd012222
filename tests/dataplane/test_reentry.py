"""Connections that fell back to TCP move to rings again, unless the reason holds for good."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dataplane.control import RouterSettings
from testbed import wait_until
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, Places

STREAM = Path(__file__).parent / "programs/stream.py"
ENDS = 4
PAUSE = 5.0
"""Seconds: the library's, see `backoff.h`."""


@pytest.mark.parametrize(
    "waits", ["", "_poll", "_select", "_one_shot", "_level", "_edge"], ids=lambda way: way[1:]
)
def test_returns(both: Places, waits: str) -> None:
    """A connection that falls back again and again moves again each time, however its program
    waits, and no byte is wrong.
    """
    both.play("reentry", f"returns{waits}", FREEFLOW_RESTLESS="1")
    if both.accelerated:
        assert both.counted()["returned"] >= 8


@pytest.mark.parametrize("scenario", ["option", "option_on_tcp"])
def test_option(both: Places, scenario: str) -> None:
    """A connection whose program sets an option that rings can't carry stays on TCP, also if it had
    fallen back before.
    """
    both.play("reentry", scenario, FREEFLOW_RESTLESS="1")


def test_bypassed(both: Places) -> None:
    """A connection stays on TCP if bytes bypassed the library, also after it had fallen back."""
    both.play("reentry", "bypassed", FREEFLOW_RESTLESS="1")


def test_shared(both: Places) -> None:
    """A connection that two processes hold stays on TCP, and moves again when one of them has
    ended.
    """
    both.play("reentry", "shared", FREEFLOW_RESTLESS="1")


def test_duplicate(both: Places) -> None:
    """A connection with two descriptors, in an epoll instance, moves again."""
    both.play("reentry", "duplicate", FREEFLOW_RESTLESS="1")


def test_crowded(both: Places) -> None:
    """Each byte arrives once while several threads send and receive much at a time on a connection
    that falls back and returns.
    """
    for _ in range(12):
        both.play("reentry", "crowded", FREEFLOW_RESTLESS="1")
    if both.accelerated:
        assert both.counted()["returned"] >= 2


def _on_shm(made: NamespaceBed) -> int:
    return sum(each.path == "shm" for each in made.router.connections().connections)


def test_acceleration_off_and_on() -> None:
    """Connections move again, not before a pause, after acceleration was off for a while."""
    with bed("server", "client", library=LIBRARY) as made:
        server, client = made.containers["server"], made.containers["client"]
        python, where = [sys.executable, str(STREAM)], [str(server.ipv4), "7300"]
        serving = server.popen([*python, "server", *where, "2"], stdout=-1, text=True)
        assert serving.stdout is not None
        assert serving.stdout.readline() == "listening\n"
        ask = [*python, "client", *where, "1", "2", "told"]
        asking = client.popen(ask, stdin=-1, stdout=-1, text=True)
        wait_until("rings", lambda: _on_shm(made) == ENDS)
        left = time.monotonic()
        made.learn(settings=RouterSettings(acceleration=False))
        wait_until("TCP", lambda: _on_shm(made) == 0)
        made.learn()
        wait_until("rings again", lambda: _on_shm(made) == ENDS, 10 * PAUSE)
        assert time.monotonic() - left > PAUSE
        said = asking.communicate("now\n", timeout=patience(30))[0]
        said += serving.communicate(timeout=patience(30))[0]
        assert said.count("whole") == ENDS, said
