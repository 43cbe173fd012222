"""Hands the messages of verbs to what acts on them."""

from __future__ import annotations

from typing import Final

from dataplane.errors import WrongMessage
from dataplane.router.library_wire import Message
from dataplane.router.pairing import Pairing
from dataplane.router.verbs_wire import (
    Step,
    VerbsConnection,
    VerbsDatagrams,
    VerbsEnd,
    VerbsKind,
    VerbsListen,
    VerbsMemory,
    VerbsMessage,
    VerbsQueuePair,
    VerbsStatus,
)

REQUEST: Final = 5
"""A request counts as so many messages: it is never refused for coming too fast, since the program
could not go on without."""


def handle(pairing: Pairing, process: int, message: Message | VerbsMessage) -> int:
    """Act on a message; as how many it counts.

    Raises:
        WrongMessage: it is none for the router, or may not come now.
    """
    cost = 1
    match message:
        case VerbsQueuePair():
            pairing.verbs.connect(process, message)
            cost = REQUEST
        case VerbsEnd(kind=VerbsKind.LISTEN_END):
            pairing.verbs_connections.listen_end(process, message)
        case VerbsEnd():
            pairing.verbs.end(process, message)
        case VerbsStatus():
            pairing.verbs.status(process, message)
        case VerbsDatagrams():
            cost = REQUEST + _datagrams(pairing, process, message)
        case VerbsMemory():
            pairing.direct_memory.handle(process, message)
            cost = REQUEST
        case VerbsListen():
            pairing.verbs_connections.listen(process, message)
        case VerbsConnection():
            pairing.verbs_connections.step(process, message)
            cost = REQUEST if message.step in (Step.REQUEST, Step.RESOLVE) else 1
        case _:
            raise WrongMessage(f"{type(message).__name__} is not for the router")
    return cost


def _datagrams(pairing: Pairing, process: int, message: VerbsDatagrams) -> int:
    """As how many more messages it counts."""
    match message.kind:
        case VerbsKind.GROUP:
            return pairing.groups.join(process, message)
        case VerbsKind.DATAGRAM_PEER if message.gid is not None and message.gid.is_multicast:
            return pairing.groups.send_to(process, message)
        case VerbsKind.DATAGRAM_PEER:
            pairing.datagrams.ask(process, message)
        case _:
            pairing.datagrams.open(process, message)
            if not message.on:
                pairing.groups.closed(process, message.qpn)
    return 0
