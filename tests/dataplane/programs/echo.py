"""An echo server that waits in a chosen way, and a client that checks it.

    echo.py threads|select|poll|epoll ADDRESS PORT
    echo.py client ADDRESS PORT

The client runs until standard input ends, and then prints how many exchanges were right.
"""

import random
import select
import selectors
import socket
import sys
import threading

PIECE = 65536


def echo_blocking(connection: socket.socket) -> None:
    """Of one connection, to its end."""
    try:
        while data := connection.recv(PIECE):
            connection.sendall(data)
    except OSError:
        pass
    connection.close()


def echo_ready(selector: selectors.BaseSelector, listener: socket.socket) -> None:
    """Of all connections, each as its selector says."""
    waiting: dict[socket.socket, bytes] = {}
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, events in selector.select():
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is listener:
                accepted, _ = listener.accept()
                accepted.setblocking(False)
                waiting[accepted] = b""
                selector.register(accepted, selectors.EVENT_READ)
                continue
            try:
                if events & selectors.EVENT_READ and len(waiting[connection]) < 4 * PIECE:
                    data = connection.recv(PIECE)
                    if not data:
                        raise ConnectionResetError
                    waiting[connection] += data
                if waiting[connection]:
                    waiting[connection] = waiting[connection][
                        connection.send(waiting[connection]) :
                    ]
            except BlockingIOError:
                pass
            except OSError:
                selector.unregister(connection)
                del waiting[connection]
                connection.close()
                continue
            wanted = selectors.EVENT_READ
            if waiting[connection]:
                wanted |= selectors.EVENT_WRITE
            selector.modify(connection, wanted)


def check(connection: socket.socket) -> None:
    """Exchanges of random sizes until standard input ends."""
    chance = random.Random(7)
    count = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        data = chance.randbytes(chance.choice((1, 100, 5000, 100_000)))
        connection.sendall(data)
        got = b""
        while len(got) < len(data):
            more = connection.recv(len(data) - len(got))
            if not more:
                sys.exit("the connection ended")
            got += more
        if got != data:
            sys.exit("other bytes came back")
        count += 1
    print(count)


def main() -> None:
    """As the arguments say."""
    role, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if role == "client":
        check(socket.create_connection((address, port), timeout=20))
        return
    listener = socket.create_server((address, port), backlog=64)
    print("listening", flush=True)
    if role == "threads":
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=echo_blocking, args=(connection,), daemon=True).start()
    if role == "select":
        echo_ready(selectors.SelectSelector(), listener)
    elif role == "poll":
        echo_ready(selectors.PollSelector(), listener)
    else:
        echo_ready(selectors.EpollSelector(), listener)


main()
