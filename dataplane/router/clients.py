"""The connections of containers' processes: admission, rates, messages and the end.

A client that sends an invalid message, or does not read its answers, loses its connection and
nothing else. A container whose processes send too many messages is read later; nobody else waits.
"""

from __future__ import annotations

import array
import errno
import fcntl
import functools
import resource
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog

from dataplane.errors import WrongMessage
from dataplane.router import library_wire as wire
from dataplane.router import verbs_messages
from dataplane.router import verbs_wire as verbs
from dataplane.router.limits import Bucket
from dataplane.router.loop import Loop
from dataplane.router.pairing import Pairing
from dataplane.router.seams import Outbox
from dataplane.router.socket_closer import Closer
from dataplane.router.socket_table import SIOCGSKNS, Namespaces
from dataplane.router.unix_listener import BoundSocket
from dataplane.router.verbs_devices import RANGE

log = structlog.get_logger()

PATIENCE: Final = 2.0
"""Seconds until a process of an unknown namespace gets its WELCOME: the driver may just be about to
tell the router of its container."""
UNKNOWN: Final = 64
"""Processes in unknown namespaces, all together. The oldest gives way to a new one, once PATIENCE
has passed."""
UNREAD: Final = 16 << 20
"""Bytes of kernel memory in answers that the processes of one container have not read, as long as
each may have UNREAD_LEAST."""
UNREAD_MOST: Final = 64 << 10
UNREAD_LEAST: Final = 4 << 10
"""The same for one process: a process that has more is stalled, that is, not read."""
UNASKED_MOST: Final = 64 << 10
"""The same of a process that may still be told what others ask of it: nobody else's requests fill
the socket of one that doesn't read, which would cost it its connection to the router."""
UNREAD_PATIENCE: Final = 10.0
"""Seconds without reading anything after which a stalled process loses its connection."""
FULL: Final = 0.9
"""Share of the router's descriptors from which on the container with the most processes gets no
more."""
LOG_PAUSE: Final = 1.0
"""Seconds between two warnings about the processes of one container."""
ACCEPT_PAUSE: Final = 1.0
"""Seconds without accepting after the router ran out of descriptors."""
STALLED_CHECK: Final = 0.05
"""Seconds between two checks of stalled processes."""
_PAUSED_CHECK: Final = 0.02
"""Seconds between two checks of containers that have used up their rate."""
_AT_ONCE: Final = 32
"""Messages of one client, and new clients, per round of the loop."""
_BACKLOG: Final = 4096
_ANSWERS: Final = 1 << 19
"""Bytes of a socket's send buffer, which the kernel doubles: room for some 1,300 answers to a
process that is busy while a burst of its connections moves. A process whose buffer is full loses
its connection to the router, and its connections stay on TCP."""
_ANSWERS_OF_QUEUE_PAIR: Final = 1 << 11
"""More bytes for each queue pair that a process may have: room for the grant and the end of all at
once, and of their connections of rdma_cm, since its queue pairs would end with the connection to
the router."""
_SIOCOUTQ: Final = 0x5411  # linux/sockios.h
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
_INT: Final = struct.Struct("=i")
_PEERCRED: Final = struct.Struct("=3i")
_READ: Final = select.EPOLLIN | select.EPOLLRDHUP
_NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
# Plain numbers: the socket module's flags are slow to combine, and this happens for each message.
_RECEIVE: Final = int(socket.MSG_DONTWAIT)
_PEEK: Final = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_CONTROL_CUT: Final = int(socket.MSG_CTRUNC)


@dataclass(slots=True, eq=False)
class RateState:
    """How many messages a container's processes have sent, and what follows from that."""

    messages: Bucket
    clients: int = 0
    paused: set[int] = field(default_factory=set)
    """Descriptors that are not read for now."""
    logged: float = float("-inf")
    suppressed: int = 0
    """Warnings that were not logged since the last one that was."""


@dataclass(slots=True, eq=False)
class ClientConnection:
    """The connection of one process."""

    socket: socket.socket
    process: int
    namespace: int
    pid: int
    rate: RateState
    since: float
    closing: bool = False
    unread: int = 0
    """Bytes of unread answers at the last check, if it is stalled."""
    last_read: float = 0
    """When it last read something, as far as the checks show."""


