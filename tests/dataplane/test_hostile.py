"""A process that writes invalid values into shared memory harms only its own connection: the peer's
program continues to serve others.

The hostile end gets its grant like any other, behaves correctly until bytes go through the rings,
and then keeps writing any values into every shared word. Seeds are random, and printed on failure.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import RouterSettings, Rule
from dataplane.router import layout
from dataplane.router import library_wire as wire
from testbed.kernel_hosts import missing_tools
from testbed.namespace_bed import NamespaceBed, bed
from testbed.patience import patience
from tests.dataplane.library import Library, dial
from tests.dataplane.places import LIBRARY

PROGRAM: Final = Path(__file__).parent / "programs" / "echo.py"
PORT: Final = 7000
SECONDS: Final = 4.0
WORD: Final = struct.Struct("=Q")
HALF: Final = struct.Struct("=I")
# struct ring, in `dataplane/library/layout.h`.
TAIL, BASE, START, END, BUSY = 0, 8, 16, 24, 32
HEAD, READY, LEAVE = 64, 72, 76
WAITERS, ROOM = (128, 192), 264
FIRST_BYTES: Final = layout.RING_HEADER
SIDES_OFFSET: Final = 64
"""The words of struct arena: known bells, dirty slots."""


@dataclass
class Ring:
    """One direction of the hostile end's connection."""

    memory: mmap.mmap
    offset: int

    def word(self, offset: int) -> int:
        return int(WORD.unpack_from(self.memory, self.offset + offset)[0])

    def put(self, offset: int, value: int) -> None:
        WORD.pack_into(self.memory, self.offset + offset, value & (1 << 64) - 1)

    def put_half(self, offset: int, value: int) -> None:
        HALF.pack_into(self.memory, self.offset + offset, value & (1 << 32) - 1)


def nonsense(chance: random.Random, ring: Ring) -> int:
    """A value that is wrong in a harmful way, or any value."""
    near = ring.word(chance.choice((TAIL, BASE, START, END, HEAD)))
    return chance.choice(
        (
            0,
            1,
            (1 << 32) - 1,
            (1 << 63),
            (1 << 64) - 1,
            chance.getrandbits(64),
            near + chance.randrange(-3, 4),
            near + layout.RING_SIZE + chance.randrange(-1, 2),
            near - layout.RING_SIZE,
        )
    )


