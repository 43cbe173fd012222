"""Connections with six messages that end soon after they are old enough to move, and a long one.

    short.py server ADDRESS PORT
    short.py client ADDRESS PORT COUNT AGE LONG

The client makes COUNT short connections, eight at a time, each older than AGE seconds at its last
message, and then one with LONG messages, if any. It prints "right" and the greatest age of a short
connection at its end.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor


def serve(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(64):
            connection.sendall(data)


def ask(connection: socket.socket, count: int) -> None:
    for number in range(count):
        question = b"%8d" % number
        connection.sendall(question)
        answer = b""
        while len(answer) < len(question):
            answer += connection.recv(64)
        assert answer == question


def short(where: tuple[str, int], age: float) -> float:
    """Returns the connection's age at its last message, in seconds."""
    begin = time.monotonic()
    with socket.create_connection(where) as connection:
        ask(connection, 2)
        time.sleep(age)
        ask(connection, 1)
    return time.monotonic() - begin


def main() -> None:
    role, address, port, *more = sys.argv[1:]
    where = (address, int(port))
    if role == "server":
        listener = socket.create_server(where, backlog=64)
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    count, age, long = int(more[0]), float(more[1]), int(more[2])
    with ThreadPoolExecutor(8) as pool:
        oldest = max(pool.map(lambda _: short(where, age), range(count)))
    if long:
        with socket.create_connection(where) as connection:
            ask(connection, long)
            time.sleep(age)
            ask(connection, long)
    print(f"right {oldest:.3f}")


if __name__ == "__main__":
    main()
