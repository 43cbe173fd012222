"""Many connections to a redis server that ask it for echoes all the time, and check each answer.

    echoes.py ADDRESS COUNT RENEWAL FILE

A connection that is lost is dialled again. With a RENEWAL a connection is also closed and dialled
again when it is so many seconds old, between two questions. FILE has, once per second, "right" or
"wrong" (an answer was), the answers so far, the connections that were lost, and the longest time in
seconds that an answer took or has taken so far, of connections that weren't lost.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
import time

PORT = 6379
PATIENCE = 20.0
"""Seconds for a connection to be made."""


class Connection:
    """One of the connections, over all sockets that it has had."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.turn = 0
        self.socket: socket.socket | None = None
        self.due = 0.0
        self.asked = self.since = 0.0
        self.expected = self.heard = b""


class Load:
    """All connections, and what is known about them."""

    def __init__(self, address: str, count: int, renewal: float) -> None:
        self.address = address
        self.renewal = renewal
        self.selector = selectors.DefaultSelector()
        self.connections = [Connection(number) for number in range(count)]
        self.done = self.lost = 0
        self.longest = 0.0
        self.said = "right"

    def dial(self, one: Connection) -> None:
        """Connect and ask; later, if that fails."""
        try:
            one.socket = socket.create_connection((self.address, PORT), PATIENCE)
        except OSError:
            self.lost += 1
            one.due = time.monotonic() + 0.5
            return
        one.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(one.socket, selectors.EVENT_READ, one)
        # Not all at the same time.
        one.since = time.monotonic() - self.renewal * one.number / len(self.connections)
        self.ask(one)

    def close(self, one: Connection) -> None:
        assert one.socket is not None
        self.selector.unregister(one.socket)
        one.socket.close()
        one.socket = None
        one.due = 0.0

    def ask(self, one: Connection) -> None:
        """Send a question whose answer is the end of the question."""
        assert one.socket is not None
        one.turn += 1
        text = b"%d-%d-" % (one.number, one.turn) + b"x" * (one.turn % 300)
        one.expected = b"$%d\r\n%s\r\n" % (len(text), text)
        one.heard = b""
        one.asked = time.monotonic()
        try:
            one.socket.sendall(b"*2\r\n$4\r\nECHO\r\n" + one.expected)
        except OSError:
            self.lost += 1
            self.close(one)

    def hear(self, one: Connection) -> None:
        assert one.socket is not None
        try:
            data = one.socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.lost += 1
            self.close(one)
            return
        one.heard += data
        if one.heard != one.expected[: len(one.heard)]:
            self.said = "wrong"
            print(f"connection {one.number}: {one.heard!r} is not {one.expected!r}", flush=True)
        if len(one.heard) < len(one.expected):
            return
        now = time.monotonic()
        self.done += 1
        self.longest = max(self.longest, now - one.asked)
        if self.renewal and now - one.since > self.renewal:
            self.close(one)
        else:
            self.ask(one)

    def report(self, file: str) -> None:
        now = time.monotonic()
        waiting = [now - one.asked for one in self.connections if one.socket]
        longest = max([self.longest, *waiting])
        with open(f"{file}.new", "w") as new:  # noqa: PTH123 - pathlib is not in every container
            new.write(f"{self.said} {self.done} {self.lost} {longest:.1f}\n")
        os.replace(f"{file}.new", file)  # noqa: PTH105

    def run(self, file: str) -> None:
        reported = 0.0
        while True:
            now = time.monotonic()
            for one in self.connections:
                if one.socket is None and one.due <= now:
                    self.dial(one)
            if now - reported >= 1:
                reported = now
                self.report(file)
            for key, _ in self.selector.select(0.2):
                # An earlier one of these events may have closed it.
                if key.data.socket is key.fileobj:
                    self.hear(key.data)


if __name__ == "__main__":
    Load(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run(sys.argv[4])
