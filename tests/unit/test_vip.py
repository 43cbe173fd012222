"""VIP rules as text: any change of a table brings the rules that a new namespace would have. On a kernel: `tests/kernel`."""

from __future__ import annotations

import itertools
import re
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driver.model import VipTable
from driver.vip import NftBalancer, render_change, render_new, render_removal

VIP, VIP2 = IPv4Address("10.0.4.2"), IPv4Address("10.0.4.3")


def at(number: int) -> IPv4Address:
    return IPv4Address(f"10.0.4.{number}")


class Rules:
    """As much of nftables as our commands need, with its refusals: what exists can't be made, what doesn't can't be removed."""

    def __init__(self) -> None:
        self.table = False
        self.chains: dict[str, list[str]] = {}
        self.elements: dict[str, set[str]] = {}

    def run(self, commands: str) -> Rules:
        for line in filter(None, commands.splitlines()):
            verb, kind, _, table, *rest = line.split()
            assert table == "freeflow"
            getattr(self, f"_{verb}_{kind}")(*rest)
        return self

    def _create_table(self) -> None:
        assert not self.table
        self.table = True

    def _add_table(self) -> None:
        self.table = True

    def _delete_table(self) -> None:
        assert self.table
        self.__init__()  # type: ignore[misc]

    def _add_set(self, name: str, *_: str) -> None:
        assert self.table
        self.elements.setdefault(name, set())

    _add_map = _add_set

    def _add_chain(self, name: str, *_: str) -> None:
        assert self.table
        self.chains.setdefault(name, [])

    def _flush_chain(self, name: str) -> None:
        self.chains[name] = []

    def _delete_chain(self, name: str) -> None:
        assert not self.chains.pop(name)
        assert not any(element.endswith(f"goto {name}") for element in self.elements["vips"])

    def _add_rule(self, chain: str, *rule: str) -> None:
        self.chains[chain].append(" ".join(rule))

    def _listed(self, words: tuple[str, ...]) -> list[str]:
        return [item.strip() for item in " ".join(words).strip("{} ").split(",")]

    def _add_element(self, name: str, *words: str) -> None:
        for element in self._listed(words):
            assert element not in self.elements[name]
            if "goto" in element:
                assert element.split()[-1] in self.chains
            self.elements[name].add(element)

    def _delete_element(self, name: str, *words: str) -> None:
        for element in self._listed(words):
            self.elements[name].remove(element)

    # --- what they do

    def leads(self) -> VipTable:
        """Where each VIP leads."""
        found: VipTable = {IPv4Address(vip): () for vip in self.elements.get("down", ())}
        for element in self.elements.get("vips", ()):
            vip, _, verdict = element.partition(" : goto ")
            assert IPv4Address(vip) not in found
            (target,) = (rule for rule in self.chains[verdict] if rule.startswith("dnat to"))
            tasks = re.findall(r"\d+\.\d+\.\d+\.\d+", target)
            found[IPv4Address(vip)] = tuple(sorted(map(IPv4Address, tasks)))
            turns = re.findall(r"(\d+) : ", target)
            if len(tasks) > 1:
                assert f"numgen inc mod {len(tasks)} map" in target
                assert [int(turn) for turn in turns] == list(range(len(tasks)))
        return found

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Rules)
        mine, others = (
            (self.table, self.chains.keys(), self.elements, self.leads()),
            (other.table, other.chains.keys(), other.elements, other.leads()),
        )
        return mine == others


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
    """In a new namespace each VIP leads to its tasks in turn, wherever the turn begins; one without tasks refuses."""
    rules = Rules().run(render_new(table, first))
    assert rules.leads() == table
    assert rules.elements["down"] == {str(vip) for vip, tasks in table.items() if not tasks}


@given(tables, tables, st.integers(0, 100))
def test_changed_rules_are_as_new_ones(old: VipTable, new: VipTable, first: int) -> None:
    """Any change of the table gives the rules that a new namespace would have; nothing is left over."""
    changed = Rules().run(render_new(old)).run(render_change(old, new, first))
    assert changed == Rules().run(render_new(new, first))


@given(st.lists(tables, min_size=2, max_size=6))
def test_a_row_of_changes(row: list[VipTable]) -> None:
    """Many changes after each other end as the last table says."""
    rules = Rules().run(render_new(row[0]))
    for old, new in itertools.pairwise(row):
        rules.run(render_change(old, new))
    assert rules == Rules().run(render_new(row[-1]))


def test_unchanged_vips_are_not_touched() -> None:
    """A change of one service says nothing of another's rules: its connections' turns go on."""
    old: VipTable = {VIP: (at(10),), VIP2: (at(20),)}
    commands = render_change(old, old | {VIP: (at(10), at(11))})
    assert "10_0_4_2" in commands
    assert "10_0_4_3" not in commands
    assert str(at(20)) not in commands


@given(tables)
def test_removal(table: VipTable) -> None:
    """Removal leaves nothing, and is no error where nothing is."""
    assert not Rules().run(render_new(table)).run(render_removal()).table
    assert not Rules().run(render_removal()).table


def test_turns_begin_apart() -> None:
    """Clients that live for one connection don't all begin with the same task."""
    table: VipTable = {VIP: (at(10), at(11), at(12))}
    starts = {
        re.search(r"0 : (\S+?),", render_new(table, first))[1]  # type: ignore[index]
        for first in range(3)
    }
    assert starts == {"10.0.4.10", "10.0.4.11", "10.0.4.12"}


def test_namespace_that_is_not_there(tmp_path: Path) -> None:
    """A namespace that isn't there yet, or isn't mounted yet, is told so, and isn't an error."""
    balancer = NftBalancer(iter(range(10)))
    assert not balancer.apply(tmp_path / "none", {VIP: (at(10),)})
    (tmp_path / "empty").touch()
    assert not balancer.apply(tmp_path / "empty", {VIP: (at(10),)})
    balancer.forget([])


@pytest.mark.parametrize("count", [1, 2, 300])
def test_size_of_a_service(count: int) -> None:
    """A service may have one task or hundreds."""
    tasks = tuple(IPv4Address("10.1.0.0") + n for n in range(1, count + 1))
    assert Rules().run(render_new({VIP: tasks})).leads() == {VIP: tasks}
