"""Slots for datagrams of real processes and a real router: memory, bells, kills and restarts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from dataplane.router import library_wire as wire
from dataplane.router.library_wire import IPAddress
from dataplane.router.reasons import Reason
from dataplane.router.verbs_wire import (
    SlotKind,
    VerbsDatagrams,
    VerbsGrant,
    VerbsKind,
    VerbsRefuse,
)
from tests.verbs.router import TestRouter, router
from tests.verbs.test_router_verbs import VerbsLibrary

GID = IPv4Address("10.0.4.1")
GROUP = IPv4Address("239.1.2.3")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[TestRouter]:
    with router(tmp_path) as made:
        yield made


def say(process: VerbsLibrary, kind: VerbsKind, to: IPAddress | None, peer: int = 0) -> None:
    """Open a queue pair for datagrams, ask for a slot, or join a group."""
    process.library.say(VerbsDatagrams(kind, 7, process.qpn, 0, peer, True, 0, to))


def opened(path: Path, qpn_first: int = 0) -> VerbsLibrary:
    """A process with a queue pair that takes datagrams."""
    made = VerbsLibrary(path, qpn_first)
    say(made, VerbsKind.DATAGRAMS, None)
    # The answer to something else says that the router has read it.
    say(made, VerbsKind.DATAGRAM_PEER, GID, made.qpn)
    assert made.library.hear(VerbsRefuse)[0].reason == Reason.SHARED
    return made


def slot(one: VerbsLibrary, other: VerbsLibrary) -> VerbsGrant:
    """The slot that both are granted; its memory is the same, and each can wake the other."""
    grant, memory = one.library.hear(VerbsGrant)
    theirs, memory2 = other.library.hear(VerbsGrant)
    assert grant.slot_kind is SlotKind.DATAGRAMS
    assert (grant.arena, grant.slot, grant.number) == (theirs.arena, theirs.slot, theirs.number)
    assert grant.incarnation == theirs.incarnation
    assert memory is not None
    assert memory2 is not None
    assert os.fstat(memory).st_ino == os.fstat(memory2).st_ino
    assert one.library.rings(grant.arena, 1 - grant.side)
    assert other.library.rings(grant.arena, 1 - theirs.side)
    return grant


def test_a_slot(served: TestRouter) -> None:
    """Two processes share a slot; when one is gone the other is told, and its router goes on."""
    one, other = opened(served.socket), opened(served.socket)
    say(one, VerbsKind.DATAGRAM_PEER, GID, other.qpn)
    grant = slot(one, other)
    one.library.close()
    refuse, _ = other.library.hear(VerbsRefuse)
    assert (refuse.refused, refuse.number) == (VerbsKind.GRANT, grant.number)
    assert refuse.reason == Reason.PEER_CLOSED
    say(other, VerbsKind.DATAGRAM_PEER, GID, one.qpn)
    refuse, _ = other.library.hear(VerbsRefuse)
    assert (refuse.refused, refuse.request) == (VerbsKind.DATAGRAM_PEER, 7)
    assert refuse.reason == Reason.NOT_FOUND


def test_a_group(served: TestRouter) -> None:
    """A process that sends to a group is told of the slots of those that join it."""
    one, other = opened(served.socket), opened(served.socket)
    say(one, VerbsKind.DATAGRAM_PEER, GROUP)
    end, _ = one.library.hear(VerbsDatagrams)
    assert (end.request, end.number) == (7, 0)
    say(other, VerbsKind.GROUP, GROUP)
    grant = slot(one, other)
    joined, _ = one.library.hear(VerbsDatagrams)
    assert (joined.kind, joined.number, joined.on, joined.gid) == (
        VerbsKind.GROUP,
        grant.number,
        True,
        GROUP,
    )


def test_a_new_router(served: TestRouter) -> None:
    """A new router knows nothing of slots of before: processes that ask again get others, and may
    release those they had.
    """
    one, other = opened(served.socket), opened(served.socket)
    say(one, VerbsKind.DATAGRAM_PEER, GID, other.qpn)
    old = slot(one, other)
    served.restart()
    again, other_again = (opened(served.socket, each.qpn) for each in (one, other))
    assert (again.qpn, other_again.qpn) == (one.qpn, other.qpn)
    release = wire.Release(old.slot, old.arena, old.incarnation, old.token)
    other_again.library.say(release)
    say(other_again, VerbsKind.DATAGRAM_PEER, GID, again.qpn)
    assert slot(other_again, again).arena != old.arena
