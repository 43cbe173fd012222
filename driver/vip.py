"""VIPs: rules in each container's namespace translate a service's virtual address to a task's.

`table ip freeflow` there has a chain per service, found by one lookup of the destination. The chain
takes the tasks in turn (numgen), and conntrack keeps a connection with its task. If a service isn't
balanced evenly, the chain has only the tasks that the container prefers (`balance.py`). A service
without tasks refuses new connections. Each change of the table is one transaction, so a container
is never without rules.

Conntrack also keeps entries that are wrong: a flow that began before the VIP had rules stays
untranslated as long as it sends packets, and a UDP flow stays with a task that has left. Such
entries are deleted (`flows.py`), and the flow's next packet meets the rules.

We pack the table's netlink messages ourselves (`kernel/nf_tables.py`), since a container may have
any rules beside it. The cost of a change depends on the change alone: each VIP's tasks are in a map
of their own, numbered from 0.

Why not IPVS: it needs a module that many kernels lack, and a hidden endpoint per host and network.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import structlog

from driver.balance import chosen
from driver.errors import KernelError
from driver.kernel import flows
from driver.kernel import nf_tables as nf
from driver.kernel.namespace import in_netns, is_namespace
from driver.kernel.nf_tables import Batch, Hook
from driver.locks import KeyedLocks
from driver.model import Choice, Choices, VipTable

log = structlog.get_logger()

TABLE: Final = "freeflow"
DATAGRAMS: Final = "datagrams"
"""Name of the set of VIPs that have had UDP flows, or others without an end, since the table was
made."""
_MANY: Final = 65535
"""Capacity of that set."""

REFUSER: Final = "127.66.66.66"
"""Destination of packets for VIPs without tasks, where they are refused: an unused loopback
address."""

FEW: Final = 8
"""Number of VIPs up to which the set is queried for each of them."""

_DSTNAT: Final = -100
_FILTER: Final = 0
_TCP: Final = bytes((nf.TCP,))
_ORIGINAL: Final = b"\0"
"""Direction of a connection's first packet."""


def _chain(vip: IPv4Address) -> str:
    return f"vip_{str(vip).replace('.', '_')}"


def _turns(vip: IPv4Address) -> str:
    return f"tasks_{str(vip).replace('.', '_')}"


def _write_frame(batch: Batch) -> None:
    """The parts that no VIP changes. They neither accept nor drop packets to other addresses."""
    to, refuser = nf.destination(), IPv4Address(REFUSER).packed
    not_tcp = (nf.protocol(), nf.differs(_TCP))
    batch.add_verdicts("vips")
    batch.add_set("down")
    batch.add_dynamic_set(DATAGRAMS, _MANY)
    batch.add_chain("refuse")
    batch.add_rule("refuse", nf.protocol(), nf.equals(_TCP), nf.reset())
    batch.add_rule("refuse", nf.unreachable())
    batch.add_chain("output", Hook("nat", nf.OUTPUT, _DSTNAT))
    batch.add_rule("output", to, nf.follow("vips"))
    # A reject in the output hook would give the sender EPERM. In the input hook it refuses.
    batch.add_rule("output", to, nf.among("down"), *not_tcp, to, nf.remember(DATAGRAMS))
    batch.add_rule("output", to, nf.among("down"), nf.constant(refuser), nf.dnat())
    batch.add_chain("input", Hook("filter", nf.INPUT, _FILTER))
    batch.add_rule("input", to, nf.equals(refuser), nf.goto("refuse"))
    # For containers that route for others, such as Docker in Docker.
    batch.add_chain("prerouting", Hook("nat", nf.PREROUTING, _DSTNAT))
    batch.add_rule("prerouting", to, nf.follow("vips"))
    batch.add_chain("forward", Hook("filter", nf.FORWARD, _FILTER))
    original = (nf.direction(), nf.equals(_ORIGINAL))
    batch.add_rule("forward", to, nf.among("down"), *original, nf.goto("refuse"))


def _write_rules(batch: Batch, vip: IPv4Address, count: int) -> None:
    """The rules that send new connections to `count` tasks in turn."""
    remember = (nf.destination(), nf.remember(DATAGRAMS))
    batch.add_rule(_chain(vip), nf.protocol(), nf.differs(_TCP), *remember)
    batch.add_rule(_chain(vip), nf.turn(count), nf.translate(_turns(vip)), nf.dnat())


