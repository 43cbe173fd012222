"""The servers of a probe's data: transfers with their hash, echoes, a sink, datagrams.

A client begins with a tag that only those know who have the run's key. So nobody else on the
network can use a probe to send anything.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import selectors
import socket
import struct
import threading
import time
from typing import Any

from plugin.network_test.probe.probe_wire import tag

HEADER = struct.Struct("!16s1sxxxxxxxQ")
"""Tag, what to do, and a number of bytes."""
TRANSFER, ECHO, SINK = b"T", b"E", b"S"
DATAGRAM = 17
"""Bytes in front of a datagram: the tag, and what to do:"""
WHOLE, FRAGMENTS, NOTE = b"W", b"F", b"N"
"""return it unfragmented, return it, or only note it."""
PIECE = 1 << 16
_IDLE = 60.0
"""Seconds after which a silent connection is closed."""
_NOTES = 10_000
CONNECTIONS = 200
"""At the same time at one port, each with a thread."""


def listen(port: int, family: int) -> socket.socket:
    """A TCP server on all addresses of a family. Raises OSError."""
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind(("", port))
    server.listen(1024)
    return server


def accept_all(server: socket.socket, serve: Any, limit: int = CONNECTIONS) -> None:
    """Serve each connection in a thread of its own. Those over the limit are closed: containers
    that do not know the key may make any number, and threads are the host's.
    """
    free = threading.BoundedSemaphore(limit)
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            if server.fileno() < 0:
                return
            # No descriptor is free: others end.
            time.sleep(0.1)
            continue
        if free.acquire(blocking=False):
            threading.Thread(target=_serve, args=(serve, connection, free), daemon=True).start()
        else:
            connection.close()


def _serve(serve: Any, connection: socket.socket, free: threading.BoundedSemaphore) -> None:
    kept = False
    try:
        connection.settimeout(_IDLE)
        kept = bool(serve(connection))
    except Exception:
        pass
    finally:
        if not kept:
            connection.close()
        free.release()


def receive_all(connection: socket.socket, count: int) -> bytes:
    """Raises OSError if the connection ends before."""
    parts = []
    while count:
        part = connection.recv(min(count, PIECE))
        if not part:
            raise OSError("the connection has ended early")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def send_hashed(connection: socket.socket, count: int) -> bytes:
    """Send so many random bytes; their hash."""
    digest = hashlib.sha256()
    while count:
        piece = os.urandom(min(count, PIECE))
        digest.update(piece)
        connection.sendall(piece)
        count -= len(piece)
    return digest.digest()


def receive_hashed(connection: socket.socket, count: int) -> bytes:
    """Receive so many bytes; their hash. Raises OSError."""
    digest = hashlib.sha256()
    while count:
        piece = connection.recv(min(count, 4 * PIECE))
        if not piece:
            raise OSError("the connection has ended early")
        digest.update(piece)
        count -= len(piece)
    return digest.digest()


class Echoes:
    """Returns what connections send, all in one thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, connection: socket.socket) -> None:
        connection.settimeout(_IDLE)
        with self._lock:
            self._selector.register(connection, selectors.EVENT_READ)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(1):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                try:
                    piece = connection.recv(PIECE)
                    if piece:
                        connection.sendall(piece)
                        continue
                except OSError:
                    pass
                self._selector.unregister(connection)
                connection.close()


class DataServer:
    """TCP and UDP servers at one port, for both families where the kernel has them."""

    def __init__(self, port: int, key: bytes) -> None:
        self._port = port
        self._tag = tag(key, "data")
        self._echoes = Echoes()
        self._notes: list[dict[str, str]] = []

    def start(self, *, datagrams: bool = True) -> None:
        """Raises OSError if there is no IPv4 socket."""
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                server = listen(self._port, family)
            except OSError:
                if family == socket.AF_INET:
                    raise
                continue
            threading.Thread(target=accept_all, args=(server, self._stream), daemon=True).start()
            if datagrams:
                threading.Thread(target=self._datagrams, args=(family,), daemon=True).start()

    def noted(self, mark: str) -> list[str]:
        """Addresses from which datagrams with this mark have come."""
        return [note["source"] for note in list(self._notes) if note["mark"] == mark]

    def _stream(self, connection: socket.socket) -> bool:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        given, what, count = HEADER.unpack(receive_all(connection, HEADER.size))
        if not hmac.compare_digest(given, self._tag):
            return False
        if what == TRANSFER:
            connection.sendall(receive_hashed(connection, count))
            connection.sendall(send_hashed(connection, count))
            # Not before the other end has everything: a close could discard it.
            receive_all(connection, 1)
        elif what == ECHO:
            self._echoes.add(connection)
            return True
        elif what == SINK:
            self._sink(connection)
        return False

    def _sink(self, connection: socket.socket) -> None:
        total, begin, end = 0, 0.0, 0.0
        room = bytearray(1 << 20)
        while True:
            count = connection.recv_into(room)
            if not count:
                break
            end = time.monotonic()
            begin = begin or end
            total += count
        connection.sendall(struct.pack("!Qd", total, end - begin))

    def _datagrams(self, family: int) -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as server:
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            server.bind(("", self._port))
            while True:
                datagram, source = server.recvfrom(1 << 16)
                if not hmac.compare_digest(datagram[:16], self._tag):
                    continue
                what = datagram[16:DATAGRAM]
                if what == NOTE:
                    self._note(datagram[DATAGRAM:], str(source[0]))
                elif what in (WHOLE, FRAGMENTS):
                    unfragmented(server, what == WHOLE)
                    try:
                        server.sendto(datagram, source)
                    except OSError:
                        continue

    def _note(self, mark: bytes, source: str) -> None:
        if len(self._notes) < _NOTES:
            self._notes.append({"mark": mark.decode(errors="replace"), "source": source})


_MTU_DISCOVER = {socket.AF_INET: (0, 10), socket.AF_INET6: (41, 23)}
_DONT, _PROBE = 0, 3


def unfragmented(datagrams: socket.socket, whole: bool) -> None:
    """Whether datagrams are sent in one packet or not at all (ip(7), IP_PMTUDISC_PROBE)."""
    level, option = _MTU_DISCOVER[socket.AddressFamily(datagrams.family)]
    datagrams.setsockopt(level, option, _PROBE if whole else _DONT)
    if datagrams.family == socket.AF_INET6:
        datagrams.setsockopt(41, 62, int(whole))  # IPV6_DONTFRAG
