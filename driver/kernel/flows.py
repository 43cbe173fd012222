"""Conntrack entries that would keep a flow from what the VIP rules now say, found and forgotten.

All functions work in the calling thread's network namespace. Nothing else is touched: a TCP connection stays with its
task until it ends, also when the task takes no new ones.

Looking is dear: the kernel walks the host's whole table, some 10 ms of CPU, whatever the namespace has in it. So callers
look only for VIPs that have a reason.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

from driver.errors import KernelError

_CONNECTIONS: Final = (socket.IPPROTO_TCP, socket.IPPROTO_SCTP)
"""Protocols whose flows have an end of their own; others last as long as their packets."""

_NEIGHBOURS: Final = Path("/proc/thread-self/net/arp")


def is_stale(protocol: int, vip: str, task: str, tasks: Collection[str]) -> bool:
    """Whether a flow to `vip`, of which conntrack says that `task` answers, is against the rules `vip -> tasks`."""
    if task == vip:
        # It began before the VIP had rules.
        return True
    return protocol not in _CONNECTIONS and task not in tasks


def tried(vips: Iterable[IPv4Address], neighbours: Path = _NEIGHBOURS) -> set[IPv4Address]:
    """Of VIPs that had no rules, those that something here sent packets to: the kernel asked who has the address."""
    wanted = {str(vip): vip for vip in vips}
    if not wanted:
        return set()
    try:
        lines = neighbours.read_text(errors="replace").splitlines()[1:]
    except OSError:
        return set(wanted.values())
    return {wanted[address] for line in lines if (address := line.split(maxsplit=1)[0]) in wanted}


def _addresses(tuple_: Any) -> tuple[str, str, int]:
    address = tuple_.get_attr("CTA_TUPLE_IP")
    protocol = tuple_.get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_NUM")
    return (
        address.get_attr("CTA_IP_V4_SRC"),
        address.get_attr("CTA_IP_V4_DST"),
        protocol,
    )


def _forget(rules: Mapping[str, frozenset[str]]) -> int:
    forgotten = 0
    # Kernels before 5.8 ignore the filter and send all.
    only = NFCTAttrTuple(daddr=next(iter(rules))) if len(rules) == 1 else None
    with NFCTSocket() as conntrack:
        for entry in conntrack.dump(tuple_orig=only):
            original, reply = (
                entry.get_attr("CTA_TUPLE_ORIG"),
                entry.get_attr("CTA_TUPLE_REPLY"),
            )
            if entry["nfgen_family"] != socket.AF_INET or original is None or reply is None:
                continue
            _, vip, protocol = _addresses(original)
            task = _addresses(reply)[0]
            if vip in rules and is_stale(protocol, vip, task, rules[vip]):
                flow = NFCTAttrTuple.from_netlink(socket.AF_INET, original)
                try:
                    conntrack.entry("del", tuple_orig=flow)
                    forgotten += 1
                except NetlinkError as error:
                    # It ended meanwhile.
                    if error.code != errno.ENOENT:
                        raise
    return forgotten


def forget_stale(rules: Mapping[IPv4Address, Collection[IPv4Address]]) -> int:
    """Forget the flows to these VIPs that are against their rules; returns how many.

    Raises:
        KernelError: conntrack can't be read or changed.
    """
    if not rules:
        return 0
    texts = {str(vip): frozenset(map(str, tasks)) for vip, tasks in rules.items()}
    try:
        return _forget(texts)
    except (NetlinkError, OSError) as error:
        raise KernelError(f"conntrack: {error}; is nf_conntrack_netlink available?") from error


def answering(vip: IPv4Address, identifier: int) -> IPv4Address | None:
    """The task that conntrack has for the pings to this VIP with this identifier; None if it has none, or can't say."""
    try:
        with NFCTSocket() as conntrack:
            for entry in conntrack.dump(tuple_orig=NFCTAttrTuple(daddr=str(vip))):
                original, reply = (
                    entry.get_attr("CTA_TUPLE_ORIG"),
                    entry.get_attr("CTA_TUPLE_REPLY"),
                )
                if entry["nfgen_family"] != socket.AF_INET or original is None or reply is None:
                    continue
                _, to, protocol = _addresses(original)
                if (to, protocol) != (str(vip), socket.IPPROTO_ICMP):
                    continue
                if original.get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_ICMP_ID") == identifier:
                    return IPv4Address(_addresses(reply)[0])
    except (NetlinkError, OSError):
        return None
    return None
