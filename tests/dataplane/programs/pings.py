"""Small messages to and fro on many connections between two processes, each an event loop.

    pings.py server ADDRESS PORT
    pings.py client ADDRESS PORT COUNT RATE
        lines on stdin: so many connections are busy from now; +N: N more, which are busy

RATE is round trips per second of each busy connection, 0: as fast as possible. A busy connection's
answers are checked. The client prints "right" when its stdin ends.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time


def serve(where: tuple[str, int]) -> None:
    listener = socket.create_server(where, backlog=1024)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    print("listening", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                accepted, _ = listener.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(accepted, selectors.EVENT_READ)
                continue
            assert isinstance(key.fileobj, socket.socket)
            data = key.fileobj.recv(4096)
            if data:
                key.fileobj.sendall(data)
            else:
                selector.unregister(key.fileobj)
                key.fileobj.close()


def ask(where: tuple[str, int], count: int, rate: float) -> None:
    selector = selectors.DefaultSelector()
    connections: list[socket.socket] = []
    numbers: dict[socket.socket, int] = {}
    awaited: set[socket.socket] = set()
    due: dict[socket.socket, float] = {}

    def connect(count: int) -> None:
        for _ in range(count):
            connection = socket.create_connection(where)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection, selectors.EVENT_READ)
            connections.append(connection)
            numbers[connection], due[connection] = 0, 0.0

    connect(count)
    selector.register(sys.stdin, selectors.EVENT_READ)
    busy = count
    while True:
        now = time.monotonic()
        for connection in connections[:busy]:
            if connection not in awaited and due[connection] <= now:
                connection.sendall(numbers[connection].to_bytes(64, "big"))
                awaited.add(connection)
                due[connection] = now + (1 / rate if rate else 0)
        for key, _ in selector.select(0.001 if rate else None if busy else 0.1):
            if not isinstance(key.fileobj, socket.socket):
                line = sys.stdin.readline()
                if not line:
                    print("right", flush=True)
                    return
                if line.startswith("+"):
                    connect(int(line))
                    busy = len(connections)
                else:
                    busy = int(line)
                continue
            answer = key.fileobj.recv(4096)
            assert answer == numbers[key.fileobj].to_bytes(64, "big"), answer
            numbers[key.fileobj] += 1
            awaited.discard(key.fileobj)


if __name__ == "__main__":
    role, address, port, *more = sys.argv[1:]
    if role == "server":
        serve((address, int(port)))
    else:
        ask((address, int(port)), int(more[0]), float(more[1]))
