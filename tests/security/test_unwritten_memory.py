"""A client claims bytes in its rings that it never wrote: reading them costs the server next to
nothing.

The kernel creates a page that nobody has written for its first reader, and charges the reader's
container.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RouterSettings, Rule
from dataplane.router import layout
from dataplane.router import library_wire as wire
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.library import Library, dial
from tests.dataplane.places import LIBRARY
from tests.dataplane.test_hostile import HEAD, READY, START, TAIL, Ring

PORT: Final = 7000
CONNECTIONS: Final = 24
LIMIT: Final = 64 << 20
"""The memory limit of the server's control group, where one can be made."""
READ_MOST: Final = 64 << 20
"""The bytes that a process's receivers read by their mappings at most; an eighth of its limit if
that is less.
"""
SLACK: Final = 2 << 20
GROUPS: Final = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)

SERVER: Final = """
import socket, sys, time
listener = socket.create_server(("0.0.0.0", int(sys.argv[1])), backlog=64)
listener.setblocking(False)
print("listening", flush=True)
some = []
while True:
    try:
        some.append(listener.accept()[0])
        some[-1].setblocking(False)
    except BlockingIOError:
        pass
    for one in list(some):
        try:
            got = one.recv(1 << 18)
            if 0 < len(got) < 100:
                one.send(b"k")
        except BlockingIOError:
            continue
        except OSError:
            got = b""
        if not got:
            some.remove(one)
            one.close()
    time.sleep(0.001)
"""


@contextlib.contextmanager
def group() -> Iterator[Path | None]:
    """A control group with a memory limit; None where this machine allows none."""
    for top, name in GROUPS:
        made = top / f"freeflow-test-{os.getpid()}"
        try:
            made.mkdir()
            (made / name).write_text(str(LIMIT))
        except OSError:
            with contextlib.suppress(OSError):
                made.rmdir()
            continue
        try:
            yield made
        finally:
            with contextlib.suppress(OSError):
                made.rmdir()
        return
    yield None


class Client:
    """One process of the hostile container, with one arena."""

    def __init__(self, made: NamespaceBed) -> None:
        self.made = made
        self.container = made.containers["hostile"]
        self.library = Library.connect(made.shared / "router.sock", self.container.namespace)
        self.library.hear(wire.Welcome)
        self.memory = -1
        self.kept: list[tuple[socket.socket, Ring]] = []

    def connect(self) -> Ring:
        """A connection whose ring claims to be full, although nothing was written."""
        tcp = dial(self.container.namespace, str(self.made.containers["server"].ipv4), PORT)
        tcp.settimeout(patience(5))
        self.library.ask(tcp)
        until = time.monotonic() + patience(20)
        sent = 0
        while not (sent > 3 and select.select([self.library.connection], [], [], 0.02)[0]):
            assert time.monotonic() < until, "no grant"
            tcp.sendall(b"hello")
            assert tcp.recv(100)
            sent += 1
        grant, memory = self.library.hear(wire.Grant)
        assert memory is not None
        mapped = mmap.mmap(memory, layout.BULK_OFFSET)
        if self.memory < 0:
            self.memory = memory
        else:
            os.close(memory)
        one, other = (
            Ring(mapped, layout.ring_offset(grant.slot, side))
            for side in (grant.side, 1 - grant.side)
        )
        other.put_half(READY, 1)
        for _ in range(2):
            tcp.sendall(b"more")
            time.sleep(0.005)
        one.put(START, sent * 5 + 2 * 4 + 1)
        one.put(TAIL, layout.RING_SIZE)
        self.kept.append((tcp, one))
        return one

    def used(self) -> int:
        """The bytes of the arena that exist."""
        return os.fstat(self.memory).st_blocks * 512


def test_bytes_that_nobody_wrote() -> None:
    """24 connections of 4 MiB each cost the server no more than its share, which it reclaims when
    they end.
    """
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    settings = RouterSettings(rule=Rule(operations=2, age=0))
    with group() as limited, bed("server", "hostile", library=LIBRARY, settings=settings) as made:
        enter = f"echo $$ > {limited}/cgroup.procs; " if limited else ""
        server = made.containers["server"].popen(
            ["sh", "-c", f'{enter}exec "$@"', "sh", sys.executable, "-c", SERVER, str(PORT)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        client = Client(made)
        rings = [client.connect() for _ in range(CONNECTIONS)]
        until = time.monotonic() + patience(20)
        while any(ring.word(HEAD) != layout.RING_SIZE for ring in rings):
            assert server.poll() is None, "the server was killed"
            assert time.monotonic() < until, "the server doesn't read on"
            time.sleep(0.02)
        most = min(LIMIT // 8, READ_MOST) if limited else READ_MOST
        assert client.used() < most + SLACK
        for tcp, _ in client.kept:
            tcp.close()
        # The client keeps its slots and does not release them.
        while client.used() > SLACK:
            assert time.monotonic() < until, client.used()
            time.sleep(0.02)
        assert server.poll() is None
        server.kill()
        server.wait()
        client.library.close()
