"""Valkey with its RDMA module, which Debian's package lacks, between two containers.

The server has no TCP port. Its module needs librdmacm and libibverbs; `valkey-cli` and
`valkey-benchmark` open them by name.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from testbed.debian_suite import SuiteAbsentError
from testbed.images import NotPreparedError
from testbed.namespace_bed import BedContainer, NamespaceBed
from testbed.process import wait_until
from testbed.verbs_packages import valkey
from tests.verbs.test_applications import NOBODY, PRELOADED, end, finish, made, start

pytestmark = pytest.mark.kernel
__all__ = ["made"]

LARGE: Final = 3_000_001
"""Bytes of a value that needs many turns of Valkey's buffers of 1 MiB."""


@dataclass
class ValkeyServer:
    """A server in one container, whose clients are in the other."""

    box: BedContainer
    far: BedContainer
    programs: Path
    folder: Path
    process: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start it, with the data that it has saved."""
        module = str(self.programs / "valkey-rdma.so")
        self.process = start(
            self.box,
            [
                *(*NOBODY, "env", f"LD_PRELOAD={PRELOADED}", str(self.programs / "valkey-server")),
                *("--port", "0", "--save", "", "--protected-mode", "no", "--dir", str(self.folder)),
                *("--logfile", "log", "--loadmodule", module),
                *("--rdma-bind", str(self.box.ipv4), "--rdma-port", "6379"),
            ],
        )
        log = self.folder / "log"

        def ready() -> bool:
            assert self.process
            assert self.process.poll() is None, end(self.process)
            return log.exists() and "Ready to accept connections rdma" in log.read_text()

        # A client that comes too early crashes.
        wait_until("the server to listen", ready)

    def stop(self) -> str:
        """Kill it. Returns what it has logged."""
        assert self.process
        end(self.process)
        log = self.folder / "log"
        said = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return said

    def command(self, program: str, *words: str) -> list[str]:
        """A client, as an unprivileged user."""
        to = (str(self.programs / program), "--rdma", "-h", str(self.box.ipv4))
        return [*NOBODY, "env", f"LD_PRELOAD={PRELOADED}", *to, *words]

    def ask(self, *words: str, data: bytes | None = None) -> bytes:
        """What it answers to a command, whose last argument may be any bytes."""
        more = ("-x",) if data is not None else ()
        done = self.far.run(
            self.command("valkey-cli", "--raw", *more, *words),
            accelerated=False,
            text=False,
            input=data,
        )
        answer: bytes = done.stdout
        return answer.removesuffix(b"\n")


@pytest.fixture
def server(made: NamespaceBed) -> Iterator[ValkeyServer]:
    a, b = made.containers.values()
    with served(a, b) as running:
        yield running


@contextlib.contextmanager
def served(a: BedContainer, b: BedContainer) -> Iterator[ValkeyServer]:
    """A server in the first container."""
    try:
        programs = valkey()
    except (NotPreparedError, SuiteAbsentError) as error:
        pytest.skip(str(error))
    # Not in pytest's folder, which is root's alone.
    with TemporaryDirectory(prefix="freeflow-valkey-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        running = ValkeyServer(a, b, programs, folder)
        yield running
        print("server:", running.stop())


def operations(made: NamespaceBed) -> int:
    """Those of queue pairs that the router has been told of."""
    return made.router.statistics().verbs.operations


def store_and_read(server: ValkeyServer, *sizes: int) -> None:
    """Values are read as they were written."""
    for size in sizes:
        value = os.urandom(size)
        assert server.ask("SET", f"key{size}", data=value) == b"OK"
        assert server.ask("GET", f"key{size}") == value
    assert server.ask("DBSIZE") == str(len(sizes)).encode()


def test_values(made: NamespaceBed, server: ValkeyServer) -> None:
    """Values of all sizes are read as they were written, over queue pairs."""
    before = operations(made)
    store_and_read(server, 0, 1, 4096, LARGE)
    wait_until("operations of queue pairs", lambda: operations(made) > before)


def test_many_clients_and_a_fork(server: ValkeyServer) -> None:
    """While many connections work the server saves its data by a fork; everything is there, and
    after a restart, too.
    """
    value = os.urandom(LARGE)
    assert server.ask("SET", "large", data=value) == b"OK"
    busy = start(
        server.far,
        server.command(
            *("valkey-benchmark", "-t", "set,get,lpush", "-c", "20", "-n", "4000"),
            *("-d", "3000", "-P", "4", "--csv"),
        ),
    )
    assert server.ask("BGSAVE") == b"Background saving started"
    wait_until(
        "the data to be saved", lambda: b"rdb_bgsave_in_progress:0" in server.ask("INFO", "persistence")
    )  # fmt: skip
    said = finish(busy)
    rates = re.findall(r'^"(SET|GET|LPUSH)","([\d.]+)"', said, re.MULTILINE)
    assert [name for name, _ in rates] == ["SET", "GET", "LPUSH"], said
    assert all(float(rate) > 0 for _, rate in rates), said
    assert server.ask("LLEN", "mylist") == b"4000"
    assert len(server.ask("LINDEX", "mylist", "17")) == 3000
    assert b"rdb_last_bgsave_status:ok" in server.ask("INFO", "persistence")
    assert server.ask("GET", "large") == value
    server.stop()
    server.start()
    assert server.ask("GET", "large") == value
