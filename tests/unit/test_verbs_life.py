"""Queue pairs under random use: processes that come, ask, reset, release and die in any order, and
routers that end: whatever happens, nobody waits for ever and nobody gets what is another's.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.control import Limits
from dataplane.router.knowledge import Knowledge
from dataplane.router.verbs_devices import RANGE
from dataplane.router.verbs_pairing import RETURN
from tests.unit.verbs_world import RC, UC, QueuePairModel, VerbsModel, VerbsWorld, gid, moved

CONTAINERS = st.integers(1, 3)
PICK = st.integers(0, 7)
LIMITS = Limits(queue_pairs=5, connections=6, processes=3, bells=5)
Named = tuple[int, int]
"""A namespace and a QPN."""


class VerbsLife(RuleBasedStateMachine):
    """Processes of three containers, each with three queue pairs at most."""

    def __init__(self) -> None:
        super().__init__()
        self.world = VerbsWorld(LIMITS)

    # --- what happens

    @property
    def models(self) -> list[VerbsModel]:
        return list(self.world.models.values())

    def pick(self, number: int) -> VerbsModel:
        return self.models[number % len(self.models)]

    def own(self, model: VerbsModel, number: int) -> QueuePairModel:
        """One of a process's queue pairs, or a new one."""
        own = list(model.queue_pairs.values())
        return own[number % 3] if number % 3 < len(own) else model.create()

    def namespace(self, model: VerbsModel) -> int:
        return self.world.pairing.processes[model.process].namespace

    @rule(namespace=CONTAINERS)
    def come(self, namespace: int) -> None:
        container = self.world.pairing.containers.get(namespace)
        if container is None or len(container.processes) < 3:
            self.world.open(namespace)

    @precondition(lambda self: self.models)
    @rule(number=PICK)
    def die(self, number: int) -> None:
        self.world.kill(self.pick(number))

    @precondition(lambda self: self.models)
    @rule(one=PICK, other=PICK, mine=PICK, theirs=PICK, uc=st.booleans(), late=st.booleans())
    def ask_both(self, one: int, other: int, mine: int, theirs: int, uc: bool, late: bool) -> None:
        """Both sides ask; or one does, so far."""
        a, b = self.pick(one), self.pick(other)
        first, second = self.own(a, mine), self.own(b, theirs)
        if not (a.devices[0].count and b.devices[0].count) or first is second:
            return
        for asker, own, peer, its in ((a, first, b, second), (b, second, a, first)):
            self.release_slot(asker, own)
            address = gid(f"10.0.4.{self.namespace(peer)}")
            asker.ask_for(own, address, its.qpn, of_type=UC if uc else RC)
            if late:
                return

    @precondition(lambda self: self.models)
    @rule(number=PICK, mine=PICK, qpn=st.sampled_from([0, 5, RANGE, 9 * RANGE, 1 << 31]))
    def ask_nonsense(self, number: int, mine: int, qpn: int) -> None:
        model = self.pick(number)
        own = self.own(model, mine)
        self.release_slot(model, own)
        model.ask_for(own, gid("10.0.4.2"), qpn)

    def release_slot(self, model: VerbsModel, own: QueuePairModel) -> None:
        if own.grant is not None:
            model.give_back(own.grant)
            own.grant = None

    @precondition(lambda self: self.models)
    @rule(number=PICK, mine=PICK, first=st.booleans())
    def reset(self, number: int, mine: int, first: bool) -> None:
        model = self.pick(number)
        own = self.own(model, mine)
        if first:
            self.release_slot(model, own)
        model.reset(own)

    @precondition(lambda self: self.models)
    @rule(number=PICK, most=st.integers(1, 3))
    def read(self, number: int, most: int) -> None:
        self.pick(number).read(most)

    @precondition(lambda self: len(self.models) > 1)
    @rule(one=PICK, other=PICK, port=st.integers(5000, 5003))
    def connect(self, one: int, other: int, port: int) -> None:
        """Connections are in the same arenas."""
        a, b = self.pick(one), self.pick(other)
        if a is not b:
            self.world.connect(a.process, b.process, port)

    @precondition(lambda self: self.models)
    @rule(number=PICK, mine=PICK)
    def steal(self, number: int, mine: int) -> None:
        """A process uses the number of another process's queue pair, and its slot's numbers."""
        thief = self.pick(number)
        for model in self.models:
            own = list(model.queue_pairs.values())
            if model is thief or not own:
                continue
            victim = own[mine % len(own)]
            if victim.qpn in thief.queue_pairs:
                # Numbers are unique within a container only; this one is the thief's own, too.
                continue
            before = len(self.world.pairing.verbs.queue_pairs)
            copy = QueuePairModel(victim.qpn)
            thief.ask_for(copy, gid("10.0.4.2"), 9)
            thief.reset(copy)
            if victim.grant is not None and self.namespace(model) == self.namespace(thief):
                thief.give_back(victim.grant)
            assert len(self.world.pairing.verbs.queue_pairs) == before

    @rule(gone=st.booleans())
    def change_networks(self, gone: bool) -> None:
        """A container leaves the network, or all are there."""
        facts = self.world.facts
        known = moved(self.world, e1=()) if gone else Knowledge(facts)
        self.world.pairing.replace_snapshot(known)

    @rule()
    def pass_time(self) -> None:
        self.world.now += RETURN + 1
        self.world.pairing.weigh()
        self.world.pairing.sweep(100)

    @rule(come_back=st.lists(st.booleans(), min_size=9, max_size=9))
    def restart(self, come_back: list[bool]) -> None:
        """Another router takes over. Processes come back one by one, or die meanwhile."""
        for model in self.models:
            model.read()
        old, self.world = self.world, VerbsWorld(LIMITS)
        self.world.now = old.now
        for (process, before), back in zip(old.models.items(), come_back, strict=False):
            if back and before.devices[0].count:
                self.come_back(before, old.pairing.processes[process].namespace)

    def come_back(self, before: VerbsModel, namespace: int) -> None:
        model = self.world.open(namespace, qpn_first=before.qpn_first)
        if not model.devices[0].count or model.qpn_first != before.qpn_first:
            return
        model.queue_pairs, model.created = before.queue_pairs, before.created
        for own in model.queue_pairs.values():
            paired, own.grant = own.grant is not None, None
            if own.peer is not None and own.lost is None:
                model.ask_for(own, *own.peer, paired=paired)

    # --- what always holds

    @invariant()
    def books_agree(self) -> None:
        pairing = self.world.pairing
        verbs = pairing.verbs
        records = list(verbs)
        assert len(records) == sum(len(each.queue_pairs) for each in verbs.processes.values())
        for record in records:
            assert verbs.processes[record.process].queue_pairs[record.message.qpn] is record
            assert record.peer is None or record.peer.peer is record
            assert record.peer is None or record.peer.number == record.peer_number
            if record.place is not None:
                arena, slot, side = record.place
                assert arena.slots[slot].ends[side] is record
                assert pairing.containers[record.namespace].ends[record.key] == record.place
        for namespace, container in pairing.containers.items():
            own = [each for each in records if each.namespace == namespace]
            assert len(own) <= 5
            assert len(container.ends) <= 6
            assert {key for key in container.ends if isinstance(key, tuple)} == {
                each.key for each in own if each.place is not None
            }
        assert {arena.memory for arena in pairing.arenas.values()} == self.world.memory.arenas
        firsts = [(self.namespace(each), each.qpn_first) for each in self.models]
        firsts = [each for each in firsts if each[1]]
        assert len(set(firsts)) == len(firsts)

    @rule()
    def all_is_read(self) -> None:
        """When all messages have been read, each queue pair that is paired is so on both sides, and
        no two wait that ask for each other.
        """
        for _ in range(2):
            for model in self.models:
                model.read()
        found: dict[Named, QueuePairModel] = {
            (self.namespace(model), own.qpn): own
            for model in self.models
            for own in model.queue_pairs.values()
        }
        records = self.world.pairing.verbs.queue_pairs
        for named, own in found.items():
            if own.lost is not None or own.peer is None:
                continue
            assert named in records
            record = records[named]
            peer = found.get(record.peer_number)
            if own.grant is not None:
                assert peer is not None
                assert peer.grant is not None
                assert (own.grant.arena, own.grant.slot, own.grant.incarnation) == (
                    peer.grant.arena,
                    peer.grant.slot,
                    peer.grant.incarnation,
                )
                assert own.grant.side != peer.grant.side
            elif peer is not None and record.peer_number in records and record.peer is None:
                theirs = records[record.peer_number]
                waits = theirs.waits and record.fits(theirs) and theirs.fits(record)
                assert not waits

    def teardown(self) -> None:
        self.all_is_read()
        pairing = self.world.pairing
        for process in list(pairing.processes):
            pairing.gone(process)
        assert not pairing.verbs.processes
        assert not pairing.verbs.queue_pairs
        assert not pairing.containers
        assert not pairing.arenas
        assert not pairing.arena_table.with_room
        assert not self.world.memory.arenas
        assert not self.world.memory.bells


TestVerbsLife = VerbsLife.TestCase
TestVerbsLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
