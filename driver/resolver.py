"""Finds the tasks that take new connections, by Docker's embedded DNS in a container's namespace.

The engine's API lists a task until its container is gone, also while it is being stopped. The
embedded DNS is exact: `tasks.<service>` contains a task's address from the moment it is healthy
until Swarm disables its binding, two seconds before the stop signal (moby, `controller.Shutdown`).
The service's own name keeps its VIP meanwhile. So a service whose name resolves to its VIP, and
whose `tasks.` name doesn't exist, has no task that takes connections.

The embedded DNS forwards names that it doesn't know to external servers, whose answers may be
anything, and a container may redirect the queries in its namespace. Therefore an address counts
only if the engine lists it for the service; if it doesn't list it yet, that is a hint to read the
list.

A missing answer means nothing: it may be lost or late. Only an answer says that a service has no
tasks. A service whose answer would not fit a datagram isn't queried: Docker would try record by
record how many fit.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from driver import dns
from driver.errors import KernelError
from driver.kernel.namespace import in_netns
from driver.model import Service
from driver.ports import TaskAnswers

SERVER: Final = ("127.0.0.11", 53)
TIMEOUT: Final = 0.2
"""Seconds without an answer. The embedded DNS answers within a millisecond; external servers take
longer."""
PATIENCE: Final = 1.0
"""The same for services that had no answer before."""
LONGEST: Final = 1.0
"""Most seconds for one container, without `PATIENCE`, however many answers come."""
WINDOW: Final = 32
"""Queries in flight at once."""
BUFFER: Final = 8 << 20
"""Bytes of the socket's buffer, for the answers to all queries in flight. The default has room for
three large ones."""
SMALL: Final = 8192
"""Bytes up to which an answer's size doesn't delay it."""
_SO_RCVBUFFORCE: Final = 33


def question(service: Service, network_name: str) -> str:
    """The name that the embedded DNS resolves to the addresses of a service's tasks."""
    # With the network's name: the service may be on several networks of the container.
    return f"tasks.{service.name}.{network_name}"


def answer_size(service: Service, network_name: str) -> int:
    """Bytes of the answer to that query: libnetwork repeats the name with each address."""
    name = len(question(service, network_name)) + 2
    return 64 + name + (name + 14) * len(service.tasks)


def fits(service: Service, network_name: str) -> bool:
    """Whether the answer to that query fits a datagram."""
    return answer_size(service, network_name) <= dns.SIZE


Answers = dict[str, frozenset[IPv4Address] | None]
"""By name, without names that got no answer; None: the answer was truncated."""


def ask(
    channel: socket.socket,
    names: Iterable[str],
    timeout: float = TIMEOUT,
    sizes: Mapping[str, int] | None = None,
    until: float = float("inf"),
) -> Answers:
    """Query the A records of several names over a connected UDP socket.

    `sizes` are those of the answers, in bytes, where they are known. `until` is the time at which
    to stop, by time.monotonic().

    Raises:
        OSError: the server can't be reached.
    """
    answers: Answers = {}
    # The kernel also counts its own overhead: half of the buffer is enough for that.
    room = channel.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 4
    window: list[str] = []
    expected = 0
    for name in dict.fromkeys(names):
        if time.monotonic() >= until:
            return answers
        size = (sizes or {}).get(name, dns.SMALLEST)
        if window and (len(window) == WINDOW or expected + size > room):
            answers.update(_ask_window(channel, window, timeout, until))
            window, expected = [], 0
        window.append(name)
        expected += size
    if window:
        answers.update(_ask_window(channel, window, timeout, until))
    return answers


def _ask_window(
    channel: socket.socket, names: Sequence[str], timeout: float, until: float
) -> Answers:
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
    last = time.monotonic()
    while waiting and (left := min(last + timeout, until) - time.monotonic()) > 0:
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
            last = time.monotonic()
    return answers


@dataclass(slots=True)
class _Channel:
    """A socket in a namespace, whose inode tells it from a later one under the same path."""

    inode: int
    socket: socket.socket
    used: float


class EmbeddedDns:
    """`ports.TaskResolver` over Docker's embedded DNS.

    A socket stays in the namespace in which it was made, so one per queried container is kept, for
    `KEEP` seconds at most: a socket keeps its namespace alive.
    """

    KEEP: Final = 3.0

    def __init__(self, server: tuple[str, int] = SERVER, timeout: float = TIMEOUT) -> None:
        self._server = server
        self._timeout = timeout
        self._lock = threading.Lock()
        self._channels: dict[Path, _Channel] = {}

    def tasks(
        self,
        sandbox: Path,
        network_name: str,
        services: Sequence[Service],
        *,
        patient: bool = False,
    ) -> TaskAnswers:
        """Query a container; services whose answers don't fit a datagram are left out."""
        try:
            channel = self._take(sandbox)
        except (OSError, KernelError):
            return TaskAnswers({})
        try:
            asked = [service for service in services if fits(service, network_name)]
            return self._tasks(channel.socket, network_name, asked, patient)
        except OSError:
            channel.socket.close()
            return TaskAnswers({})
        finally:
            self._put_back(sandbox, channel)

    def _tasks(
        self, channel: socket.socket, network_name: str, services: Sequence[Service], patient: bool
    ) -> TaskAnswers:
        until = time.monotonic() + LONGEST
        listed = {question(item, network_name): item for item in services}
        sizes = {name: answer_size(item, network_name) for name, item in listed.items()}
        answers = ask(channel, listed, self._timeout, sizes, until)
        known: dict[str, frozenset[IPv4Address]] = {}
        doubtful = {}
        for name, service in listed.items():
            addresses = answers.get(name, frozenset())
            if addresses is None:
                continue
            if addresses & {task.address for task in service.tasks}:
                known[service.name] = addresses
            # A large answer that is late or lost isn't requested again.
            elif name in answers or sizes[name] <= SMALL:
                doubtful[name] = service
        # Distinguish services without tasks from those that this container's DNS doesn't know.
        own = {name: f"{service.name}.{network_name}" for name, service in doubtful.items()}
        names = [name for pair in own.items() for name in pair]
        timeout = PATIENCE if patient else self._timeout
        until += timeout
        answers = ask(channel, names, timeout, sizes, until) if names else {}
        silent = set()
        for name, service in doubtful.items():
            if service.vip not in (answers.get(own[name]) or ()):
                continue
            if name not in answers:
                silent.add(service.name)
            elif (addresses := answers[name]) is not None:
                known[service.name] = addresses
        return TaskAnswers(known, frozenset(silent), slow=time.monotonic() >= until)

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
            # The plugin may exceed the host's limit.
            with contextlib.suppress(OSError):
                channel.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER)
            channel.connect(self._server)
        except OSError:
            channel.close()
            raise
        return channel

    @staticmethod
    def _drain(channel: socket.socket) -> bool:
        """Discard late answers to earlier queries; false: the socket can't be used any more."""
        channel.setblocking(False)
        try:
            while True:
                channel.recv(0xFFFF)
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _put_back(self, sandbox: Path, channel: _Channel) -> None:
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
