"""VIPs: each container's own namespace translates a service's virtual address to one of its tasks.

`table ip freeflow` there: one look-up of the destination leads to the service's own chain, which takes the tasks in turn
(nft's numgen). Conntrack keeps a connection with its task. A service without tasks refuses new connections. What changes
between two tables is one transaction, so there is no moment without rules.

Conntrack also keeps what it should not: a flow that began before the VIP had rules stays untranslated while its packets
go on, and a UDP flow stays with a task that left. Such flows are forgotten (`flows.py`); their next packet is a new one.

Not IPVS: it needs a module that many kernels lack, and a hidden endpoint per host and network.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import structlog

from driver.errors import KernelError
from driver.kernel import flows, nft
from driver.kernel.namespace import in_netns, is_namespace
from driver.locks import KeyedLocks
from driver.model import VipTable

log = structlog.get_logger()

TABLE: Final = "ip freeflow"
DATAGRAMS: Final = "datagrams"
"""Set of the VIPs that had flows which only their packets keep alive, since the table was made."""

REFUSER: Final = "127.66.66.66"
"""Where packets go for VIPs without tasks, to be refused: on the loopback device, and used by nobody."""

FEW: Final = 8
"""Up to so many VIPs are asked about one by one."""

# The name `dstnat` is not known in output hooks by all versions of nft.
_DSTNAT: Final = -100
_FILTER: Final = 0

_Tasks = tuple[IPv4Address, ...]


def _chain(vip: IPv4Address) -> str:
    return f"vip_{str(vip).replace('.', '_')}"


def _frame() -> list[str]:
    """The parts that don't depend on any VIP. Nothing is accepted or dropped that isn't for a VIP."""
    nat = "type nat hook {} priority " + str(_DSTNAT)
    check = "type filter hook {} priority " + str(_FILTER)
    return [
        f"add map {TABLE} vips {{ type ipv4_addr : verdict; }}",
        f"add set {TABLE} down {{ type ipv4_addr; }}",
        f"add set {TABLE} {DATAGRAMS} {{ type ipv4_addr; flags dynamic; size 65535; }}",
        f"add chain {TABLE} refuse",
        f"add rule {TABLE} refuse meta l4proto tcp reject with tcp reset",
        f"add rule {TABLE} refuse reject with icmp type port-unreachable",
        f"add chain {TABLE} output {{ {nat.format('output')}; policy accept; }}",
        f"add rule {TABLE} output ip daddr vmap @vips",
        # What is rejected in the output hook gives the sender "operation not permitted". On its way in it is refused.
        f"add rule {TABLE} output ip daddr @down meta l4proto != tcp add @{DATAGRAMS} {{ ip daddr }}",
        f"add rule {TABLE} output ip daddr @down dnat to {REFUSER}",
        f"add chain {TABLE} input {{ {check.format('input')}; policy accept; }}",
        f"add rule {TABLE} input ip daddr {REFUSER} goto refuse",
        # For containers that route for others, such as Docker in Docker.
        f"add chain {TABLE} prerouting {{ {nat.format('prerouting')}; policy accept; }}",
        f"add rule {TABLE} prerouting ip daddr vmap @vips",
        f"add chain {TABLE} forward {{ {check.format('forward')}; policy accept; }}",
        f"add rule {TABLE} forward ip daddr @down ct direction original goto refuse",
    ]


def _rules(vip: IPv4Address, tasks: _Tasks, first: int) -> list[str]:
    """The rules that send new connections to the tasks in turn, starting anywhere."""
    chain = f"add rule {TABLE} {_chain(vip)}"
    if len(tasks) == 1:
        target = str(tasks[0])
    else:
        start = first % len(tasks)
        order = (*tasks[start:], *tasks[:start])
        turns = ", ".join(f"{turn} : {task}" for turn, task in enumerate(order))
        target = f"numgen inc mod {len(tasks)} map {{ {turns} }}"
    return [
        f"{chain} meta l4proto != tcp add @{DATAGRAMS} {{ {vip} }}",
        f"{chain} dnat to {target}",
    ]


def _elements(action: str, what: str, elements: list[str]) -> list[str]:
    return [f"{action} element {TABLE} {what} {{ {', '.join(elements)} }}"] if elements else []


def _additions(table: VipTable, first: int) -> list[str]:
    up = {vip: tasks for vip, tasks in sorted(table.items()) if tasks}
    lines = []
    for vip, tasks in up.items():
        lines += [f"add chain {TABLE} {_chain(vip)}", *_rules(vip, tasks, first)]
    lines += _elements("add", "vips", [f"{vip} : goto {_chain(vip)}" for vip in up])
    return lines + _elements("add", "down", [str(vip) for vip in sorted(table) if not table[vip]])


def render_new(table: VipTable, first: int = 0) -> str:
    """nft(8) commands for a namespace without rules of ours; they fail in another.

    `first` is where the turn starts: with the same everywhere, many short-lived clients would all begin with one task.
    """
    return "\n".join([f"create table {TABLE}", *_frame(), *_additions(table, first)]) + "\n"


def render_removal() -> str:
    """nft(8) commands that remove our rules, if there are any."""
    return f"add table {TABLE}\ndelete table {TABLE}\n"


def render_change(old: VipTable, new: VipTable, first: int = 0) -> str:
    """nft(8) commands that bring rules from those of `old` to those of `new`, neither of them empty."""
    both = old.keys() & new.keys()
    # A VIP that gets its first task, or loses its last one, is removed and added.
    flipped = {vip for vip in both if bool(old[vip]) != bool(new[vip])}
    gone = sorted((old.keys() - new.keys()) | flipped)
    come = {vip: new[vip] for vip in new if vip not in old or vip in flipped}
    chains = [vip for vip in gone if old[vip]]
    lines = _elements("delete", "vips", [f"{vip} : goto {_chain(vip)}" for vip in chains])
    lines += _elements("delete", "down", [str(vip) for vip in gone if not old[vip]])
    for vip in chains:
        lines += [
            f"flush chain {TABLE} {_chain(vip)}",
            f"delete chain {TABLE} {_chain(vip)}",
        ]
    for vip in sorted(both - flipped):
        if old[vip] != new[vip]:
            lines += [
                f"flush chain {TABLE} {_chain(vip)}",
                *_rules(vip, new[vip], first),
            ]
    return "\n".join([*lines, *_additions(come, first)]) + "\n"


@dataclass(frozen=True, slots=True)
class _Applied:
    """What a namespace has. The inode tells it from a later one under the same path.

    `complete`: the set of datagram VIPs has been there from the namespace's first rule on.
    """

    inode: int
    table: VipTable
    complete: bool


class NftBalancer:
    """`ports.Balancer`: remembers what each namespace has, so that an unchanged table costs nothing."""

    def __init__(self, turns: Iterator[int] | None = None) -> None:
        self._guard = threading.Lock()
        # Each namespace begins the turn one task further. Not with the same on all hosts.
        self._turns = itertools.count(secrets.randbelow(1 << 16)) if turns is None else turns
        self._locks = KeyedLocks()
        self._applied: dict[Path, _Applied] = {}

    def apply(self, sandbox: Path, table: VipTable) -> bool:
        """See `ports.Balancer.apply`."""
        with self._locks.hold(str(sandbox)):
            before = self._applied.get(sandbox)
            try:
                inode = sandbox.stat().st_ino
            except OSError:
                self._remember(sandbox, None)
                return False
            if before is not None and before.inode != inode:
                before = None
            if before is not None and before.table == table:
                return True
            # Docker makes the file first and mounts the namespace on it later.
            if not is_namespace(sandbox):
                self._remember(sandbox, None)
                return False
            try:
                first = next(self._turns)
                complete = in_netns(sandbox, lambda: _bring(before, table, first))
            except KernelError:
                self._remember(sandbox, None)
                if not is_namespace(sandbox):
                    return False
                raise
            self._remember(sandbox, _Applied(inode, dict(table), complete))
        return True

    def forget(self, alive: Iterable[Path]) -> None:
        """Drop what is remembered of namespaces that aren't in `alive`."""
        keep = set(alive)
        with self._guard:
            self._applied = {path: kept for path, kept in self._applied.items() if path in keep}

    def _remember(self, sandbox: Path, applied: _Applied | None) -> None:
        with self._guard:
            if applied is None:
                self._applied.pop(sandbox, None)
            else:
                self._applied[sandbox] = applied


