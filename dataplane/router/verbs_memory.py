"""Files for registered memory, which peers on this host map to read and write it directly.

A process asks for a file, and gets it with a token. It gives the token to the peer of a queue pair
that may reach the memory, over their ring, after it has checked the peer's key as it would for an
operation. Who shows the token gets the file, if it has a queue pair with the owner's process on a
network that allows it. So the router knows no keys, and nobody gets a file unasked. There is no I/O
but that of `seams.py`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from dataplane.errors import KernelRefused, WrongMessage
from dataplane.router.layout import PAGE
from dataplane.router.queue_pairs import QueuePairRecord
from dataplane.router.reasons import Reason
from dataplane.router.registry import Registry
from dataplane.router.seams import ArenaMemory
from dataplane.router.verbs_pairing import VerbsProcess, opened_by
from dataplane.router.verbs_wire import VerbsKind, VerbsMemory, VerbsRefuse

FILES: Final = 1024
"""Files of one process."""
FILES_OF_CONTAINER: Final = 4096
"""Each is a descriptor of the router's."""
LENT_OF_CONTAINER: Final = 512
LENT: Final = 8192
"""Each is a descriptor of the relay's. The WRITEs to and from others go through rings."""


@dataclass(slots=True, eq=False)
class MemoryFile:
    """A file for part of a process's registered memory."""

    number: int
    token: int
    process: int
    namespace: int
    size: int
    memory: int
    writable: bool
    """Whether peers can map it to write there."""
    ready: bool
    """Whether they get it: one that they may only read is to be protected before."""
    lent: bool = False
    """The relay has it."""


