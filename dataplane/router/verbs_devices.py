"""The device of verbs that a container's processes see: its GIDs, and the numbers (QPNs) that each
process gives to its queue pairs. There is no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from dataplane.router.library_wire import IPAddress
from dataplane.router.verbs_wire import VerbsDevice

RANGE: Final = 4096
"""Numbers of one process."""
RANGES: Final = (1 << 24) // RANGE
"""QPNs have 24 bits. The first range has the numbers of management queue pairs, and the last one
that of multicasts: nobody gets them."""
REGIONS: Final = 65536
"""Memory regions of one process."""
_LOCAL: Final = 0x024646FF << 32
"""Marks a GUID as chosen here (IEEE's locally administered bit)."""
_LOW: Final = (1 << 64) - 1


class QpnRanges:
    """The numbers of the queue pairs of one namespace, a range for each process.

    A range is not given again before all others have been: a message about an earlier queue pair
    reaches no later one.
    """

    def __init__(self, random: int) -> None:
        """`random`: any number; the first range depends on it."""
        self._next = random
        self._taken: set[int] = set()

    def take(self, wanted: int = 0) -> int | None:
        """Take a range: the one that begins with `wanted`, if it is free. None: all are taken."""
        if self._is_free(wanted):
            self._taken.add(wanted)
            return wanted
        while len(self._taken) < RANGES - 2:
            first = self._next % RANGES * RANGE
            self._next += 1
            if self._is_free(first):
                self._taken.add(first)
                return first
        return None

    def give_back(self, first: int) -> None:
        """A process is gone."""
        self._taken.remove(first)

    def _is_free(self, first: int) -> bool:
        inside = RANGE <= first < (RANGES - 1) * RANGE
        return inside and first % RANGE == 0 and first not in self._taken


Gids = tuple[IPAddress | None, ...]
"""By index; None: the container has no such address any more."""


def place_gids(before: Gids, addresses: Sequence[IPAddress]) -> Gids:
    """The GIDs of a process, of which it knows those before.

    A GID keeps its index as long as the container has the address. Index 0 is in use if any is,
    since programs use it without looking: it may be one that has another index as well.
    """
    now = [gid if gid in addresses else None for gid in before]
    for address in addresses:
        if address in now:
            continue
        if None in now:
            now[now.index(None)] = address
        else:
            now.append(address)
    if now and now[0] is None:
        now[0] = next((gid for gid in now if gid is not None), None)
    return tuple(now)


def guid_of(address: IPAddress) -> int:
    """The GUID of a device whose first GID this is."""
    return _LOCAL | int(address) if address.version == 4 else int(address) & _LOW


@dataclass(slots=True)
class DeviceView:
    """The device as one process knows it."""

    wanted: int = 0
    """The range that it had of an earlier router."""
    qpn_first: int | None = None
    """None: it has had no device so far."""
    guid: int = 0
    gids: Gids = ()
    told: list[VerbsDevice] = field(default_factory=list)

    def gid(self, index: int) -> IPAddress | None:
        """The GID with an index, if there is one."""
        return self.gids[index] if index < len(self.gids) else None

    def index_of(self, gid: IPAddress) -> int | None:
        """The index of a GID, if it has it."""
        return self.gids.index(gid) if gid in self.gids else None

    def owns(self, qpn: int) -> bool:
        """Whether the process may give a queue pair this number."""
        return self.qpn_first is not None and self.qpn_first <= qpn < self.qpn_first + RANGE

    def update(
        self, addresses: Sequence[IPAddress], queue_pairs: int, direct_bytes: int = 0
    ) -> list[VerbsDevice]:
        """What the process is to be told; nothing if it knows.

        Args:
            addresses: those of its container that can be GIDs.
            queue_pairs: how many the container may have.
            direct_bytes: how much registered memory its peers may map.
        """
        if addresses and not self.guid:
            self.guid = guid_of(addresses[0])
        self.gids = place_gids(self.gids, addresses)
        there = self.qpn_first is not None and any(self.gids)
        gids: Gids = self.gids if there else (None,)
        told = [
            VerbsDevice(
                index=index,
                count=len(gids) if there else 0,
                qpn_first=self.qpn_first or 0,
                qpn_count=RANGE if there else 0,
                queue_pairs=min(queue_pairs, RANGE),
                regions=REGIONS,
                direct=direct_bytes > 0,
                guid=self.guid,
                direct_bytes=direct_bytes,
                gid=gid,
            )
            for index, gid in enumerate(gids)
        ]
        if told == self.told:
            return []
        self.told = told
        return told
