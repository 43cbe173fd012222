"""What a probe can be asked to do to another one: resolve, connect, transfer, measure."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from plugin.network_test.probe.data_server import (
    DATAGRAM,
    ECHO,
    FRAGMENTS,
    HEADER,
    SINK,
    TRANSFER,
    WHOLE,
    receive_all,
    receive_hashed,
    send_hashed,
    unfragmented,
)
from plugin.network_test.probe.own_interfaces import interface_of
from plugin.network_test.probe.probe_wire import IDENTITY, tag

_ATTEMPTS = 5
_ANSWER = 1.0
"""Seconds that a datagram's answer may take."""


def connect(to: str, port: int, seconds: float) -> socket.socket:
    """A TCP connection to an address of either family. Raises OSError."""
    made = socket.create_connection((to, port), timeout=seconds)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def resolve(name: str) -> list[str]:
    """The IPv4 addresses of a name. Raises OSError."""
    found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    return sorted({str(each[4][0]) for each in found})


def identities(to: str, count: int, seconds: float, enough: int) -> dict[str, Any]:
    """Who answers at an address, of `count` connections or until so many have answered."""
    end = time.monotonic() + seconds
    answers: dict[str, int] = {}
    failures: list[str] = []
    for _ in range(count):
        if time.monotonic() > end or len(answers) >= enough or len(failures) >= 3:
            break
        try:
            with socket.create_connection((to, IDENTITY), timeout=5) as connection:
                name = connection.makefile().readline(200).strip()
            answers[name] = answers.get(name, 0) + 1
        except OSError as error:
            failures.append(str(error))
    return {"answers": answers, "failures": failures}


def transfer(key: bytes, to: str, port: int, count: int, seconds: float) -> dict[str, Any]:
    """Send so many bytes and get as many; whether the hashes are right in both directions."""
    with connect(to, port, seconds) as connection:
        connection.sendall(HEADER.pack(tag(key, "data"), TRANSFER, count))
        sent = send_hashed(connection, count)
        there = receive_all(connection, 32) == sent
        got = receive_hashed(connection, count)
        back = receive_all(connection, 32) == got
        connection.sendall(b".")
    return {"there": there, "back": back}


def throughput(key: bytes, to: str, port: int, seconds: float) -> dict[str, Any]:
    """Bits per second of one TCP connection, as the receiver measures."""
    piece = os.urandom(1 << 18)
    with connect(to, port, 10 + seconds) as connection:
        connection.sendall(HEADER.pack(tag(key, "data"), SINK, 0))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
        total, took = struct.unpack("!Qd", receive_all(connection, 16))
    return {"bytes": total, "bits_per_second": total * 8 / took if took > 0 else 0.0}


def round_trips(key: bytes, to: str, port: int, count: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of round trips of 64 bytes over one TCP connection."""
    times = []
    message = os.urandom(64)
    end = time.monotonic() + seconds
    with connect(to, port, seconds) as connection:
        connection.sendall(HEADER.pack(tag(key, "data"), ECHO, 0))
        for number in range(count + 10):
            begin = time.perf_counter()
            connection.sendall(message)
            if receive_all(connection, 64) != message:
                raise OSError("an echo is not what was sent")
            if number >= 10:
                times.append((time.perf_counter() - begin) * 1000)
            if time.monotonic() > end:
                break
    times.sort()
    if not times:
        raise OSError("no round trip in time")
    return {
        "median": times[len(times) // 2],
        "p99": times[min(len(times) - 1, len(times) * 99 // 100)],
        "least": times[0],
    }


def _returns(sender: socket.socket, datagram: bytes) -> bool:
    """Whether a datagram comes back; one may be lost."""
    for _ in range(_ATTEMPTS):
        sender.send(datagram)
        end = time.monotonic() + _ANSWER
        while time.monotonic() < end:
            sender.settimeout(max(end - time.monotonic(), 0.01))
            try:
                if sender.recv(1 << 16) == datagram:
                    return True
            except socket.timeout:  # noqa: UP041 — not yet the same in Python 3.9
                break
    return False


def _sender(to: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    sender = socket.socket(family, socket.SOCK_DGRAM)
    sender.connect((to, port))
    return sender


def datagrams(key: bytes, to: str, port: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Which sizes of UDP datagrams, fragmented ones included, do not come back unchanged."""
    lost = []
    with _sender(to, port) as sender:
        unfragmented(sender, False)
        for size in sizes:
            head = tag(key, "data") + FRAGMENTS
            if not _returns(sender, head + os.urandom(max(size - DATAGRAM, 0))):
                lost.append(size)
    return {"lost": lost}


def mtu_edges(key: bytes, to: str, port: int) -> dict[str, Any]:
    """Whether the largest packet passes unfragmented, and one with a byte more is refused here."""
    with _sender(to, port) as sender:
        unfragmented(sender, True)
        own = interface_of(str(sender.getsockname()[0]))
        headers = (40 if sender.family == socket.AF_INET6 else 20) + 8
        largest = own["mtu"] - headers
        head = tag(key, "data") + WHOLE

        def passes(size: int) -> bool:
            return _returns(sender, head + os.urandom(size - DATAGRAM))

        exact = passes(largest)
        passing = largest if exact else _largest_passing(passes, largest)
        refused = False
        try:
            sender.send(head + bytes(largest + 1 - DATAGRAM))
        except OSError as error:
            refused = error.errno == errno.EMSGSIZE
    return {
        "mtu": own["mtu"],
        "exact": exact,
        "refused": refused,
        "passing": passing + headers if passing else 0,
    }


def _largest_passing(passes: Any, limit: int) -> int:
    """The largest of some common sizes that passes; 0: none does."""
    headers = 28
    for mtu in (8950, 8900, 1450, 1430, 1400, 1350, 1280, 1200, 576):
        if mtu - headers < limit and passes(mtu - headers):
            return mtu - headers
    return 0
