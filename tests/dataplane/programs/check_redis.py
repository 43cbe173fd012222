"""Writes keys of all sizes in pipelines and reads them back: ADDRESS PORT."""

import random
import socket
import sys

chance = random.Random(7)
stream = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
answers = stream.makefile("rb")


def command(*words: bytes) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


for _turn in range(30):
    values = {
        b"key:%d" % number: chance.randbytes(chance.choice((1, 100, 4000, 60000)))
        for number in range(30)
    }
    stream.sendall(b"".join(command(b"SET", key, value) for key, value in values.items()))
    for _ in values:
        assert answers.readline() == b"+OK\r\n"
    for key in values:
        stored = values[key]
        stream.sendall(command(b"GET", key))
        assert answers.readline() == b"$%d\r\n" % len(stored)
        assert answers.read(len(stored) + 2) == stored + b"\r\n"
