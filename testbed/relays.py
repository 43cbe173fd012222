"""The router's part for tests of relays: starts relays, and gives them links, arenas and slots.

In a test::

    with relays(binary) as (a, b):
        link(a, b)
        one, two = connect(a, b)
        ...one.popen("send=1000000") and two.popen("receive=1000000")...
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dataplane.router import layout
from dataplane.router.arena_memory import LinuxArenaMemory
from dataplane.router.relay_wire import CONNECTION, COUNTERS, ENCRYPT_MESSAGES
from testbed.descriptors import close_unless_reused
from testbed.patience import patience

VERBS: Final = 1
LOOPBACK: Final = 2
TCP: Final = 3
SOCKETS: Final = 4
"""Of a link over TCP."""
WHOLE: Final = 0
BROKEN: Final = 1
VERSION: Final = 7
RING: Final = 256 << 10
PATIENCE: Final = 10.0

KINDS: Final = {
    name: number
    for number, name in enumerate(
        [
            "OPEN",
            "OPENED",
            "LINK",
            "LINKED",
            "CONNECT",
            "CONNECTED",
            "UNLINK",
            "ARENA",
            "BELL",
            "DISCARD",
            "SLOT",
            "PLACED",
            "PAIR",
            "PAIRED",
            "CLOSE",
            "FINISHED",
            "LEAVE",
            "LEFT",
            "DROP",
            "DROPPED",
            "FRAME",
            "STREAM",
            "COUNT",
            "COUNTS",
            "DOWN",
            "ENDED",
            "SOCKET",
            "USAGE",
            "EXPIRE",
            "SHARE",
            "FILE",
            "FILE_END",
            "FILE_ENDED",
        ],
        1,
    )
}
NAMES: Final = {number: name for name, number in KINDS.items()}

HEADER: Final = struct.Struct("=HH")
OPEN: Final = struct.Struct("=HH64sBBHIII")
OPENED: Final = struct.Struct("=HHi96sI")
NUMBER: Final = struct.Struct("=HHII")
OUTCOME: Final = struct.Struct("=HHIi96sI")
OFFER: Final = struct.Struct("=HHIi96sHH128s")
ACCEPT: Final = struct.Struct("=HHIIHH128s")
ARENA: Final = struct.Struct("=HHIQQ")
SLOT: Final = struct.Struct("=HHIIHHQQ")
FRAME: Final = struct.Struct("=HHI")
COUNTS: Final = struct.Struct("=HHI28Q")
FILE: Final = struct.Struct("=HHIQQQ")
USAGE: Final = struct.Struct("=HHIQ11Q")

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Message:
    """A message from a relay."""

    kind: str
    number: int = 0
    error: int = 0
    text: str = ""
    state: int = 0
    words: bytes = b""
    values: tuple[int, ...] = ()


def parse(data: bytes) -> Message:
    """Decode one packet."""
    kind, size = HEADER.unpack_from(data)
    assert size == len(data), data
    name = NAMES[kind]
    if name == "OPENED":
        _, _, error, text, mtu = OPENED.unpack(data)
        return Message(name, 0, error, _text(text), mtu)
    if name in ("LINKED", "PLACED"):
        _, _, number, error, text, length, _, words = OFFER.unpack(data)
        return Message(name, number, error, _text(text), 0, words[:length])
    if name in ("CONNECTED", "PAIRED", "DOWN"):
        _, _, number, error, text, received = OUTCOME.unpack(data)
        return Message(name, number, error, _text(text), received)
    if name == "COUNTS":
        return Message(name, values=COUNTS.unpack(data)[3:])
    if name == "USAGE":
        _, _, number, arena, *values = USAGE.unpack(data)
        return Message(name, number, state=arena, values=tuple(values))
    if name == "FILE_ENDED":
        return Message(name, FILE.unpack(data)[3])
    if name == "FRAME":
        _, _, number = FRAME.unpack_from(data)
        return Message(name, number, words=data[FRAME.size :])
    _, _, number, state = NUMBER.unpack(data)
    return Message(name, number, state=state)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()


@dataclass(eq=False)
class Relay:
    """A relay process."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    received: list[Message] = field(default_factory=list)
    """Messages that no test has expected yet."""
    reads: threading.RLock = field(default_factory=threading.RLock)
    transport: int = 0
    arenas: list[tuple[int, int]] = field(default_factory=list)
    """Descriptor and inode of the arenas that it was given; they are closed when the relay ends."""

    def raw(self, data: bytes, *descriptors: int) -> None:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        self.socket.sendmsg([data], [rights] if descriptors else [])

    def number(self, kind: str, number: int = 0, state: int = 0) -> None:
        self.raw(NUMBER.pack(KINDS[kind], NUMBER.size, number, state))

    def accept(self, kind: str, number: int, peer: int, words: bytes) -> None:
        self.raw(ACCEPT.pack(KINDS[kind], ACCEPT.size, number, peer, len(words), 0, words))

    def give_socket(self, number: int, index: int, descriptor: int) -> None:
        """Give a link the socket of a lane."""
        self.raw(NUMBER.pack(KINDS["SOCKET"], NUMBER.size, number, index), descriptor)

    def receive(self, seconds: float = 0) -> bool:
        """Receive one message, if one comes in time."""
        with self.reads:
            if not select.select([self.socket], [], [], seconds)[0]:
                return False
            data = self.socket.recv(65536)
            assert data, f"the relay has gone: {self.process.wait()}"
            self.received.append(parse(data))
            return True

    def expect(self, *kinds: str, number: int | None = None, seconds: float = PATIENCE) -> Message:
        """Wait for the next message of one of these kinds, about this number."""
        until = time.monotonic() + patience(seconds)
        while True:
            with self.reads:
                for message in self.received:
                    if message.kind in kinds and number in (None, message.number):
                        self.received.remove(message)
                        return message
            assert time.monotonic() < until, f"no {kinds} but {self.received}"
            self.receive(0.01)

    def silent(self, *kinds: str, seconds: float = 0.1) -> bool:
        """Check that no such message comes for a while."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.receive(left)
        return not any(message.kind in kinds for message in self.received)

    def open(
        self,
        device: str = "",
        *,
        transport: int = LOOPBACK,
        gid_index: int = 0,
        port: int = 1,
        spin: int = 20,
        encryption: int = 0,
    ) -> Message:
        head = (KINDS["OPEN"], OPEN.size, device.encode(), port, VERSION, gid_index)
        self.raw(OPEN.pack(*head, transport, spin, encryption))
        self.transport = transport
        return self.expect("OPENED")

    def link(self, number: int) -> bytes:
        """Make a channel of a link, of the transport that was opened last; its address."""
        self.number("LINK", number, self.transport)
        answer = self.expect("LINKED", number=number)
        assert not answer.error, answer
        return answer.words

    def connect(self, number: int, address: bytes) -> Message:
        self.accept("CONNECT", number, 0, address)
        return self.expect("CONNECTED", number=number)

    def counts(self) -> dict[str, int]:
        self.number("COUNT")
        return dict(zip(COUNTERS, self.expect("COUNTS").values, strict=True))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Close the socket, as when the router ends; the relay's exit code."""
        self.socket.close()
        return self.process.wait(patience(10))


