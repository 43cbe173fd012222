"""The devices and queue pairs of verbs of this host's containers, for people and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from dataplane.control import QueuePairFact, VerbsDeviceFact, VerbsFacts, VerbsObjects
from dataplane.router.pairing import Pairing
from dataplane.router.verbs_pairing import QueuePairRecord, VerbsPairing, VerbsProcess

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
    reasons = {WAITING: _WHY_WAITING}
    queue_pairs = []
    for number, record in enumerate(list(verbs), 1):
        if number % _STEP == 0:
            yield None
        if only not in (None, record.namespace) or verbs.queue_pairs.get(record.number) != record:
            continue
        queue_pairs.append(_queue_pair(pairing, record, now))
        if record.refused is not None:
            reasons[record.refused.word] = record.refused.sentence
    words = {fact.reason for fact in queue_pairs}
    yield VerbsObjects(
        devices=tuple(
            _device(pairing, opened)
            for opened in verbs.processes.values()
            if only in (None, opened.namespace) and any(opened.device.gids)
        ),
        queue_pairs=tuple(queue_pairs),
        reasons={word: sentence for word, sentence in reasons.items() if word in words},
    )


def counts(verbs: VerbsPairing) -> VerbsFacts:
    """The counters."""
    return VerbsFacts(
        processes=sum(any(opened.device.gids) for opened in verbs.processes.values()),
        queue_pairs=len(verbs.queue_pairs),
        waiting=sum(_waits(record) for record in verbs),
        paired=verbs.counts.paired,
        operations=verbs.counts.operations,
        bytes=verbs.counts.bytes,
        refused={reason.word: count for reason, count in verbs.counts.refused.items()},
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


def _queue_pair(pairing: Pairing, record: QueuePairRecord, now: float) -> QueuePairFact:
    message, status = record.message, record.status
    reason = None if record.refused is None else record.refused.word
    if _waits(record):
        reason = WAITING
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
        path="shm" if reason is None else "",
        reason=reason,
        age=now - record.since,
        operations=0 if status is None else status.operations,
        bytes=0 if status is None else status.bytes,
    )
