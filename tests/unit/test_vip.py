"""VIP rules, in a model of nf_tables. `tests/kernel/test_vip.py` has the tests on a kernel."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.kernel import nf_tables as nf
from driver.kernel.nf_tables import Hook
from driver.model import VipTable
from driver.vip import NftBalancer, arrange, write_change, write_new, write_removal

VIP, VIP2 = IPv4Address("10.0.4.2"), IPv4Address("10.0.4.3")


def at(number: int) -> IPv4Address:
    return IPv4Address(f"10.0.4.{number}")


class Rules(nf.Batch):
    """A model of nf_tables for our changes, with its refusals: existing objects can't be created,
    missing ones can't be deleted."""

    def __init__(self) -> None:
        self.table = False
        self.chains: dict[str, list[tuple[bytes, ...]]] = {}
        self.sets: dict[str, dict[object, object]] = {}

    def add_table(self) -> None:
        self.table = True

    def create_table(self) -> None:
        assert not self.table
        self.table = True

    def delete_table(self) -> None:
        assert self.table
        self.__init__()  # type: ignore[misc]

    def add_chain(self, name: str, hook: Hook | None = None) -> None:
        assert self.table
        self.chains.setdefault(name, [])

    def flush_chain(self, name: str) -> None:
        self.chains[name] = []

    def delete_chain(self, name: str) -> None:
        assert not self.chains.pop(name)
        assert name not in self.sets["vips"].values()

    def add_rule(self, chain: str, *expressions: bytes) -> None:
        self.chains[chain].append(expressions)

    def add_set(self, name: str) -> None:
        assert self.table
        self.sets.setdefault(name, {})

    def add_dynamic_set(self, name: str, size: int) -> None:
        self.add_set(name)

    add_verdicts = add_turns = add_set

    def delete_set(self, name: str) -> None:
        del self.sets[name]
        assert not any(
            nf.translate(name) in rule for rules in self.chains.values() for rule in rules
        )

    def _put(self, name: str, elements: Iterable[tuple[object, object]]) -> None:
        for key, value in elements:
            assert key not in self.sets[name]
            self.sets[name][key] = value

    def add_addresses(self, name: str, addresses: Iterable[IPv4Address]) -> None:
        self._put(name, ((address, None) for address in addresses))

    def delete_addresses(self, name: str, addresses: Iterable[IPv4Address]) -> None:
        for address in addresses:
            del self.sets[name][address]

    def add_gotos(self, name: str, chains: Iterable[tuple[IPv4Address, str]]) -> None:
        chains = list(chains)
        assert all(chain in self.chains for _, chain in chains)
        self._put(name, chains)

    def put_turns(self, name: str, targets: Iterable[tuple[int, IPv4Address]]) -> None:
        self._put(name, targets)

    def delete_turns(self, name: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            del self.sets[name][number]

    # --- what they do

    def leads(self) -> VipTable:
        """The tasks behind each VIP, in the order of the turns."""
        found: VipTable = dict.fromkeys(self.sets.get("down", ()), ())  # type: ignore[arg-type]
        for vip, chain in self.sets.get("vips", {}).items():
            assert isinstance(vip, IPv4Address)
            assert vip not in found
            turns = self.sets[f"tasks_{str(vip).replace('.', '_')}"]
            assert sorted(turns) == list(range(len(turns)))  # type: ignore[type-var]
            *_, last = self.chains[str(chain)]
            assert last[0] == nf.turn(len(turns))
            found[vip] = tuple(turns[number] for number in range(len(turns)))  # type: ignore[misc]
        return found

    def balances(self) -> VipTable:
        """The sorted targets of each VIP."""
        return {vip: tuple(sorted(tasks)) for vip, tasks in self.leads().items()}


def new(table: VipTable) -> Rules:
    rules = Rules()
    write_new(rules, table)
    return rules


def same(one: Rules, other: Rules) -> bool:
    """Whether two are equal except for the order of the turns."""
    return (
        one.table == other.table
        and one.chains.keys() == other.chains.keys()
        and one.sets.keys() == other.sets.keys()
        and one.balances() == other.balances()
        and all(sorted(one.chains[name]) == sorted(other.chains[name]) for name in one.chains)
    )


tables = st.dictionaries(
    st.integers(2, 6).map(at),
    st.lists(st.integers(10, 20).map(at), max_size=4, unique=True).map(
        lambda tasks: tuple(sorted(tasks))
    ),
    min_size=1,
    max_size=5,
)


@given(tables, st.integers(0, 100))
def test_new_rules_lead_where_the_table_says(table: VipTable, first: int) -> None:
    """In a new namespace each VIP leads to its tasks in turn, wherever the turn begins; one without
    tasks refuses.
    """
    rules = new(arrange({}, table, first))
    assert rules.balances() == table
    assert set(rules.sets["down"]) == {vip for vip, tasks in table.items() if not tasks}


@given(tables, tables, st.integers(0, 100))
def test_changed_rules_are_as_new_ones(old: VipTable, after: VipTable, first: int) -> None:
    """Any change of the table gives the rules that a new namespace would have, and nothing is left
    over.
    """
    before = arrange({}, old, first)
    changed = new(before)
    write_change(changed, before, arrange(before, after, first))
    assert same(changed, new(arrange({}, after)))


@given(st.lists(tables, min_size=2, max_size=6))
def test_a_row_of_changes(row: list[VipTable]) -> None:
    """After many changes the rules are those of the last table."""
    order = arrange({}, row[0])
    rules = new(order)
    for table in row[1:]:
        before, order = order, arrange(order, table)
        write_change(rules, before, order)
    assert same(rules, new(row[-1]))
    assert rules.leads() == order


@given(tables, tables)
def test_who_stays_keeps_their_turn(old: VipTable, after: VipTable) -> None:
    """A change writes the turns of tasks that come or go, and of as many at the end as go: its cost
    doesn't depend on the table."""
    before = arrange({}, old)
    order = arrange(before, after)
    for vip in before.keys() & order.keys():
        come = set(order[vip]) - set(before[vip])
        gone = set(before[vip]) - set(order[vip])
        moved = [
            task
            for number, task in enumerate(before[vip])
            if task in order[vip] and order[vip].index(task) != number
        ]
        assert len(moved) <= max(0, len(gone) - len(come))


def test_unchanged_vips_are_not_touched() -> None:
    """A change of one service doesn't touch another's rules, whose turns continue."""
    old: VipTable = {VIP: (at(10),), VIP2: (at(20),)}

    class Watching(Rules):
        touched: ClassVar[set[str]] = set()

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if not callable(found) or name.startswith("_"):
                return found

            def call(*arguments: Any) -> Any:
                self.touched.update(map(str, arguments))
                return found(*arguments)

            return call

    rules = Watching()
    write_new(rules, old)
    rules.touched.clear()
    write_change(rules, old, old | {VIP: (at(10), at(11))})
    assert any("10_0_4_2" in each for each in rules.touched)
    assert not any("10_0_4_3" in each for each in rules.touched)


@given(tables)
def test_removal(table: VipTable) -> None:
    """Removal leaves nothing, and is no error where nothing exists."""
    for rules in (new(table), Rules()):
        write_removal(rules)
        assert not rules.table


def test_turns_begin_apart() -> None:
    """Clients with a single connection don't all start with the same task."""
    table: VipTable = {VIP: (at(10), at(11), at(12))}
    starts = {arrange({}, table, first)[VIP][0] for first in range(3)}
    assert starts == {at(10), at(11), at(12)}


def test_namespace_that_is_not_there(tmp_path: Path) -> None:
    """A namespace that doesn't exist yet, or isn't mounted yet, is reported as such, not as an
    error."""
    balancer = NftBalancer(iter(range(10)))
    assert not balancer.apply(tmp_path / "none", {VIP: (at(10),)})
    (tmp_path / "empty").touch()
    assert not balancer.apply(tmp_path / "empty", {VIP: (at(10),)})
    balancer.forget([])


@pytest.mark.parametrize("count", [1, 2, 300])
def test_size_of_a_service(count: int) -> None:
    """A service may have one task or hundreds."""
    tasks = tuple(IPv4Address("10.1.0.0") + n for n in range(1, count + 1))
    assert new({VIP: tasks}).leads() == {VIP: tasks}
