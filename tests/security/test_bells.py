"""A client that misuses bells: the server's program continues to serve others.

The hostile end speaks the protocol as the library does. It gets its connection into shared memory,
and holds the ends that ring the server's bells. It can send anything to them, as often as it likes,
and name bells that do not exist.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RouterSettings, Rule
from dataplane.router import layout
from dataplane.router import library_wire as wire
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience, within
from tests.dataplane.library import Library, dial
from tests.dataplane.places import LIBRARY
from tests.dataplane.test_hostile import (
    FIRST_BYTES,
    HEAD,
    PORT,
    PROGRAM,
    READY,
    START,
    TAIL,
    WAITERS,
    Ring,
    processor_time,
)
from tests.security.lingering import filled, lingering, send

SIDE: Final = 64 + 8 * layout.BELLS
"""The size of struct side in bytes."""


@dataclass
class Hostile:
    """A client whose connection is in shared memory."""

    tcp: socket.socket
    library: Library
    grant: wire.Grant
    memory: mmap.mmap
    bell: socket.socket
    """The end that rings bell 0 of the server."""
    sends: Ring = field(init=False)
    receives: Ring = field(init=False)
    sent: int = 0

    def __post_init__(self) -> None:
        self.sends, self.receives = (
            Ring(self.memory, layout.ring_offset(self.grant.slot, direction))
            for direction in (self.grant.side, 1 - self.grant.side)
        )

    def ask(self, bells: tuple[int, ...] = ()) -> None:
        """Send a request of one byte, whose answer must ring these bells, and receive the last
        answer.
        """
        waiters = self.receives.offset + WAITERS[0]
        for bell in bells:
            place = waiters + 8 + bell // 64 * 8
            word = struct.unpack_from("=Q", self.memory, place)[0]
            struct.pack_into("=Q", self.memory, place, word | 1 << bell % 64)
        struct.pack_into("=I", self.memory, waiters, bool(bells))
        # The server reads everything each time, so its ring starts again at 0.
        self.receives.put(HEAD, self.receives.word(TAIL))
        self.memory[self.sends.offset + FIRST_BYTES + self.sent % 3000] = 65
        self.sent += 1
        self.sends.put(TAIL, self.sent)
        dirty = 64 + (1 - self.grant.side) * SIDE + 64
        struct.pack_into("=Q", self.memory, dirty, 1 << self.grant.slot)
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self.bell.send(b"!", socket.MSG_DONTWAIT)

    def close(self) -> None:
        self.tcp.close()
        self.library.close()
        self.bell.close()


def attach(made: NamespaceBed) -> Hostile:
    """Behave correctly until bytes go through the rings."""
    container = made.containers["hostile"]
    tcp = dial(container.namespace, str(made.containers["server"].ipv4), PORT)
    tcp.settimeout(patience(5))
    library = Library.connect(made.shared / "router.sock", container.namespace)
    library.connection.settimeout(patience(5))
    library.hear(wire.Welcome)
    library.ask(tcp)
    until, count = time.monotonic() + patience(20), 0
    while count < 12 or not select.select([library.connection], [], [], 0.05)[0]:
        tcp.sendall(b"hello")
        assert tcp.recv(100)
        count += 1
        assert time.monotonic() < until, "no grant"
    grant, descriptor = library.hear(wire.Grant)
    assert descriptor is not None
    memory = mmap.mmap(descriptor, layout.ARENA_SIZE)
    os.close(descriptor)
    bell = socket.socket(fileno=library.rings(grant.arena, 1 - grant.side))
    made_ = Hostile(tcp, library, grant, memory, bell)
    made_.receives.put_half(READY, 1)
    for _ in range(4):
        tcp.sendall(b"more")
        time.sleep(0.01)
    made_.sends.put(START, count * 5 + 4 * 4 + 1)
    # The server's library announces it in the same way.
    struct.pack_into("=Q", memory, 64 + (1 - grant.side) * SIDE + 8, 1)
    return made_


@contextlib.contextmanager
def served(way: str, *, guard: bool = True) -> Iterator[tuple[NamespaceBed, subprocess.Popen[str]]]:
    """An echo server that waits in the given way."""
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    settings = RouterSettings(rule=Rule(operations=2, age=0))
    with bed(
        "server", "client", "hostile", library=LIBRARY, settings=settings, guard=guard
    ) as made:
        address = [str(made.containers["server"].ipv4), str(PORT)]
        server = made.containers["server"].popen(
            [sys.executable, str(PROGRAM), way, *address], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            yield made, server
        finally:
            server.kill()
            server.communicate()


def descriptors_of(process: subprocess.Popen[str]) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def exchange(made: NamespaceBed, count: int) -> float:
    """Exchange bytes with a correct client without the library; the median time in seconds."""
    container = made.containers["client"]
    times = []
    with dial(container.namespace, str(made.containers["server"].ipv4), PORT) as client:
        client.settimeout(patience(15))
        for _ in range(count):
            begin = time.monotonic()
            client.sendall(b"ping")
            assert client.recv(10) == b"ping"
            times.append(time.monotonic() - begin)
            time.sleep(0.002)
    return sorted(times)[count // 2]


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("way", ["epoll", "poll", "threads"])
def test_a_bell_with_a_descriptor_in_it(way: str, guard: bool) -> None:
    """A lingering descriptor in a bell does not block the server, neither when the bell rings nor
    when it is closed.
    """
    with served(way, guard=guard) as (made, server):
        exchange(made, 20)
        for closes in (False, True):
            hostile = attach(made)
            for _ in range(70):
                hostile.ask()
                time.sleep(0.001)
            poison = lingering(made.containers["hostile"].namespace)
            try:
                sent = False
                with contextlib.suppress(BrokenPipeError):
                    sent = send(hostile.bell, b"!", poison.closes.fileno())
                poison.let_go(sent=sent)
                for _ in range(0 if closes else 150):
                    hostile.ask()
                    time.sleep(0.001)
                hostile.close()
                exchange(made, 50)
            finally:
                poison.close()
        assert server.poll() is None


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("way", ["epoll", "select"])
def test_a_bell_that_is_kept_full(way: str, guard: bool) -> None:
    """A client that fills the server's bell faster than it can be emptied does not keep the server
    from its other clients.
    """
    with served(way, guard=guard) as (made, server):
        exchange(made, 20)
        hostile = attach(made)
        with filled(hostile.bell):
            for _ in range(100):
                hostile.ask()
                time.sleep(0.001)
            exchange(made, 100)
            used = processor_time(server.pid)
            time.sleep(1)
            assert processor_time(server.pid) - used < 0.5
        hostile.close()
        assert server.poll() is None


def test_bells_that_are_not_there() -> None:
    """A client that names bells that do not exist does not make the server wait for the router in
    its sends.
    """
    with served("epoll") as (made, server):
        exchange(made, 20)
        everyone = [attach(made) for _ in range(6)]
        assert made.process is not None
        # A stopped router answers nothing.
        ends = threading.Event()

        def run() -> None:
            while not ends.is_set():
                for one in everyone:
                    one.ask((3, 70, 200))
                time.sleep(0.01)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            os.kill(made.process.pid, signal.SIGSTOP)
            # 6 clients every 10 ms: if the server waited 10 ms for each, it would have no time for
            # others.
            median = exchange(made, 150)
        finally:
            os.kill(made.process.pid, signal.SIGCONT)
            ends.set()
            thread.join()
        for one in everyone:
            one.close()
        assert median < within(0.05)
        assert server.poll() is None


def test_bells_without_number() -> None:
    """A client that makes the server fetch all existing bells uses few of its descriptors."""
    with served("epoll") as (made, server):
        hostile = attach(made)
        for index in range(1, layout.BELLS):
            hostile.library.say(
                wire.Bell(index, hostile.grant.arena, hostile.grant.token, hostile.grant.side)
            )
            _, descriptor = hostile.library.hear(wire.Hear)
            assert descriptor is not None
            os.close(descriptor)
        before = descriptors_of(server)
        for index in range(1, layout.BELLS):
            hostile.ask((index,))
            time.sleep(0.002)
        time.sleep(0.5)
        assert descriptors_of(server) <= before + 4
        hostile.close()
