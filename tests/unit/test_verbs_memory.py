"""Who gets which files of registered memory: the registry, with fakes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from dataplane.control import Limits
from dataplane.errors import WrongMessage
from dataplane.router import verbs_listing
from dataplane.router.knowledge import Knowledge
from dataplane.router.reasons import Reason
from dataplane.router.verbs_memory import FILES, FILES_OF_CONTAINER
from dataplane.router.verbs_wire import VerbsKind, VerbsMemory, VerbsRefuse
from tests.unit.verbs_world import VerbsModel, VerbsWorld

PAGES = 8 * 4096


class MemoryWorld(VerbsWorld):
    """Containers on a network that allows direct memory, unless it is told otherwise."""

    def __init__(self, limits: Limits | None = None) -> None:
        super().__init__(limits)
        self.allow(True)

    def allow(self, allowed: bool) -> None:
        """Whether the networks allow it."""
        networks = tuple(replace(each, verbs_direct=allowed) for each in self.facts.networks)
        self.facts = replace(self.facts, networks=networks)
        self.pairing.replace_snapshot(Knowledge(self.facts))

    def say(self, model: VerbsModel, kind: VerbsKind, **fields: int) -> None:
        """Send a message of a process."""
        message = replace(VerbsMemory(kind), **fields)
        self.pairing.direct_memory.handle(model.process, message)

    def made(self, model: VerbsModel, size: int = PAGES, *, writable: bool = True) -> VerbsMemory:
        """The file that a process gets."""
        before = len(self.heard(model.process, VerbsMemory))
        self.say(model, VerbsKind.MEMORY, request=7, bytes=size, writable=writable)
        ((answer, descriptor),) = self.heard(model.process, VerbsMemory)[before:]
        assert (answer.kind, answer.request) == (VerbsKind.MEMORY_MADE, 7)
        assert descriptor is not None
        assert self.memory.files[descriptor] == size
        return answer

    def reach(self, model: VerbsModel, qpn: int, file: VerbsMemory, **other: int) -> None:
        """A process asks for a file."""
        wanted = {"qpn": qpn, "memory": file.memory, "token": file.token, **other}
        self.say(model, VerbsKind.REACH, request=9, **wanted)

    def refusals(self, process: int) -> list[int]:
        return [
            refuse.reason
            for refuse, _ in self.heard(process, VerbsRefuse)
            if refuse.refused in (VerbsKind.MEMORY, VerbsKind.REACH)
        ]


@pytest.fixture
def world() -> MemoryWorld:
    return MemoryWorld()


def test_a_peer_reaches_a_file(world: MemoryWorld) -> None:
    """The peer of a queue pair gets the file whose token it has been told, and the device says
    that there is such a thing.
    """
    one, other = world.open(1), world.open(2)
    first, _ = world.pair(one, other)
    file = world.made(other)
    world.reach(one, first.qpn, file)
    ((answer, descriptor),) = world.heard(one.process, VerbsMemory)
    assert answer == VerbsMemory(
        VerbsKind.REACHED,
        request=9,
        qpn=first.qpn,
        writable=True,
        bytes=PAGES,
        memory=file.memory,
    )
    assert descriptor in world.memory.files
    assert one.devices[0].direct
    assert one.devices[0].direct_bytes == Limits().direct_memory


def test_nobody_else_does(world: MemoryWorld) -> None:
    """Without the token, without a queue pair of one's own, or with one that has another peer or
    none, a file can't be had.
    """
    one, other, third = world.open(1), world.open(2), world.open(3)
    first, second = world.pair(one, other)
    foreign, _ = world.pair(third, one)
    file = world.made(other)
    world.reach(one, first.qpn, file, token=file.token + 1)
    world.reach(one, first.qpn, file, memory=file.memory + 1)
    world.reach(one, second.qpn, file)
    world.reach(one, first.qpn + 100, file)
    world.reach(third, foreign.qpn, file)
    assert world.refusals(one.process) == [Reason.NOT_FOUND] * 4
    assert world.refusals(third.process) == [Reason.NOT_FOUND]
    waiting = one.create()
    one.ask(waiting, other, other.create())
    world.reach(one, waiting.qpn, file)
    assert world.refusals(one.process) == [Reason.NOT_FOUND] * 5
    assert not world.heard(one.process, VerbsMemory) + world.heard(third.process, VerbsMemory)


def test_a_file_to_be_read(world: MemoryWorld) -> None:
    """A file that peers may only read is theirs after its owner has mapped it, when nobody can map
    it to write any more.
    """
    one, other = world.open(1), world.open(2)
    first, _ = world.pair(one, other)
    file = world.made(other, writable=False)
    world.reach(one, first.qpn, file)
    assert world.refusals(one.process) == [Reason.NOT_FOUND]
    world.say(one, VerbsKind.MEMORY_MAPPED, memory=file.memory)
    assert not world.memory.protected
    world.say(other, VerbsKind.MEMORY_MAPPED, memory=file.memory)
    assert len(world.memory.protected) == 1
    world.reach(one, first.qpn, file)
    ((answer, _),) = world.heard(one.process, VerbsMemory)
    assert not answer.writable


def test_the_end_of_files(world: MemoryWorld) -> None:
    """A file ends when its owner says so, or is gone; nobody gets it then, and no descriptor is
    left.
    """
    one, other = world.open(1), world.open(2)
    first, _ = world.pair(one, other)
    file, kept = world.made(other), world.made(other)
    world.say(one, VerbsKind.MEMORY_END, memory=file.memory)
    assert len(world.pairing.direct_memory.files) == 2
    world.say(other, VerbsKind.MEMORY_END, memory=file.memory)
    world.say(other, VerbsKind.MEMORY_END, memory=file.memory)
    world.reach(one, first.qpn, file)
    assert world.refusals(one.process) == [Reason.NOT_FOUND]
    world.kill(other)
    world.reach(one, first.qpn, kept)
    assert world.refusals(one.process) == [Reason.NOT_FOUND] * 2
    direct = world.pairing.direct_memory
    assert not direct.files
    assert not direct.of_process
    assert not direct.bytes
    assert not world.memory.arenas & world.memory.files.keys()


def test_networks_without(world: MemoryWorld) -> None:
    """Where the network does not allow it there are no files, nor does one reach those from
    before.
    """
    one, other = world.open(1), world.open(2)
    first, _ = world.pair(one, other)
    file = world.made(other)
    world.allow(False)
    one.read()
    assert not one.devices[0].direct
    assert not one.devices[0].direct_bytes
    world.reach(one, first.qpn, file)
    world.say(one, VerbsKind.MEMORY, bytes=PAGES)
    assert world.refusals(one.process) == [Reason.NOT_FOUND, Reason.OFF]


def test_who_is_told_of_it(world: MemoryWorld) -> None:
    """A queue pair may use direct memory only where the network allows it and both processes have
    the same library: an earlier one would not understand the records for it.
    """
    one, other, earlier = world.open(1), world.open(2), world.open(2)
    world.pairing.processes[earlier.process].build = "another"
    for peer, allowed, word in (
        (other, True, "unused"),
        (earlier, True, "library"),
        (other, False, ""),
    ):
        world.allow(allowed)
        pair = world.pair(one, peer)
        for queue_pair in pair:
            assert queue_pair.grant is not None
            assert queue_pair.grant.number == (word == "unused")
        assert listed(world, pair[0].qpn) == word


def listed(world: MemoryWorld, qpn: int) -> str:
    """What the list of queue pairs says of one's direct memory."""
    *_, found = verbs_listing.objects(world.pairing, world.now, 1)
    assert found is not None
    (word,) = (each.direct for each in found.queue_pairs if each.qpn == qpn)
    return word


