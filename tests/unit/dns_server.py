"""A DNS server on loopback that answers as Docker's embedded one, or worse."""

from __future__ import annotations

import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from tests.patience import patience

HEADER = struct.Struct("!6H")


def question_end(query: bytes) -> int:
    """Where the question's name, type and class end."""
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


def answer(query: bytes, addresses: list[IPv4Address], *, flags: int = 0x8180) -> bytes:
    """An answer with these addresses; none: there is no such name."""
    (identifier,) = struct.unpack_from("!H", query)
    code = 0 if addresses else 3
    head = HEADER.pack(identifier, flags | code, 1, len(addresses), 0, 0)
    records = b"".join(
        struct.pack("!HHHIH", 0xC00C, 1, 1, 600, 4) + address.packed for address in addresses
    )
    return head + query[HEADER.size : question_end(query)] + records


@dataclass
class DnsServer:
    """`records` by name. `silent`: names that get no answer; `truncated`: those whose answer is cut short."""

    records: dict[str, list[IPv4Address]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    truncated: set[str] = field(default_factory=set)
    noise: list[bytes] = field(default_factory=list)
    delay: float = 0.0
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._socket.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            query, peer = self._socket.recvfrom(4096)
            if query == b"stop":
                return
            name = name_of(query)
            self.asked.append(name)
            time.sleep(self.delay)
            for junk in self.noise:
                self._socket.sendto(junk, peer)
            if name not in self.silent:
                flags = 0x8380 if name in self.truncated else 0x8180
                self._socket.sendto(answer(query, self.records.get(name, []), flags=flags), peer)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stopper:
            stopper.sendto(b"stop", self.address)
        self._thread.join(patience(5))
        self._socket.close()
