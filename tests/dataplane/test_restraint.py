"""Programs whose connections end soon after they have moved stop moving them, and long connections
still move.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import wait_until
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import within
from tests.dataplane.places import LIBRARY, counts_of

PROGRAM = Path(__file__).parent / "programs/short.py"
SHORT = 32


@pytest.fixture
def made() -> Iterator[NamespaceBed]:
    with bed("server", "client", library=LIBRARY) as both:
        yield both


def _listens(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, 7300)) == 0


def test_short_connections_stop_asking(made: NamespaceBed, tmp_path: Path) -> None:
    """Of many connections that end right after they are old enough to move only some of the first
    send a request; a long one moves.
    """
    server, client = made.containers["server"], made.containers["client"]
    python, where = [sys.executable, str(PROGRAM)], [str(server.ipv4), "7300"]
    for factor in (1, 3, 9, 27):
        age = factor * within(0.1)
        statistics = tmp_path / f"statistics{factor}"
        environment = {
            "FREEFLOW_STATS": str(statistics),
            "FREEFLOW_UPGRADE_AGE": f"{age * 1e6:.0f}",
        }
        serving = server.popen(
            [*python, "server", *where], env={**environment, "FREEFLOW_STATS": ""}
        )
        wait_until("the server", lambda: server.do(lambda: _listens(str(server.ipv4))))
        arguments = [str(SHORT), f"{age * 1.05:.3f}", "400"]
        said = client.run([*python, "client", *where, *arguments], env=environment)
        right, oldest = said.stdout.split()
        assert right == "right"
        counts = counts_of(statistics)
        # At least the second half of the long one has moved.
        moved = counts["received"] > 100 * 8
        if float(oldest) < 2 * age and 1 < counts["asked"] <= SHORT * 2 // 3 and moved:
            break
        # A busy machine delays some connections until they count as long, and answers to requests.
        # Both matter less with longer times.
        serving.kill()
        serving.wait()
    assert counts["tracked"] > SHORT
    assert 1 < counts["asked"] <= SHORT * 2 // 3
    assert moved
