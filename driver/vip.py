"""VIPs: each container's own namespace translates a service's virtual address to one of its tasks.

`table ip freeflow` there: one look-up of the destination, then the service's chain, which takes the tasks in turn
(nft's numgen). Conntrack keeps a connection with its task. A service without tasks refuses. The table is replaced in one
transaction, and only when it changes.

Not IPVS: it needs a module that many kernels lack, and a hidden endpoint per host and network.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import structlog
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from driver.errors import KernelError
from driver.kernel import nft
from driver.kernel.namespace import in_netns, is_namespace
from driver.model import VipTable

log = structlog.get_logger()

TABLE: Final = "ip freeflow"
_STATELESS: Final = (1, 17)
"""ICMP and UDP: their conntrack entries outlive a task for as long as the client sends."""


def _chain(vip: IPv4Address) -> str:
    return f"vip_{str(vip).replace('.', '_')}"


def render(table: VipTable, first: int = 0) -> str:
    """nft(8) commands that make the namespace's rules those of `table`; `first` shifts the turn, so that many short-lived
    clients don't all start with the same task."""
    lines = [f"add table {TABLE}", f"delete table {TABLE}"]
    if not table:
        return "\n".join(lines) + "\n"
    lines += [
        f"add table {TABLE}",
        f"add map {TABLE} vips {{ type ipv4_addr : verdict; }}",
        f"add set {TABLE} down {{ type ipv4_addr; }}",
        f"add chain {TABLE} output {{ type nat hook output priority dstnat; policy accept; }}",
        f"add chain {TABLE} prerouting {{ type nat hook prerouting priority dstnat; policy accept; }}",
        f"add rule {TABLE} output ip daddr vmap @vips",
        f"add rule {TABLE} prerouting ip daddr vmap @vips",
        f"add chain {TABLE} refuse {{ type filter hook output priority filter; policy accept; }}",
        f"add rule {TABLE} refuse ip daddr @down meta l4proto tcp reject with tcp reset",
        f"add rule {TABLE} refuse ip daddr @down reject with icmp type port-unreachable",
    ]
    elements, down = [], []
    for vip, tasks in sorted(table.items()):
        if not tasks:
            down.append(str(vip))
            continue
        name = _chain(vip)
        lines.append(f"add chain {TABLE} {name}")
        if len(tasks) == 1:
            lines.append(f"add rule {TABLE} {name} dnat to {tasks[0]}")
        else:
            count = len(tasks)
            turns = ", ".join(
                f"{turn} : {task}" for turn, task in enumerate(_shifted(tasks, first))
            )
            lines.append(
                f"add rule {TABLE} {name} dnat to numgen inc mod {count} map {{ {turns} }}"
            )
        elements.append(f"{vip} : goto {name}")
    if elements:
        lines.append(f"add element {TABLE} vips {{ {', '.join(elements)} }}")
    if down:
        lines.append(f"add element {TABLE} down {{ {', '.join(down)} }}")
    return "\n".join(lines) + "\n"


def _shifted(tasks: tuple[IPv4Address, ...], first: int) -> Iterable[IPv4Address]:
    start = first % len(tasks)
    return (*tasks[start:], *tasks[:start])


def _forget_flows(departed: frozenset[str], vips: frozenset[str]) -> None:
    """Remove UDP and ICMP conntrack entries from a VIP to a departed task, in the calling thread's namespace."""
    with NFCTSocket() as conntrack:
        for entry in conntrack.dump():
            original, reply = entry.get_attr("CTA_TUPLE_ORIG"), entry.get_attr("CTA_TUPLE_REPLY")
            if entry["nfgen_family"] != socket.AF_INET or original is None or reply is None:
                continue
            protocol = original.get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_NUM")
            vip = original.get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_DST")
            task = reply.get_attr("CTA_TUPLE_IP").get_attr("CTA_IP_V4_SRC")
            if protocol in _STATELESS and vip in vips and task in departed:
                try:
                    flow = NFCTAttrTuple.from_netlink(socket.AF_INET, original)
                    conntrack.entry("del", tuple_orig=flow)
                except NetlinkError as error:
                    if error.code != errno.ENOENT:
                        raise


class NftBalancer:
    """`ports.Balancer`: keeps what it applied, by namespace, so that an unchanged table costs nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._applied: dict[Path, tuple[int, str, VipTable]] = {}

    def apply(self, sandbox: Path, table: VipTable) -> bool:
        if not is_namespace(sandbox):
            with self._lock:
                self._applied.pop(sandbox, None)
            return False
        try:
            inode = os.stat(sandbox).st_ino
        except FileNotFoundError:
            return False
        digest = hashlib.sha256(repr(sorted(table.items())).encode()).hexdigest()
        with self._lock:
            before = self._applied.get(sandbox)
        if before is not None and before[:2] == (inode, digest):
            return True
        old = before[2] if before is not None and before[0] == inode else {}
        if not table and not old and before is not None and before[0] == inode:
            return True
        try:
            nft.run(render(table, first=inode), sandbox)
            self._end_flows(sandbox, old, table)
        except KernelError:
            if not is_namespace(sandbox):
                return False
            raise
        with self._lock:
            self._applied[sandbox] = (inode, digest, dict(table))
        return True

    @staticmethod
    def _end_flows(sandbox: Path, old: VipTable, new: VipTable) -> None:
        departed = frozenset(
            str(task) for vip, tasks in old.items() for task in set(tasks) - set(new.get(vip, ()))
        )
        if departed:
            vips = frozenset(str(vip) for vip in old)
            in_netns(sandbox, lambda: _forget_flows(departed, vips))

    def forget(self, alive: Iterable[Path]) -> None:
        """Drop what is remembered of namespaces that aren't in `alive`."""
        keep = set(alive)
        with self._lock:
            self._applied = {path: kept for path, kept in self._applied.items() if path in keep}
