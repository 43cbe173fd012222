"""Shared memory is used only as needed, is limited, and is reclaimed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dataplane.control import Rule
from testbed import wait_until
from testbed.patience import patience
from tests.dataplane.places import LIBRARY, Places, places

PROGRAM = Path(__file__).parent / "programs" / "bulk.py"
SIZE = 64 << 20
IDLE = 64 << 10
"""Bytes. The first pages of two connections need much less."""


@contextmanager
def stream(both: Places, port: int) -> Iterator[None]:
    """In the block, a connection has carried SIZE bytes on a ring and is idle."""
    command = [sys.executable, str(PROGRAM)]
    arguments = [both.address, str(port), str(SIZE)]
    server = both.server.popen(
        [*command, "server", *arguments], env=both.environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        client = both.client.popen(
            [*command, "client", *arguments],
            env=both.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert client.stdin is not None
            assert client.stdout is not None
            wait_until("rings", lambda: on_rings(both) == 2)
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "right\n"
            yield
        finally:
            client.communicate(timeout=patience(20))
        assert client.returncode == 0
        server.communicate(timeout=patience(20))
        assert server.returncode == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()


def on_rings(both: Places) -> int:
    """Ends of connections that have a ring."""
    return sum(each.path == "shm" for each in both.made.router.connections().connections)


def used(both: Places) -> int:
    """Bytes of shared memory at the last scan of the router."""
    return both.made.router.statistics().memory


def becomes_idle(both: Places) -> bool:
    """Whether all but the first pages are reclaimed soon."""
    until = time.monotonic() + patience(8)
    while time.monotonic() < until:
        if 0 < used(both) <= IDLE:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def accelerated() -> None:
    """Skip without a library."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")


def test_idle_memory_is_reclaimed(accelerated: None, tmp_path: Path) -> None:
    """A connection that has carried bulk data and becomes idle keeps only its first pages."""
    with places(True, tmp_path, tmp_path) as both:
        with stream(both, 7000):
            time.sleep(0.5)
            assert becomes_idle(both), used(both)
        both.upgraded(1)


def test_ring_limit_holds(accelerated: None, tmp_path: Path) -> None:
    """With RING_LIMIT a connection never touches more of its ring, however many bytes it
    carries.
    """
    limit = 128 << 10
    with places(True, tmp_path, tmp_path, Rule(operations=2, age=0, ring_limit=limit)) as both:
        with stream(both, 7000):
            # The router scans once a second.
            time.sleep(1.2)
            assert 0 < used(both) <= limit + IDLE
        both.upgraded(1)
        assert both.counted()["sent"] > SIZE / 2


def test_reading_past_the_budget(both: Places) -> None:
    """Bulk data beyond what a process may read by its mappings arrives unchanged."""
    both.play("reading", "much")
    both.upgraded(20)
