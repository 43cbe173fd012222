"""A stream of numbered records, each with a mark that a capture finds in the clear.

    marked.py server PORT
    marked.py client ADDRESS PORT MARK

The client connects, tries that again while it fails, and sends records at a moderate rate until it
gets a line of input. The server checks that each number is the next one. Both print `whole N` after
N right records and the end, or what happened in its place.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time

MARK = 24
RECORD = struct.Struct(f"<{MARK}sQ")
END = (1 << 64) - 1
BATCH = 32
PAUSE = 0.05


def server(port: int) -> str:
    listener = socket.create_server(("", port))
    print("listening", flush=True)
    connection, _ = listener.accept()
    expected, left = 0, b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError as error:
            return f"failed after {expected}: {error}"
        if not data:
            return f"gap after {expected}"
        left += data
        whole = len(left) // RECORD.size * RECORD.size
        for _, number in RECORD.iter_unpack(left[:whole]):
            if number == END:
                connection.sendall(b"%d\n" % expected)
                return f"whole {expected}"
            if number != expected:
                return f"wrong {number} after {expected}"
            expected += 1
        left = left[whole:]


def connect(address: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((address, port), timeout=10)
        except OSError:
            time.sleep(0.2)


def client(address: str, port: int, mark: bytes) -> str:
    connection = connect(address, port)
    connection.settimeout(None)
    print("connected", flush=True)
    told = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        told.set()

    threading.Thread(target=listen, daemon=True).start()
    number = 0
    try:
        while not told.is_set():
            batch = range(number, number + BATCH)
            connection.sendall(b"".join(RECORD.pack(mark, each) for each in batch))
            number += BATCH
            time.sleep(PAUSE)
        connection.sendall(RECORD.pack(mark, END))
        answer = connection.makefile().readline()
    except OSError as error:
        return f"failed after {number}: {error}"
    return f"whole {number}" if answer == f"{number}\n" else f"{answer!r} after {number}"


if __name__ == "__main__":
    if sys.argv[1] == "server":
        print(server(int(sys.argv[2])))
    else:
        print(client(sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()))
