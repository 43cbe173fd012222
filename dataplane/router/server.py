"""The router's loop: one thread, one epoll, sockets that never make it wait.

A client that sends what the protocol doesn't have, or doesn't take its answers, loses its connection and nothing else; a
container that talks too much is read later. The public socket appears with the first snapshot: before it, nobody could be
told the truth.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import structlog

from dataplane import control
from dataplane.errors import DataplaneError, WrongMessage
from dataplane.router import library_wire as wire
from dataplane.router import listing
from dataplane.router.arena_memory import LinuxArenaMemory
from dataplane.router.hosts import Equipment, Hosts
from dataplane.router.knowledge import Knowledge
from dataplane.router.limits import Bucket
from dataplane.router.loop import EpollLoop
from dataplane.router.pairing import Pairing
from dataplane.router.socket_closer import Closer
from dataplane.router.socket_table import SIOCGSKNS, LinuxSocketTable, Namespaces
from dataplane.router.unix_listener import BoundSocket

log = structlog.get_logger()

PATIENCE: Final = 2.0
"""Seconds that a process of an unknown namespace waits for its WELCOME: its container may just have come."""
STRANGERS: Final = 64
"""Processes in namespaces that are no endpoint's, together. The oldest makes place for a new one, after its patience."""
UNREAD: Final = 16 << 20
"""Bytes of kernel memory in answers that the processes of one container haven't read, as long as each may have its least."""
UNREAD_MOST: Final = 64 << 10
UNREAD_LEAST: Final = 4 << 10
"""The same for one process: who has more isn't heard."""
UNREAD_PATIENCE: Final = 10.0
"""Seconds without taking anything, after which such a process loses its connection."""
FULL: Final = 0.9
"""Share of the descriptors from which on the container with the most processes gets no more."""
_AT_ONCE: Final = 32
"""Messages of one client, and new clients, per round."""
_BACKLOG: Final = 4096
_BEAT: Final = 1.0
_SWEEP: Final = 500
_CONTROL_LINE: Final = 64 << 20
_CONTROL_CHUNK: Final = 1 << 18
_ANSWERS: Final = 1 << 19
"""Bytes, which the kernel doubles: room for some 1,300 answers to a process that is busy with something else, in whose
connections a burst moves. Who doesn't take them is cut off, and its connections stay on TCP."""
_SIOCOUTQ: Final = 0x5411  # linux/sockios.h
_GLANCE: Final = 0.05
"""Seconds between two looks at processes that don't read."""
_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h
_INT: Final = struct.Struct("=i")
_PEERCRED: Final = struct.Struct("=3i")
_READ: Final = select.EPOLLIN | select.EPOLLRDHUP
# Plain numbers: flags of the socket module are slow to combine, and this is done for each message.
_RECEIVE: Final = int(socket.MSG_DONTWAIT)
_PEEK: Final = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)
_SEND: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_CUT: Final = int(socket.MSG_CTRUNC)


@dataclass(slots=True, eq=False)
class RateState:
    """How much a container talks."""

    messages: Bucket
    clients: int = 0
    paused: set[int] = field(default_factory=set)
    """Descriptors that aren't read for now."""
    logged: float = float("-inf")
    unsaid: int = 0
    """What went without a log line since the last."""


@dataclass(slots=True, eq=False)
class ClientConnection:
    """A process's connection."""

    socket: socket.socket
    process: int
    namespace: int
    pid: int
    talk: RateState
    since: float
    doomed: bool = False
    unread: int = 0
    """Bytes of answers, when last looked, of one that isn't heard for that."""
    took: float = 0
    """When it last read something, as far as that is known."""


