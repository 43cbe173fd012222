"""One connection that lives long enough to move, and then carries much, in both directions at once.

echo.py server ADDRESS PORT returns what it gets, of one connection echo.py client ADDRESS PORT
BYTES SEED when it gets input, sends random bytes, and fails unless the same come back. If the input
is the line `rest`, it says `rests`, and its connection is idle until the next line.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import threading

CHUNK = 30_011


def server(address: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as listener:
        connection, _ = listener.accept()
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)


def client(address: str, port: int, size: int, seed: int) -> None:
    with socket.create_connection((address, port)) as connection:
        # Exchange bytes until the test says that the connection has moved.
        while not select.select([sys.stdin], [], [], 0.02)[0]:
            connection.sendall(b"ping")
            assert connection.recv(4, socket.MSG_WAITALL) == b"ping"
        if sys.stdin.readline() == "rest\n":
            print("rests", flush=True)
            sys.stdin.readline()
        content = random.Random(seed).randbytes(size)

        def send() -> None:
            for start in range(0, size, CHUNK):
                connection.sendall(content[start : start + CHUNK])

        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        # Neither end is closed before, because the rest of a half-closed connection may use TCP.
        while len(received) < size and (data := connection.recv(65536)):
            received += data
        sender.join()
        assert received == content, f"{len(received)} of {size} bytes, and not the same"
    print("the same")


if __name__ == "__main__":
    if sys.argv[1] == "server":
        server(sys.argv[2], int(sys.argv[3]))
    else:
        client(sys.argv[2], *map(int, sys.argv[3:6]))
