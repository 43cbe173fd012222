"""The ports of rdma_cm are given as the kernel gives them."""

from __future__ import annotations

import itertools
from ipaddress import IPv6Address
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from dataplane.router.library_wire import IPAddress
from dataplane.router.verbs_cm import PORTS
from dataplane.router.verbs_ports import (
    ALL_IPV4,
    ALL_IPV6,
    EPHEMERAL,
    SHARERS,
    BoundId,
    VerbsPorts,
)
from dataplane.router.verbs_wire import VerbsKind, VerbsListen
from tests.unit.cm_world import TCP, UDP
from tests.unit.verbs_world import gid

A, B, SIX = gid("10.0.4.1"), gid("10.0.9.1"), IPv6Address("fd00::1")
GIDS: list[IPAddress | None] = [None, ALL_IPV4, ALL_IPV6, A, B, SIX]


def wants(
    number: int,
    port: int,
    of: IPAddress | None = None,
    *,
    space: int = TCP,
    backlog: int = 8,
    reuse: bool = False,
) -> VerbsListen:
    return VerbsListen(VerbsKind.LISTEN, number, space, port, backlog, reuse, of)


def made() -> VerbsPorts:
    return VerbsPorts(itertools.count(5).__next__)


def test_a_port_is_given_once() -> None:
    """A second id gets a port only in another container, space or address."""
    ports = made()
    assert ports.bind(1, 7, wants(1, 500, A)) is not None
    assert ports.bind(1, 7, wants(2, 500, A)) is None
    assert ports.bind(2, 7, wants(1, 500)) is None
    assert ports.bind(2, 7, wants(1, 500, ALL_IPV4)) is None
    assert ports.bind(2, 7, wants(2, 500, B)) is not None
    assert ports.bind(2, 7, wants(3, 500, ALL_IPV6)) is not None
    assert ports.bind(2, 7, wants(4, 500, A, space=UDP)) is not None
    assert ports.bind(3, 8, wants(1, 500)) is not None
    ports.end(1, 1)
    ports.end(1, 1)
    assert ports.bind(2, 7, wants(5, 500, A)) is not None


def test_any_port_is_one_that_nobody_has() -> None:
    """Who doesn't care gets a port of the ephemeral range, and keeps it when it listens."""
    ports = made()
    bound = [ports.bind(1, 7, wants(number, 0, backlog=0)) for number in range(1, 100)]
    found = [each.port for each in bound if each is not None]
    assert len(set(found)) == 99
    assert set(found) <= set(EPHEMERAL)
    again = ports.bind(1, 7, wants(1, 0))
    assert again is not None
    assert again.port == found[0]
    assert again.listens


def test_any_port_costs_little() -> None:
    """A container that has all the ports that it may have, in a row, makes nobody look at them."""

    class Counted(dict[tuple[int, int, int], list[BoundId]]):
        looks = 0

        def __contains__(self, key: object) -> bool:
            Counted.looks += 1
            return super().__contains__(key)

    chance = Random(1)
    ports = VerbsPorts(lambda: chance.getrandbits(64))
    ports._bound = bound = Counted()
    for number, port in enumerate(EPHEMERAL[: PORTS - 1], 1):
        assert ports.bind(1, 7, wants(number, port, backlog=0)) is not None
    for _ in range(1000):
        assert ports.bind(1, 7, wants(PORTS, 0)) is not None
        ports.end(1, PORTS)
    assert bound.looks < 10_000


def test_no_such_port() -> None:
    """A port has 16 bits."""
    assert made().bind(1, 7, wants(1, 1 << 16)) is None


def test_shared_ports() -> None:
    """Ids that say so share a port until one of them listens; only so many do."""
    ports = made()
    for number in range(1, SHARERS):
        assert ports.bind(1, 7, wants(number, 500, backlog=0, reuse=True)) is not None
    assert ports.bind(1, 7, wants(900, 500, backlog=0)) is None
    assert ports.listener(7, TCP, 500, A) is None
    listens = ports.bind(1, 7, wants(1, 500, reuse=True))
    assert listens is not None
    assert ports.listener(7, TCP, 500, A) is listens
    assert ports.bind(1, 7, wants(2, 500, reuse=True)) is None
    assert ports.bind(1, 7, wants(901, 500, backlog=0, reuse=True)) is not None
    assert ports.bind(1, 7, wants(902, 500, backlog=0, reuse=True)) is None


def test_the_nearest_listens() -> None:
    """A request goes to who has just its address, before one with all of them."""
    ports = made()
    every = ports.bind(1, 7, wants(1, 500, ALL_IPV4, reuse=True, backlog=0))
    assert every is not None
    assert ports.listener(7, TCP, 500, A) is None
    one = ports.bind(2, 7, wants(1, 500, A, reuse=True))
    assert ports.listener(7, TCP, 500, A) is one
    assert ports.listener(7, TCP, 500, B) is None
    assert ports.listener(7, UDP, 500, A) is None
    ports.gone(2)
    assert ports.listener(7, TCP, 500, A) is None
    ports.gone(1)
    assert not ports.of_container


@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.integers(1, 4),
            st.sampled_from(GIDS),
            st.booleans(),
            st.booleans(),
            st.sampled_from(["bind", "bind", "bind", "end", "gone"]),
        ),
        max_size=30,
    )
)
def test_no_address_has_two_listeners(
    deeds: list[tuple[int, int, IPAddress | None, bool, bool, str]],
) -> None:
    """Whatever processes do, a port and address has one listener, or sharers none of which
    listens; and the books agree.
    """
    ports = made()
    for process, number, of, listens, reuse, deed in deeds:
        if deed == "bind":
            ports.bind(process, 7, wants(number, 500, of, backlog=int(listens), reuse=reuse))
        elif deed == "end":
            ports.end(process, number)
        else:
            ports.gone(process)
        bound: list[BoundId] = list(ports)
        assert ports.of_container[7] == len(bound)
        for address in (A, B, SIX):
            serve = [each for each in bound if each.serves(address)]
            assert len(serve) < 2 or all(each.message.reuse for each in serve)
            listeners = [each for each in serve if each.listens]
            assert len(listeners) < 2
            assert ports.listener(7, TCP, 500, address) is (listeners[0] if listeners else None)
    for process in (1, 2, 3):
        ports.gone(process)
    assert not list(ports)