@contextlib.contextmanager
def relay(binary: Path, **environment: str) -> Iterator[Relay]:
    """A relay that ends with the test; it must not have failed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen(
            [binary],
            pass_fds=(3,),
            preexec_fn=lambda: os.dup2(theirs.fileno(), 3),
            env={**os.environ, **environment},
        )
        theirs.close()
        made = Relay(process, ours)
        try:
            yield made
            ours.close()
            assert process.wait(patience(10)) in (0, -9)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for descriptor, inode in made.arenas:
                close_unless_reused(descriptor, inode)


@dataclass
class Usual:
    """What `relays` opens unless it is told otherwise."""

    transport: int = LOOPBACK


usual: Final = Usual()


@contextlib.contextmanager
def relays(
    binary: Path,
    device: str = "",
    *,
    count: int = 2,
    spin: int = 20,
    transport: int | None = None,
    encryption: int = ENCRYPT_MESSAGES,
) -> Iterator[list[Relay]]:
    """Relays of one machine that can reach each other, over `usual` or another transport."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(relay(binary)) for _ in range(count)]
        for one in made:
            kind = usual.transport if transport is None else transport
            assert not one.open(device, spin=spin, transport=kind, encryption=encryption).error
        yield made


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


def link(
    a: Relay, b: Relay, number: int = 1, peer: int | None = None, *, lost: bool = False
) -> bool:
    """Connect the two channels of a link, for the first time or again.

    False: it was lost meanwhile, which `lost` allows.
    """
    peer = number if peer is None else peer
    one = a.link(number)
    two = b.link(peer)
    if a.transport == TCP:
        for index in range(SOCKETS):
            for host, to, end in zip((a, b), (number, peer), socket_pair(), strict=True):
                host.give_socket(to, index, end.fileno())
                end.close()
    answers = b.connect(peer, one), a.connect(number, two)
    assert lost or not any(answer.error for answer in answers), answers
    return not any(answer.error for answer in answers)


