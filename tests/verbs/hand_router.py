"""A router for tests of the library alone: it pairs whoever asks, has no containers and no rules,
and makes mistakes on demand. `router.py` starts the real one.

Each process that connects has a GID of its own, 10.0.0.1, 10.0.0.2 and so on, in the order of their
V_OPEN, and the queue pair numbers from `FIRST_QPN` on. Queue pairs that name each other get a slot.
"""

from __future__ import annotations

import array
import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from dataplane.router import layout, verbs_wire
from dataplane.router import library_wire as wire
from dataplane.router.arena_memory import LinuxArenaMemory
from dataplane.router.reasons import Reason
from testbed.patience import patience

FIRST_QPN: Final = 0x1000
QPNS: Final = 0x1000
_PEEK: Final = 1 + verbs_wire.MAX_MESSAGE

AnyMessage = wire.Message | verbs_wire.VerbsMessage


@dataclass(eq=False)
class Client:
    """A process that has connected."""

    connection: socket.socket
    gid: IPv4Address | None = None
    """None before its V_OPEN."""
    takes: set[int] = field(default_factory=set)
    """The queue pairs to which datagrams may come."""


Asked = tuple[Client, verbs_wire.VerbsQueuePair]


@dataclass(eq=False)
class PairArena:
    """An arena of two processes; side 0 is the first one's."""

    number: int
    memory: int
    clients: tuple[Client, Client]
    slots: dict[int, set[int]] = field(default_factory=dict)
    """The slots in use, and which sides have not released them."""
    incarnations: dict[int, int] = field(default_factory=dict)
    bells: dict[tuple[int, int], int] = field(default_factory=dict)
    """The ringing end of each bell, by side and index."""

    def token(self, side: int) -> int:
        return self.number << 8 | side


def welcome_message(verbs: int) -> wire.Welcome:
    """The settings of a router with this version of verbs; 0: without. No connection moves."""
    return wire.Welcome(
        wire.PROTOCOL_VERSION,
        layout.VERSION,
        enabled=True,
        operations=1 << 30,
        age=0,
        bytes=1 << 30,
        bulk=1 << 30,
        spin=0,
        ring_limit=layout.RING_SIZE,
        verbs=verbs,
    )


