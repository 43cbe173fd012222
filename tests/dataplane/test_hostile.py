"""Who writes nonsense into shared memory hurts only his own connection: the program at the other end goes on serving others.

The hostile end gets its grant as anybody does, behaves until bytes go through the rings, and then writes whatever it likes into
every word that both sides share, all the while. Seeds are random, and said on failure.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from dataplane.control import Rule, Settings
from dataplane.router import layout, wire
from tests.dataplane.bed import Bed, bed
from tests.dataplane.library import Library, dial
from tests.dataplane.places import LIBRARY
from tests.kernel.hosts import missing_tools

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
"""Of struct arena: bells known, slots dirty."""


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
    """A value that is wrong in a way that matters, or any."""
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
    """Write into one shared word, of a ring or of the arena's header."""
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
def granted(made: Bed) -> Iterator[tuple[object, mmap.mmap, tuple[Ring, Ring]]]:
    """A connection of the hostile container to the server, its arena, and its rings: sent into, received from."""
    container = made.containers["stranger"]
    tcp = dial(container.namespace, str(made.containers["server"].ipv4), PORT)
    library = Library.connect(made.shared / "router.sock", container.namespace)
    try:
        library.hear(wire.Welcome)
        tcp.settimeout(5)
        library.ask(tcp)
        # The other end asks after some exchanges.
        for _ in range(12):
            tcp.sendall(b"hello")
            assert tcp.recv(100)
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


def attack(made: Bed, chance: random.Random, seconds: float) -> None:
    """One connection, from good behaviour to nonsense."""
    with granted(made) as (tcp, memory, rings):
        sends, receives = rings
        receives.put_half(READY, 1)
        for _ in range(4):
            tcp.sendall(b"more")  # type: ignore[attr-defined]
            time.sleep(0.002)
        if chance.random() < 0.7:
            # As a sender does: 4 * 5 bytes of the first exchanges and those of the last have gone over TCP.
            sends.put(START, 12 * 5 + 4 * 4 + 1)
            memory[sends.offset + FIRST_BYTES : sends.offset + FIRST_BYTES + 5] = b"bytes"
            sends.put(TAIL, 5)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(chance.randrange(1, 60)):
                hurt(chance, memory, rings)
            if chance.random() < 0.3:
                with contextlib.suppress(OSError):
                    tcp.setblocking(False)  # type: ignore[attr-defined]
                    tcp.send(b"x")  # type: ignore[attr-defined]
            time.sleep(chance.choice((0, 0, 0.001)))


def processor_time(pid: int) -> float:
    """Seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("way", ["threads", "select", "poll", "epoll"])
def test_nonsense_in_shared_memory(way: str) -> None:
    """The program serves others rightly all the while, lives, and rests when the hostile one has gone."""
    if missing := missing_tools():
        pytest.skip(f"missing: {missing}")
    if not LIBRARY.exists():
        pytest.skip(f"missing: {LIBRARY} (make library)")
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    settings = Settings(rule=Rule(operations=2, age=0))
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
            until, attacks = time.monotonic() + SECONDS, 0
            while time.monotonic() < until:
                attack(made, chance, chance.uniform(0.02, 0.3))
                attacks += 1
                assert server.poll() is None, (seed, attacks)
                assert honest.poll() is None, (seed, attacks, honest.communicate()[0])
            said = honest.communicate("", timeout=30)[0]
            assert int(said) > 50, (seed, said)
            assert attacks > 5, seed
            before = processor_time(server.pid)
            time.sleep(1)
            assert processor_time(server.pid) - before < 0.3, seed
        finally:
            server.kill()
            server.communicate()
