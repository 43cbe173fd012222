"""Data that hostile processes put into others' sockets: descriptors whose last close() waits, and
more bytes than can be read.
"""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from driver.kernel.namespace import in_netns

SECONDS: Final = 600
"""The time in seconds for which close() waits."""


@dataclass
class Lingering:
    """A TCP connection whose closing end has unread bytes.

    The last process that closes `closes` waits.
    """

    listener: socket.socket
    reader: socket.socket
    closes: socket.socket

    def let_go(self, *, sent: bool) -> None:
        """Close this process's end; if it was sent to another process, that one closes last."""
        if not sent:
            self.closes.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.closes.close()

    def close(self) -> None:
        """Leave nothing that could make a process wait."""
        # The reset ends the wait of the process that closed the other end.
        self.reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for opened in (self.reader, self.listener):
            opened.close()


def lingering(namespace: int) -> Lingering:
    """Make such a connection in a namespace."""

    def make() -> Lingering:
        listener = socket.create_server(("127.0.0.1", 0))
        closes = socket.create_connection(listener.getsockname())
        reader, _ = listener.accept()
        closes.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                closes.send(b"x" * 65536)
        closes.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, SECONDS))
        return Lingering(listener, reader, closes)

    return in_netns(namespace, make)


def send(through: socket.socket, data: bytes, *descriptors: int) -> bool:
    """Send descriptors; return false if the kernel refuses them."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    try:
        through.sendmsg([data], [rights], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except PermissionError:
        return False
    return True


@contextlib.contextmanager
def filled(bell: socket.socket, writers: int = 2) -> Iterator[None]:
    """Start programs that fill a socket as fast as it is emptied."""
    bell.setblocking(True)
    many = [
        subprocess.Popen(["cat", "/dev/zero"], stdout=bell.fileno(), stderr=subprocess.DEVNULL)
        for _ in range(writers)
    ]
    try:
        yield
    finally:
        for program in many:
            program.kill()
            program.wait()


def refuses() -> bool:
    """Whether this kernel lets a socket refuse descriptors (Linux 6.16)."""
    with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, 83, 0)
        return True
    return False
