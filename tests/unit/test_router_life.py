"""The registry under random use: whatever processes do, nothing leaks and no slot serves two
connections.
"""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dataplane.control import Limits
from dataplane.errors import WrongMessage
from dataplane.router import library_wire as wire
from dataplane.router.agenda import RARELY
from tests.unit.router_world import VIP, World, at

PORTS = st.integers(5000, 5006)
CONTAINERS = st.integers(1, 4)


class Life(RuleBasedStateMachine):
    """Processes of four containers connect, send requests, release, ring, send invalid messages and
    end.
    """

    processes: Bundle[int] = Bundle("processes")

    def __init__(self) -> None:
        super().__init__()
        self.world = World(Limits(connections=6, waiting=8, bells=4, processes=3))

    @rule(target=processes, namespace=CONTAINERS)
    def come(self, namespace: int) -> int:
        pairing = self.world.pairing
        container = pairing.containers.get(namespace)
        if container is not None and len(container.processes) >= 3:
            return next(iter(container.processes))
        return self.world.process(namespace)

    @rule(process=consumes(processes))
    def go(self, process: int) -> None:
        if process in self.world.pairing.processes:
            self.world.pairing.gone(process)

    @rule(process=processes, to=CONTAINERS, port=PORTS, vip=st.booleans())
    def ask_as_client(self, process: int, to: int, port: int, vip: bool) -> None:
        if process in self.world.pairing.processes:
            own = self.world.pairing.processes[process].namespace
            remote = VIP if vip else f"10.0.4.{to}"
            self.world.open_and_ask(process, f"10.0.4.{own}:{port}", f"{remote}:80")

    @rule(process=processes, client=CONTAINERS, port=PORTS)
    def ask_as_server(self, process: int, client: int, port: int) -> None:
        if process in self.world.pairing.processes:
            own = self.world.pairing.processes[process].namespace
            self.world.open_and_ask(process, f"10.0.4.{own}:80", f"10.0.4.{client}:{port}")

    @rule(client=processes, server=processes, port=PORTS)
    def connect(self, client: int, server: int, port: int) -> None:
        if {client, server} <= self.world.pairing.processes.keys():
            self.world.connect(client, server, port)

    @rule(process=processes, pick=st.integers(0, 20))
    def release(self, process: int, pick: int) -> None:
        grants = self.world.grants(process)
        if process in self.world.pairing.processes and grants:
            self.world.release(process, grants[pick % len(grants)])

    @rule(process=processes, pick=st.integers(0, 5), side=st.integers(0, 1))
    def bell(self, process: int, pick: int, side: int) -> None:
        grants = self.world.grants(process)
        if process not in self.world.pairing.processes or not grants:
            return
        grant = grants[pick % len(grants)]
        with contextlib.suppress(WrongMessage):
            bell = wire.Bell(pick % 2, grant.arena, grant.token, side)
            self.world.pairing.bell(process, bell)

    @rule(process=processes, pick=st.integers(0, 20))
    def fetch(self, process: int, pick: int) -> None:
        grants = self.world.grants(process)
        if process in self.world.pairing.processes and grants:
            grant = grants[pick % len(grants)]
            fetch = wire.Fetch(pick % 2, grant.arena, grant.token, 1 - grant.side)
            self.world.pairing.fetch(process, fetch)

    @rule(namespace=CONTAINERS, port=PORTS)
    def close(self, namespace: int, port: int) -> None:
        kernel = self.world.kernel
        local = at(f"10.0.4.{namespace}:{port}")
        kernel.sockets = {key: value for key, value in kernel.sockets.items() if key[1] != local}

    @rule()
    def pass_time(self) -> None:
        self.world.now += RARELY + 1
        self.world.pairing.weigh()
        self.world.pairing.sweep(100)

    @invariant()
    def books_agree(self) -> None:
        pairing = self.world.pairing
        for container in pairing.containers.values():
            assert len(container.ends) <= 6
            assert len(container.waiting) <= 8
            assert container.bells == sum(
                len(side.bells)
                for arena in pairing.arenas.values()
                for side in arena.sides
                if side.namespace == container.namespace
            )
            for cookie, (arena, slot, side) in container.ends.items():
                end = arena.slots[slot].ends[side]
                assert end is not None
                assert (end.key, end.namespace) == (cookie, container.namespace)
        waiting = {id(each) for each in pairing.requests}
        assert waiting == {
            id(each) for process in pairing.processes.values() for each in process.waiting.values()
        }
        assert {arena.memory for arena in pairing.arenas.values()} == self.world.memory.arenas
        for pair, arenas in pairing.arena_table.with_room.items():
            assert arenas
            assert set(pair) <= pairing.processes.keys()
            assert all(arena.free and not arena.retired for arena in arenas.values())
        held = {
            each
            for arena in pairing.arenas.values()
            for side in arena.sides
            for each in side.bells.values()
        }
        assert held == self.world.memory.bells
        # The router keeps no end that hears: whatever is in its queue is its process's.
        assert {-each for each in held} <= self.world.memory.handed

    @invariant()
    def incarnations_differ(self) -> None:
        seen = [
            slot.incarnation
            for arena in self.world.pairing.arenas.values()
            for slot in arena.slots.values()
        ]
        assert len(set(seen)) == len(seen)

    def teardown(self) -> None:
        pairing = self.world.pairing
        for process in list(pairing.processes):
            pairing.gone(process)
        assert not pairing.containers
        assert not pairing.arenas
        assert not list(pairing.requests)
        assert not pairing.arena_table.with_room
        assert not self.world.memory.arenas
        assert not self.world.memory.bells


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
