"""System calls that bypass the library after a connection has moved: no byte is lost, duplicated or
reordered.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.kernel_hosts import missing_tools
from tests.dataplane.places import LIBRARY, PATIENCE, Places, relayed

WRITES = (
    "server_writes",
    "client_writes",
    "server_writes_between",
    "client_writes_between",
    "late_reader",
    "server_writes_later",
    "client_writes_later",
    "server_writes_hot",
    "client_writes_hot",
    "hotter",
    "often",
    "full",
    "blocked",
    "poll",
    "epoll",
)
RAW = 6
"""REASON_RAW."""


@pytest.mark.parametrize("scenario", WRITES)
def test_raw_writes(both: Places, scenario: str) -> None:
    """Bytes that are written without the library arrive where TCP would have them; both directions
    are TCP from then on.
    """
    both.play("raw", scenario)
    both.upgraded()
    if both.accelerated:
        counted = both.counted()
        assert counted["past"] >= 1, counted
        assert sum(row["reasons"][RAW] for row in counted.rows) >= 1, counted


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, programs: Path) -> Iterator[Places]:
    """Containers as if on two hosts."""
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    with relayed(tmp_path_factory.mktemp("far"), programs) as made:
        yield made


@pytest.mark.parametrize("scenario", WRITES)
def test_raw_writes_between_hosts(far: Places, scenario: str) -> None:
    """Bytes that are written without the library wait for those that the relays still carry."""
    far.forget()
    far.play("raw", scenario)
    far.upgraded()


@pytest.mark.parametrize("scenario", ["server_reads", "client_reads"])
def test_raw_reads(both: Places, scenario: str) -> None:
    """A read without the library sees nothing of what is in shared memory, and takes nothing
    away.
    """
    both.play("raw", scenario)
    both.upgraded()


def test_raw_shutdown(both: Places) -> None:
    """A shutdown without the library is the end for the peer, and for later writes of the
    program.
    """
    both.play("raw", "shutdown")
    both.upgraded()


def test_raw_close(both: Places) -> None:
    """A file with the number of a connection that was closed without the library is read and
    written as itself.
    """
    both.play("raw", "closed")
    both.upgraded()


@pytest.mark.parametrize("scenario", ["closed_all", "closed_all_there"])
def test_raw_close_of_all(both: Places, scenario: str) -> None:
    """A program that closes all unknown descriptors without the library continues, and sleeps while
    it waits.
    """
    both.play("raw", scenario)
    both.upgraded()


def test_program_without_the_library(both: Places) -> None:
    """Bytes that a static program writes to a connection from raw calls arrive between the
    library's own.
    """
    both.play("raw", "program", HELPER=str(both.programs / "static-cat"))
    both.upgraded()


def test_listing(both: Places) -> None:
    """`freeflow connections` says at both ends that the connection is TCP again, with the
    reason.
    """
    if not both.accelerated:
        both.play("raw", "stay")
        return
    port = str(next(both.ports))
    file = str(both.programs / "raw")
    server, client = (
        container.popen(
            [file, role, both.address, port, "stay"],
            env=both.environment(),
            stdin=subprocess.PIPE,
        )
        for role, container in (("server", both.server), ("client", both.client))
    )
    until = time.monotonic() + PATIENCE
    while True:
        found = [
            (each.path, each.reason)
            for each in both.made.router.connections().connections
            if port in (each.local.rpartition(":")[2], each.remote.rpartition(":")[2])
        ]
        if found == [("overlay", "raw")] * 2:
            break
        assert time.monotonic() < until, found
        time.sleep(0.05)
    client.communicate()
    assert (server.wait(PATIENCE), client.returncode) == (0, 0)