def test_what_is_listed(world: MemoryWorld) -> None:
    """The list says by which queue pairs memory of the peer was mapped, and how much there is."""
    one, other = world.open(1), world.open(2)
    first, second = world.pair(one, other)
    world.reach(one, first.qpn, world.made(other))
    world.made(other, 4096)
    assert listed(world, first.qpn) == "used"
    assert not world.pairing.verbs.queue_pairs[2, second.qpn].reached
    counts = verbs_listing.counts(world.pairing.verbs, world.pairing.direct_memory)
    assert (counts.direct_files, counts.direct_bytes) == (2, PAGES + 4096)


def test_limits() -> None:
    """A container has no more bytes and files than it may have, nor a process more files, and no
    file is part of a page or empty.
    """
    world = MemoryWorld(Limits(direct_memory=3 * PAGES))
    one, other = world.open(1), world.open(1)
    world.made(one, 2 * PAGES)
    for size in (2 * PAGES, 0, 100, PAGES + 1):
        world.say(other, VerbsKind.MEMORY, bytes=size)
    assert world.refusals(other.process) == [Reason.LIMIT] * 4
    world.made(other)
    world = MemoryWorld()
    for _ in range(FILES_OF_CONTAINER // FILES):
        one = world.open(1)
        for _ in range(FILES):
            world.say(one, VerbsKind.MEMORY, bytes=4096)
        assert not world.refusals(one.process)
        world.say(one, VerbsKind.MEMORY, bytes=4096)
        assert world.refusals(one.process) == [Reason.LIMIT]
    another = world.open(1)
    world.say(another, VerbsKind.MEMORY, bytes=4096)
    assert world.refusals(another.process) == [Reason.LIMIT]
    world.pairing.direct_memory.gone(one.process)
    world.made(another, 4096)
    world.memory.refuses = True
    other = world.open(2)
    world.say(other, VerbsKind.MEMORY, bytes=4096)
    assert world.refusals(other.process) == [Reason.MEMORY]


def test_wrong_messages(world: MemoryWorld) -> None:
    """A process that sends what only the router sends, or comes before V_OPEN, is cut off."""
    one = world.open(1)
    for kind in (VerbsKind.MEMORY_MADE, VerbsKind.REACHED):
        with pytest.raises(WrongMessage):
            world.say(one, kind)
    with pytest.raises(WrongMessage):
        world.pairing.direct_memory.handle(
            world.process(1), VerbsMemory(VerbsKind.MEMORY, bytes=4096)
        )
