"""Programs that lock their memory need no more of it with the library, which reserves much address
space.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dataplane.places import Places
from tests.dataplane.test_programs import check, need, serving

MEMCACHED_MOST = 140 << 10
"""KiB. Without the library it needs 90 MiB."""


@pytest.mark.parametrize(
    "scenario",
    [
        "current_and_future",
        "current",
        "future",
        "future_past_the_library",
        "after_the_move",
        "on_fault",
    ],
)
def test_mlockall(both: Places, scenario: str) -> None:
    """mlockall() locks the program's memory and none of the rings, and connections move to
    rings.
    """
    both.play("locked", scenario)
    both.upgraded()


def test_limit(both: Places) -> None:
    """RLIMIT_MEMLOCK permits as much as without the library, with the same errors."""
    both.play("locked", "limited")


def test_memcached(both: Places) -> None:
    """`memcached -k` serves its clients in the memory that it has without the library."""
    need("memcached")
    port = next(both.ports)
    server = [
        "memcached",
        "-k",
        "-u",
        "root",
        "-l",
        "0.0.0.0",
        "-p",
        str(port),
        "-t",
        "2",
        "-U",
        "0",
    ]
    for _ in both.attempts(lambda: both.has_upgraded(12)):
        with serving(both, server, port) as running:
            check(both, "check_memcached.py", both.address, str(port))
            status = Path(f"/proc/{running.pid}/status").read_text()
            used = {
                name: int(rest.split()[0])
                for name, _, rest in (line.partition(":") for line in status.splitlines())
                if name in ("VmRSS", "VmLck", "RssShmem")
            }
            assert used["VmRSS"] < MEMCACHED_MOST, used
            assert used["VmLck"] > 1024, used
