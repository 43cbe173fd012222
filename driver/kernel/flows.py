"""Deletes conntrack entries that contradict the present VIP rules.

All functions work in the calling thread's network namespace. Other entries stay: a TCP connection
keeps its task until it ends, even if the task takes no new connections.

Listing is expensive: the kernel walks the host's whole table, some 10 ms of CPU, however few
entries the namespace has. So callers list only for VIPs that may have stale entries.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from dataplane.nlmsg import NESTED, attribute, attributes, nest
from driver.errors import reporting
from driver.kernel.netfilter import IPV4, InterruptedDumpError, dump, send_each

_CONNECTIONS: Final = (socket.IPPROTO_TCP, socket.IPPROTO_SCTP)
"""Protocols whose connections end by themselves; other flows last as long as packets come."""

_SUBSYSTEM: Final = 1 << 8
_GET, _DELETE = _SUBSYSTEM | 1, _SUBSYSTEM | 2
_ORIGINAL, _REPLY, _FILTER = 1, 2, 25
_IP, _PROTOCOL = 1, 2
_SOURCE, _DESTINATION = 1, 2
_NUMBER, _ECHO = 1, 4
_BY_DESTINATION: Final = struct.pack("=I", 1 << 1)
MOST: Final = 65536
"""Entries that are read. A container can make any number of them."""

_HEAD: Final = 1 << 20
"""Bytes that are read of the list of neighbours."""
_NEIGHBOURS: Final = Path("/proc/thread-self/net/arp")


def is_stale(protocol: int, vip: str, task: str, tasks: Collection[str]) -> bool:
    """Whether an entry that sends a flow to `vip` to `task` contradicts the rules `vip` →
    `tasks`."""
    if task == vip:
        # It began before the VIP had rules.
        return True
    return protocol not in _CONNECTIONS and task not in tasks


def tried(vips: Iterable[IPv4Address], neighbours: Path = _NEIGHBOURS) -> set[IPv4Address]:
    """The VIPs to which packets were sent before they had rules: the kernel requested their MAC
    address."""
    wanted = {str(vip): vip for vip in vips}
    if not wanted:
        return set()
    try:
        with neighbours.open(errors="replace") as file:
            lines = file.read(_HEAD).splitlines()[1:]
    except OSError:
        return set(wanted.values())
    return {wanted[address] for line in lines if (address := line.split(maxsplit=1)[0]) in wanted}


@dataclass(frozen=True, slots=True)
class _Flow:
    """An entry: VIP, task, protocol, identifier of a ping. `original` are attributes as they were
    read."""

    vip: str
    task: str
    protocol: int
    echo: int
    original: bytes


def _flow(data: bytes) -> _Flow | None:
    """Decode an entry; None: it isn't IPv4, or has an unknown form."""
    try:
        entry = dict(attributes(data))
        original, reply = dict(attributes(entry[_ORIGINAL])), dict(attributes(entry[_REPLY]))
        to, protocol = dict(attributes(original[_IP])), dict(attributes(original[_PROTOCOL]))
        answering = dict(attributes(reply[_IP]))
        return _Flow(
            str(IPv4Address(to[_DESTINATION])),
            str(IPv4Address(answering[_SOURCE])),
            protocol[_NUMBER][0],
            int.from_bytes(protocol.get(_ECHO, b""), "big"),
            entry[_ORIGINAL],
        )
    except (KeyError, ValueError, IndexError):
        return None


def _flows(only: str | None) -> Iterator[_Flow]:
    """The flows of the namespace, up to `MOST`; only those to one VIP where the kernel can filter
    (5.8).

    Raises:
        OSError: conntrack can't be read.
    """
    chosen = []
    if only is not None:
        to = nest(_IP, attribute(_DESTINATION, IPv4Address(only).packed))
        flags = (attribute(1, _BY_DESTINATION), attribute(2, bytes(4)))
        chosen = [nest(_ORIGINAL, to), nest(_FILTER, *flags)]
    try:
        for family, data in dump(_GET, IPV4, MOST, *chosen):
            flow = _flow(data) if family == IPV4 else None
            if flow is not None:
                yield flow
    except (OverflowError, InterruptedDumpError):
        # A container with so many entries has made them on purpose; the rest expire.
        return


def _forget(rules: Mapping[str, frozenset[str]]) -> int:
    only = next(iter(rules)) if len(rules) == 1 else None
    stale = [
        flow
        for flow in _flows(only)
        if flow.vip in rules and is_stale(flow.protocol, flow.vip, flow.task, rules[flow.vip])
    ]
    # Entries that have expired meanwhile don't matter.
    return send_each(
        _DELETE, IPV4, (attribute(_ORIGINAL | NESTED, flow.original) for flow in stale)
    )


def forget_stale(rules: Mapping[IPv4Address, Collection[IPv4Address]]) -> int:
    """Delete entries to these VIPs that contradict their rules; returns how many.

    Raises:
        KernelError: conntrack can't be read or changed.
    """
    if not rules:
        return 0
    texts = {str(vip): frozenset(map(str, tasks)) for vip, tasks in rules.items()}
    with reporting("connection tracking", remedy="modprobe nf_conntrack_netlink"):
        return _forget(texts)


def answering(vip: IPv4Address, identifier: int) -> IPv4Address | None:
    """The task behind pings to this VIP with this identifier, by conntrack; None: no such entry."""
    try:
        for flow in _flows(str(vip)):
            if (flow.vip, flow.protocol, flow.echo) == (str(vip), socket.IPPROTO_ICMP, identifier):
                return IPv4Address(flow.task)
    except OSError:
        return None
    return None