def _write_additions(batch: Batch, table: VipTable) -> None:
    up = {vip: tasks for vip, tasks in sorted(table.items()) if tasks}
    for vip, tasks in up.items():
        batch.add_turns(_turns(vip))
        batch.put_turns(_turns(vip), enumerate(tasks))
        batch.add_chain(_chain(vip))
        _write_rules(batch, vip, len(tasks))
    batch.add_gotos("vips", [(vip, _chain(vip)) for vip in up])
    batch.add_addresses("down", [vip for vip in sorted(table) if not table[vip]])


def arrange(order: VipTable, table: VipTable, first: int = 0) -> VipTable:
    """`table` with each VIP's tasks in the order of their turns.

    Tasks that stay keep their turn in `order` where possible. `first` is where the turns of a new
    VIP start: if they started alike everywhere, many short-lived clients would all begin with the
    same task.
    """
    made: VipTable = {}
    for vip, tasks in table.items():
        before, left = order.get(vip, ()), set(tasks)
        if not before:
            start = first % len(tasks) if tasks else 0
            made[vip] = (*tasks[start:], *tasks[:start])
            continue
        known = set(before)
        come = deque(task for task in tasks if task not in known)
        row = [task if task in left else None for task in before]
        holes = [number for number, task in enumerate(row) if task is None]
        for number in holes[: len(come)]:
            row[number] = come.popleft()
        full: list[IPv4Address] = [task for task in row if task is not None]
        # The last tasks move into the remaining holes.
        keep = row[: len(full)]
        moved = (task for task in row[len(full) :] if task is not None)
        made[vip] = (*(next(moved) if task is None else task for task in keep), *come)
    return made


def write_new(batch: Batch, table: VipTable) -> None:
    """Changes for a namespace without our table; they fail where it exists. Tasks take turns in
    order."""
    batch.create_table()
    _write_frame(batch)
    _write_additions(batch, table)


def write_removal(batch: Batch) -> None:
    """Changes that remove our table, if there is one."""
    batch.add_table()
    batch.delete_table()


def _write_turns(
    batch: Batch, vip: IPv4Address, old: Sequence[IPv4Address], new: Sequence[IPv4Address]
) -> None:
    same = {number for number, pair in enumerate(zip(old, new, strict=False)) if pair[0] == pair[1]}
    batch.delete_turns(_turns(vip), [n for n in range(len(old)) if n not in same])
    batch.put_turns(_turns(vip), [(n, task) for n, task in enumerate(new) if n not in same])
    if len(old) != len(new):
        batch.flush_chain(_chain(vip))
        _write_rules(batch, vip, len(new))


def write_change(batch: Batch, old: VipTable, new: VipTable) -> None:
    """Changes from the rules of `old` to those of `new`, neither of which is empty."""
    both = old.keys() & new.keys()
    # A VIP that gets its first task or loses its last one is removed and added again.
    flipped = {vip for vip in both if bool(old[vip]) != bool(new[vip])}
    gone = sorted((old.keys() - new.keys()) | flipped)
    come = {vip: new[vip] for vip in new if vip not in old or vip in flipped}
    chains = [vip for vip in gone if old[vip]]
    batch.delete_addresses("vips", chains)
    batch.delete_addresses("down", [vip for vip in gone if not old[vip]])
    for vip in chains:
        batch.flush_chain(_chain(vip))
        batch.delete_chain(_chain(vip))
        batch.delete_set(_turns(vip))
    for vip in sorted(both - flipped):
        if old[vip] != new[vip]:
            _write_turns(batch, vip, old[vip], new[vip])
    _write_additions(batch, come)


@dataclass(frozen=True, slots=True)
class _Applied:
    """The rules of a namespace. `inode` tells it from a later namespace under the same path.

    `order`: the tasks that get new connections, in the order of their turns. `complete`: the set
    `DATAGRAMS` has existed since the namespace's first rule.
    """

    inode: int
    table: VipTable
    choices: Choices
    order: VipTable
    complete: bool


