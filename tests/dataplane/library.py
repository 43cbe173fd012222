"""A library in Python: speaks the protocol for sockets of the test's own process, and reports
answers.
"""

from __future__ import annotations

import array
import os
import socket
import weakref
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeVar

from dataplane.router import layout
from dataplane.router import library_wire as wire
from dataplane.router.library_wire import Address
from dataplane.router.verbs_wire import MAX_MESSAGE, VerbsGrant, VerbsMessage
from driver.kernel.namespace import in_netns
from testbed.descriptors import close_unless_reused
from testbed.patience import patience

SO_COOKIE: Final = 57
M = TypeVar("M")


def cookie_of(tcp: socket.socket) -> int:
    """The kernel's cookie of a socket."""
    return int.from_bytes(tcp.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


def addresses_of(tcp: socket.socket) -> tuple[Address, Address]:
    """The local and the remote address of a socket."""
    found = []
    for name in (tcp.getsockname(), tcp.getpeername()):
        ip = ip_address(name[0])
        found.append(Address(getattr(ip, "ipv4_mapped", None) or ip, name[1]))
    return found[0], found[1]


@dataclass(eq=False)
class Library:
    """One process's connection to the router, made in a container's namespace."""

    connection: socket.socket
    numbers: int = 0
    asked: dict[int, wire.Request] = field(default_factory=dict)
    hearing: dict[tuple[int, int], int] = field(default_factory=dict)
    """Arena and own side to the end that hears bell 0."""
    ringing: dict[tuple[int, int], int] = field(default_factory=dict)
    """Arena and other side to the end that rings its bell 0."""
    received: list[int] = field(default_factory=list)
    """All received descriptors."""

    @classmethod
    def connect(cls, path: Path, namespace: int | Path | None, *, hello: bool = True) -> Library:
        """Connect as a process in that namespace does."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            made.connect(str(path))
            return made

        made = cls(make() if namespace is None else in_netns(namespace, make))
        made.connection.settimeout(patience(3))
        if hello:
            made.say(wire.Hello(wire.PROTOCOL_VERSION, layout.VERSION, "0123abcd"))
        return made

    def say(self, message: wire.Message | VerbsMessage, *descriptors: int) -> None:
        """Send a message."""
        self.raw(wire.codec.pack(message), *descriptors)

    def raw(self, data: bytes, *descriptors: int) -> None:
        """Send any bytes."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        self.connection.sendmsg([data], [rights] if descriptors else [])

    def hear(self, kind: type[M]) -> tuple[M, int | None]:
        """Receive the next message, which must be of this kind, and its descriptor."""
        while True:
            message, descriptors = self.hear_all()
            if isinstance(message, wire.Grant | VerbsGrant) and len(descriptors) > 1:
                self.hearing[message.arena, message.side] = descriptors.pop()
            if isinstance(message, wire.Ring) and kind is not wire.Ring and not message.index:
                # The end that rings bell 0 arrives without a request.
                self.ringing[message.arena, message.side] = descriptors[0]
                continue
            assert isinstance(message, kind), message
            assert len(descriptors) <= 1
            return message, descriptors[0] if descriptors else None

    def hear_all(self) -> tuple[wire.Message | VerbsMessage, list[int]]:
        """Receive the next message and its descriptors."""
        data, descriptors, _, _ = socket.recv_fds(self.connection, MAX_MESSAGE + 1, 4)
        assert data, "the router has closed the connection"
        self.received += descriptors
        for descriptor in descriptors:
            weakref.finalize(self, close_unless_reused, descriptor, os.fstat(descriptor).st_ino)
        return wire.codec.unpack(data), descriptors

    def rings(self, arena: int, side: int) -> int:
        """The end that rings bell 0 of the other side, `side`."""
        while (arena, side) not in self.ringing:
            message, descriptors = self.hear_all()
            assert isinstance(message, wire.Ring), message
            self.ringing[message.arena, message.side] = descriptors[0]
        return self.ringing[arena, side]

    def ask(self, tcp: socket.socket, **changes: object) -> int:
        """Request a connection; return its number."""
        self.numbers += 1
        local, remote = addresses_of(tcp)
        fields = {
            "connection": self.numbers,
            "cookie": cookie_of(tcp),
            "local": local,
            "remote": remote,
            **changes,
        }
        self.say(wire.Request(**fields))  # type: ignore[arg-type]
        return self.numbers

    def silent(self, seconds: float = 0.15) -> bool:
        """Whether no message arrives for a while."""
        before = self.connection.gettimeout()
        self.connection.settimeout(seconds)
        try:
            return not self.connection.recv(256, socket.MSG_PEEK) and False
        except TimeoutError:
            return True
        finally:
            self.connection.settimeout(before)

    def closed(self) -> bool:
        """Whether the router ends the connection; messages before are discarded."""
        try:
            while self.connection.recv(256):
                pass
        except ConnectionResetError:
            return True
        return True

    def close(self) -> None:
        self.connection.close()

    def discard(self) -> None:
        """Close the connection and all received descriptors now, before the test ends.

        This is for tests that receive many of them and close none themselves.
        """
        self.close()
        for each in self.received:
            os.close(each)
        self.received.clear()


def listen(namespace: int | Path, address: str, port: int = 7700) -> socket.socket:
    """A listening TCP socket inside a namespace; with `::` for both families."""
    six = ":" in address
    family = socket.AF_INET6 if six else socket.AF_INET
    return in_netns(
        namespace,
        lambda: socket.create_server((address, port), family=family, dualstack_ipv6=six),
    )


def dial(namespace: int | Path, address: str, port: int = 7700) -> socket.socket:
    """A TCP connection from a namespace."""
    return in_netns(
        namespace, lambda: socket.create_connection((address, port), timeout=patience(5))
    )


def read_at(memory: int, offset: int, length: int) -> bytes:
    """Read bytes of an arena at an offset."""
    return os.pread(memory, length, offset)
