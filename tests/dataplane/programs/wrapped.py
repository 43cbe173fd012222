"""Messages to and fro between two processes, and then waits in which nothing comes.

    wrapped.py server|client ADDRESS PORT

Each prints how many bytes it has sent and received, and by how many calls. It ends with its stdin.
"""

from __future__ import annotations

import select
import socket
import sys
from typing import Final

ROUNDS: Final = 2000
MESSAGE: Final = b"x" * 300


def main(role: str, address: str, port: int) -> None:
    if role == "server":
        listener = socket.create_server((address, port))
        print("listening", flush=True)
        connection, _ = listener.accept()
    else:
        connection = socket.create_connection((address, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received = calls = 0
    for number in range(ROUNDS):
        if role == "client":
            connection.send(MESSAGE)
        until = (number + 1) * len(MESSAGE)
        while received < until:
            received += len(connection.recv(until - received))
            calls += 1
        if role == "server":
            connection.send(MESSAGE)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    for milliseconds in (0, 1, 300):
        assert poll.poll(milliseconds) == []
    print(ROUNDS * len(MESSAGE), received, calls + ROUNDS, flush=True)
    # The other end still waits, and must not see that this one closes.
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
