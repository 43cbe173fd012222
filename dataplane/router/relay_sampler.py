"""Reads the counters of connections that wait for the relay, within a share of the processor.

A round reads those that are due, a packet of them at a time, and the router does other work in
between. Its time is counted as it goes: a container with very many connections is sampled less
often, and nobody waits for it.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Final

from dataplane.router.limits import Share
from dataplane.router.loop import Loop
from dataplane.router.remote_requests import RemoteRequest
from dataplane.router.seams import SocketTable
from dataplane.router.socket_table import AT_ONCE
from dataplane.router.tcp_counters import TcpCounters

PROCESSOR: Final = 0.02
"""Share of one processor."""
AT_A_TIME: Final = 0.02
"""Seconds of work that an unused share allows at once."""

Each = Callable[[RemoteRequest, TcpCounters | None], None]


class RelaySampler:
    """One round at a time."""

    def __init__(
        self, loop: Loop, sockets: SocketTable, cpu: Callable[[], float] = time.thread_time
    ) -> None:
        """`cpu`: seconds of the processor that this thread has used."""
        self._loop = loop
        self._sockets = sockets
        self._cpu = cpu
        self._share = Share.full(PROCESSOR, AT_A_TIME, loop.now())
        self._queue: deque[tuple[int, list[RemoteRequest]]] = deque()
        self.busy = False
        """A round isn't finished."""

    def sample(
        self, requests: Iterable[RemoteRequest], each: Each, done: Callable[[], None]
    ) -> None:
        """Begin a round, if none runs: `each` gets the counters of each request, `done` is last."""
        by_namespace: defaultdict[int, list[RemoteRequest]] = defaultdict(list)
        for request in requests:
            by_namespace[request.local.namespace].append(request)
        for namespace, some in by_namespace.items():
            for at in range(0, len(some), AT_ONCE):
                self._queue.append((namespace, some[at : at + AT_ONCE]))
        self.busy = True
        self._later(each, done)

    def _step(self, each: Each, done: Callable[[], None]) -> None:
        began = self._cpu()
        try:
            self._read(each)
            if not self._queue:
                self.busy = False
                done()
        finally:
            # Also after a bug: without another step no round would ever begin again.
            self._share.spend(self._cpu() - began, self._loop.now())
            if self.busy:
                self._later(each, done)

    def _read(self, each: Each) -> None:
        if not self._queue:
            return
        namespace, some = self._queue.popleft()
        ends = [
            (message.local, message.remote, message.cookie)
            for message in (request.local.message for request in some)
        ]
        for request, counters in zip(some, self._sockets.counters(namespace, ends), strict=True):
            each(request, counters)

    def _later(self, each: Each, done: Callable[[], None]) -> None:
        """Go on as soon as the share allows it."""
        self._share.spend(0.0, self._loop.now())
        self._loop.after(self._share.pause(0.0), lambda: self._step(each, done))
