"""Several clients at once each store and read values of their own: ADDRESS PORT."""

import random
import socket
import sys
import threading

failed: list[str] = []


def client(number: int) -> None:
    chance = random.Random(number)
    stream = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
    answers = stream.makefile("rb")
    for turn in range(150):
        key = b"%d:%d" % (number, turn)
        value = chance.randbytes(chance.choice((1, 200, 5000, 100000)))
        stream.sendall(b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value))
        assert answers.readline() == b"STORED\r\n"
        stream.sendall(b"get %s\r\n" % key)
        assert answers.readline() == b"VALUE %s 0 %d\r\n" % (key, len(value))
        assert answers.read(len(value) + 2) == value + b"\r\n"
        assert answers.readline() == b"END\r\n"


def guarded(number: int) -> None:
    try:
        client(number)
    except BaseException as error:
        failed.append(repr(error))
        raise


threads = [threading.Thread(target=guarded, args=(number,)) for number in range(12)]
for each in threads:
    each.start()
for each in threads:
    each.join()
sys.exit(1 if failed else 0)
