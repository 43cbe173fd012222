"""A stream of bulk data, then silence: `bulk.py server|client ADDRESS PORT SIZE`.

The client begins the stream when its input has a line. Until then, and for a moment afterwards, the
two exchange messages, so the connection is upgraded before. At the end the client prints whether
all bytes have arrived.
"""

import hashlib
import socket
import sys
import threading
import time

PIECE = bytes(range(256)) * 1024


def talk(connection: socket.socket) -> None:
    """Exchange messages until the input has a line, and as many more as the library needs to see
    what the router had answered by then.
    """
    told = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        told.set()

    threading.Thread(target=listen, daemon=True).start()
    left = 40
    while left:
        left -= told.is_set()
        connection.sendall(b"?")
        connection.recv(1)
        time.sleep(0.005)
    connection.sendall(b".")


def server(address: str, port: int, size: int) -> None:
    """Reads `size` bytes, answers with their digest, and waits for the end."""
    with socket.create_server((address, port)) as listener:
        print("listening", flush=True)
        connection, _ = listener.accept()
    while connection.recv(1) == b"?":
        connection.sendall(b"!")
    digest, left = hashlib.sha256(), size
    while left:
        got = connection.recv(min(left, 1 << 16))
        digest.update(got)
        left -= len(got)
    connection.sendall(digest.digest())
    connection.recv(1)


def client(address: str, port: int, size: int) -> None:
    """Send `size` bytes in pieces, check the digest, and wait in recv() until input ends."""
    connection = socket.create_connection((address, port))
    talk(connection)
    digest, left = hashlib.sha256(), size
    while left:
        piece = PIECE[: min(left, len(PIECE))]
        digest.update(piece)
        connection.sendall(piece)
        left -= len(piece)
    answer = connection.recv(32, socket.MSG_WAITALL)
    print("right" if answer == digest.digest() else "wrong", flush=True)
    threading.Thread(target=connection.recv, args=(1,), daemon=True).start()
    sys.stdin.read()
    connection.close()


if __name__ == "__main__":
    {"server": server, "client": client}[sys.argv[1]](
        sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    )
