"""The path of each connection, and why: the kernel's sockets joined with the registry.

A granted connection counts as shm, or to another host as rdma or relay. The router knows that both
ends were granted a slot, but not when each direction switches to it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from dataplane.control import (
    ConnectionFact,
    Connections,
    ContainerCounts,
    PathCount,
    PathCounts,
    RdmaFacts,
    RelayFacts,
    Statistics,
)
from dataplane.errors import KernelRefused
from dataplane.router.arenas import RELAY, RELAY_SIDE, Arena, ConnectionEnd, Slot
from dataplane.router.knowledge import KnownNetwork
from dataplane.router.library_wire import IPAddress
from dataplane.router.pair_requests import PairRequest
from dataplane.router.pairing import Pairing
from dataplane.router.reasons import Reason
from dataplane.router.registry import ContainerRecord
from dataplane.router.socket_table import Namespaces, TcpSocket
from dataplane.router.verbs_listing import counts as counts_of_verbs

SHM: Final = "shm"
TOGETHER: Final = 32
"""Namespaces that are entered at once."""


def connections(
    pairing: Pairing, namespaces: Namespaces, clock: Callable[[], float], only: int | None
) -> Iterator[Connections | None]:
    """The list, as the last item; a None after each step, where the caller may do other work."""
    entries: list[ConnectionFact] = []
    wanted = list(pairing.knowledge.sandboxes) if only is None else [only]
    for found in sockets(namespaces, wanted):
        if found is None:
            yield None
            continue
        entry = entry_of(pairing, *found, clock())
        if entry is not None:
            entries.append(entry)
    yield Connections(connections=tuple(entries), reasons=sentences(entries))


def sentences(entries: Iterable[ConnectionFact]) -> dict[str, str]:
    """The words of the reasons that appear, with their sentences."""
    words = {entry.reason for entry in entries}
    return {reason.word: reason.sentence for reason in Reason if reason.word in words}


def paths(pairing: Pairing, namespaces: Namespaces) -> Iterator[PathCounts | None]:
    """The counts, as the last item; a None after each step, as in `connections`."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for found in sockets(namespaces, list(pairing.knowledge.sandboxes)):
        if found is None:
            yield None
            continue
        namespace, tcp = found
        network = pairing.knowledge.network_of(namespace, tcp.local.ip)
        if network is not None and tcp.inode:
            container = pairing.containers.get(namespace)
            path, reason, _ = _path(pairing, container, network, tcp, 0.0)
            counts[network.id, path, "" if reason is None else reason.word] += 1
    yield PathCounts(
        paths=tuple(
            PathCount(network, path, reason, count)
            for (network, path, reason), count in counts.items()
        )
    )


def sockets(
    namespaces: Namespaces, wanted: Sequence[int], counters: int = 0
) -> Iterator[tuple[int, TcpSocket] | None]:
    """The connected sockets of these namespaces; a None after each step.

    `counters`: as for `Diag.connected`.
    """
    for at in range(0, len(wanted), TOGETHER):
        with namespaces.lists(wanted[at : at + TOGETHER]) as diags:
            for namespace, diag in diags.items():
                # The container may have ended meanwhile.
                with contextlib.suppress(KernelRefused):
                    for tcp in diag.connected(counters):
                        yield None if tcp is None else (namespace, tcp)
        yield None


def entry_of(pairing: Pairing, namespace: int, tcp: TcpSocket, now: float) -> ConnectionFact | None:
    """The connection of a socket; None: it is no connection of a container."""
    knowledge = pairing.knowledge
    network = knowledge.network_of(namespace, tcp.local.ip)
    sandbox = knowledge.sandboxes.get(namespace)
    # A socket without an inode belongs to no process any more: the kernel is closing it.
    if network is None or sandbox is None or not tcp.inode:
        return None
    container = pairing.containers.get(namespace)
    path, reason, age = _path(pairing, container, network, tcp, now)
    return ConnectionFact(
        namespace=namespace,
        container=sandbox.name,
        network=network.id,
        local=str(tcp.local),
        remote=str(tcp.remote),
        path=path,
        reason=None if reason is None else reason.word,
        age=age,
    )