class DirectMemory:
    """The files of all processes of this host."""

    def __init__(
        self,
        registry: Registry,
        processes: Mapping[int, VerbsProcess],
        memory: ArenaMemory,
        secret: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._processes = processes
        self._memory = memory
        self._secret = secret
        # Processes may still have files of an earlier router: none of its numbers comes again.
        self._numbers = itertools.count((secret() >> 2) + 1)
        self.files: dict[int, MemoryFile] = {}
        """By number."""
        self.of_process: dict[int, dict[int, MemoryFile]] = {}
        self.bytes: Counter[int] = Counter()
        """By namespace, as their number."""
        self.counts: Counter[int] = Counter()
        self.refused: Counter[Reason] = Counter()
        self.lent: Counter[int] = Counter()
        """Files that the relay has, by namespace."""
        self._lending: set[int] = set()
        """Processes whose files the relay gets."""
        self._ended: dict[int, MemoryFile] = {}
        """Files that nobody uses, and that the relay has. They count until it lets them go."""

    def handle(self, process_id: int, message: VerbsMemory) -> None:
        """Act on a message.

        Raises:
            WrongMessage: the process has not sent V_OPEN, or only the router sends this kind.
        """
        opened = opened_by(self._processes, process_id)
        match message.kind:
            case VerbsKind.MEMORY:
                self._make(opened, message)
            case VerbsKind.REACH:
                self._reach(opened, message)
            case VerbsKind.MEMORY_MAPPED:
                self._mapped(opened, message)
            case VerbsKind.MEMORY_END:
                self._end(opened, message)
            case _:
                raise WrongMessage(f"{message.kind.name} is not for the router")

    # --- owners

    def _make(self, opened: VerbsProcess, message: VerbsMemory) -> None:
        reason = self._why_not(opened, message.bytes)
        if reason is not None:
            self._refuse(opened, message, reason)
            return
        try:
            memory = self._memory.make_file(message.bytes)
        except KernelRefused:
            self._refuse(opened, message, Reason.MEMORY)
            return
        number = next(self._numbers)
        file = MemoryFile(
            number=number,
            token=self._secret(),
            process=opened.id,
            namespace=opened.namespace,
            size=message.bytes,
            memory=memory,
            writable=message.writable,
            ready=message.writable,
        )
        self.files[number] = self.of_process.setdefault(opened.id, {})[number] = file
        self.bytes[opened.namespace] += file.size
        self.counts[opened.namespace] += 1
        answer = VerbsMemory(
            VerbsKind.MEMORY_MADE,
            request=message.request,
            bytes=file.size,
            memory=number,
            token=file.token,
        )
        self._registry.outbox.send(opened.id, answer, memory)
        self._lend(file)

    def _why_not(self, opened: VerbsProcess, size: int) -> Reason | None:
        if opened.namespace not in self._registry.knowledge.direct:
            return Reason.OFF
        most = self._registry.limits.direct_memory
        if (
            not size
            or size % PAGE
            or self.bytes[opened.namespace] + size > most
            or len(self.of_process.get(opened.id, ())) >= FILES
            or self.counts[opened.namespace] >= FILES_OF_CONTAINER
        ):
            return Reason.LIMIT
        return None

    def _mapped(self, opened: VerbsProcess, message: VerbsMemory) -> None:
        """Its owner has mapped a file that peers may only read."""
        file = self.of_process.get(opened.id, {}).get(message.memory)
        if file is not None and not file.ready:
            with contextlib.suppress(KernelRefused):
                self._memory.protect(file.memory)
                file.ready = True
                self._lend(file)

    def _end(self, opened: VerbsProcess, message: VerbsMemory) -> None:
        """Its owner uses a file no more. Who has mapped it keeps it, for nothing."""
        file = self.of_process.get(opened.id, {}).get(message.memory)
        if file is not None:
            self._forget(file)

    def _forget(self, file: MemoryFile) -> None:
        del self.files[file.number], self.of_process[file.process][file.number]
        if not self.of_process[file.process]:
            del self.of_process[file.process]
        self._memory.close(file.memory)
        if file.lent:
            self._ended[file.number] = file
            self._registry.remote.end_file(file.number)
        else:
            self._uncount(file)

    def _uncount(self, file: MemoryFile) -> None:
        self.bytes[file.namespace] -= file.size
        self.counts[file.namespace] -= 1
        if not self.counts[file.namespace]:
            del self.bytes[file.namespace], self.counts[file.namespace]

    def gone(self, process_id: int) -> None:
        """A process has closed its connection to the router."""
        for file in list(self.of_process.get(process_id, {}).values()):
            self._forget(file)
        self._lending.discard(process_id)

    # --- the relay

    def lend(self, process_id: int) -> None:
        """The relay may use the files of a process: those that there are, and all later ones."""
        if process_id not in self._lending:
            self._lending.add(process_id)
            for file in self.of_process.get(process_id, {}).values():
                self._lend(file)

    def _lend(self, file: MemoryFile) -> None:
        if file.process not in self._lending or not file.ready or file.lent:
            return
        if self.lent[file.namespace] >= LENT_OF_CONTAINER or self.lent.total() >= LENT:
            self.refused[Reason.LIMIT] += 1
            return
        file.lent = True
        self.lent[file.namespace] += 1
        self._registry.remote.lend_file(file)

    def returned(self, number: int) -> None:
        """The relay has let a file go that nobody uses."""
        file = self._ended.pop(number, None)
        if file is not None:
            self.lent[file.namespace] -= 1
            if not self.lent[file.namespace]:
                del self.lent[file.namespace]
            self._uncount(file)

    def relay_died(self) -> None:
        """The relay has ended, and has no files any more."""
        self._lending.clear()
        for file in self.files.values():
            file.lent = False
        for number in list(self._ended):
            self.returned(number)
        self.lent.clear()

    # --- peers

    def _reach(self, opened: VerbsProcess, message: VerbsMemory) -> None:
        record = opened.queue_pairs.get(message.qpn)
        file = self._file_for(record, message)
        if record is None or file is None:
            self._refuse(opened, message, Reason.NOT_FOUND)
            return
        record.reached = True
        answer = VerbsMemory(
            VerbsKind.REACHED,
            request=message.request,
            qpn=message.qpn,
            writable=file.writable,
            bytes=file.size,
            memory=file.number,
        )
        self._registry.outbox.send(opened.id, answer, file.memory)

    def _file_for(self, record: QueuePairRecord | None, message: VerbsMemory) -> MemoryFile | None:
        """The file that a queue pair may have its process map."""
        file = self.files.get(message.memory)
        if record is None or record.peer is None or file is None:
            return None
        network = self._registry.knowledge.networks.get(record.network)
        allowed = (
            network is not None
            and network.verbs_direct
            and file.ready
            and file.process == record.peer.process
            and file.token == message.token
        )
        return file if allowed else None

    def _refuse(self, opened: VerbsProcess, message: VerbsMemory, reason: Reason) -> None:
        self.refused[reason] += 1
        refuse = VerbsRefuse(message.kind, message.request, message.qpn, reason)
        self._registry.outbox.send(opened.id, refuse)