class NftBalancer:
    """`ports.Balancer`. Remembers the rules of each namespace, so an unchanged table costs
    nothing."""

    def __init__(self, turns: Iterator[int] | None = None) -> None:
        self._guard = threading.Lock()
        # Each namespace starts one task further, and each host with another one.
        self._turns = itertools.count(secrets.randbelow(1 << 16)) if turns is None else turns
        self._locks = KeyedLocks()
        self._applied: dict[Path, _Applied] = {}

    def apply(
        self,
        sandbox: Path,
        table: VipTable,
        choices: Mapping[IPv4Address, Choice] | None = None,
    ) -> bool:
        wanted = dict(choices or {})
        with self._locks.hold(str(sandbox)):
            before = self._applied.get(sandbox)
            try:
                inode = sandbox.stat().st_ino
            except OSError:
                self._remember(sandbox, None)
                return False
            if before is not None and before.inode != inode:
                before = None
            if before is not None and (before.table, before.choices) == (table, wanted):
                return True
            # Docker creates the file first and mounts the namespace there later.
            if not is_namespace(sandbox):
                self._remember(sandbox, None)
                return False
            try:
                first = next(self._turns)
                order, complete = in_netns(sandbox, lambda: _bring(before, table, wanted, first))
            except KernelError:
                self._remember(sandbox, None)
                if not is_namespace(sandbox):
                    return False
                raise
            self._remember(sandbox, _Applied(inode, dict(table), wanted, order, complete))
        return True

    def leads(self, sandbox: Path) -> VipTable:
        with self._guard:
            applied = self._applied.get(sandbox)
        return {} if applied is None else applied.order

    def forget(self, alive: Iterable[Path]) -> None:
        keep = set(alive)
        with self._guard:
            self._applied = {path: kept for path, kept in self._applied.items() if path in keep}

    def _remember(self, sandbox: Path, applied: _Applied | None) -> None:
        with self._guard:
            if applied is None:
                self._applied.pop(sandbox, None)
            else:
                self._applied[sandbox] = applied


def _kept(before: _Applied | None, choices: Choices) -> dict[IPv4Address, IPv4Address]:
    """The one task that each VIP has led to so far, for VIPs that are balanced by source.

    After a restart of the plugin the calling thread's namespace knows it.
    """
    vips = [vip for vip, choice in choices.items() if choice.client is not None]
    if before is None:
        pairs = {vip: [nf.turn_of(TABLE, _turns(vip), number) for number in (0, 1)] for vip in vips}
        return {vip: task for vip, (task, more) in pairs.items() if task and not more}
    return {vip: tasks[0] for vip in vips if len(tasks := before.order.get(vip, ())) == 1}


def _bring(
    before: _Applied | None, table: VipTable, choices: Choices, first: int
) -> tuple[VipTable, bool]:
    """Make the calling thread's namespace have the rules of `table` and `choices`.

    Returns `order` and `complete` of `_Applied`; `first`: see `arrange`.
    """
    old: VipTable = before.order if before is not None else {}
    known: VipTable = before.table if before is not None else {}
    complete = before is None or before.complete
    new = arrange(old, chosen(table, choices, _kept(before, choices)), first)
    # VIPs whose flows may be stale; the set is read before the change may remove it.
    departed = {
        vip
        for vip in known
        if set(known[vip]) - set(table.get(vip, ())) or (table.get(vip) and not known[vip])
    }
    suspects = set(departed)
    if complete and len(departed) <= FEW:
        suspects = {vip for vip in departed if _had_datagrams(vip)}
    if not _change(old, new):
        # The table isn't as we left it, or the plugin has restarted and doesn't know it.
        batch = Batch(TABLE)
        write_removal(batch)
        if new:
            write_new(batch, new)
        batch.commit()
        complete = False
        suspects |= new.keys()
    else:
        suspects |= flows.tried({vip for vip in new if new[vip] and vip not in old})
    try:
        flows.forget_stale({vip: table.get(vip, ()) for vip in suspects})
    except KernelError as error:
        # The new rules hold for new connections in any case.
        log.warning("stale flows to VIPs not deleted", reason=str(error))
    return new, complete or not new


def _change(old: VipTable, new: VipTable) -> bool:
    """Change from `old` to `new`; false if the namespace doesn't have the rules of `old`."""
    if not new:
        return not old and not nf.has_table(TABLE)
    batch = Batch(TABLE)
    if old:
        write_change(batch, old, new)
    else:
        write_new(batch, new)
    try:
        batch.commit()
    except KernelError as error:
        if old:
            log.info("VIP rules were changed by others, written again", reason=str(error))
        return False
    return True


def _had_datagrams(vip: IPv4Address) -> bool:
    return nf.has_address(TABLE, DATAGRAMS, vip)
