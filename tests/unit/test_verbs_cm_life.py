"""Connections of rdma_cm under random use: whatever processes say, die and repeat, nobody hears
what isn't for it, the tables agree, and in the end nothing is left.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.control import Limits
from dataplane.router.knowledge import Knowledge
from dataplane.router.verbs_cm import LATE
from dataplane.router.verbs_connections import CmStage
from dataplane.router.verbs_pairing import RETURN
from dataplane.router.verbs_wire import Step, VerbsConnection
from tests.unit.cm_world import TCP, UDP, CmModel
from tests.unit.verbs_world import VerbsWorld, gid, moved

CONTAINERS = st.integers(1, 3)
PICK = st.integers(0, 5)
STEPS = st.sampled_from([step for step in Step if step not in (Step.REQUEST, Step.RESOLVE)])
LIMITS = Limits(queue_pairs=3, processes=3)
PORTS = st.integers(500, 502)
SPACES = st.sampled_from([TCP, UDP])


class CmLife(RuleBasedStateMachine):
    """Processes of three containers."""

    def __init__(self) -> None:
        super().__init__()
        self.world = VerbsWorld(LIMITS)
        self.processes: list[CmModel] = []
        self.known: dict[CmModel, list[int]] = {}
        """Numbers of connections that each process was told."""

    def pick(self, number: int) -> CmModel:
        return self.processes[number % len(self.processes)]

    def read(self) -> None:
        """All processes take what there is for them."""
        for model in self.processes:
            for heard in model.read():
                if isinstance(heard, VerbsConnection) and heard.connection:
                    self.known[model].append(heard.connection)

    def only(self, *allowed: int) -> None:
        """Nobody else has heard anything."""
        for model in self.processes:
            assert model.process in allowed or not model.read()
        self.read()

    def ends(self, model: CmModel) -> set[int]:
        """A process, and those with which it has connections."""
        of_process = self.world.pairing.verbs_connections.table.of_process.get(model.process, {})
        return {model.process} | {end.process for each in of_process for end in each.sides}

    @rule(namespace=CONTAINERS)
    def come(self, namespace: int) -> None:
        container = self.world.pairing.containers.get(namespace)
        if container is None or len(container.processes) < 3:
            model = CmModel.open(self.world, namespace)
            self.processes.append(model)
            self.known[model] = []

    @precondition(lambda self: self.processes)
    @rule(number=PICK)
    def die(self, number: int) -> None:
        """Those that had connections with it are told, and nobody else."""
        model = self.pick(number)
        self.read()
        told = self.ends(model)
        self.processes.remove(model)
        model.kill()
        for other in self.processes:
            heard = other.read()
            assert bool(heard) == (other.process in told)
            assert {each.step for each in heard if isinstance(each, VerbsConnection)} <= {
                Step.REJECT,
                Step.RESOLVED,
                Step.DISCONNECT,
                Step.DISCONNECTED,
            }

    @precondition(lambda self: self.processes)
    @rule(number=PICK, port=PORTS, space=SPACES, backlog=st.integers(0, 1), reuse=st.booleans())
    def listen(self, number: int, port: int, space: int, backlog: int, reuse: bool) -> None:
        self.read()
        model = self.pick(number)
        model.listen(900 + port, port, space=space, backlog=backlog, reuse=reuse)
        self.only(model.process)

    @precondition(lambda self: self.processes)
    @rule(number=PICK, port=PORTS)
    def listen_end(self, number: int, port: int) -> None:
        self.pick(number).listen_end(900 + port)

    @precondition(lambda self: self.processes)
    @rule(
        number=PICK,
        own=st.integers(1, 4),
        to=st.integers(1, 4),
        port=PORTS,
        space=SPACES,
        step=st.sampled_from([Step.REQUEST, Step.RESOLVE]),
    )
    def ask(self, number: int, own: int, to: int, port: int, space: int, step: Step) -> None:
        self.read()
        model, address = self.pick(number), gid(f"10.0.4.{to}")
        listener = self.world.pairing.verbs_connections.ports.listener(to, space, port, address)
        model.ask(own, address, port, space=space, step=step)
        known = self.ends(model)
        assert listener is None or listener.process in known or model.heard
        self.only(*known)

    @precondition(lambda self: self.processes)
    @rule(number=PICK, step=STEPS, own=st.integers(0, 8), which=PICK, whose=PICK)
    def say(self, number: int, step: Step, own: int, which: int, whose: int) -> None:
        """Any step, on any connection of its own or of others."""
        self.read()
        known = self.known[self.pick(whose)]
        connection = known[which % len(known)] if known else 0
        model = self.pick(number)
        allowed = self.ends(model)
        if step is Step.RESUME:
            model.resume(own, connection, gid(f"10.0.4.{1 + which % 3}"))
            allowed |= self.ends(model)
        else:
            model.say(step, own, connection)
        self.only(*allowed)

    @precondition(lambda self: self.processes)
    @rule(number=PICK)
    def accept(self, number: int) -> None:
        """A process answers what it was asked last, and the other one is ready."""
        self.read()
        model = self.pick(number)
        asked = [
            each
            for each in model.heard
            if isinstance(each, VerbsConnection) and each.step is Step.REQUEST
        ]
        if not asked:
            return
        number = asked[-1].connection
        model.say(Step.REPLY, 200 + len(asked), number)
        for other in self.processes:
            for heard in other.read():
                if isinstance(heard, VerbsConnection) and heard.step is Step.REPLY:
                    assert heard.connection == number
                    other.say(Step.READY, heard.id, number)
        connection = self.world.pairing.verbs_connections.table.by_number.get(
            (model.process, number)
        )
        assert connection is None or connection.stage > CmStage.ASKED

    @precondition(lambda self: self.processes)
    @rule(number=PICK, busy=st.booleans())
    def be_busy(self, number: int, busy: bool) -> None:
        process = self.pick(number).process
        (self.world.post.busy.add if busy else self.world.post.busy.discard)(process)

    @rule(gone=st.booleans())
    def change_networks(self, gone: bool) -> None:
        """A container leaves the network, or all are there."""
        facts = self.world.facts
        self.world.pairing.replace_snapshot(moved(self.world, e2=()) if gone else Knowledge(facts))
        cm = self.world.pairing.verbs_connections
        sides = {side.gid for each in set(cm.table.by_number.values()) for side in each.sides}
        assert not gone or gid("10.0.4.2") not in sides

    @rule(long=st.booleans())
    def pass_time(self, long: bool) -> None:
        self.world.now += LATE + 1 if long else RETURN + 1
        self.world.pairing.sweep(100)
        cm = self.world.pairing.verbs_connections
        assert not cm.table.returned
        if long:
            assert not cm.table.since

    @invariant()
    def books_agree(self) -> None:
        cm = self.world.pairing.verbs_connections
        found = {each for of in cm.table.of_process.values() for each in of}
        assert set(cm.table.by_number.values()) == found
        assert cm.table.asked_by.total() == len(found)
        assert set(cm.table.asking.values()) <= found
        for each in found:
            assert each.stage > CmStage.ASKED or each in cm.table.since
            assert (each.half is None) == (len(each.sides) == 2)
            assert (each in cm.table.returned) == (each.half is not None)
            for side in each.sides:
                assert cm.table.by_number[side.process, each.number] is each
        waiting = sum(bound.waiting.total() for bound in cm.ports)
        assert waiting <= sum(each.waiting is not None for each in found)
        assert all(count <= 6 for count in cm.table.asked_by.values())

    def teardown(self) -> None:
        for process in list(self.world.pairing.processes):
            self.world.pairing.gone(process)
        cm = self.world.pairing.verbs_connections
        tables = (
            cm.table.by_number,
            cm.table.of_process,
            cm.table.asking,
            cm.table.halves,
            cm.table.since,
            cm.table.returned,
        )
        assert not any(tables)
        assert not cm.table.asked_by
        assert not list(cm.ports)


TestCmLife = CmLife.TestCase
TestCmLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
