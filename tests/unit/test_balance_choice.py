"""Which tasks get a container's new connections."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv4Address, IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.balance import (
    BY_LIST,
    EVEN,
    HERE,
    LOCAL,
    NONE_HERE,
    SOURCE,
    balances,
    chosen,
    favourite,
)
from driver.model import Choice, LocalContainer, NetworkView, Service, Task, VipTable

VIP, VIP2 = IPv4Address("10.0.4.2"), IPv4Address("10.0.4.3")


def at(number: int) -> IPv4Address:
    return IPv4Address("10.0.4.0") + number


def view(*here: int) -> NetworkView:
    """A network with a service of tasks 7, 8 and 9, of which some are here, and one without VIP."""
    tasks = tuple(Task(f"web.{n}", at(n), f"e{n}") for n in (7, 8, 9))
    containers = (
        LocalContainer(f"c{n}", f"web.{n}", f"e{n}", IPv4Interface(f"10.0.4.{n}/24")) for n in here
    )
    services = (Service("web", VIP, tasks), Service("db", None, tasks))
    return NetworkView("n", "n", "freeflow:latest", services=services, containers=tuple(containers))


TABLE: VipTable = {VIP: (at(7), at(8))}


def test_nothing_is_said() -> None:
    """Without option and labels no VIP has an entry."""
    assert balances(EVEN, {}, view(7), TABLE, ()) == {}


def test_tasks_of_this_host() -> None:
    """Only tasks that are on this host and take connections are local."""
    web = balances(LOCAL, {}, view(8, 9), TABLE, ())[VIP]
    assert (web.kind, web.local, web.why) == (LOCAL, frozenset({at(8)}), HERE)
    web = balances(LOCAL, {}, view(9), TABLE, ())[VIP]
    assert (web.kind, web.local, web.why) == (LOCAL, frozenset(), NONE_HERE)


def test_tasks_that_dns_does_not_tell() -> None:
    """Where DNS doesn't tell which tasks take connections, none is preferred: it may be ending."""
    web = balances(LOCAL, {}, view(8), TABLE, {"web"})[VIP]
    assert (web.local, web.why) == (frozenset(), BY_LIST)


@pytest.mark.parametrize("option", [EVEN, LOCAL, SOURCE])
@pytest.mark.parametrize("label", [EVEN, LOCAL, SOURCE])
def test_a_label_takes_precedence(option: str, label: str) -> None:
    """A service's label counts before the network's option."""
    assert balances(option, {"web": label}, view(), TABLE, ())[VIP].kind == label


def test_a_label_that_means_nothing() -> None:
    """With an unknown label the network's option holds, and the reason names the label."""
    web = balances(LOCAL, {"web": "near"}, view(8), TABLE, ())[VIP]
    assert (web.kind, web.local) == (LOCAL, frozenset({at(8)}))
    assert "freeflow.balance=near" in web.why


def test_choices() -> None:
    """Local tasks come first, all follow without one; a VIP without tasks has none in any case."""
    table = {VIP: (at(7), at(8)), VIP2: ()}
    assert chosen(table, {}, {}) == table
    local = Choice(local=frozenset({at(8), at(30)}))
    assert chosen(table, {VIP: local, VIP2: local}, {}) == {VIP: (at(8),), VIP2: ()}
    none = Choice(local=frozenset({at(30)}))
    assert chosen(table, {VIP: none}, {}) == table
    client = Choice(client=at(20))
    assert chosen(table, {VIP: client, VIP2: client}, {VIP: at(8)}) == {VIP: (at(8),), VIP2: ()}


tasks = st.sets(st.integers(10, 40), min_size=1, max_size=8)


@given(st.lists(tasks, min_size=1, max_size=8), st.integers(100, 200))
def test_a_client_keeps_its_task_while_it_lives(rounds: list[set[int]], client: int) -> None:
    """A client changes its task only when this one leaves, whatever else comes and goes."""
    kept: dict[IPv4Address, IPv4Address] = {}
    for numbers in rounds:
        table = {VIP: tuple(at(number) for number in sorted(numbers))}
        (task,) = chosen(table, {VIP: Choice(client=at(client))}, kept)[VIP]
        assert task in table[VIP]
        if kept and kept[VIP] in table[VIP]:
            assert task == kept[VIP]
        kept = {VIP: task}


def test_clients_are_spread_evenly() -> None:
    """Many clients are spread over all tasks, each with about its share."""
    row = [at(number) for number in range(10, 20)]
    counts = Counter(favourite(IPv4Address("10.1.0.0") + n, row) for n in range(5000))
    assert set(counts) == set(row)
    assert max(counts.values()) < 1.25 * 500
    assert min(counts.values()) > 0.75 * 500


def test_only_clients_of_a_task_that_leaves_move() -> None:
    """When a task leaves, its clients go to all others, and nobody else moves, even without
    memory."""
    row = [at(number) for number in range(10, 20)]
    clients = [IPv4Address("10.1.0.0") + n for n in range(1000)]
    before = {client: favourite(client, row) for client in clients}
    after = {client: favourite(client, row[1:]) for client in clients}
    moved = [client for client in clients if before[client] != after[client]]
    assert moved
    assert {before[client] for client in moved} == {row[0]}
    assert {after[client] for client in moved} == set(row[1:])


def test_order_does_not_matter() -> None:
    """All hosts choose the same task for a client."""
    row = [at(number) for number in range(10, 20)]
    assert favourite(at(5), row) == favourite(at(5), reversed(row))
