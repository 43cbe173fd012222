"""What each connection has carried: the kernel's counters of its socket, and its rings' words.

The containers at both sides can write every word of a ring. What they say is only shown, and only
if it is possible: rings can't carry more than memory can copy. A container may still lie about its
own connections, as it may lie to its peer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from dataplane.control import (
    RING_MOST,
    ConnectionFact,
    ConnectionTraffic,
    RingTraffic,
    TcpTraffic,
    TrafficFacts,
)
from dataplane.router.listing import entry_of, sentences, sockets
from dataplane.router.pairing import Pairing
from dataplane.router.seams import ArenaMemory, Sent
from dataplane.router.socket_table import Namespaces, TcpSocket
from dataplane.router.tcp_counters import INFO_WANTED, TcpCounters

_GRACE: Final = 0.1
"""Seconds by which a slot may be older than it says."""
_PROCESS_CLOCK: Final = 2
"""CPUCLOCK_SCHED of the kernel's linux/posix-timers_types.h."""


def traffic(
    pairing: Pairing,
    namespaces: Namespaces,
    memory: ArenaMemory,
    clock: Callable[[], float],
    relay: int | None,
    only: int | None,
) -> Iterator[TrafficFacts | None]:
    """The list, as the last item; a None after each step, as in `listing.connections`.

    `relay`: the relay's process, if one runs.
    """
    entries: list[ConnectionTraffic] = []
    wanted = list(pairing.knowledge.sandboxes) if only is None else [only]
    for found in sockets(namespaces, wanted, INFO_WANTED):
        if found is None:
            yield None
            continue
        now = clock()
        entry = entry_of(pairing, *found, now)
        if entry is not None:
            ring = ring_traffic(pairing, memory, *found, now)
            entries.append(_carried(entry, found[1], ring, now))
    yield TrafficFacts(
        connections=tuple(entries),
        reasons=sentences(entries),
        read=clock(),
        router_cpu=time.process_time(),
        relay_cpu=None if relay is None else cpu_of(relay),
        containers_relay_cpu={
            container.namespace: container.relay_cpu
            for container in pairing.containers.values()
            if container.relay_cpu and only in (None, container.namespace)
        },
    )


def _carried(
    entry: ConnectionFact, tcp: TcpSocket, ring: RingTraffic | None, now: float
) -> ConnectionTraffic:
    counters = None if tcp.counters is None else tcp_traffic(tcp.counters)
    facts = msgspec.structs.asdict(entry)
    return ConnectionTraffic(**facts, cookie=tcp.cookie, read=now, tcp=counters, ring=ring)


def tcp_traffic(counters: TcpCounters) -> TcpTraffic:
    """The kernel's counters of a connection."""
    return TcpTraffic(
        bytes_in=counters.bytes_in,
        bytes_out=counters.bytes_out,
        segments_in=counters.segments_in,
        segments_out=counters.segments_out,
        retransmits=counters.retransmits,
        round_trip=counters.round_trip,
    )


def ring_traffic(
    pairing: Pairing, memory: ArenaMemory, namespace: int, tcp: TcpSocket, now: float
) -> RingTraffic | None:
    """What a connection's rings have carried; None: it has none, or their words can't be true."""
    container = pairing.containers.get(namespace)
    held = None if container is None else container.ends.get(tcp.cookie)
    if held is None:
        return None
    arena, number, side = held
    slot = arena.slots[number]
    said = memory.sent(arena.memory, number)
    if said is None or not all(is_possible(each, now - slot.since) for each in said):
        return None
    put, came = said[side], said[1 - side]
    return RingTraffic(
        incarnation=slot.incarnation,
        bytes_in=came.bytes,
        bytes_out=put.bytes,
        messages_in=_messages(came),
        messages_out=_messages(put),
    )


def is_possible(said: Sent, seconds: float) -> bool:
    """Whether a ring can have carried so many bytes in so many seconds."""
    return said.bytes <= RING_MOST * (max(seconds, 0.0) + _GRACE)


def _messages(said: Sent) -> int | None:
    # A message has a byte at least; the words were not read at the same moment.
    return min(said.messages, said.bytes) if said.messages or not said.bytes else None


def cpu_of(process: int) -> float | None:
    """Seconds of the processor that a process has used; None: there is no such process.

    The clock's number is that of clock_getcpuclockid(3), which Python lacks.
    """
    try:
        return time.clock_gettime(~process << 3 | _PROCESS_CLOCK)
    except OSError:
        return None
