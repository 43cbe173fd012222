"""Two ends that send each other numbers, and print the outcome.

    stream.py server ADDRESS PORT [CONNECTIONS]
    stream.py client ADDRESS PORT SECONDS [CONNECTIONS [told]]

Each end sends 0, 1, 2, … as eight bytes each until its time is over, then END, and checks that it
receives the same. With `told` the client's SECONDS begin with a line of its input, or its end, so a
test may take its time before, however busy the machine is. For each connection it prints `whole N`
(everything arrived, the end included), `reset N` (the connection failed after N right numbers),
`gap N` (it ended as if everything had arrived, and it had not) or `wrong N`.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time

END = (1 << 64) - 1
RUN = 512
"""Numbers that are sent at once."""


class End:
    """When senders end."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    def when_told(self, seconds: float) -> None:
        self.at = float("inf")

        def listen() -> None:
            sys.stdin.readline()
            self.at = time.monotonic() + seconds

        threading.Thread(target=listen, daemon=True).start()


def send(
    connection: socket.socket, end: End, stop: threading.Event, failed: threading.Event
) -> None:
    position = 0
    try:
        while time.monotonic() < end.at and not stop.is_set():
            connection.sendall(struct.pack(f"<{RUN}Q", *range(position, position + RUN)))
            position += RUN
            if position % (64 * RUN) == 0:
                # Some connections have pauses.
                time.sleep(0.01)
        connection.sendall(struct.pack("<Q", END))
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        # The kernel tells a reset once: whoever reads after that sees an end.
        failed.set()


def receive(connection: socket.socket) -> str:
    expected = 0
    left = b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except OSError:
            return f"reset {expected}"
        if not data:
            return f"gap {expected}"
        data = left + data
        whole = len(data) // 8
        left = data[whole * 8 :]
        for number in struct.unpack(f"<{whole}Q", data[: whole * 8]):
            if number == END:
                return f"whole {expected}"
            if number != expected:
                return f"wrong {expected}"
            expected += 1


def both(connection: socket.socket, end: End, *, answers: bool) -> str:
    """Whoever answers ends when it has heard the end."""
    stop, failed = threading.Event(), threading.Event()
    sender = threading.Thread(target=send, args=(connection, end, stop, failed), daemon=True)
    sender.start()
    said = receive(connection)
    if answers or not said.startswith("whole"):
        stop.set()
    sender.join(30)
    connection.close()
    return said.replace("gap", "reset") if failed.is_set() else said


def main() -> None:
    role, address, port, *more = sys.argv[1:]
    if role == "server":
        count = int(more[0]) if more else 1
        listener = socket.create_server((address, int(port)), backlog=4096)
        print("listening", flush=True)
        end = End(3600)
        connections = [listener.accept()[0] for _ in range(count)]
    else:
        count = int(more[1]) if len(more) > 1 else 1
        end = End(float(more[0]))
        if more[2:] == ["told"]:
            end.when_told(float(more[0]))
        connections = [socket.create_connection((address, int(port))) for _ in range(count)]
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda c=each: said.append(both(c, end, answers=role == "server")))
        for each in connections
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(said), flush=True)


if __name__ == "__main__":
    main()
