"""A DNS server on loopback that answers as Docker's embedded one, or worse."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from testbed.patience import patience

HEADER = struct.Struct("!6H")


def question_end(query: bytes) -> int:
    """The position after the query's name, type and class."""
    offset = HEADER.size
    while query[offset]:
        offset += 1 + query[offset]
    return offset + 5


def name_of(query: bytes) -> str:
    offset, labels = HEADER.size, []
    while query[offset]:
        labels.append(query[offset + 1 : offset + 1 + query[offset]].decode())
        offset += 1 + query[offset]
    return ".".join(labels)


NO_NAME = 3


def answer(
    query: bytes,
    addresses: list[IPv4Address],
    *,
    flags: int = 0x8180,
    whole: bool = False,
    refusal: int = NO_NAME,
) -> bytes:
    """An answer with these addresses, or without any, a `refusal`: there is no such name.

    With `whole`, each record repeats the name.
    """
    (identifier,) = struct.unpack_from("!H", query)
    code = 0 if addresses else refusal
    head = HEADER.pack(identifier, flags | code, 1, len(addresses), 0, 0)
    end = question_end(query)
    name = query[HEADER.size : end - 4] if whole else b"\xc0\x0c"
    records = b"".join(
        name + struct.pack("!HHIH", 1, 1, 600, 4) + address.packed for address in addresses
    )
    return head + query[HEADER.size : question_end(query)] + records


@dataclass
class DnsServer:
    """A server with `records` by name.

    `silent` names get no answer, those of `truncated` a shortened one, those of `late` one after so
    many seconds. With `burst`, all answers are sent together after the last query and repeat the
    name, as Docker's do.
    """

    records: dict[str, list[IPv4Address]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    truncated: set[str] = field(default_factory=set)
    late: dict[str, float] = field(default_factory=dict)
    burst: bool = False
    refusal: int = NO_NAME
    place: tuple[str, int] = ("127.0.0.1", 0)
    noise: list[bytes] = field(default_factory=list)
    delay: float = 0.0
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(self.place)
        self.address: tuple[str, int] = self._socket.getsockname()
        self._held: list[tuple[bytes, tuple[str, int]]] = []
        if self.burst:
            self._socket.settimeout(0.02)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                query, peer = self._socket.recvfrom(4096)
            except TimeoutError:
                self._release()
                continue
            if query in (b"stop", b""):
                return
            name = name_of(query)
            self.asked.append(name)
            time.sleep(self.delay)
            for junk in self.noise:
                self._socket.sendto(junk, peer)
            if name in self.silent:
                continue
            flags = 0x8380 if name in self.truncated else 0x8180
            made = answer(
                query,
                self.records.get(name, []),
                flags=flags,
                whole=self.burst,
                refusal=self.refusal,
            )
            if name in self.late:
                timer = threading.Timer(self.late[name], self._send, (made, peer))
                timer.daemon = True
                timer.start()
            elif self.burst:
                self._held.append((made, peer))
            else:
                self._send(made, peer)

    def _send(self, message: bytes, peer: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendto(message, peer)

    def _release(self) -> None:
        for message, peer in self._held:
            self._send(message, peer)
        self._held.clear()

    def end(self) -> None:
        """Close the server from any namespace; its address may belong to another one."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(5)
        self._socket.close()

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stopper:
            stopper.sendto(b"stop", self.address)
        self._thread.join(patience(5))
        self._socket.close()