class HandRouter:
    """The router on a socket; `verbs=False`: one that knows nothing of verbs.

    What processes have ended is in `releases` and `ends`, in order.
    """

    def __init__(self, path: Path, *, verbs: bool = True) -> None:
        self._verbs = verbs
        self._memory = LinuxArenaMemory()
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._numbers = 1
        self._waiting: dict[tuple[IPv4Address, int], Asked] = {}
        self.clients: list[Client] = []
        self.arenas: list[PairArena] = []
        self.releases: list[tuple[int, int, int]] = []
        """Arena, side and slot."""
        self.ends: list[int] = []
        """Queue pairs that have ended."""
        self.sought = 0
        """How often a peer for datagrams was asked for."""
        self._found: list[tuple[set[int], PairArena, int]] = []
        """Slots for datagrams that were asked for: the identities of the two clients."""
        self.spoil = False
        """Whether grants name a wrong incarnation."""
        self._lock = threading.RLock()
        self._stopped = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- for tests

    def close(self) -> None:
        """End it, and all connections."""
        self._stopped = True
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self.hang_up()
        self._listener.close()
        for arena in self.arenas:
            for bell in arena.bells.values():
                os.close(bell)
            os.close(arena.memory)

    def hang_up(self) -> None:
        """End the connections of all processes, which may come back."""
        with self._lock:
            for client in list(self.clients):
                self._gone(client)

    @contextlib.contextmanager
    def reads_nothing(self) -> Iterator[None]:
        """Meanwhile it takes no messages of processes."""
        with self._lock:
            yield

    def say(self, client: Client, message: AnyMessage, *descriptors: int) -> None:
        """Send a process a message."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.connection.sendmsg([wire.codec.pack(message)], [rights] if descriptors else [])

    def welcome(self, client: Client) -> None:
        """Send a process its settings."""
        self.say(client, welcome_message(verbs_wire.VERBS_VERSION if self._verbs else 0))

    def await_releases(self, count: int) -> None:
        """Wait until so many sides have released a slot."""
        until = time.monotonic() + patience(5)
        while len(self.releases) < count:
            assert time.monotonic() < until, self.releases
            time.sleep(0.01)

    def await_ends(self, count: int) -> None:
        """Wait until so many queue pairs have ended."""
        until = time.monotonic() + patience(5)
        while len(self.ends) < count:
            assert time.monotonic() < until, self.ends
            time.sleep(0.01)

    def used(self) -> int:
        """Bytes of memory that the arenas use."""
        return sum(self._memory.used(arena.memory) for arena in self.arenas)

    # --- the socket

    def _run(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select(0.02):
                try:
                    with self._lock:
                        self._ready(key)
                except Exception as error:
                    self._failure = error
                    return

    def _ready(self, key: selectors.SelectorKey) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif key.data in self.clients:
            self._receive(key.data)

    def _accept(self) -> None:
        client = Client(self._listener.accept()[0])
        self.clients.append(client)
        self._selector.register(client.connection, selectors.EVENT_READ, client)

    def _gone(self, client: Client) -> None:
        self.clients.remove(client)
        self._selector.unregister(client.connection)
        client.connection.close()
        self._waiting = {key: told for key, told in self._waiting.items() if told[0] is not client}

    def _receive(self, client: Client) -> None:
        try:
            data = client.connection.recv(_PEEK)
        except ConnectionResetError:
            # It has ended with unread messages. What it has sent before is still there.
            return
        if not data:
            self._gone(client)
        else:
            self._message(client, wire.codec.unpack(data))

    def _message(self, client: Client, message: AnyMessage) -> None:
        match message:
            case wire.Hello():
                self.welcome(client)
            case wire.Bell():
                self._make_bell(client, message)
            case wire.Fetch():
                self._fetch(client, message)
            case wire.Release():
                self._release(message)
            case verbs_wire.VerbsOpen():
                client.gid = client.gid or self._new_gid()
                self.say(client, device(client.gid))
            case verbs_wire.VerbsQueuePair():
                self._pair(client, message)
            case verbs_wire.VerbsEnd(kind=verbs_wire.VerbsKind.QUEUE_PAIR_END):
                self.ends.append(message.number)
                assert client.gid is not None
                self._waiting.pop((client.gid, message.number), None)
            case verbs_wire.VerbsStatus():
                pass
            case verbs_wire.VerbsDatagrams(kind=verbs_wire.VerbsKind.DATAGRAMS):
                self._announce(client, message)
            case verbs_wire.VerbsDatagrams(kind=verbs_wire.VerbsKind.DATAGRAM_PEER):
                self._find_peer(client, message)
            case _:
                raise AssertionError(message)

    # --- queue pairs

    def _new_gid(self) -> IPv4Address:
        return IPv4Address("10.0.0.1") + sum(each.gid is not None for each in self.clients)

    def _pair(self, client: Client, message: verbs_wire.VerbsQueuePair) -> None:
        assert client.gid is not None
        assert isinstance(message.peer_gid, IPv4Address)
        own, peer = (client.gid, message.qpn), (message.peer_gid, message.peer_qpn)
        self._waiting[own] = client, message
        other = self._waiting.get(peer)
        if other is None or (other[1].peer_gid, other[1].peer_qpn) != own:
            return
        del self._waiting[own]
        self._waiting.pop(peer, None)
        self._connect(other, (client, message))

    def _connect(self, other: Asked, one: Asked) -> None:
        """Give two queue pairs, of which `other` has asked first, a slot."""
        arena, slot = self._new_slot(other[0], one[0])
        both = [other, one]
        for side, (asker, asked) in enumerate(
            both if other[0] is arena.clients[0] else reversed(both)
        ):
            grant = verbs_wire.VerbsGrant(
                asked.request,
                asked.qpn,
                asked.peer_qpn,
                verbs_wire.SlotKind.CONNECTED,
                side,
                slot,
                asked.gid_index,
                arena.number,
                arena.incarnations[slot] + self.spoil,
                arena.token(side),
                asked.peer_gid,
            )
            self._grant(arena, side, asker, grant)

    # --- datagrams

    def _announce(self, client: Client, message: verbs_wire.VerbsDatagrams) -> None:
        if message.on:
            client.takes.add(message.qpn)
        else:
            client.takes.remove(message.qpn)

    def _find_peer(self, client: Client, message: verbs_wire.VerbsDatagrams) -> None:
        assert message.qpn in client.takes
        self.sought += 1
        peer = next((each for each in self.clients if each.gid == message.gid), None)
        if peer is None or message.peer_qpn not in peer.takes:
            self.say(
                client,
                verbs_wire.VerbsRefuse(
                    verbs_wire.VerbsKind.DATAGRAM_PEER,
                    message.request,
                    message.peer_qpn,
                    Reason.NOT_FOUND,
                ),
            )
            return
        both = {id(client), id(peer)}
        if not any(each == both and slot in arena.slots for each, arena, slot in self._found):
            self._found.append((both, *self.give_datagrams(client, peer, message.request)))

    def give_datagrams(
        self, client: Client, peer: Client, request: int = 0
    ) -> tuple[PairArena, int]:
        """Give two processes a slot for datagrams, which is returned."""
        arena, slot = self._new_slot(client, peer)
        for side, each in enumerate(arena.clients):
            other = arena.clients[1 - side]
            assert other.gid is not None
            grant = verbs_wire.VerbsGrant(
                request if each is client else 0,
                0,
                FIRST_QPN,
                verbs_wire.SlotKind.DATAGRAMS,
                side,
                slot,
                0,
                arena.number,
                arena.incarnations[slot],
                arena.token(side),
                other.gid,
                QPNS,
                arena.incarnations[slot] & 0xFFFFFFFF,
            )
            self._grant(arena, side, each, grant)
        return arena, slot

    def end_datagrams(self, number: int) -> None:
        """End such a slot, by its number."""
        for arena in self.arenas:
            if number in arena.incarnations.values():
                for client in arena.clients:
                    self.say(
                        client,
                        verbs_wire.VerbsRefuse(
                            verbs_wire.VerbsKind.GRANT, 0, number, Reason.PEER_CLOSED
                        ),
                    )

    # --- slots

    def _new_slot(self, one: Client, other: Client) -> tuple[PairArena, int]:
        arena = self._arena_of(one, other)
        slot = next(number for number in range(layout.SLOTS) if number not in arena.slots)
        self._numbers += 1
        arena.slots[slot] = {0, 1}
        arena.incarnations[slot] = self._numbers
        self._memory.prepare(arena.memory, slot, self._numbers)
        return arena, slot

    def _arena_of(self, one: Client, other: Client) -> PairArena:
        for arena in self.arenas:
            if set(arena.clients) == {one, other} and len(arena.slots) < layout.SLOTS:
                return arena
        self._numbers += 1
        arena = PairArena(self._numbers, self._memory.make(), (one, other))
        self.arenas.append(arena)
        return arena

    def _grant(
        self, arena: PairArena, side: int, client: Client, grant: verbs_wire.VerbsGrant
    ) -> None:
        if (side, 0) in arena.bells:
            self.say(client, grant, arena.memory)
            return
        hears, rings = self._memory.make_bell()
        arena.bells[side, 0] = rings
        self.say(client, grant, arena.memory, hears)
        self._memory.close_hearing(hears)
        self.say(arena.clients[1 - side], wire.Ring(0, arena.number, side), rings)

    def _release(self, message: wire.Release) -> None:
        arena = self._arena(message.arena)
        side = message.token & 1
        assert message.token == arena.token(side)
        assert side in arena.slots[message.slot], "released twice"
        self.releases.append((arena.number, side, message.slot))
        arena.slots[message.slot].remove(side)
        if not arena.slots[message.slot]:
            del arena.slots[message.slot]
            self._memory.reclaim(arena.memory, message.slot)

    # --- bells

    def _arena(self, number: int) -> PairArena:
        return next(arena for arena in self.arenas if arena.number == number)

    def _make_bell(self, client: Client, message: wire.Bell) -> None:
        arena = self._arena(message.arena)
        hears, rings = self._memory.make_bell()
        if (old := arena.bells.pop((message.side, message.index), None)) is not None:
            os.close(old)
        arena.bells[message.side, message.index] = rings
        self.say(client, wire.Hear(message.index, arena.number, message.side), hears)
        self._memory.close_hearing(hears)

    def _fetch(self, client: Client, message: wire.Fetch) -> None:
        bell = self._arena(message.arena).bells.get((message.side, message.index))
        answer = wire.Ring(message.index, message.arena, message.side)
        if bell is None:
            self.say(client, answer)
            return
        self._memory.ring(bell)
        self.say(client, answer, bell)


def device(gid: IPv4Address, index: int = 0) -> verbs_wire.VerbsDevice:
    """What a process is told of its device."""
    return verbs_wire.VerbsDevice(
        index,
        count=1,
        qpn_first=FIRST_QPN,
        qpn_count=QPNS,
        queue_pairs=64,
        regions=64,
        direct=False,
        guid=int(gid),
        direct_bytes=0,
        gid=gid,
    )


@contextlib.contextmanager
def hand_router(path: Path, *, verbs: bool = True) -> Iterator[HandRouter]:
    """A router that listens at this path."""
    router = HandRouter(path, verbs=verbs)
    try:
        yield router
    finally:
        router.close()
        path.unlink(missing_ok=True)