class Clients:
    """The clients of the public socket; the registry's `Outbox`."""

    def __init__(
        self,
        loop: Loop,
        namespaces: Namespaces,
        registry: Callable[[Outbox], Pairing],
        *,
        guard: bool,
    ) -> None:
        """`registry` makes the registry, given its outbox.

        `guard=False`: as on kernels before Linux 6.16, where a socket can't refuse descriptors.
        """
        self._loop = loop
        self._namespaces = namespaces
        self._guard = guard
        self._guarded = False
        """Whether the public socket refuses descriptors."""
        self.pairing = registry(self)
        self._closer = Closer()
        self._clients: dict[int, ClientConnection] = {}
        """By descriptor."""
        self._by_process: dict[int, ClientConnection] = {}
        self._rates: dict[int, RateState] = {}
        """By namespace."""
        self._unknown_rate = self._full_rate()
        """Of all unknown namespaces together: they count as one container."""
        self._unknown: dict[int, ClientConnection] = {}
        """Clients in unknown namespaces by process, the oldest first."""
        self._stalled: dict[int, ClientConnection] = {}
        """By process: those that don't read their answers."""
        self._stalled_checked = loop.now()
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._closing: deque[ClientConnection] = deque()
        self._late_welcomes: deque[tuple[float, int]] = deque()
        self._ids = 0
        self._resume_accept: float | None = None
        self._listener: BoundSocket | None = None
        self.wrong_messages = 0
        self.dropped = 0
        """Clients that didn't read their answers."""

    # --- the loop

    def listen(self, path: Path) -> None:
        """Open the public socket, unless it is open."""
        if self._listener is not None:
            return
        self._listener = BoundSocket(
            path, socket.SOCK_SEQPACKET, 0o666, _BACKLOG, guard=self._guard
        )
        self._guarded = self._listener.guarded
        self._loop.watch(self._listener.socket.fileno(), select.EPOLLIN, lambda _: self._accept())
        log.info("router listens", socket=str(path))

    def close(self) -> None:
        """Close the public socket and all connections."""
        for client in list(self._clients.values()):
            self._close_client(client)
        if self._listener is not None:
            # Connections that were not accepted may have descriptors in their queues.
            self._loop.forget(self._listener.socket.fileno())
            self._listener.remove()
            self._closer.give(self._listener.socket)
        self._closer.work()

    def close_scheduled(self) -> None:
        """Close what `_schedule_close` was called for."""
        while self._closing:
            self._close_client(self._closing.popleft())

    def work(self) -> None:
        """What is due in this round: late welcomes, and clients that may be read again."""
        now = self._loop.now()
        while self._late_welcomes and self._late_welcomes[0][0] <= now:
            self.pairing.welcome_late(self._late_welcomes.popleft()[1])
        self._resume(now)

    def tick(self) -> None:
        """About once a second."""
        self._closer.work()
        self._forget_rates(self._loop.now())

    def pause(self, most: float) -> float:
        """Seconds until `work` has something to do, `most` at most."""
        if self._unknown_rate.paused or any(rate.paused for rate in self._rates.values()):
            return min(most, _PAUSED_CHECK)
        return min(most, STALLED_CHECK) if self._stalled else most

    def _resume(self, now: float) -> None:
        """Read containers again whose rate allows it by now, and stalled clients that have read."""
        allowed = self.pairing.limits.messages
        for rate in (self._unknown_rate, *self._rates.values()):
            if rate.paused and not rate.messages.empty(now, allowed):
                for descriptor in rate.paused:
                    self._loop.modify(descriptor, _READ)
                rate.paused.clear()
        if self._stalled and now - self._stalled_checked >= STALLED_CHECK:
            self._stalled_checked = now
            for client in list(self._stalled.values()):
                self._check_stalled(client, now)
        if self._resume_accept is not None and now >= self._resume_accept:
            self._resume_accept = None
            if self._listener is not None:
                self._loop.modify(self._listener.socket.fileno(), select.EPOLLIN)

    # --- admission

    def _accept(self) -> None:
        assert self._listener is not None
        listener = self._listener.socket
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR:
                    log.error("no descriptor for a new process", reason=error.strerror)
                    self._loop.modify(listener.fileno(), 0)
                    self._resume_accept = self._loop.now() + ACCEPT_PAUSE
                    return
                continue
            self._admit(accepted)

    def _admit(self, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            _enlarge_send_buffer(accepted, _ANSWERS)
            pid, _, _ = _PEERCRED.unpack(
                accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            )
            # The accepted end of a unix socket belongs to the namespace of the connecting one.
            namespace = self._namespaces.hold(fcntl.ioctl(accepted, SIOCGSKNS))
        except OSError as error:
            log.error("cannot identify a client's network namespace", reason=error.strerror)
            self._close_socket(accepted)
            return
        now = self._loop.now()
        rate = self._rate_of(namespace)
        self._ids += 1
        if (
            not rate.messages.take(now, self.pairing.limits.messages)
            or not self._has_room(accepted, rate, now)
            or not self.pairing.connected(self._ids, namespace, pid)
        ):
            self._close_socket(accepted)
            self._namespaces.release(namespace)
            return
        rate.clients += 1
        client = ClientConnection(accepted, self._ids, namespace, pid, rate, now)
        self._clients[accepted.fileno()] = self._by_process[client.process] = client
        if rate is self._unknown_rate:
            self._unknown[client.process] = client
        self._loop.watch(accepted.fileno(), _READ, functools.partial(self._serve, client))

    def _full_rate(self) -> RateState:
        return RateState(Bucket.full(self.pairing.limits.messages, self._loop.now()))

    def _rate_of(self, namespace: int) -> RateState:
        if not self.pairing.knowledge.is_endpoint(namespace):
            return self._unknown_rate
        rate = self._rates.get(namespace)
        if rate is None:
            rate = self._rates[namespace] = self._full_rate()
        return rate

    def _has_room(self, accepted: socket.socket, rate: RateState, now: float) -> bool:
        """Whether one more process may connect. Descriptors have the lowest free numbers."""
        if rate is self._unknown_rate and len(self._unknown) >= UNKNOWN:
            oldest = next(iter(self._unknown.values()))
            if now - oldest.since < PATIENCE:
                return False
            self._schedule_close(oldest)
            # The next process that connects takes the place of another one.
            del self._unknown[oldest.process]
        if accepted.fileno() < FULL * self._descriptors:
            return True
        most = max((other.clients for other in self._rates.values()), default=0)
        return 2 * rate.clients < most

    def snapshot_replaced(self) -> None:
        """Move clients whose container is known by now to the rate of that container."""
        for client in list(self._unknown.values()):
            if not self.pairing.knowledge.is_endpoint(client.namespace):
                continue
            del self._unknown[client.process]
            self._unknown_rate.clients -= 1
            descriptor = client.socket.fileno()
            if descriptor in self._unknown_rate.paused:
                self._unknown_rate.paused.remove(descriptor)
                self._loop.modify(descriptor, _READ)
            client.rate = self._rate_of(client.namespace)
            client.rate.clients += 1

    def _forget_rates(self, now: float) -> None:
        """Forget containers without processes whose bucket is full again."""
        allowed = self.pairing.limits.messages
        for namespace, rate in list(self._rates.items()):
            if not rate.clients and rate.messages.full_by(now, allowed):
                del self._rates[namespace]

    # --- messages

    def _serve(self, client: ClientConnection, events: int) -> None:
        if not events & select.EPOLLIN:
            self._schedule_close(client)
            return
        if self._is_stalled(client):
            return
        rate = client.rate
        for _ in range(_AT_ONCE):
            if client.closing:
                return
            if not rate.messages.take(self._loop.now(), self.pairing.limits.messages):
                rate.paused.add(client.socket.fileno())
                self._loop.modify(client.socket.fileno(), 0)
                return
            if not self._serve_one(client):
                return

    def _serve_one(self, client: ClientConnection) -> bool:
        """Receive and handle one message. False: there is none, or the connection closes."""
        try:
            data = self._receive(client)
            if data is None:
                return False
            self._handle(client, wire.codec.unpack(data))
        except WrongMessage as error:
            self.wrong_messages += 1
            self._close_with_warning(client, "wrong message", str(error))
        except Exception:
            # A bug of the router costs one client its connection, not all.
            log.exception("a bug in the router", pid=client.pid)
            self._schedule_close(client)
        else:
            return True
        return False

    def _receive(self, client: ClientConnection) -> bytes | None:
        """A packet. None: there is none for now, or the process has closed its connection.

        Descriptors are never received: the receiver of one may have to do its last close(), which
        can wait for as long as the sender likes.

        Raises:
            WrongMessage: a descriptor comes with the next packet; it stays in the queue.
        """
        try:
            if not self._guarded:
                _, _, flags, _ = client.socket.recvmsg(1, 0, _PEEK)
                if flags & _CONTROL_CUT:
                    raise WrongMessage("a packet with a descriptor")
            data = client.socket.recv(verbs.MAX_MESSAGE + 1, _RECEIVE)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            # The end of the connection, or an empty packet, which is no message either.
            self._schedule_close(client)
            return None
        return data

    def _handle(self, client: ClientConnection, message: wire.Message | verbs.VerbsMessage) -> None:
        """Act on a message."""
        pairing = self.pairing
        process = client.process
        match message:
            case wire.Request():
                pairing.request(process, message)
            case wire.Release():
                pairing.release(process, message)
            case wire.Note():
                pairing.note(process, message)
            case wire.Bell():
                pairing.bell(process, message)
            case wire.Fetch():
                pairing.fetch(process, message)
            case wire.Hello():
                pairing.hello(process, message)
                self._late_welcomes.append((self._loop.now() + PATIENCE, process))
            case verbs.VerbsOpen():
                pairing.verbs.open(process, message)
                more = min(RANGE, pairing.limits.queue_pairs) * _ANSWERS_OF_QUEUE_PAIR
                _enlarge_send_buffer(client.socket, _ANSWERS + more)
            case _:
                client.rate.messages.charge(verbs_messages.handle(pairing, process, message) - 1)

    def send(
        self, process: int, answer: wire.Answer | verbs.VerbsAnswer, *descriptors: int
    ) -> bool:
        client = self._by_process.get(process)
        if client is None or client.closing:
            return False
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        ancillary = [rights] if descriptors else []
        try:
            client.socket.sendmsg([wire.codec.pack(answer)], ancillary, _SEND)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                self._drop_unread(client, "its socket is full")
            self._schedule_close(client)
            return False
        return True

    def has_room(self, process: int) -> bool:
        client = self._by_process.get(process)
        return client is not None and _unread_bytes(client.socket) <= UNASKED_MOST

    # --- answers that a process doesn't read

    def _is_stalled(self, client: ClientConnection) -> bool:
        """Whether a process has so many unread answers that it is not read for now."""
        unread = _unread_bytes(client.socket)
        if unread <= _allowed_unread(client.rate):
            return False
        client.unread, client.last_read = unread, self._loop.now()
        self._stalled[client.process] = client
        self._loop.modify(client.socket.fileno(), 0)
        return True

    def _check_stalled(self, client: ClientConnection, now: float) -> None:
        """Read a process again if it has read its answers; close its connection if not."""
        unread = _unread_bytes(client.socket)
        if unread <= _allowed_unread(client.rate) // 2:
            del self._stalled[client.process]
            self._loop.modify(client.socket.fileno(), _READ)
        elif unread < client.unread:
            client.unread, client.last_read = unread, now
        elif now - client.last_read > UNREAD_PATIENCE:
            self._drop_unread(client, f"it has read nothing for {UNREAD_PATIENCE:.0f} seconds")

    def _drop_unread(self, client: ClientConnection, reason: str) -> None:
        self.dropped += 1
        self._close_with_warning(client, "a process does not read its answers", reason)

    # --- closing

    def _close_with_warning(self, client: ClientConnection, event: str, reason: str) -> None:
        """Log what a process did wrong, at most once a second per container, and close."""
        rate = client.rate
        now = self._loop.now()
        if now - rate.logged >= LOG_PAUSE:
            sandbox = self.pairing.knowledge.sandboxes.get(client.namespace)
            log.warning(
                event,
                container="" if sandbox is None else sandbox.name,
                namespace=client.namespace,
                pid=client.pid,
                reason=reason,
                suppressed=rate.suppressed,
            )
            rate.logged, rate.suppressed = now, 0
        else:
            rate.suppressed += 1
        self._schedule_close(client)

    def _schedule_close(self, client: ClientConnection) -> None:
        """Close the connection once the current message has been handled to its end."""
        if not client.closing:
            client.closing = True
            self._closing.append(client)

    def _close_client(self, client: ClientConnection) -> None:
        descriptor = client.socket.fileno()
        if self._clients.pop(descriptor, None) is None:
            return
        client.closing = True
        del self._by_process[client.process]
        self._loop.forget(descriptor)
        self._close_socket(client.socket)
        self.pairing.gone(client.process)
        self._namespaces.release(client.namespace)
        self._unknown.pop(client.process, None)
        self._stalled.pop(client.process, None)
        client.rate.paused.discard(descriptor)
        client.rate.clients -= 1

    def _close_socket(self, connection: socket.socket) -> None:
        """Close without waiting, whatever is in the socket's queue."""
        if self._guarded:
            connection.close()
        else:
            self._closer.close(connection)


def _unread_bytes(connection: socket.socket) -> int:
    """Bytes of kernel memory in answers that the process has not read."""
    answer = fcntl.ioctl(connection, _SIOCOUTQ, bytes(_INT.size))
    return int(_INT.unpack(answer)[0])


def _allowed_unread(rate: RateState) -> int:
    """The same that one of a container's processes may have."""
    return max(UNREAD_LEAST, min(UNREAD_MOST, UNREAD // max(rate.clients, 1)))


def _enlarge_send_buffer(accepted: socket.socket, size: int) -> None:
    try:
        accepted.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
    except PermissionError:
        # Without CAP_NET_ADMIN: as much as the host allows anyone.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
