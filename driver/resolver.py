"""Which tasks of a service take new connections: asked of Docker's embedded DNS, from inside a container's namespace.

The engine's inspect lists a task until its container is gone, also while it is being stopped. The embedded DNS is exact:
a task's address is under `tasks.<service>` from when it is healthy until Swarm disables its binding, two seconds before
the stop signal (moby, `controller.Shutdown`). The service's own name keeps its VIP meanwhile; so a service whose name
leads to its VIP, but whose `tasks.` name leads nowhere, has no task that takes connections.

What the embedded DNS doesn't know it forwards to the DNS servers of the outside, which may answer anything; and a
container may have changed its namespace, so that somebody else answers. Hence an address counts only if the engine itself
lists it for the service; that it doesn't yet is a hint to read the list again.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver import dns
from driver.errors import KernelError
from driver.kernel.namespace import in_netns
from driver.model import Service

SERVER: Final = ("127.0.0.11", 53)
TIMEOUT: Final = 0.2
"""Seconds. The embedded DNS itself answers within a millisecond; longer waits are for servers outside."""
WINDOW: Final = 32
"""Questions under way at once: their answers must fit the socket's buffer."""


Answers = dict[str, frozenset[IPv4Address] | None]
"""By name; None: more than fits an answer. A name without an answer is absent."""


def ask(channel: socket.socket, names: Iterable[str], timeout: float = TIMEOUT) -> Answers:
    """Ask for the A records of several names over a connected UDP socket.

    Raises:
        OSError: the server can't be reached.
    """
    answers: Answers = {}
    todo = list(dict.fromkeys(names))
    while todo:
        window, todo = todo[:WINDOW], todo[WINDOW:]
        answers.update(_ask_window(channel, window, timeout))
    return answers


def _ask_window(channel: socket.socket, names: Sequence[str], timeout: float) -> Answers:
    start = secrets.randbelow(1 << 16)
    waiting: dict[int, str] = {}
    answers: Answers = {}
    for number, name in enumerate(names):
        identifier = (start + number) & 0xFFFF
        try:
            query = dns.encode_query(identifier, name)
        except dns.BadNameError:
            continue
        channel.send(query)
        waiting[identifier] = name
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        channel.settimeout(left)
        try:
            message = channel.recv(0xFFFF)
        except TimeoutError:
            break
        identifier = dns.identifier(message)
        name = waiting.get(identifier, "")
        with contextlib.suppress(dns.MalformedAnswerError):
            answers[name] = dns.decode_answer(message, name)
            del waiting[identifier]
    return answers


@dataclass(slots=True)
class _Channel:
    """A socket in a container's namespace. The inode tells the namespace from a later one under the same path."""

    inode: int
    socket: socket.socket
    used: float


class EmbeddedDns:
    """`ports.TaskResolver` over Docker's embedded DNS.

    A socket belongs to the namespace that it was made in, whoever uses it: so one is kept per container asked, for
    `KEEP` seconds at most, since a socket keeps its namespace alive.
    """

    KEEP: Final = 3.0

    def __init__(self, server: tuple[str, int] = SERVER, timeout: float = TIMEOUT) -> None:
        self._server = server
        self._timeout = timeout
        self._lock = threading.Lock()
        self._channels: dict[Path, _Channel] = {}

    def tasks(
        self, sandbox: Path, network_name: str, services: Sequence[Service]
    ) -> dict[str, frozenset[IPv4Address]]:
        """See `ports.TaskResolver.tasks`."""
        try:
            channel = self._take(sandbox)
        except (OSError, KernelError):
            return {}
        try:
            # Qualified by the network: a service may be on several networks of the container.
            return self._tasks(channel.socket, network_name, services)
        except OSError:
            channel.socket.close()
            return {}
        finally:
            self._give_back(sandbox, channel)

    def _tasks(
        self, channel: socket.socket, network_name: str, services: Sequence[Service]
    ) -> dict[str, frozenset[IPv4Address]]:
        found: dict[str, frozenset[IPv4Address]] = {}
        none = []
        listed = {f"tasks.{item.name}.{network_name}": item for item in services}
        answers = ask(channel, listed, self._timeout)
        for name, service in listed.items():
            addresses = answers.get(name, frozenset())
            if addresses is None:
                continue
            if addresses & {task.address for task in service.tasks}:
                found[service.name] = addresses
            else:
                none.append(service)
        if none:
            self._confirm(channel, network_name, none, found)
        return found

    def _confirm(
        self,
        channel: socket.socket,
        network_name: str,
        services: Sequence[Service],
        found: dict[str, frozenset[IPv4Address]],
    ) -> None:
        """Tell services without tasks from those that this container's DNS doesn't know, and from lost answers."""
        names = [
            f"{prefix}{item.name}.{network_name}" for item in services for prefix in ("", "tasks.")
        ]
        answers = ask(channel, names, self._timeout)
        for service in services:
            addresses = answers.get(f"tasks.{service.name}.{network_name}", frozenset())
            own = answers.get(f"{service.name}.{network_name}")
            if addresses is not None and own is not None and service.vip in own:
                found[service.name] = addresses

    # --- the sockets

    def _take(self, sandbox: Path) -> _Channel:
        inode = sandbox.stat().st_ino
        now = time.monotonic()
        with self._lock:
            kept = self._channels.pop(sandbox, None)
            for path, other in list(self._channels.items()):
                if now - other.used > self.KEEP:
                    other.socket.close()
                    del self._channels[path]
        if kept is not None:
            if kept.inode == inode and self._drain(kept.socket):
                return kept
            kept.socket.close()
        return _Channel(inode, in_netns(sandbox, self._open), now)

    def _open(self) -> socket.socket:
        channel = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            channel.connect(self._server)
        except OSError:
            channel.close()
            raise
        return channel

    @staticmethod
    def _drain(channel: socket.socket) -> bool:
        """Drop late answers of the last time; false if the socket is of no use."""
        channel.setblocking(False)
        try:
            while True:
                channel.recv(0xFFFF)
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _give_back(self, sandbox: Path, channel: _Channel) -> None:
        if channel.socket.fileno() < 0:
            return
        channel.used = time.monotonic()
        with self._lock:
            other = self._channels.pop(sandbox, None)
            self._channels[sandbox] = channel
        if other is not None:
            other.socket.close()

    def close(self) -> None:
        """Close all sockets."""
        with self._lock:
            channels = list(self._channels.values())
            self._channels.clear()
        for channel in channels:
            channel.socket.close()
