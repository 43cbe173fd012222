"""Other libraries that are preloaded, and wrap the same calls as FreeFlow's."""

from __future__ import annotations

import select
import subprocess
import sys
from pathlib import Path

from testbed.namespace_bed import BedContainer
from testbed.patience import patience
from tests.dataplane.places import SOURCES, Places


def line(end: subprocess.Popen[str]) -> str:
    """The next line that a program prints."""
    assert end.stdout is not None
    assert select.select([end.stdout], [], [], patience(30))[0], "it hangs"
    return end.stdout.readline()


def test_a_library_in_front(both: Places, tmp_path: Path) -> None:
    """A library that stands before FreeFlow's in LD_PRELOAD sees each call of the program, and none
    of FreeFlow's own; a clock that it stops keeps no wait from ending.
    """
    libraries = [str(both.programs / "wrapper.so")]
    if both.accelerated:
        libraries.append("/run/freeflow/libfreeflow.so")

    def start(role: str, container: BedContainer) -> subprocess.Popen[str]:
        return container.popen(
            [
                *("env", f"LD_PRELOAD={':'.join(libraries)}", sys.executable),
                *(str(SOURCES / "wrapped.py"), role, both.address, port),
            ],
            env=both.environment(WRAPPER_COUNTS=str(counts)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    for attempt in both.attempts(both.has_upgraded):
        port, counts = str(next(both.ports)), tmp_path / str(attempt)
        server = start("server", both.server)
        assert line(server) == "listening\n"
        client = start("client", both.client)
        said = [line(server), line(client)]
        for end in (server, client):
            assert end.communicate(timeout=patience(30))[0] == ""
            assert end.returncode == 0
        assert sorted(counts.read_text().splitlines(keepends=True)) == sorted(said)
