"""A sender whose peer stops reading for a while: `stalled.py server|client ADDRESS PORT`.

The server reads until it gets a line of input, then reads nothing until it gets another one. The
client sends until it gets a line of input. Both print how many bytes there were.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

PIECE = 1 << 14


def told() -> threading.Event:
    """Set by a line of input."""
    event = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        event.set()

    threading.Thread(target=listen, daemon=True).start()
    return event


def client(address: tuple[str, int]) -> int:
    stop, count = told(), 0
    with socket.create_connection(address) as connection:
        while not stop.is_set():
            connection.sendall(bytes(PIECE))
            count += PIECE
    return count


def server(address: tuple[str, int]) -> int:
    with socket.create_server(address) as listener:
        print("listening", flush=True)
        connection, _ = listener.accept()
    stall, count = told(), 0
    with connection:
        while not stall.is_set():
            count += len(connection.recv(PIECE))
            # Slowly, so that the sender has to wait for room all the time.
            time.sleep(0.001)
        sys.stdin.readline()
        while data := connection.recv(1 << 16):
            count += len(data)
    return count


if __name__ == "__main__":
    end = client if sys.argv[1] == "client" else server
    print(end((sys.argv[2], int(sys.argv[3]))), flush=True)
