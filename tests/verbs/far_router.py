"""A router for tests in which each queue pair is on another host than its peer: two relays carry
their rings. No router pairs anything across hosts here; `HandRouter` and the test do.

The first process that opens the device is on the first relay's host, the next one on the second's,
and so on in turn.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from dataplane.router import library_wire as wire
from dataplane.router import verbs_wire
from dataplane.router.relay_wire import QUEUE_PAIR
from testbed.relays import (
    ARENA,
    KINDS,
    RING,
    End,
    Relay,
    give_arena,
    link,
    pair,
    place,
    relays,
)
from tests.verbs.hand_router import Asked, Client, HandRouter

_SLOTS: Final = 64


@dataclass(eq=False)
class FarArena:
    """The arena of a process and its host's relay, which is side 1."""

    client: Client
    first: End
    slots: Iterator[int] = field(default_factory=itertools.count)
    ends: dict[int, End] = field(default_factory=dict)
    """By slot."""
    bells: dict[int, int] = field(default_factory=dict)
    """The ringing ends of the process's bells."""

    @property
    def number(self) -> int:
        return self.first.arena


class FarRouter(HandRouter):
    """See the module. `ring`: bytes of a ring."""

    def __init__(self, path: Path, hosts: tuple[Relay, Relay], ring: int = RING) -> None:
        self.hosts = hosts
        self._ring = ring
        self.far: list[FarArena] = []
        super().__init__(path)

    def close(self) -> None:
        """End it, and all connections."""
        try:
            super().close()
        finally:
            for arena in self.far:
                for rings in arena.bells.values():
                    self._memory.close(rings)
                assert arena.first.rings_relay is not None
                arena.first.rings_relay.close()

    def connect_hosts(self, *, lost: bool = False) -> bool:
        """Make the relays' link, for the first time or again."""
        with self._lock:
            return link(*self.hosts, lost=lost)

    def lose_host(self, number: int) -> None:
        """A relay has ended: do what its router and the other one do then."""
        with self._lock:
            for arena in self.far:
                if arena.first.relay is not self.hosts[number]:
                    continue
                for slot in arena.ends:
                    self._memory.sever(arena.first.memory, slot)
                self._memory.alarm(arena.first.memory)
                for rings in arena.bells.values():
                    self._memory.ring(rings)
            self.hosts[1 - number].number("UNLINK", 1)

    def _host_of(self, client: Client) -> Relay:
        assert client.gid is not None
        return self.hosts[(int(client.gid) + 1) % 2]

    def _connect(self, other: Asked, one: Asked) -> None:
        ends = [self._place(asked) for asked in (other, one)]
        for here, there in (ends, reversed(ends)):
            answer = pair(here[1], there[1])
            assert not answer.error, answer
        for (client, message), (arena, end) in zip((other, one), ends, strict=True):
            self._give(client, message, arena, end)

    def _place(self, asked: Asked) -> tuple[FarArena, End]:
        """A slot of a queue pair, in its process's arena."""
        client, _ = asked
        arena = next((each for each in self.far if each.client is client), None)
        if arena is None:
            first = give_arena(self._host_of(client), self._ring, self.clients.index(client) + 1)
            arena = FarArena(client, first)
            self.far.append(arena)
        first = arena.first
        slot = next(arena.slots)
        end = End(first.relay, 0, first.memory, slot=slot, arena=first.arena, ring=first.ring)
        answer = place(end, user=QUEUE_PAIR)
        assert not answer.error, answer
        arena.ends[slot] = end
        return arena, end

    def _give(
        self, client: Client, message: verbs_wire.VerbsQueuePair, arena: FarArena, end: End
    ) -> None:
        grant = verbs_wire.VerbsGrant(
            message.request,
            message.qpn,
            message.peer_qpn,
            verbs_wire.SlotKind.CONNECTED,
            0,
            end.slot,
            message.gid_index,
            arena.number,
            end.incarnation,
            arena.number << 8,
            message.peer_gid,
        )
        if 0 in arena.bells:
            self.say(client, grant, end.memory)
            return
        hears = self._new_bell(arena, 0)
        self.say(client, grant, end.memory, hears)
        self._memory.close_hearing(hears)
        assert arena.first.rings_relay is not None
        self.say(client, wire.Ring(0, arena.number, 1), arena.first.rings_relay.fileno())

    def _new_bell(self, arena: FarArena, index: int) -> int:
        """Make a bell of the process, and give the relay the end that rings it."""
        hears, rings = self._memory.make_bell()
        if (old := arena.bells.pop(index, None)) is not None:
            self._memory.close(old)
        arena.bells[index] = rings
        packed = ARENA.pack(KINDS["BELL"], ARENA.size, index, arena.number, 0)
        arena.first.relay.raw(packed, rings)
        return hears

    def _far(self, number: int) -> FarArena:
        return next(arena for arena in self.far if arena.number == number)

    def _make_bell(self, client: Client, message: wire.Bell) -> None:
        hears = self._new_bell(self._far(message.arena), message.index)
        self.say(client, wire.Hear(message.index, message.arena, message.side), hears)
        self._memory.close_hearing(hears)

    def _fetch(self, client: Client, message: wire.Fetch) -> None:
        arena = self._far(message.arena)
        assert message.side == 1
        answer = wire.Ring(message.index, message.arena, message.side)
        if message.index:
            self.say(client, answer)
            return
        assert arena.first.rings_relay is not None
        self.say(client, answer, arena.first.rings_relay.fileno())

    def _release(self, message: wire.Release) -> None:
        arena = self._far(message.arena)
        assert message.token == arena.number << 8
        end = arena.ends.pop(message.slot)
        self.releases.append((arena.number, 0, message.slot))
        with contextlib.suppress(OSError):
            end.relay.number("CLOSE", end.number)

    def _gone(self, client: Client) -> None:
        """The process has ended: so have its queue pairs."""
        super()._gone(client)
        for arena in self.far:
            if arena.client is client:
                for end in arena.ends.values():
                    with contextlib.suppress(OSError):
                        end.relay.number("CLOSE", end.number)
                arena.ends.clear()


@contextlib.contextmanager
def far_router(
    path: Path, binary: Path, transport: int, ring: int = RING, device: str = ""
) -> Iterator[FarRouter]:
    """Two relays that are linked, and a router that pairs processes over them."""
    with relays(binary, device, transport=transport) as (one, other):
        router = FarRouter(path, (one, other), ring)
        try:
            router.connect_hosts()
            yield router
        finally:
            router.close()
            path.unlink(missing_ok=True)
