"""Sends a file over a connection repeatedly; the other end prints what arrived.

    files.py server ADDRESS PORT COUNT SIZE
    files.py client ADDRESS PORT FILE COUNT

The client prints its page faults per file of the second half.
"""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import sys
import time
from pathlib import Path

ROUNDS = 100
PAUSE = 0.01
"""Rounds of one byte each way, and seconds between two: the connection moves meanwhile."""


def whole(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        some = connection.recv(size - len(data))
        if not some:
            raise EOFError
        data += some
    return data


def serve(address: str, port: int, count: int, size: int) -> None:
    with socket.create_server((address, port)) as listener:
        connection, _ = listener.accept()
    with connection:
        for _ in range(ROUNDS):
            connection.sendall(whole(connection, 1))
        for _ in range(count):
            connection.sendall(hashlib.sha256(whole(connection, size)).digest())


def send(address: str, port: int, name: str, count: int) -> None:
    path = Path(name)
    digest, size = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_size
    with socket.create_connection((address, port)) as connection, path.open("rb") as file:
        for _ in range(ROUNDS):
            connection.sendall(b"x")
            whole(connection, 1)
            time.sleep(PAUSE)
        before = 0
        for number in range(count):
            if number == count // 2:  # The ring's pages are there by now.
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            done = 0
            while done < size:
                done += os.sendfile(connection.fileno(), file.fileno(), done, size - done)
            if whole(connection, len(digest)) != digest:
                raise ValueError("the file arrived changed")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (count // 2))


if __name__ == "__main__":
    role, address, port, *rest = sys.argv[1:]
    if role == "server":
        serve(address, int(port), int(rest[0]), int(rest[1]))
    else:
        send(address, int(port), rest[0], int(rest[1]))
