"""A stream of bulk data, then silence: `bulk.py server|client ADDRESS PORT SIZE`.

The server prints how many bytes arrived, and whether they were right.
"""

import hashlib
import socket
import sys
import threading

PIECE = bytes(range(256)) * 1024


def talk(connection: socket.socket) -> None:
    """Exchange some messages until the connection is upgraded."""
    for _ in range(20):
        connection.sendall(b"?")
        connection.recv(1)


def server(address: str, port: int, size: int) -> None:
    """Reads `size` bytes, answers with their digest, and waits for the end."""
    with socket.create_server((address, port)) as listener:
        print("listening", flush=True)
        connection, _ = listener.accept()
    for _ in range(20):
        connection.recv(1)
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
