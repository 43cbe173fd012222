"""Which files of registered memory the relay gets, so that devices may move bytes between them."""

from __future__ import annotations

import pytest

from dataplane.router import verbs_listing, verbs_memory
from dataplane.router.knowledge import Knowledge
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import VerbsKind, VerbsMemory, VerbsStatus
from tests.unit.remote_world import Host, World, started
from tests.unit.test_verbs_remote import FarQueuePair, asked, end, paired
from tests.unit.verbs_world import UC

PAGES = 8 * 4096


def world_of(*, direct: bool = True, zero_copy: bool = True) -> World:
    """Hosts with devices, and a network that allows direct memory."""
    world = started(zero_copy=zero_copy)
    world.options["verbs_direct"] = direct
    for host in world.hosts:
        host.pairing.replace_snapshot(Knowledge(host.facts()))
    return world


def file(one: FarQueuePair, *, writable: bool = True) -> VerbsMemory:
    """A new file of the queue pair's process."""
    wanted = VerbsMemory(VerbsKind.MEMORY, request=1, bytes=PAGES, writable=writable)
    one.host.pairing.direct_memory.handle(one.process, wanted)
    answers = [
        message
        for message, _ in one.host.post.sent[one.process]
        if isinstance(message, VerbsMemory) and message.kind == VerbsKind.MEMORY_MADE
    ]
    return answers[-1]


def give_up(one: FarQueuePair, made: VerbsMemory) -> None:
    message = VerbsMemory(VerbsKind.MEMORY_END, memory=made.memory)
    one.host.pairing.direct_memory.handle(one.process, message)


def counted(host: Host) -> int:
    """Bytes that count for the limits of containers."""
    return host.pairing.direct_memory.bytes.total()


def test_files_of_a_process_that_may_move() -> None:
    """The relay gets the files that a process has, and later ones, with token and owner; each
    counts for the container until the relay has let it go.
    """
    world = world_of()
    first, _ = asked(world)
    early = file(first)
    assert not first.host.relay.files
    world.loop.run(1)
    assert first.grant is not None
    late = file(first)
    world.loop.run(1)
    assert set(first.host.relay.files) == {early.memory, late.memory}
    got = first.host.relay.files[late.memory]
    assert (got.token, got.owner, got.writable) == (late.token, first.process, 1)
    assert all(lent.moving for host in world.hosts for lent in host.relay.lent.values())
    give_up(first, early)
    assert counted(first.host) == 2 * PAGES
    world.loop.run(1)
    assert counted(first.host) == PAGES
    assert set(first.host.relay.files) == {late.memory}
    first.host.pairing.gone(first.process)
    world.loop.run(1)
    assert not first.host.relay.files
    assert not counted(first.host)
    assert not first.host.pairing.direct_memory.lent


def test_a_file_to_be_read() -> None:
    """The relay gets a file that peers may only read when its owner has mapped it, and it is
    sealed.
    """
    world = world_of()
    first, _ = paired(world)
    made = file(first, writable=False)
    world.loop.run(1)
    assert not first.host.relay.files
    mapped = VerbsMemory(VerbsKind.MEMORY_MAPPED, memory=made.memory)
    first.host.pairing.direct_memory.handle(first.process, mapped)
    world.loop.run(1)
    assert first.host.relay.files[made.memory].writable == 0


@pytest.mark.parametrize(
    ("direct", "zero_copy"), [(False, True), (True, False)], ids=["network", "setting"]
)
def test_where_it_is_not_allowed(direct: bool, zero_copy: bool) -> None:
    """Without the network's option or the setting, relays have no files, and slots are ordinary."""
    world = world_of(direct=direct, zero_copy=zero_copy)
    first, second = paired(world)
    made = file(first) if direct else None
    world.loop.run(1)
    assert not first.host.relay.files
    if made is not None:
        give_up(first, made)
    assert not any(lent.moving for host in world.hosts for lent in host.relay.lent.values())
    end(world, first, second)


def test_other_types() -> None:
    """Only reliable queue pairs may move."""
    world = world_of()
    first, second = asked(world)
    for one, other in ((first, second), (second, first)):
        one.end()
        one.ask(other, UC)
    world.loop.run(1)
    assert first.grant is not None
    assert not any(lent.moving for host in world.hosts for lent in host.relay.lent.values())


def test_relay_ends() -> None:
    """What the relay had is nobody's any more when it ends; the next one gets the files of
    processes with new queue pairs.
    """
    world = world_of()
    first, second = paired(world)
    ended, kept = file(first), file(first)
    world.loop.run(1)
    first.host.relay.hear = lambda *_: None  # type: ignore[method-assign]
    give_up(first, ended)
    assert counted(first.host) == 2 * PAGES
    first.host.remotes.relay_died()
    assert counted(first.host) == PAGES
    assert not first.host.pairing.direct_memory.lent
    assert not first.host.pairing.direct_memory.files[kept.memory].lent
    assert second.grant is not None


def test_limit_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay has at most so many files of a container; operations with others go as records."""
    monkeypatch.setattr(verbs_memory, "LENT_OF_CONTAINER", 3)
    world = world_of()
    first, _ = paired(world)
    made = [file(first) for _ in range(5)]
    world.loop.run(1)
    assert len(first.host.relay.files) == 3
    assert first.host.pairing.direct_memory.refused[Reason.LIMIT] == 2
    give_up(first, made[0])
    world.loop.run(1)
    file(first)
    world.loop.run(1)
    assert len(first.host.relay.files) == 3


def test_limit_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is with those of all containers."""
    monkeypatch.setattr(verbs_memory, "LENT", 2)
    world = world_of()
    first, _ = paired(world)
    for _ in range(3):
        file(first)
    world.loop.run(1)
    assert len(first.host.relay.files) == 2


def test_what_is_listed() -> None:
    """The list says whether a queue pair may move bytes, and has."""
    world = world_of()
    first, _ = paired(world)
    assert listed(first) == "unused"
    status = VerbsStatus(first.qpn, 3, 1, 100_000, moved=True)
    first.host.pairing.verbs.status(first.process, status)
    assert listed(first) == "used"


def listed(one: FarQueuePair) -> str:
    *_, found = verbs_listing.objects(one.host.pairing, 0, None)
    assert found is not None
    (word,) = (each.direct for each in found.queue_pairs if each.qpn == one.qpn)
    return word
