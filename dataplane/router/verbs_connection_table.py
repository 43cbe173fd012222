"""The connections of rdma_cm by all that names them. There is no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final, TypeVar

from dataplane.router.library_wire import IPAddress
from dataplane.router.verbs_connections import CmConnection, CmStage, ConnectionSide, HalfKey

_LAST: Final = 0xFFFFFFFF

FarKey = tuple[IPAddress, bool, int]
"""Another host, whether this host asked, and the number of the host that did."""


class ConnectionTable:
    """See the module."""

    def __init__(self, random: int) -> None:
        """`random`: any number; the first connection's depends on it."""
        # Connections of an earlier router may be resumed: none of its numbers should come again.
        self._next = random
        self.by_number: dict[tuple[int, int], CmConnection] = {}
        """By process and the router's number."""
        self.of_process: dict[int, dict[CmConnection, None]] = {}
        self.asking: dict[tuple[int, int], CmConnection] = {}
        """By the process that asks, and its id."""
        self.asked_by: Counter[int] = Counter()
        """Connections by the namespace that asked for them; those of other hosts don't count."""
        self.far: dict[FarKey, CmConnection] = {}
        self.of_host: dict[IPAddress, dict[CmConnection, None]] = {}
        self.halves: dict[HalfKey, CmConnection] = {}
        """Those of an earlier router with one side so far."""
        self.since: dict[CmConnection, float] = {}
        """Requests and those that one end has left, by the time from which on; the oldest first."""
        self.returned: dict[CmConnection, float] = {}
        """The same for `halves`."""

    def __iter__(self) -> Iterator[CmConnection]:
        """Each of them once."""
        return iter({each: None for of in self.of_process.values() for each in of})

    def number(self, *processes: int) -> int:
        """A number that none of these processes' connections has."""
        while True:
            self._next = self._next % _LAST + 1
            if not any((process, self._next) in self.by_number for process in processes):
                return self._next

    def add(self, connection: CmConnection, now: float) -> None:
        """A request, or a connection of an earlier router."""
        first = connection.sides[0]
        if first.host is None:
            self.asked_by[first.namespace] += 1
        if connection.half is not None:
            self.halves[connection.half] = connection
            self.returned[connection] = now
        else:
            self.since[connection] = now
            if first.host is None:
                self.asking[first.process, first.id] = connection
        for side in connection.sides:
            self.add_side(connection, side)

    def add_side(self, connection: CmConnection, side: ConnectionSide) -> None:
        """One of its ends."""
        if side.host is None:
            self.by_number[side.process, connection.number] = connection
            self.of_process.setdefault(side.process, {})[connection] = None
        else:
            self.far[_far_key(connection, side.host)] = connection
            self.of_host.setdefault(side.host, {})[connection] = None

    def join(self, half: CmConnection, own: ConnectionSide) -> None:
        """The other end of a connection of an earlier router has come back."""
        assert half.half is not None
        del self.halves[half.half], self.returned[half]
        half.half = None
        half.sides.append(own)
        self.add_side(half, own)

    def repeated(self, connection: CmConnection, now: float) -> None:
        """It is still wanted."""
        del self.since[connection]
        self.since[connection] = now

    def answered(self, connection: CmConnection, stage: CmStage) -> None:
        """It has got further: it is no request any more that its listener hasn't answered."""
        if connection.stage is CmStage.ASKED:
            self._unwait(connection)
            del self.since[connection]
        connection.stage = max(connection.stage, stage)

    def forget(self, connection: CmConnection) -> None:
        """It has ended."""
        self._unwait(connection)
        first = connection.sides[0]
        if first.host is None:
            self.asked_by[first.namespace] -= 1
            if not self.asked_by[first.namespace]:
                del self.asked_by[first.namespace]
            if self.asking.get((first.process, first.id)) is connection:
                del self.asking[first.process, first.id]
        for side in connection.sides:
            if side.host is None:
                self.by_number.pop((side.process, connection.number), None)
                _discard(self.of_process, side.process, connection)
            else:
                del self.far[_far_key(connection, side.host)]
                _discard(self.of_host, side.host, connection)
        if connection.half is not None:
            del self.halves[connection.half], self.returned[connection]
        self.since.pop(connection, None)

    def _unwait(self, connection: CmConnection) -> None:
        if connection.waiting is not None:
            connection.waiting[connection.sides[0].container] -= 1
            connection.waiting = None


def _far_key(connection: CmConnection, host: IPAddress) -> FarKey:
    return host, connection.sides[0].host is None, connection.far_number


_Of = TypeVar("_Of")


def _discard(
    tables: dict[_Of, dict[CmConnection, None]], of: _Of, connection: CmConnection
) -> None:
    table = tables.get(of, {})
    table.pop(connection, None)
    if not table:
        tables.pop(of, None)
