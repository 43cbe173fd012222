"""The router's process: one thread, one epoll instance, and no socket that makes it wait.

The public socket opens with the first snapshot of the driver: before that, the router could not
give a container a right answer.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from dataplane import control
from dataplane.router import connection_traffic, listing, verbs_listing
from dataplane.router.arena_memory import LinuxArenaMemory
from dataplane.router.clients import Clients
from dataplane.router.control_socket import ControlSocket, Steps
from dataplane.router.interhost import Equipment, InterHost
from dataplane.router.interhost_facts import encryption_facts
from dataplane.router.knowledge import Knowledge
from dataplane.router.loop import Bugs, EpollLoop
from dataplane.router.pairing import Pairing
from dataplane.router.socket_table import LinuxSocketTable, Namespaces

TICK: Final = 1.0
"""Seconds between two ticks of the parts that do something regularly."""
_SWEEP: Final = 500
"""Requests and slots that are checked per tick, at most."""
_EVENTS: Final = 256
"""Events per round."""


class RouterServer:
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
        """`guard=False`: as before Linux 6.16, where a socket can't refuse descriptors."""
        self._public = public
        self._clock = clock
        self._started = clock()
        self._ticked = clock()
        self._stopped = False
        self._namespaces = Namespaces(self._path_of, clock)
        sockets, memory = LinuxSocketTable(self._namespaces), LinuxArenaMemory(guards=guard)
        self._memory = memory
        self._epoll = select.epoll()
        self._bugs = Bugs(clock)
        self.loop = EpollLoop(self._epoll, clock, self._bugs.guard)
        self._clients = Clients(
            self.loop,
            self._namespaces,
            lambda outbox: Pairing(outbox, sockets, memory, clock=clock, secret=secret or _secret),
            guard=guard,
        )
        self.pairing = self._clients.pairing
        self.interhost = InterHost(
            self.pairing, self.loop, sockets, memory, equipment or Equipment()
        )
        self._control = ControlSocket(self.loop, admin, self._answer)
        self._parts = (
            self.pairing.weigh,
            lambda: self.pairing.sweep(_SWEEP),
            self.interhost.tick,
            self._namespaces.tidy,
            self._clients.tick,
        )
        """What happens at each tick."""

    def _path_of(self, namespace: int) -> Path | None:
        sandbox = self.pairing.knowledge.sandboxes.get(namespace)
        return None if sandbox is None or sandbox.path == Path() else sandbox.path

    def run(self) -> None:
        """Serve until `stop` is called or the watched descriptor ends."""
        try:
            while not self._stopped:
                self._round()
        finally:
            self.close()

    def stop(self) -> None:
        """Leave `run` soon. May be called from a signal handler."""
        self._stopped = True

    def watch(self, descriptor: int) -> None:
        """Stop when the other end of this pipe is closed: the process that started us has ended."""

        def read(_: int) -> None:
            self._stopped = self._stopped or not os.read(descriptor, 4096)

        self.loop.watch(descriptor, select.EPOLLIN, read)

    def close(self) -> None:
        """Release everything."""
        self._clients.close()
        self._control.close()
        self.interhost.close()
        self._namespaces.close()
        self._epoll.close()

    def _round(self) -> None:
        for descriptor, events in self._epoll.poll(self._timeout(), _EVENTS):
            self.loop.serve(descriptor, events)
            self._bugs.guard(self._clients.close_scheduled)
        self.loop.fire()
        self._bugs.guard(self._control.work)
        self._bugs.guard(self._clients.work)
        now = self._clock()
        if now - self._ticked >= TICK:
            self._ticked = now
            for part in self._parts:
                self._bugs.guard(part)
        self._bugs.guard(self._clients.close_scheduled)

    def _timeout(self) -> float:
        """Seconds for which the loop may sleep."""
        return 0 if self._control.is_busy else self.loop.timeout(self._clients.pause(TICK))

    def _answer(self, request: control.ControlRequest) -> control.ControlReply | Steps:
        """The answer to a request on the control socket.

        Raises:
            DataplaneError: the snapshot contradicts itself.
        """
        match request:
            case control.RouterSnapshot():
                self.pairing.replace_snapshot(Knowledge(request))
                self.interhost.learned()
                self._clients.snapshot_replaced()
                self._clients.listen(self._public)
                return control.Done()
            case control.LivenessRequest():
                return control.Done()
            case control.StatisticsRequest():
                return self.statistics()
            case control.ConnectionsRequest():
                return listing.connections(
                    self.pairing, self._namespaces, self._clock, request.namespace
                )
            case control.VerbsRequest():
                return verbs_listing.objects(self.pairing, self._clock(), request.namespace)
            case control.TrafficRequest():
                return connection_traffic.traffic(
                    self.pairing,
                    self._namespaces,
                    self._memory,
                    self._clock,
                    self.interhost.relay_process,
                    request.namespace,
                )
            case control.PathsRequest():
                return listing.paths(self.pairing, self._namespaces)
            case control.EncryptionRequest():
                return encryption_facts(self.interhost.remotes)

    def statistics(self) -> control.Statistics:
        """The router's counters."""
        rdma, relay = self.interhost.facts()
        return listing.statistics(
            self.pairing,
            uptime=self._clock() - self._started,
            wrong_messages=self._clients.wrong_messages,
            dropped=self._clients.dropped,
            bugs=self._bugs.count,
            rdma=rdma,
            relay=relay,
        )


def _secret() -> int:
    """Never 0, which stands for no token."""
    return int.from_bytes(os.urandom(8), "little") or 1
