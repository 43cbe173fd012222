"""The devices and queue pairs of verbs of this host's containers, for people and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dataplane.control import QueuePairFact, VerbsDeviceFact, VerbsFacts, VerbsObjects
from dataplane.router.pairing import Pairing
from dataplane.router.queue_pairs import QueuePairRecord
from dataplane.router.remote_events import Transport
from dataplane.router.verbs_memory import DirectMemory
from dataplane.router.verbs_pairing import VerbsPairing, VerbsProcess

WAITING: Final = "waiting"
_WHY_WAITING: Final = "the peer has not asked for this queue pair yet"
_STEP: Final = 500
"""Queue pairs."""
_TYPES: Final = {2: "RC", 3: "UC"}
"""Of enum ibv_qp_type (infiniband/verbs.h)."""


def objects(pairing: Pairing, now: float, only: int | None) -> Iterator[VerbsObjects | None]:
    """All of them, or those of one namespace, as the last item; a None after each step, where the
    caller may do other work.
    """
    verbs = pairing.verbs
    reasons: dict[str, str] = {}
    queue_pairs = []
    for number, record in enumerate(list(verbs), 1):
        if number % _STEP == 0:
            yield None
        if only not in (None, record.namespace) or verbs.queue_pairs.get(record.number) != record:
            continue
        why = _why(pairing, record)
        if why is not None:
            reasons[why[0]] = why[1]
        queue_pairs.append(_queue_pair(pairing, record, now, None if why is None else why[0]))
    yield VerbsObjects(
        devices=tuple(
            _device(pairing, opened)
            for opened in verbs.processes.values()
            if only in (None, opened.namespace) and any(opened.device.gids)
        ),
        queue_pairs=tuple(queue_pairs),
        reasons=reasons,
    )


def counts(verbs: VerbsPairing, direct_memory: DirectMemory) -> VerbsFacts:
    """The counters."""
    return VerbsFacts(
        processes=sum(any(opened.device.gids) for opened in verbs.processes.values()),
        queue_pairs=len(verbs.queue_pairs),
        waiting=sum(_waits(record) for record in verbs),
        paired=verbs.counts.paired,
        operations=verbs.counts.operations,
        bytes=verbs.counts.bytes,
        refused={reason.word: count for reason, count in verbs.counts.refused.items()},
        direct_files=len(direct_memory.files),
        direct_bytes=direct_memory.bytes.total(),
    )


def _waits(record: QueuePairRecord) -> bool:
    """Those of an earlier router are connected, whether the peer has come back or not."""
    return record.waits and not record.message.paired


def _name(pairing: Pairing, namespace: int) -> str:
    sandbox = pairing.knowledge.sandboxes.get(namespace)
    return "" if sandbox is None else sandbox.name


def _device(pairing: Pairing, opened: VerbsProcess) -> VerbsDeviceFact:
    device = opened.device
    return VerbsDeviceFact(
        namespace=opened.namespace,
        container=_name(pairing, opened.namespace),
        pid=pairing.processes[opened.id].pid,
        guid=f"{device.guid:016x}",
        gids=tuple("" if gid is None else str(gid) for gid in device.gids),
        qpn_first=device.qpn_first or 0,
        queue_pairs=len(opened.queue_pairs),
    )


def _path(pairing: Pairing, record: QueuePairRecord) -> str:
    if record.place is None or not record.is_remote:
        return "shm"
    arena, slot, _ = record.place
    return pairing.remote.transport(arena.slots[slot].connection).value


def _direct(pairing: Pairing, record: QueuePairRecord) -> str:
    """See `QueuePairFact.direct`."""
    network = pairing.knowledge.networks.get(record.network)
    if record.moving and _path(pairing, record) == Transport.RDMA.value:
        return "used" if record.status is not None and record.status.moved else "unused"
    if record.peer is None or network is None or not network.verbs_direct:
        return ""
    if not record.direct:
        return "library"
    return "used" if record.reached else "unused"


def _why(pairing: Pairing, record: QueuePairRecord) -> tuple[str, str] | None:
    """Why a queue pair has no path, as a word and as a sentence; None: it has one."""
    reason = record.refused
    if reason is None and record.is_remote and record.place is not None:
        arena, slot, _ = record.place
        reason = pairing.remote.why_stalled(arena.slots[slot].connection)
    if reason is None and _waits(record):
        network = pairing.knowledge.networks.get(record.network)
        if record.is_remote and network is not None:
            reason = pairing.remote.why_not(network)
        if reason is None:
            return WAITING, _WHY_WAITING
    return None if reason is None else (reason.word, reason.sentence)


def _queue_pair(
    pairing: Pairing, record: QueuePairRecord, now: float, reason: str | None
) -> QueuePairFact:
    message, status = record.message, record.status
    return QueuePairFact(
        namespace=record.namespace,
        container=_name(pairing, record.namespace),
        network=record.network,
        pid=pairing.processes[record.process].pid,
        type=_TYPES.get(message.type, str(message.type)),
        local=str(record.gid),
        qpn=message.qpn,
        peer=str(record.peer_gid),
        peer_qpn=message.peer_qpn,
        path=_path(pairing, record) if reason is None else "",
        direct=_direct(pairing, record) if reason is None else "",
        reason=reason,
        age=now - record.since,
        operations=0 if status is None else status.operations,
        bytes=0 if status is None else status.bytes,
    )