def hurt(chance: random.Random, memory: mmap.mmap, rings: tuple[Ring, Ring]) -> None:
    """Write into one shared word of a ring or of the arena's header."""
    ring = chance.choice(rings)
    kind = chance.randrange(8)
    if kind < 4:
        ring.put(chance.choice((TAIL, BASE, START, END, HEAD)), nonsense(chance, ring))
    elif kind == 4:
        ring.put_half(chance.choice((BUSY, READY, LEAVE, ROOM)), chance.getrandbits(32))
    elif kind == 5:
        waiters = chance.choice(WAITERS)
        ring.put(waiters + 8 * chance.randrange(5), nonsense(chance, ring))
    elif kind == 6:
        ring.put(8 * chance.randrange(layout.RING_HEADER // 8), nonsense(chance, ring))
    else:
        WORD.pack_into(
            memory,
            SIDES_OFFSET + 8 * chance.randrange((2 * layout.PAGE - SIDES_OFFSET) // 8),
            nonsense(chance, ring) & (1 << 64) - 1,
        )


@contextlib.contextmanager
def granted(made: NamespaceBed) -> Iterator[tuple[socket.socket, mmap.mmap, tuple[Ring, Ring]]]:
    """A connection of the hostile container to the server, its arena, and its two rings."""
    container = made.containers["stranger"]
    tcp = dial(container.namespace, str(made.containers["server"].ipv4), PORT)
    library = Library.connect(made.shared / "router.sock", container.namespace)
    try:
        library.hear(wire.Welcome)
        tcp.settimeout(patience(5))
        library.ask(tcp)
        # The other end sends its request after some exchanges, or later if the router was busy.
        until = time.monotonic() + patience(20)
        for number in itertools.count():
            tcp.sendall(b"hello")
            assert tcp.recv(100)
            if number >= 11 and select.select([library.connection], [], [], 0.05)[0]:
                break
            assert time.monotonic() < until, "no grant"
        grant, memory = library.hear(wire.Grant)
        assert memory is not None
        with mmap.mmap(memory, layout.ARENA_SIZE) as mapped:
            os.close(memory)
            one, other = (
                Ring(mapped, layout.ring_offset(grant.slot, direction))
                for direction in (grant.side, 1 - grant.side)
            )
            yield tcp, mapped, (one, other)
    finally:
        library.close()
        tcp.close()


def begin(tcp: socket.socket, memory: mmap.mmap, sends: Ring, receives: Ring) -> None:
    """Act as a library does: ready to receive through one ring, and the first bytes sent through
    the other.
    """
    receives.put_half(READY, 1)
    for _ in range(4):
        tcp.sendall(b"more")
        time.sleep(0.002)
    # 12 exchanges of 5 bytes and these have gone over TCP.
    sends.put(START, 12 * 5 + 4 * 4 + 1)
    memory[sends.offset + FIRST_BYTES : sends.offset + FIRST_BYTES + 5] = b"bytes"
    sends.put(TAIL, 5)


def attack(made: NamespaceBed, chance: random.Random, seconds: float) -> None:
    """One connection, first correct and then invalid."""
    with granted(made) as (tcp, memory, rings):
        if chance.random() < 0.8:
            begin(tcp, memory, *rings)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(chance.randrange(1, 60)):
                hurt(chance, memory, rings)
            if chance.random() < 0.3:
                with contextlib.suppress(OSError):
                    tcp.setblocking(False)
                    tcp.send(b"x")
            time.sleep(chance.choice((0, 0, 0.001)))


def processor_time(pid: int) -> float:
    """The CPU time of a process in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def served(way: str) -> Iterator[tuple[NamespaceBed, subprocess.Popen[str], subprocess.Popen[str]]]:
    """An echo server that waits in the given way, and a correct client of it, whose answers must
    all be right.
    """
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    settings = RouterSettings(rule=Rule(operations=2, age=0))
    with bed("server", "client", "stranger", library=LIBRARY, settings=settings) as made:
        address = [str(made.containers["server"].ipv4), str(PORT)]
        server = made.containers["server"].popen(
            [sys.executable, str(PROGRAM), way, *address], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "listening\n"
            honest = made.containers["client"].popen(
                [sys.executable, str(PROGRAM), "client", *address],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                yield made, server, honest
                said = honest.communicate("", timeout=patience(30))[0]
                assert int(said) > 20, said
            finally:
                if honest.poll() is None:
                    honest.kill()
                    honest.communicate()
        finally:
            server.kill()
            server.communicate()


def rests(server: subprocess.Popen[str]) -> bool:
    """Whether a process uses little CPU time now."""
    before = processor_time(server.pid)
    time.sleep(1)
    return processor_time(server.pid) - before < 0.3


@pytest.mark.parametrize("way", ["threads", "select", "poll", "epoll"])
def test_nonsense_in_shared_memory(way: str) -> None:
    """The program serves others correctly meanwhile, survives, and is idle when the hostile one has
    gone.
    """
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    with served(way) as (made, server, honest):
        until, attacks = time.monotonic() + SECONDS, 0
        while time.monotonic() < until:
            attack(made, chance, chance.uniform(0.02, 0.3))
            attacks += 1
            assert server.poll() is None, (seed, attacks)
            assert honest.poll() is None, (seed, attacks, honest.communicate()[0])
        assert attacks > 5, seed
        said = honest.communicate("", timeout=patience(30))[0]
        assert int(said) > 20, (seed, said)
        assert rests(server), seed


FAR: Final = 1 << 40
WRONG: Final = {
    "an end that isn't reached": ("sends", END, 1000),
    "an end in the past": ("sends", END, 0),
    "bytes that aren't there": ("sends", TAIL, 4096),
    "more bytes than a ring has": ("sends", TAIL, FAR),
    "fewer bytes than were taken": ("sends", TAIL, -1),
    "another beginning": ("sends", BASE, 12345),
    "more taken than was put": ("receives", HEAD, 10),
    "less taken than before": ("receives", HEAD, -1),
    "space that never comes": ("receives", HEAD, -layout.RING_SIZE),
}


@pytest.mark.parametrize("way", ["threads", "epoll"])
def test_one_wrong_word(way: str) -> None:
    """With any word permanently invalid and the connection left open, the program is idle and
    serves others.
    """
    with served(way) as (made, server, honest), contextlib.ExitStack() as stack:
        for side, offset, by in WRONG.values():
            tcp, memory, (sends, receives) = stack.enter_context(granted(made))
            begin(tcp, memory, sends, receives)
            ring = sends if side == "sends" else receives
            time.sleep(0.05)
            base = ring.word(HEAD) + 1 if offset == END else ring.word(offset)
            ring.put(offset, base + by)
            with contextlib.suppress(OSError):
                tcp.send(b"x")
        time.sleep(0.3)
        honest.send_signal(signal.SIGSTOP)
        try:
            assert rests(server)
        finally:
            honest.send_signal(signal.SIGCONT)
        assert server.poll() is None
