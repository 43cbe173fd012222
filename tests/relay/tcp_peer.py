"""A peer's relay in Python that has a link's key and can send anything, and a path between two
relays that can cut, delay, change, double and reorder what they send.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from testbed.relays import SOCKETS, TCP, End, Relay, socket_pair

MAGIC: Final = 0x6C657231
SEALED: Final = 1 << 31
TAG: Final = 16
WINDOW: Final = 128
HEADER: Final = struct.Struct("=IHHQ")
BLOCK: Final = struct.Struct("=IIQ6Q")
READY: Final = 1


def block(end: End, flags: int = READY, *words: int, cookie: int | None = None) -> bytes:
    """A block for this end's connection: tail, base, start, end, head, received."""
    known = struct.unpack_from("=Q", end.place, 16)[0] if cookie is None else cookie
    return BLOCK.pack(end.number, flags, known, *words, *[0] * (6 - len(words)))


@dataclass(frozen=True)
class Heard:
    """A record of a relay: the connections of its blocks, and the bytes that came with them."""

    numbers: list[int]
    data: bytes
    encrypted: bool


class Peer:
    """The other end of a link of `relay`, with all its sockets and both keys."""

    def __init__(self, relay: Relay, number: int = 1, encryption: int = 0) -> None:
        assert relay.transport == TCP
        address = relay.link(number)
        self.sends = AESGCM(address[8:40])
        mine = bytes(range(32))
        self.receives = AESGCM(mine)
        self.sent = [0] * SOCKETS
        self.received = [0] * SOCKETS
        self.sockets = []
        for index in range(SOCKETS):
            theirs, ours = socket_pair()
            relay.give_socket(number, index, theirs.fileno())
            theirs.close()
            self.sockets.append(ours)
        words = address[:8] + mine + struct.pack("=HH12x", SOCKETS, encryption)
        assert not relay.connect(number, words).error

    def close(self) -> None:
        for one in self.sockets:
            one.close()

    def _nonce(self, counts: list[int], lane: int) -> bytes:
        counts[lane] += 1
        return struct.pack("=I", lane) + (counts[lane] - 1).to_bytes(8, "big")

    def seal(self, lane: int, head: int, body: bytes) -> bytes:
        """A record's head and sealed body."""
        opened = struct.pack("=I", head)
        return opened + self.sends.encrypt(self._nonce(self.sent, lane), body, opened)

    def record(
        self,
        *blocks: tuple[bytes, int],
        lane: int = 0,
        payload: bytes | None = None,
        sealed: bool = False,
        granted: int = WINDOW,
    ) -> bytes:
        """A record with these blocks, and how many bytes each says it brings."""
        body = HEADER.pack(MAGIC, len(blocks), 0, granted)
        body += b"".join(each for each, _ in blocks)
        body += b"".join(struct.pack("=I", size) for _, size in blocks)
        data = bytes(sum(size for _, size in blocks)) if payload is None else payload
        made = self.seal(lane, len(body) | (SEALED if sealed else 0), body)
        if sealed and data:
            data = self.sends.encrypt(self._nonce(self.sent, lane), data, None)
        return made + data

    def say(self, *blocks: tuple[bytes, int], lane: int = 0, **options: object) -> None:
        """Send a record."""
        self.sockets[lane].sendall(self.record(*blocks, lane=lane, **options))  # type: ignore[arg-type]

    def read(self, lane: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self.sockets[lane].recv(size - len(data))
            assert got
            data += got
        return data

    def hear(self, lane: int = 0) -> Heard:
        """The next record of the relay."""
        opened = self.read(lane, 4)
        (head,) = struct.unpack("=I", opened)
        sealed = self.read(lane, (head & ~SEALED) + TAG)
        body = self.receives.decrypt(self._nonce(self.received, lane), sealed, opened)
        magic, count, *_ = HEADER.unpack_from(body)
        assert magic == MAGIC
        numbers = [BLOCK.unpack_from(body, HEADER.size + n * BLOCK.size)[0] for n in range(count)]
        size = sum(struct.unpack_from(f"={count}I", body, HEADER.size + count * BLOCK.size))
        encrypted = bool(head & SEALED)
        data = self.read(lane, size + TAG * encrypted)
        if encrypted:
            data = self.receives.decrypt(self._nonce(self.received, lane), data, None)
        return Heard(numbers, data, encrypted)


Change = Callable[[int, int, bytes], list[bytes] | None]
"""From a lane, a direction and what came, what goes on; None: the connection is cut."""


@contextlib.contextmanager
def path(a: Relay, b: Relay, change: Change, number: int = 1, buffer: int = 0) -> Iterator[None]:
    """A link between two relays through this process. `buffer`: bytes that sockets hold."""
    mine, theirs = a.link(number), b.link(number)
    ways: dict[socket.socket, tuple[int, int, socket.socket]] = {}
    for index in range(SOCKETS):
        near, left = socket_pair()
        far, right = socket_pair()
        for one in (near, left, far, right) if buffer else ():
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        a.give_socket(number, index, near.fileno())
        b.give_socket(number, index, far.fileno())
        near.close()
        far.close()
        ways[left], ways[right] = (index, 0, right), (index, 1, left)
    stopped = threading.Event()

    def carry() -> None:
        while not stopped.is_set() and ways:
            for each in select.select(list(ways), [], [], 0.02)[0]:
                if each not in ways:
                    continue
                lane, direction, other = ways[each]
                try:
                    data = each.recv(65536)
                    out = change(lane, direction, data) if data else None
                    for piece in out or []:
                        other.sendall(piece)
                except OSError:
                    out = None
                if out is None:
                    for end in (each, other):
                        ways.pop(end, None)
                        end.close()

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        assert not b.connect(number, mine).error
        assert not a.connect(number, theirs).error
        yield
    finally:
        stopped.set()
        thread.join()
        for end in list(ways):
            end.close()
