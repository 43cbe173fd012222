"""The processes and containers of this host that use the router, and what each of them has.

A container is a network namespace here. Limits apply per container.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from dataplane.control import Limits
from dataplane.router.arenas import Arena, EndKey
from dataplane.router.knowledge import Knowledge
from dataplane.router.library_wire import Refuse, Request, Welcome
from dataplane.router.limits import Bucket
from dataplane.router.pair_requests import PairRequest
from dataplane.router.reasons import PASSING, Reason, told
from dataplane.router.remote_pairing import NoRemotePairing, RemotePairing
from dataplane.router.seams import Outbox

NOTES: Final = 16384
"""Notes kept per container; the oldest are forgotten."""


@dataclass(slots=True, eq=False)
class ProcessRecord:
    """A process that is connected to the router."""

    id: int
    namespace: int
    pid: int
    build: str | None = None
    """The build ID of its library; None until HELLO."""
    welcome: Welcome | None = None
    other_version: bool = False
    """Its library is older or newer than this router."""
    early: list[Request] = field(default_factory=list)
    """Requests that came before the process was welcomed."""
    waiting: dict[int, PairRequest] = field(default_factory=dict)
    """Its requests that wait, by cookie."""
    arenas: dict[int, Arena] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class ContainerRecord:
    """What the processes of one network namespace have."""

    namespace: int
    request_rate: Bucket
    """The requests that it may still send."""
    processes: dict[int, ProcessRecord] = field(default_factory=dict)
    waiting: dict[int, PairRequest] = field(default_factory=dict)
    """Requests that wait, by cookie."""
    ends: dict[EndKey, tuple[Arena, int, int]] = field(default_factory=dict)
    """Arena, slot and side of each end that has a slot."""
    notes: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Cookie to the reason why the connection is on TCP, and the time of the note."""
    sides: int = 0
    """Sides of arenas. While there is one the container is kept, with or without processes."""
    bells: int = 0
    relay_cpu: float = 0.0
    """Seconds of the processor that the relay has used for it."""
    memory: Counter[int] = field(default_factory=Counter)
    """Bytes of arenas, by the namespace at their other side."""

    def holds(self, most: int) -> int:
        """Bytes of arenas; those shared with one other container count up to half of the limit."""
        return sum(
            used if other == self.namespace else min(used, most // 2)
            for other, used in self.memory.items()
        )


@dataclass(slots=True)
class PairingCounts:
    """Counts since the start, by reason where there is one."""

    granted: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    noted: Counter[int] = field(default_factory=Counter)


class Registry:
    """All processes and containers, and the driver's snapshot."""

    def __init__(self, outbox: Outbox, clock: Callable[[], float]) -> None:
        self.outbox = outbox
        self.clock = clock
        self.knowledge = Knowledge()
        self.remote: RemotePairing = NoRemotePairing()
        self.processes: dict[int, ProcessRecord] = {}
        self.containers: dict[int, ContainerRecord] = {}
        self.counts = PairingCounts()

    @property
    def limits(self) -> Limits:
        """What one container may have."""
        return self.knowledge.settings.limits

    def add(self, process_id: int, namespace: int, pid: int) -> bool:
        """Add a process; false if its container has too many."""
        container = self.containers.get(namespace)
        if container is None:
            container = self.add_container(namespace, self.limits.asks)
        elif len(container.processes) >= self.limits.processes:
            return False
        process = ProcessRecord(process_id, namespace, pid)
        self.processes[process_id] = container.processes[process_id] = process
        return True

    def add_container(self, namespace: int, requests: float) -> ContainerRecord:
        """Add a container that may send so many requests per second."""
        container = ContainerRecord(namespace, Bucket.full(requests, self.clock()))
        self.containers[namespace] = container
        return container

    def remove(self, process_id: int) -> ProcessRecord:
        """Remove a process. Its container stays until `forget_if_unused`."""
        process = self.processes.pop(process_id)
        del self.containers[process.namespace].processes[process_id]
        return process

    def forget_if_unused(self, namespace: int) -> None:
        """Forget a container that has neither processes nor arenas."""
        container = self.containers[namespace]
        if not container.processes and not container.sides:
            del self.containers[namespace]

    def refuse(self, process_id: int, request: Request, reason: Reason) -> None:
        """Tell a process that a connection stays on TCP, and note why."""
        self.counts.refused[reason] += 1
        self.note(self.processes[process_id], request.cookie, reason)
        passes = reason in PASSING
        self.outbox.send(
            process_id, Refuse(request.connection, request.cookie, told(reason), passes)
        )

    def note(self, process: ProcessRecord, cookie: int, reason: int) -> None:
        """Remember why a connection is on TCP."""
        notes = self.containers[process.namespace].notes
        notes.pop(cookie, None)
        notes[cookie] = (reason, self.clock())
        if len(notes) > NOTES:
            del notes[next(iter(notes))]

    def is_full(self, namespace: int, more: int = 1) -> bool:
        """Whether a container can't have so many more connections in shared memory."""
        container, limits = self.containers[namespace], self.limits
        return (
            len(container.ends) + more > limits.connections
            or container.holds(limits.memory) >= limits.memory
        )

    def share_too_much(self, one: int, other: int) -> bool:
        """Whether two containers share as much memory as two may: half of what each may have."""
        return one != other and self.containers[one].memory[other] >= self.limits.memory // 2