def _path(
    pairing: Pairing,
    container: ContainerRecord | None,
    network: KnownNetwork,
    tcp: TcpSocket,
    now: float,
) -> tuple[str, Reason | None, float | None]:
    """The connection's path, the reason for TCP, and its age in seconds."""
    if container is not None:
        held = container.ends.get(tcp.cookie)
        if held is not None:
            arena, number, _ = held
            slot = arena.slots[number]
            # The process keeps the slot until it closes: the ring may still have bytes to read.
            if slot.ends[RELAY_SIDE] is None if arena.ring else slot.left:
                return network.kind, Reason(slot.why_left or Reason.LEFT), None
            # A note about a connection that has a slot: its end has fallen back to TCP since.
            noted = container.notes.get(tcp.cookie)
            if noted is not None:
                return network.kind, Reason(noted[0]), None
            path = pairing.remote.transport(slot.connection).value if arena.ring else SHM
            return path, None, now - slot.since
    if not network.accelerated:
        return network.kind, Reason.OFF, None
    if tcp.remote.ip in network.balanced:
        return network.kind, Reason.BALANCED, None
    local_peer = tcp.remote.ip in network.owners or network.tasks.get(tcp.remote.ip)
    is_remote = tcp.remote.ip in network or tcp.remote.ip in network.tasks
    if not local_peer and not is_remote:
        return network.kind, Reason.FOREIGN, None
    if not local_peer and (why := pairing.remote.why_not(network)) is not None:
        return network.kind, why, None
    if container is None or not _has_library(container):
        return network.kind, Reason.NO_LIBRARY, None
    waiting = container.waiting.get(tcp.cookie)
    if waiting is not None:
        return network.kind, _why_waiting(pairing, network, waiting), now - waiting.since
    note = container.notes.get(tcp.cookie)
    if note is not None:
        return network.kind, Reason(note[0]), None
    if local_peer and not _peer_has_library(pairing, network, tcp.remote.ip):
        return network.kind, Reason.PEER_NO_LIBRARY, None
    return network.kind, Reason.SHORT, None


def _has_library(container: ContainerRecord) -> bool:
    return any(process.build is not None for process in container.processes.values())


def _peer_has_library(pairing: Pairing, network: KnownNetwork, ip: IPAddress) -> bool:
    """Whether a container that an address or VIP leads to has a process with the library."""
    for address in network.tasks.get(ip, (ip,)):
        peer = pairing.containers.get(network.owners.get(address, -1))
        if peer is not None and _has_library(peer):
            return True
    return False


def _why_waiting(pairing: Pairing, network: KnownNetwork, waiting: PairRequest) -> Reason:
    if waiting.ambiguous:
        return Reason.AMBIGUOUS
    if waiting.is_remote:
        return pairing.remote.why_not(network) or pairing.remote.why_waiting(waiting)
    has = _peer_has_library(pairing, network, waiting.message.remote.ip)
    return Reason.PEER_SHORT if has else Reason.PEER_NO_LIBRARY


def statistics(
    pairing: Pairing,
    *,
    uptime: float,
    wrong_messages: int,
    dropped: int,
    bugs: int,
    rdma: RdmaFacts,
    relay: RelayFacts,
) -> Statistics:
    """The counters of the router and of each container."""
    counts = pairing.counts
    return Statistics(
        uptime=uptime,
        learned=pairing.knowledge.learned,
        processes=len(pairing.processes),
        waiting=sum(len(container.waiting) for container in pairing.containers.values()),
        connections=sum(map(_connections, pairing.arenas.values())),
        arenas=len(pairing.arenas),
        memory=sum(arena.used for arena in pairing.arenas.values()),
        granted=counts.granted,
        refused={Reason(number).word: count for number, count in counts.refused.items()},
        noted={Reason(number).word: count for number, count in counts.noted.items()},
        wrong_messages=wrong_messages,
        dropped=dropped,
        bugs=bugs,
        verbs=counts_of_verbs(pairing.verbs, pairing.direct_memory),
        containers=tuple(
            _counts(container, pairing)
            for container in pairing.containers.values()
            if container.namespace != RELAY
        ),
        rdma=rdma,
        relay=relay,
    )


def _connections(arena: Arena) -> int:
    """Connections within this host that have a slot; queue pairs have slots, too."""
    return 0 if arena.ring else sum(_is_connection(slot) for slot in arena.slots.values())


def _is_connection(slot: Slot) -> bool:
    return any(isinstance(end, ConnectionEnd) for end in slot.ends)


def _counts(container: ContainerRecord, pairing: Pairing) -> ContainerCounts:
    sandbox = pairing.knowledge.sandboxes.get(container.namespace)
    builds: dict[str, int] = {}
    for process in container.processes.values():
        if process.build is not None:
            builds[process.build] = builds.get(process.build, 0) + 1
    return ContainerCounts(
        namespace=container.namespace,
        container="" if sandbox is None else sandbox.name,
        processes=len(container.processes),
        waiting=len(container.waiting),
        connections=sum(isinstance(key, int) for key in container.ends),
        queue_pairs=pairing.verbs.of_container[container.namespace],
        bells=container.bells,
        relay_cpu=container.relay_cpu,
        memory=sum(container.memory.values()),
        builds=builds,
    )
