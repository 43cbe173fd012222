"""The ports of rdma_cm: which ids of a container's processes are bound to them, and which listen.

A port space of a container is as one of the kernel's (drivers/infiniband/core/cma.c): an id has an
address, or all, or all of a family. There is no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from dataplane.router.library_wire import IPAddress
from dataplane.router.verbs_wire import VerbsListen

EPHEMERAL: Final = range(32768, 61000)
"""Ports for those who don't care, as the kernel's net.ipv4.ip_local_port_range."""
SPACES: Final = frozenset({0x0002, 0x0106, 0x0111, 0x013F})
"""RDMA_PS_IPOIB, TCP, UDP and IB (rdma/rdma_cma.h)."""
ALL_IPV4: Final = IPv4Address(0)
ALL_IPV6: Final = IPv6Address(1)
"""In place of a GID: all of IPv6. A loopback address is never a GID. All of both is None."""
TRIES: Final = 128
"""Random ports that are looked at for one that is free. A container may have little more than half
of them (`verbs_cm.PORTS`)."""
SHARERS: Final = 64
"""Ids with one port, at most."""
_WILDCARDS: Final = (None, ALL_IPV4, ALL_IPV6)


@dataclass(slots=True, eq=False)
class BoundId:
    """An id of a process that is bound to a port, and perhaps listens."""

    process: int
    namespace: int
    message: VerbsListen
    port: int
    waiting: Counter[int | IPAddress] = field(default_factory=Counter)
    """Requests that it has not answered, by the namespace or the other host that asks."""

    @property
    def id(self) -> int:
        """Its number in its process."""
        return self.message.id

    @property
    def listens(self) -> bool:
        """Whether requests may come to it."""
        return self.message.backlog > 0

    def serves(self, gid: IPAddress) -> bool:
        """Whether a request for this address is for it."""
        return self.message.gid in (gid, None, ALL_IPV4 if gid.version == 4 else ALL_IPV6)

    def overlaps(self, gid: IPAddress | None) -> bool:
        """Whether some address is one of its own and of `gid`."""
        own = self.message.gid
        if own is None or gid is None:
            return True
        if own.version != gid.version:
            return False
        return own == gid or own in _WILDCARDS or gid in _WILDCARDS

    def bars(self, message: VerbsListen) -> bool:
        """Whether another id can't have this one's port."""
        shared = self.message.reuse and message.reuse and not (self.listens and message.backlog)
        return self.overlaps(message.gid) and not shared


class VerbsPorts:
    """The ports of all containers of this host."""

    def __init__(self, secret: Callable[[], int]) -> None:
        self._secret = secret
        self._bound: dict[tuple[int, int, int], list[BoundId]] = {}
        """By namespace, port space and port."""
        self._of_process: dict[int, dict[int, BoundId]] = {}
        """By process and id."""
        self.of_container: Counter[int] = Counter()
        """Bound ids by namespace."""

    def bind(self, process: int, namespace: int, message: VerbsListen) -> BoundId | None:
        """Give an id the port that it wants, or any. None: another id has it, or all are taken.

        An id that has the port already changes: it listens from now on, for instance.
        """
        old = self._of_process.get(process, {}).get(message.id)
        port = message.port or (self._free_port(namespace, message) if old is None else old.port)
        if not self._may_have(namespace, port, message, old):
            return None
        if old is not None:
            self._remove(old)
        bound = BoundId(process, namespace, message, port)
        if old is not None:
            bound.waiting = old.waiting
        self._bound.setdefault((namespace, message.space, port), []).append(bound)
        self._of_process.setdefault(process, {})[message.id] = bound
        self.of_container[namespace] += 1
        return bound

    def has(self, process: int, number: int) -> bool:
        """Whether an id has a port."""
        return number in self._of_process.get(process, {})

    def end(self, process: int, number: int) -> None:
        """An id has no port any more. An unknown one is fine."""
        bound = self._of_process.get(process, {}).get(number)
        if bound is not None:
            self._remove(bound)

    def gone(self, process: int) -> None:
        """A process is gone."""
        for bound in list(self._of_process.get(process, {}).values()):
            self._remove(bound)

    def listener(self, namespace: int, space: int, port: int, gid: IPAddress) -> BoundId | None:
        """Who gets a request: an id with just this address before one with all."""
        found = None
        for bound in self._bound.get((namespace, space, port), ()):
            if bound.listens and bound.serves(gid) and (found is None or bound.message.gid == gid):
                found = bound
        return found

    def __iter__(self) -> Iterator[BoundId]:
        return (bound for of_process in self._of_process.values() for bound in of_process.values())

    def _may_have(
        self, namespace: int, port: int, message: VerbsListen, own: BoundId | None
    ) -> bool:
        if not 0 < port < 1 << 16:
            return False
        others = self._bound.get((namespace, message.space, port), ())
        if len(others) >= SHARERS and own not in others:
            return False
        return not any(other is not own and other.bars(message) for other in others)

    def _free_port(self, namespace: int, message: VerbsListen) -> int:
        """A random port that nobody has; 0: none was found. Not one after the other: many that
        lie in a row would cost the router much.
        """
        for _ in range(TRIES):
            port = EPHEMERAL[self._secret() % len(EPHEMERAL)]
            if (namespace, message.space, port) not in self._bound:
                return port
        return 0

    def _remove(self, bound: BoundId) -> None:
        key = bound.namespace, bound.message.space, bound.port
        self._bound[key].remove(bound)
        if not self._bound[key]:
            del self._bound[key]
        of_process = self._of_process[bound.process]
        del of_process[bound.id]
        if not of_process:
            del self._of_process[bound.process]
        self.of_container[bound.namespace] -= 1
        if not self.of_container[bound.namespace]:
            del self.of_container[bound.namespace]