def _bring(before: _Applied | None, new: VipTable, first: int) -> bool:
    """Make the current namespace's rules those of `new`; returns `_Applied.complete`."""
    old: VipTable = before.table if before is not None else {}
    complete = before is None or before.complete
    # Read before it is removed or lost.
    departed = {
        vip
        for vip in old
        if set(old[vip]) - set(new.get(vip, ())) or (new.get(vip) and not old[vip])
    }
    suspects = set(departed)
    if complete and len(departed) <= FEW:
        suspects = {vip for vip in departed if _had_datagrams(vip)}
    if not _change(old, new, first):
        # A table that we don't know is there (the plugin was started again), or not what we left in it.
        nft.run(render_removal() + (render_new(new, first) if new else ""))
        complete = False
        suspects |= new.keys()
    else:
        suspects |= flows.tried({vip for vip in new if new[vip] and vip not in old})
    try:
        flows.forget_stale({vip: new.get(vip, ()) for vip in suspects})
    except KernelError as error:
        # The rules hold for new connections all the same.
        log.warning("old flows to VIPs not forgotten", reason=str(error))
    return complete or not new


def _change(old: VipTable, new: VipTable, first: int) -> bool:
    """Go from `old` to `new` if the namespace has what we think it has."""
    if not new:
        return not old and not _has_table()
    try:
        nft.run(render_change(old, new, first) if old else render_new(new, first))
    except KernelError as error:
        if old:
            log.info("VIP rules not as left, made anew", reason=str(error))
        return False
    return True


def _has_table() -> bool:
    family, name = TABLE.split()
    return any(
        item.get("table", {}).get("name") == name and item["table"].get("family") == family
        for item in nft.query(f"list tables {family}")
    )


def _had_datagrams(vip: IPv4Address) -> bool:
    # Not by listing the set: nft up to 1.0 forgets the elements in some forms of output.
    try:
        nft.run(f"get element {TABLE} {DATAGRAMS} {{ {vip} }}")
    except KernelError:
        return False
    return True