@dataclass(eq=False)
class End:
    """One end of a connection: a slot in an arena of its relay, and a process that uses it."""

    relay: Relay
    number: int
    memory: int
    slot: int = 0
    arena: int = 0
    place: bytes = b""
    incarnation: int = 0
    rings_relay: socket.socket | None = None
    waits: list[socket.socket] = field(default_factory=list)
    ring: int = RING
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def word(self, direction: int, offset: int, size: int = 8) -> int:
        """A word of a ring's header."""
        data = os.pread(self.memory, size, layout.ring_offset(self.slot, direction) + offset)
        return int.from_bytes(data, "little")

    def write(self, direction: int, offset: int, value: int, size: int = 8) -> None:
        os.pwrite(
            self.memory,
            value.to_bytes(size, "little"),
            layout.ring_offset(self.slot, direction) + offset,
        )

    def popen(self, program: Path, *options: str) -> subprocess.Popen[str]:
        """Start an end's process (`end.c`)."""
        assert self.rings_relay is not None
        descriptors = (
            self.memory,
            self.rings_relay.fileno(),
            *(waits.fileno() for waits in self.waits),
        )
        first = f"first={len(self.waits) * self.slot}"
        process = subprocess.Popen(
            [
                program,
                str(self.memory),
                str(self.slot),
                str(self.ring),
                *(str(fd) for fd in descriptors[1:]),
                first,
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            text=True,
        )
        self.started.append(process)
        return process


def result(process: subprocess.Popen[str], seconds: float = 60) -> dict[str, float]:
    """Wait for an end's process; what it printed. It must not have failed."""
    said, complaint = process.communicate(timeout=seconds)
    assert process.returncode == 0, (process.returncode, said, complaint)
    found: dict[str, float] = json.loads(said)
    return found


def give_arena(relay: Relay, ring: int = RING, owner: int = 0) -> End:
    """Give the relay a new arena of a process; the end in its slot 0."""
    memory = LinuxArenaMemory().make(ring_size=ring, remote=True)
    relay.arenas.append((memory, os.fstat(memory).st_ino))
    arena = next(_numbers)
    end = End(relay, 0, memory, arena=arena, ring=ring)
    receives, end.rings_relay = socket.socketpair()
    relay.raw(ARENA.pack(KINDS["ARENA"], ARENA.size, ring, arena, owner), memory, receives.fileno())
    receives.close()
    return end


def give_bells(end: End, count: int = 2) -> None:
    """Give the relay the bells of the process's two threads."""
    for index in range(count):
        waits, rings = socket.socketpair()
        end.waits.append(waits)
        packed = ARENA.pack(KINDS["BELL"], ARENA.size, end.slot * count + index, end.arena, 0)
        end.relay.raw(packed, rings.fileno())
        rings.close()


def place(end: End, link: int = 1, user: int = CONNECTION) -> Message:
    """Have the relay register the end's slot."""
    end.incarnation = next(_numbers)
    LinuxArenaMemory().prepare(end.memory, end.slot, end.incarnation)
    end.number = next(_numbers)
    end.relay.raw(
        SLOT.pack(
            KINDS["SLOT"],
            SLOT.size,
            end.number,
            link,
            end.slot,
            user,
            end.arena,
            end.incarnation,
        )
    )
    answer = end.relay.expect("PLACED", number=end.number)
    end.place = answer.words
    return answer


def pair(one: End, two: End) -> Message:
    """Tell the relay of `one` where `two` is."""
    one.relay.accept("PAIR", one.number, two.number, two.place)
    return one.relay.expect("PAIRED", number=one.number)


def connect(
    a: Relay, b: Relay, *, ring: int = RING, link: int = 1, peer_link: int | None = None
) -> tuple[End, End]:
    """A connection between two new arenas."""
    ends = give_arena(a, ring), give_arena(b, ring)
    for end, number in zip(ends, (link, link if peer_link is None else peer_link), strict=True):
        give_bells(end)
        assert not (answer := place(end, number)).error, answer
    for one, two in (ends[1], ends[0]), (ends[0], ends[1]):
        assert not (answer := pair(one, two)).error, answer
    return ends


def more(end: End, slot: int, link: int = 1) -> End:
    """Another slot of the same arena."""
    other = End(
        end.relay,
        0,
        end.memory,
        slot=slot,
        arena=end.arena,
        rings_relay=end.rings_relay,
        ring=end.ring,
    )
    give_bells(other)
    assert not (answer := place(other, link)).error, answer
    return other


def drop(end: End, state: int = WHOLE) -> None:
    """Drop a connection, and wait until the relay has released it."""
    end.relay.number("DROP", end.number, state)
    end.relay.expect("DROPPED", number=end.number)
