"""Many connections with few messages each.

`many.py server ADDRESS PORT` echoes. `many.py client ADDRESS PORT COUNT` sends one message on each
connection in turn, until it gets a line of input, and then once more. It prints `whole COUNT` if
every answer was right and every connection ended as it should.
"""

from __future__ import annotations

import select
import selectors
import socket
import struct
import sys

QUESTION = struct.Struct("=QQ48x")


def serve(address: str, port: int) -> None:
    listener = socket.create_server((address, port), backlog=4096)
    print("listening", flush=True)
    listener.setblocking(False)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    served = 0
    while not served or len(waiting.get_map()) > 1:
        for key, _ in waiting.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                waiting.register(connection, selectors.EVENT_READ)
                served += 1
                continue
            peer = key.fileobj
            assert isinstance(peer, socket.socket)
            data = peer.recv(QUESTION.size)
            if data:
                peer.sendall(data)
            else:
                waiting.unregister(peer)
                peer.close()


def answer(connection: socket.socket) -> bytes:
    got = b""
    while len(got) < QUESTION.size:
        data = connection.recv(QUESTION.size - len(got))
        if not data:
            sys.exit("a connection ended early")
        got += data
    return got


def ask(address: str, port: int, count: int) -> None:
    connections = [socket.create_connection((address, port)) for _ in range(count)]
    last, turn = False, 0
    while True:
        last = last or bool(select.select([sys.stdin], [], [], 0)[0])
        for number, connection in enumerate(connections):
            question = QUESTION.pack(number, turn)
            connection.sendall(question)
            if answer(connection) != question:
                sys.exit(f"connection {number}, turn {turn}: a wrong answer")
        turn += 1
        if last:
            break
    for connection in connections:
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1):
            sys.exit("bytes after the end")
    print(f"whole {count}")


if sys.argv[1] == "server":
    serve(sys.argv[2], int(sys.argv[3]))
else:
    ask(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
