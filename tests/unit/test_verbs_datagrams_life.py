"""Slots for datagrams and groups under random use: each process knows just the slots that there
are, senders reach all members of their groups, and in the end nothing is left.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.control import Limits
from dataplane.router.knowledge import Knowledge
from dataplane.router.verbs_wire import VerbsDatagrams, VerbsGrant, VerbsKind, VerbsRefuse
from tests.unit.ud_world import UdModel, clean
from tests.unit.verbs_world import VerbsWorld, gid, moved

CONTAINERS = st.integers(1, 3)
PICK = st.integers(0, 5)
PAIR = st.integers(0, 1)
LIMITS = Limits(processes=3, connections=9)


class Knows:
    """What a process knows."""

    def __init__(self) -> None:
        self.grants: dict[int, VerbsGrant] = {}
        self.ended: dict[int, VerbsGrant] = {}
        self.leads: set[int] = set()


class DatagramLife(RuleBasedStateMachine):
    """Processes of three containers."""

    def __init__(self) -> None:
        super().__init__()
        self.world = VerbsWorld(LIMITS)
        self.known: dict[UdModel, Knows] = {}

    def pick(self, number: int) -> UdModel:
        return list(self.known)[number % len(self.known)]

    @rule(namespace=CONTAINERS)
    def come(self, namespace: int) -> None:
        container = self.world.pairing.containers.get(namespace)
        if container is None or len(container.processes) < 3:
            process = self.world.open(namespace)
            if process.devices[0].count:
                self.known[UdModel(self.world, process.process, process.qpn_first)] = Knows()

    @precondition(lambda self: self.known)
    @rule(number=PICK)
    def die(self, number: int) -> None:
        model = self.pick(number)
        del self.known[model]
        model.kill()

    @precondition(lambda self: self.known)
    @rule(number=PICK, pair=PAIR, on=st.booleans())
    def take(self, number: int, pair: int, on: bool) -> None:
        self.pick(number).takes(pair, on=on)

    @precondition(lambda self: self.known)
    @rule(number=PICK, other=PICK, pair=PAIR, six=st.booleans())
    def ask(self, number: int, other: int, pair: int, six: bool) -> None:
        peer = self.pick(other)
        namespace = self.world.pairing.processes[peer.process].namespace
        address = gid(f"fd00::{namespace}" if six else f"10.0.4.{namespace}")
        self.pick(number).ask(7, address, peer.qpn + pair)

    @precondition(lambda self: self.known)
    @rule(number=PICK, pair=PAIR, on=st.booleans())
    def join(self, number: int, pair: int, on: bool) -> None:
        self.pick(number).join(pair=pair, on=on)

    @precondition(lambda self: self.known)
    @rule(number=PICK, on=st.booleans())
    def send_to(self, number: int, on: bool) -> None:
        model = self.pick(number)
        self.read(model)
        model.send_to(9, on=on)
        if not on:
            self.known[model].leads.clear()

    @precondition(lambda self: self.known)
    @rule(number=PICK, which=PICK)
    def give_back(self, number: int, which: int) -> None:
        model = self.pick(number)
        self.read(model)
        knows = self.known[model]
        for grants in (knows.ended, knows.grants):
            if grants:
                of = list(grants)[which % len(grants)]
                model.give_back(grants.pop(of))
                knows.leads.discard(of)
                return

    @precondition(lambda self: self.known)
    @rule(number=PICK, victim=PICK, which=PICK)
    def steal(self, number: int, victim: int, which: int) -> None:
        """A process releases what another one has."""
        thief, owner = self.pick(number), self.known[self.pick(victim)]
        grants = list(owner.grants.values())
        namespace = self.world.pairing.processes[thief.process].namespace
        other = self.world.pairing.processes[self.pick(victim).process].namespace
        if grants and thief is not self.pick(victim) and namespace == other:
            thief.give_back(grants[which % len(grants)])

    @precondition(lambda self: self.known)
    @rule(number=PICK, busy=st.booleans())
    def be_busy(self, number: int, busy: bool) -> None:
        process = self.pick(number).process
        (self.world.post.busy.add if busy else self.world.post.busy.discard)(process)

    @rule(refuses=st.booleans())
    def run_out_of_memory(self, refuses: bool) -> None:
        self.world.memory.refuses = refuses

    @rule(gone=st.booleans())
    def change_networks(self, gone: bool) -> None:
        """A container leaves the network, or all are there."""
        facts = self.world.facts
        self.world.pairing.replace_snapshot(moved(self.world, e2=()) if gone else Knowledge(facts))

    def read(self, model: UdModel) -> None:
        knows = self.known[model]
        for message in model.read():
            match message:
                case VerbsGrant():
                    assert message.number not in knows.grants
                    knows.grants[message.number] = message
                case VerbsRefuse(refused=VerbsKind.GRANT):
                    if message.number in knows.grants:
                        knows.ended[message.number] = knows.grants.pop(message.number)
                    knows.leads.discard(message.number)
                case VerbsDatagrams(on=True) if message.number:
                    assert message.number in knows.grants
                    knows.leads.add(message.number)
                case VerbsDatagrams(on=False):
                    knows.leads.discard(message.number)

    @rule()
    def all_is_read(self) -> None:
        """Each process knows just the slots that there are."""
        for model, knows in self.known.items():
            self.read(model)
            slots = self.world.pairing.datagrams.slots.values()
            own = {
                slot.number
                for slot in slots
                if model.process in (slot.ends[0].process, slot.ends[1].process)
            }
            assert set(knows.grants) == own
            held = self.world.pairing.datagrams.of_process.get(model.process, {})
            assert len(held) == len(knows.grants) + len(knows.ended)

    @precondition(lambda self: self.known)
    @rule()
    def senders_reach_all_members(self) -> None:
        """After a while, if there is nothing in the way."""
        self.world.post.busy.clear()
        self.world.memory.refuses = False
        for _ in range(2):
            self.world.now += 2
            self.world.pairing.sweep(100)
        self.all_is_read()
        for group in self.world.pairing.groups.groups.values():
            for (process, _), sender in group.senders.items():
                missing = set(group.members) - {process} - set(sender.told)
                waits = {
                    member.opened.id
                    for of, member in self.world.pairing.groups._due
                    if of is sender
                }
                assert missing == waits
                model = next(each for each in self.known if each.process == process)
                assert self.known[model].leads == set(sender.told.values())

    @invariant()
    def books_agree(self) -> None:
        pairing = self.world.pairing
        datagrams, groups = pairing.datagrams, pairing.groups
        assert sum(map(len, datagrams.open_of.values())) == len(datagrams.open_at)
        assert datagrams.between.total() == datagrams.unasked.total() == len(datagrams.slots)
        for slot in datagrams.slots.values():
            for end in slot.ends:
                assert end.slot is slot
                assert end.process in datagrams.open_of
                assert end in datagrams.of_process[end.process]
        for process, ends in datagrams.of_process.items():
            for end in ends:
                assert end.process == process
                assert end.place is not None
                arena, place, side = end.place
                assert arena.slots[place].ends[side] is end
                assert pairing.containers[end.namespace].ends[end.key] == end.place
        for container in pairing.containers.values():
            assert len(container.ends) <= 9
        for name, group in groups.groups.items():
            assert group.members or group.senders
            for process, member in group.members.items():
                assert {(name, qpn) for qpn in member.queue_pairs} <= set(groups._uses[process])
                assert set(member.queue_pairs) <= datagrams.open_of[process]
            for (process, gid_of), _ in group.senders.items():
                assert (name, gid_of) in groups._uses[process]

    def teardown(self) -> None:
        clean(self.world)


TestDatagramLife = DatagramLife.TestCase
TestDatagramLife.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