@dataclass(slots=True, eq=False)
class ControlConnection:
    """A connection of the driver."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    unsent: bytearray = field(default_factory=bytearray)
    work: Iterator[control.Connections | control.PathCounts | None] | None = None


class Server:
    """The router. `run` until `stop`."""

    def __init__(
        self,
        public: Path,
        admin: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        secret: Callable[[], int] | None = None,
        equipment: Equipment | None = None,
        guard: bool = True,
    ) -> None:
        """`guard=False`: as on kernels before Linux 6.16, on which a socket can't refuse descriptors."""
        self._public = public
        self._guard = guard
        self._guarded = False
        """Whether the public socket refuses descriptors."""
        self._closer = Closer()
        self._clock = clock
        self._started = clock()
        self._namespaces = Namespaces(self._path_of, clock)
        kernel, memory = LinuxSocketTable(self._namespaces), LinuxArenaMemory(guards=guard)
        self.pairing = Pairing(
            self,
            kernel,
            memory,
            clock=clock,
            secret=secret or _secret,
        )
        self._epoll = select.epoll()
        self.loop = EpollLoop(self._epoll, clock)
        self.hosts = Hosts(self.pairing, self.loop, kernel, memory, equipment or Equipment())
        self._clients: dict[int, ClientConnection] = {}
        self._by_process: dict[int, ClientConnection] = {}
        self._admins: dict[int, ControlConnection] = {}
        self._talks: dict[int, RateState] = {}
        self._foreign = RateState(Bucket.full(self.pairing.limits.messages, clock()))
        """All namespaces that are no endpoint's talk as much as one container."""
        self._strangers: dict[int, ClientConnection] = {}
        """By process, the oldest first."""
        self._stalled: dict[int, ClientConnection] = {}
        """By process: those that don't read their answers."""
        self._glance = clock()
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._doomed: deque[ClientConnection] = deque()
        self._late: deque[tuple[float, int]] = deque()
        self._ids = 0
        self._beat = clock()
        self._resume_accept: float | None = None
        self._wrong = 0
        self._dropped = 0
        self._stopped = False
        self._watch: int | None = None
        self._listener: BoundSocket | None = None
        self._control = BoundSocket(admin, socket.SOCK_STREAM, 0o600, 16)
        self._epoll.register(self._control.socket, select.EPOLLIN)

    def _path_of(self, namespace: int) -> Path | None:
        place = self.pairing.knowledge.places.get(namespace)
        return None if place is None or place.path == Path() else place.path

    # --- the loop

    def run(self) -> None:
        """Serve until `stop` is called or the watched descriptor ends."""
        try:
            while not self._stopped:
                self._round()
        finally:
            self.close()

    def stop(self) -> None:
        """Leave `run` soon; to be called from a signal handler."""
        self._stopped = True

    def watch(self, descriptor: int) -> None:
        """Stop when this pipe's other end is closed: whoever started us has ended, however."""
        self._watch = descriptor
        self._epoll.register(descriptor, select.EPOLLIN)

    def close(self) -> None:
        """Leave nothing behind."""
        for client in list(self._clients.values()):
            self._drop(client)
        for admin in list(self._admins.values()):
            self._drop_admin(admin)
        if self._listener is not None:
            # Connections that nobody has accepted may have descriptors in their queues.
            self._listener.remove()
            self._closer.give(self._listener.socket)
        self._closer.work()
        self._control.close()
        self.hosts.close()
        self._namespaces.close()
        self._epoll.close()

    def _round(self) -> None:
        for descriptor, events in self._epoll.poll(self._timeout(), 256):
            self._serve(descriptor, events)
            self._bury()
        self.loop.fire()
        now = self._clock()
        while self._late and self._late[0][0] <= now:
            self.pairing.welcome_late(self._late.popleft()[1])
        for admin in list(self._admins.values()):
            self._work(admin)
        self._resume(now)
        if now - self._beat >= _BEAT:
            self._beat = now
            self.pairing.weigh()
            self.pairing.sweep(_SWEEP)
            self.hosts.beat()
            self._closer.work()
            self._namespaces.tidy()
            self._forget_talks(now)
        self._bury()

    def _timeout(self) -> float:
        if any(admin.work is not None for admin in self._admins.values()):
            return 0
        if self._foreign.paused or any(talk.paused for talk in self._talks.values()):
            return self.loop.timeout(0.02)
        if self._stalled:
            return self.loop.timeout(_GLANCE)
        return self.loop.timeout(_BEAT)

    def _serve(self, descriptor: int, events: int) -> None:
        client = self._clients.get(descriptor)
        if client is not None:
            self._read(client, events)
        elif descriptor in self._admins:
            self._serve_admin(self._admins[descriptor], events)
        elif self._listener is not None and descriptor == self._listener.socket.fileno():
            self._accept(self._listener.socket)
        elif descriptor == self._control.socket.fileno():
            self._accept_admin()
        elif descriptor == self._watch:
            self._stopped = self._stopped or not os.read(descriptor, 4096)
        else:
            self.loop.serve(descriptor, events)

    def _resume(self, now: float) -> None:
        """Read again from containers that had talked too much, if time has filled their bucket."""
        rate = self.pairing.limits.messages
        for talk in (self._foreign, *self._talks.values()):
            if talk.paused and not talk.messages.empty(now, rate):
                for descriptor in talk.paused:
                    self._epoll.modify(descriptor, _READ)
                talk.paused.clear()
        if self._stalled and now - self._glance >= _GLANCE:
            self._glance = now
            for client in list(self._stalled.values()):
                self._look_again(client, now)
        if self._resume_accept is not None and now >= self._resume_accept:
            self._resume_accept = None
            if self._listener is not None:
                self._epoll.modify(self._listener.socket, select.EPOLLIN)

    # --- clients

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            try:
                accepted, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    log.error("no descriptor for a new process", reason=error.strerror)
                    self._epoll.modify(listener, 0)
                    self._resume_accept = self._clock() + _BEAT
                    return
                continue
            self._admit(accepted)

    def _admit(self, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            _enlarge(accepted)
            pid, _, _ = _PEERCRED.unpack(
                accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
            )
            # The accepted end of a unix socket belongs to the namespace of the connecting one.
            namespace = self._namespaces.hold(fcntl.ioctl(accepted, SIOCGSKNS))
        except OSError as error:
            log.error("a process can't be told from others", reason=error.strerror)
            self._close(accepted)
            return
        now = self._clock()
        talk = self._talk_of(namespace, now)
        self._ids += 1
        if (
            not talk.messages.take(now, self.pairing.limits.messages)
            or not self._has_room(accepted, talk, now)
            or not self.pairing.connected(self._ids, namespace, pid)
        ):
            self._close(accepted)
            self._namespaces.let_go(namespace)
            return
        talk.clients += 1
        client = ClientConnection(accepted, self._ids, namespace, pid, talk, now)
        self._clients[accepted.fileno()] = self._by_process[client.process] = client
        if talk is self._foreign:
            self._strangers[client.process] = client
        self._epoll.register(accepted, _READ)

    def _talk_of(self, namespace: int, now: float) -> RateState:
        if not self.pairing.knowledge.is_endpoint(namespace):
            return self._foreign
        talk = self._talks.get(namespace)
        if talk is None:
            talk = self._talks[namespace] = RateState(
                Bucket.full(self.pairing.limits.messages, now)
            )
        return talk

    def _has_room(self, accepted: socket.socket, talk: RateState, now: float) -> bool:
        """Whether one more process may come. Descriptors have the lowest numbers that are free."""
        if talk is self._foreign and len(self._strangers) >= STRANGERS:
            oldest = next(iter(self._strangers.values()))
            if now - oldest.since < PATIENCE:
                return False
            self._doom(oldest)
            # The next one that comes finds another.
            del self._strangers[oldest.process]
        if accepted.fileno() < FULL * self._descriptors:
            return True
        most = max((each.clients for each in self._talks.values()), default=0)
        return 2 * talk.clients < most

    def _recognise(self) -> None:
        """Processes whose container is known by now aren't strangers any more."""
        now = self._clock()
        for client in list(self._strangers.values()):
            if not self.pairing.knowledge.is_endpoint(client.namespace):
                continue
            del self._strangers[client.process]
            self._foreign.clients -= 1
            if client.socket.fileno() in self._foreign.paused:
                self._foreign.paused.remove(client.socket.fileno())
                self._epoll.modify(client.socket, _READ)
            client.talk = self._talk_of(client.namespace, now)
            client.talk.clients += 1

    # --- answers that nobody reads

    def _is_stalled(self, client: ClientConnection) -> bool:
        """Whether a process has so many unread answers that it isn't heard for now."""
        unread = _unread(client.socket)
        if unread <= _allowed(client.talk):
            return False
        client.unread, client.took = unread, self._clock()
        self._stalled[client.process] = client
        self._epoll.modify(client.socket, 0)
        return True

    def _look_again(self, client: ClientConnection, now: float) -> None:
        """Hear it again if it has read, end it if it doesn't."""
        unread = _unread(client.socket)
        if unread <= _allowed(client.talk) // 2:
            del self._stalled[client.process]
            self._epoll.modify(client.socket, _READ)
        elif unread < client.unread:
            client.unread, client.took = unread, now
        elif now - client.took > UNREAD_PATIENCE:
            self._dropped += 1
            why = f"it has read nothing for {UNREAD_PATIENCE:.0f} seconds"
            self._blame(client, "a process doesn't take its answers", why)

    def _read(self, client: ClientConnection, events: int) -> None:
        if not events & select.EPOLLIN:
            self._doom(client)
            return
        talk = client.talk
        if self._is_stalled(client):
            return
        for _ in range(_AT_ONCE):
            if client.doomed:
                return
            if not talk.messages.take(self._clock(), self.pairing.limits.messages):
                talk.paused.add(client.socket.fileno())
                self._epoll.modify(client.socket, 0)
                return
            try:
                data = self._receive(client)
            except BlockingIOError:
                return
            except OSError:
                self._doom(client)
                return
            except WrongMessage as error:
                self._accuse(client, error)
                return
            if not data:
                # The end, or an empty packet, which is no message either.
                self._doom(client)
                return
            try:
                self._handle(client, wire.unpack(data))
            except WrongMessage as error:
                self._accuse(client, error)
                return
            except Exception:
                # A bug of ours costs one client its connection, not all.
                log.exception("a bug in the router", pid=client.pid)
                self._doom(client)
                return

    def _receive(self, client: ClientConnection) -> bytes:
        """A packet. No descriptor is ever received: whoever takes it out of the queue may have to do its last close().

        Raises:
            WrongMessage: a descriptor comes with the next packet; it stays in the queue.
        """
        if not self._guarded:
            _, _, flags, _ = client.socket.recvmsg(1, 0, _PEEK)
            if flags & _CUT:
                raise WrongMessage("a packet with a descriptor")
        return client.socket.recv(wire.MAX_MESSAGE + 1, _RECEIVE)

    def _accuse(self, client: ClientConnection, error: WrongMessage) -> None:
        self._wrong += 1
        self._blame(client, "wrong message", str(error))

    def _handle(self, client: ClientConnection, message: wire.Message) -> None:
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
                self._late.append((self._clock() + PATIENCE, process))
            case _:
                raise WrongMessage(f"{type(message).__name__} is for the router to say")

    def send(self, process: int, answer: wire.Answer, *descriptors: int) -> bool:
        """`pairing.Outbox`: now or never."""
        client = self._by_process.get(process)
        if client is None or client.doomed:
            return False
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        ancillary = [rights] if descriptors else []
        try:
            client.socket.sendmsg([wire.pack(answer)], ancillary, _SEND)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                self._dropped += 1
                self._blame(client, "a process doesn't take its answers", "its socket is full")
            self._doom(client)
            return False
        return True

    def _blame(self, client: ClientConnection, what: str, why: str) -> None:
        """Say what a process has done wrong, at most once a second per container, and end its connection."""
        talk = client.talk
        now = self._clock()
        if now - talk.logged >= _BEAT:
            place = self.pairing.knowledge.places.get(client.namespace)
            log.warning(
                what,
                container="" if place is None else place.name,
                namespace=client.namespace,
                pid=client.pid,
                reason=why,
                unsaid=talk.unsaid,
            )
            talk.logged, talk.unsaid = now, 0
        else:
            talk.unsaid += 1
        self._doom(client)

    def _doom(self, client: ClientConnection) -> None:
        """Its connection ends as soon as nobody is in the middle of something."""
        if not client.doomed:
            client.doomed = True
            self._doomed.append(client)

    def _bury(self) -> None:
        while self._doomed:
            self._drop(self._doomed.popleft())

    def _drop(self, client: ClientConnection) -> None:
        descriptor = client.socket.fileno()
        if self._clients.pop(descriptor, None) is None:
            return
        client.doomed = True
        del self._by_process[client.process]
        self._epoll.unregister(client.socket)
        self._close(client.socket)
        self.pairing.gone(client.process)
        self._namespaces.let_go(client.namespace)
        self._strangers.pop(client.process, None)
        self._stalled.pop(client.process, None)
        client.talk.paused.discard(descriptor)
        client.talk.clients -= 1

    def _close(self, connection: socket.socket) -> None:
        """Without waiting, whatever is in its queue."""
        if self._guarded:
            connection.close()
        else:
            self._closer.close(connection)

    def _forget_talks(self, now: float) -> None:
        """Containers without processes whose silence has filled their bucket."""
        rate = self.pairing.limits.messages
        for namespace, talk in list(self._talks.items()):
            if not talk.clients and talk.messages.full_by(now, rate):
                del self._talks[namespace]

    # --- the driver

    def _accept_admin(self) -> None:
        try:
            accepted, _ = self._control.socket.accept()
        except OSError:
            return
        accepted.setblocking(False)
        credentials = accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        if _PEERCRED.unpack(credentials)[1] != os.geteuid():
            accepted.close()
            return
        self._admins[accepted.fileno()] = ControlConnection(accepted)
        self._epoll.register(accepted, select.EPOLLIN)

    def _serve_admin(self, admin: ControlConnection, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(admin)
        if not events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            return
        try:
            data = admin.socket.recv(_CONTROL_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(admin.received) > _CONTROL_LINE:
            self._drop_admin(admin)
            return
        admin.received += data
        self._answer_lines(admin)

    def _answer_lines(self, admin: ControlConnection) -> None:
        while admin.work is None:
            line, newline, rest = admin.received.partition(b"\n")
            if not newline:
                return
            admin.received = rest
            try:
                request = msgspec.json.decode(line, type=control.ControlRequest)
                self._do(admin, request)
            except (msgspec.MsgspecError, DataplaneError) as error:
                self._reply(admin, control.Failed(message=str(error)))

    def _do(self, admin: ControlConnection, request: control.ControlRequest) -> None:
        match request:
            case control.RouterSnapshot():
                self.pairing.replace_snapshot(Knowledge(request))
                self.hosts.learned()
                self._recognise()
                self._listen()
                self._reply(admin, control.Done())
            case control.LivenessRequest():
                self._reply(admin, control.Done())
            case control.StatisticsRequest():
                self._reply(admin, self.statistics())
            case control.ConnectionsRequest():
                admin.work = listing.connections(
                    self.pairing, self._namespaces, self._clock, request.namespace
                )

            case control.PathsRequest():
                admin.work = listing.paths(self.pairing, self._namespaces)

    def statistics(self) -> control.Statistics:
        """Counts."""
        return listing.statistics(
            self.pairing,
            uptime=self._clock() - self._started,
            wrong_messages=self._wrong,
            dropped=self._dropped,
            rdma=self.hosts.facts(),
        )

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = BoundSocket(
                self._public, socket.SOCK_SEQPACKET, 0o666, _BACKLOG, guard=self._guard
            )
            self._guarded = self._listener.guarded
            self._epoll.register(self._listener.socket, select.EPOLLIN)
            log.info("router listens", socket=str(self._public))

    def _work(self, admin: ControlConnection) -> None:
        """One step of a list."""
        if admin.work is None:
            return
        found = next(admin.work)
        if found is not None:
            admin.work = None
            self._reply(admin, found)
            self._answer_lines(admin)

    def _reply(self, admin: ControlConnection, reply: control.ControlReply) -> None:
        admin.unsent += msgspec.json.encode(reply) + b"\n"
        self._flush(admin)

    def _flush(self, admin: ControlConnection) -> None:
        try:
            sent = admin.socket.send(admin.unsent, _SEND)
            del admin.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            # Its end is seen by the next read.
            admin.unsent.clear()
        more = select.EPOLLOUT if admin.unsent else 0
        self._epoll.modify(admin.socket, select.EPOLLIN | more)

    def _drop_admin(self, admin: ControlConnection) -> None:
        del self._admins[admin.socket.fileno()]
        self._epoll.unregister(admin.socket)
        admin.socket.close()


def _unread(connection: socket.socket) -> int:
    """Bytes of kernel memory that answers take which the other end hasn't read."""
    found = fcntl.ioctl(connection, _SIOCOUTQ, bytes(_INT.size))
    return int(_INT.unpack(found)[0])


def _allowed(talk: RateState) -> int:
    """The same that one of a container's processes may have."""
    return max(UNREAD_LEAST, min(UNREAD_MOST, UNREAD // max(talk.clients, 1)))


def _enlarge(accepted: socket.socket) -> None:
    try:
        accepted.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _ANSWERS)
    except PermissionError:
        # Without CAP_NET_ADMIN: as much as the host allows anyone.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ANSWERS)


def _secret() -> int:
    """Never 0, which stands for no token."""
    return int.from_bytes(os.urandom(8), "little") or 1
