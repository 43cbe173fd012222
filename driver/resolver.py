"""Which tasks of a service take new connections: asked of Docker's embedded DNS, from inside a container's namespace.

The engine's inspect lists a task until its container is gone, also while it is being stopped. The embedded DNS is exact:
a task's address is under `tasks.<service>` from when it is healthy until Swarm disables its binding, two seconds before
the stop signal. Wire format: RFC 1035, over TCP (section 4.2.2) so that the number of tasks has no limit.

The DNS server is Docker's, but it is reached through a namespace that the container may have changed: the answer is
hostile until checked.
"""

from __future__ import annotations

import secrets
import socket
import struct
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver.errors import KernelError
from driver.kernel.namespace import in_netns
from driver.model import IPAddress

SERVER: Final = ("127.0.0.11", 53)
TIMEOUT: Final = 0.3
_TYPE_A: Final = 1
_CLASS_IN: Final = 1
_NXDOMAIN: Final = 3
_MAX_LABEL: Final = 63


class MalformedAnswer(ValueError):
    """The answer is not a DNS answer to our question."""


def encode_query(identifier: int, name: str) -> bytes:
    """A query for A records, recursion desired. ValueError if `name` has a label that DNS can't carry."""
    labels = name.split(".")
    encoded = b""
    for label in labels:
        octets = label.encode()
        if not 0 < len(octets) <= _MAX_LABEL:
            raise ValueError(f"{name!r} is not a DNS name")
        encoded += bytes([len(octets)]) + octets
    header = struct.pack("!6H", identifier, 0x0100, 1, 0, 0, 0)
    return header + encoded + b"\0" + struct.pack("!2H", _TYPE_A, _CLASS_IN)


def _skip_name(message: bytes, offset: int) -> int:
    while True:
        if offset >= len(message):
            raise MalformedAnswer("a name runs past the end")
        length = message[offset]
        if length >= 0xC0:
            return offset + 2
        if length > _MAX_LABEL:
            raise MalformedAnswer("a label's length is reserved")
        offset += 1 + length
        if length == 0:
            return offset


def decode_answer(identifier: int, message: bytes) -> frozenset[IPAddress] | None:
    """The addresses in an answer; empty for a name that doesn't exist; None if the server failed.

    Raises:
        MalformedAnswer: not an answer to query `identifier`.
    """
    if len(message) < 12:
        raise MalformedAnswer("shorter than a header")
    answer_id, flags, questions, answers = struct.unpack_from("!4H", message)
    if answer_id != identifier or not flags & 0x8000:
        raise MalformedAnswer("not the answer to this query")
    code = flags & 0xF
    if code == _NXDOMAIN:
        return frozenset()
    if code != 0:
        return None
    offset = 12
    for _ in range(questions):
        offset = _skip_name(message, offset) + 4
    addresses: set[IPAddress] = set()
    for _ in range(answers):
        offset = _skip_name(message, offset)
        if offset + 10 > len(message):
            raise MalformedAnswer("a record runs past the end")
        kind, family, _ttl, length = struct.unpack_from("!HHIH", message, offset)
        offset += 10
        if offset + length > len(message):
            raise MalformedAnswer("a record's data runs past the end")
        if kind == _TYPE_A and family == _CLASS_IN and length == 4:
            addresses.add(IPv4Address(message[offset : offset + 4]))
        offset += length
    return frozenset(addresses)


def _read(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise MalformedAnswer("the connection ended early")
        data += part
    return data


def ask(
    name: str, server: tuple[str, int] = SERVER, timeout: float = TIMEOUT
) -> frozenset[IPAddress] | None:
    """Ask `server` for the A records of `name`, in the calling thread's namespace.

    Raises:
        OSError, MalformedAnswer
    """
    identifier = secrets.randbelow(1 << 16)
    query = encode_query(identifier, name)
    with socket.create_connection(server, timeout=timeout) as connection:
        connection.sendall(struct.pack("!H", len(query)) + query)
        (length,) = struct.unpack("!H", _read(connection, 2))
        return decode_answer(identifier, _read(connection, length))


class EmbeddedDns:
    """`ports.TaskResolver` over Docker's embedded DNS."""

    def tasks(self, sandbox: Path, service: str, network_name: str) -> frozenset[IPAddress] | None:
        # Qualified by the network: a service may be on several networks of the asking container.
        name = f"tasks.{service}.{network_name}"
        try:
            return in_netns(sandbox, lambda: ask(name))
        except (OSError, ValueError, KernelError):
            return None
