"""A server whose commands answer, as with CGI, in every way that Python has; and its client.

`commands.py server PORT` ends after a connection that says "end". The client is
`commands.py client ADDRESS PORT`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from typing import Any

WORDS = b"from the child\n"
ECHO = ["echo", WORDS.decode().strip()]
READ = 'read line; test "$line" = question'


def to_shell(connection: socket.socket, command: str) -> str:
    """A command whose output goes to the connection, which it inherits."""
    os.set_inheritable(connection.fileno(), True)
    return f"{command} >&{connection.fileno()}"


def forked(connection: socket.socket, then: str) -> None:
    child = os.fork()
    if not child:
        os.dup2(connection.fileno(), 1)
        getattr(os, then)(ECHO[0] if then == "execvp" else "/bin/echo", ECHO)
    assert os.waitpid(child, 0)[1] == 0


def spawned(connection: socket.socket, spawn: str) -> None:
    actions = [(os.POSIX_SPAWN_DUP2, connection.fileno(), 1)]
    path = "/bin/echo" if spawn == "posix_spawn" else "echo"
    child = getattr(os, spawn)(path, ECHO, os.environ, file_actions=actions)
    assert os.waitpid(child, 0)[1] == 0


async def by_asyncio(connection: Any) -> None:
    process = await asyncio.create_subprocess_exec(*ECHO, stdout=connection)
    assert await process.wait() == 0


def from_other(connection: socket.socket) -> None:
    connection.sendall(WORDS)


def by_multiprocessing(connection: socket.socket, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=from_other, args=(connection,))
    process.start()
    process.join()
    assert process.exitcode == 0


def answer(connection: Any, way: str) -> None:
    """Have another process say WORDS."""
    shell = ["sh", "-c", f"{READ} && echo {ECHO[1]}"]
    number = connection.fileno()
    if way == "stdout":
        subprocess.run(ECHO, stdout=connection, check=True)
    elif way == "stdin":
        done = subprocess.run(["sh", "-c", READ], stdin=connection, check=False)
        connection.sendall(WORDS if done.returncode == 0 else b"not read\n")
    elif way == "stderr":
        subprocess.run(["sh", "-c", f"echo {ECHO[1]} >&2"], stderr=connection, check=True)
    elif way == "all":
        subprocess.run(shell, stdin=connection, stdout=connection, stderr=connection, check=True)
    elif way == "file":
        with connection.makefile("wb", buffering=0) as file:
            subprocess.run(ECHO, stdout=file, check=True)
    elif way == "pass_fds":
        command = f"echo {ECHO[1]} >&{number}"
        subprocess.run(["sh", "-c", command], pass_fds=[number], check=True)
    elif way == "open":
        command = to_shell(connection, f"echo {ECHO[1]}")
        subprocess.run(command, shell=True, close_fds=False, check=True)
    elif way == "preexec":
        subprocess.run(ECHO, stdout=connection, preexec_fn=os.getpid, check=True)
    elif way == "session":
        subprocess.run(ECHO, stdout=connection, start_new_session=True, check=True)
    elif way == "chain":
        subprocess.run(["sh", "-c", f"sh -c 'echo {ECHO[1]}'"], stdout=connection, check=True)
    elif way == "system":
        assert os.system(to_shell(connection, f"echo {ECHO[1]}")) == 0
    elif way == "asyncio":
        asyncio.run(by_asyncio(connection))
    elif way.startswith("exec"):
        forked(connection, way)
    elif way.startswith("posix"):
        spawned(connection, way)
    else:
        by_multiprocessing(connection, way)


WAYS = (
    *("stdout", "stdin", "stderr", "all", "file", "pass_fds", "open", "preexec", "session"),
    *("chain", "system", "asyncio", "execv", "execvp", "posix_spawn", "posix_spawnp"),
    *("fork", "spawn", "forkserver"),
)


def lines_of(connection: socket.socket) -> str:
    """A line, read byte by byte: what follows may be the child's."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line.decode().strip()


def serve(port: int) -> None:
    listener = socket.create_server(("0.0.0.0", port))
    while True:
        connection, _ = listener.accept()
        with connection:
            while (line := lines_of(connection)) == "y":
                connection.sendall(b"y\n")
            if line == "end":
                return
            if line in WAYS:
                answer(connection, line)
                connection.sendall(b"from the parent\n")


def ask(address: str, port: int) -> None:
    for way in WAYS:
        with socket.create_connection((address, port), 20) as connection:
            for _ in range(20):
                connection.sendall(b"y\n")
                assert connection.recv(2) == b"y\n"
                time.sleep(0.001)
            # A command that reads finds its line behind the one that names it.
            question = b"question\n" if way in ("stdin", "all") else b""
            connection.sendall(way.encode() + b"\n" + question)
            heard = b""
            while part := connection.recv(100):
                heard += part
            assert heard == WORDS + b"from the parent\n", (way, heard)
    with socket.create_connection((address, port), 20) as connection:
        connection.sendall(b"end\n")


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(int(sys.argv[2]))
    else:
        ask(sys.argv[2], int(sys.argv[3]))
