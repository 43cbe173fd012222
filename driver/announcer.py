"""Announces endpoints that join, after the answer to Docker.

Docker needs no announcement, and each one waits for the kernel's lock of all links (rtnl), the
bottleneck when many containers start at once.

Announcements are repeated, because the first one may be lost. A host drops packets of hosts that it
doesn't know as peers yet (`kernel/guard.py`), and Docker's gossip about a new peer usually arrives
after the first announcement. A host that missed all of them would send to the former host of an
address until its containers' neighbour entries expire.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Final

import structlog

from driver.errors import FreeFlowError
from driver.model import Endpoint
from driver.ports import Kernel
from driver.worker import OnDemandWorker

log = structlog.get_logger()

AGAIN: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds after a Join at which the endpoint is announced again.

Docker's gossip repeats within 30 s what was lost. The intervals grow, so an address that has moved
is found at the latest after twice the time that the gossip took."""


@dataclass(frozen=True, slots=True)
class _Due:
    endpoint: Endpoint
    joined: float
    at: float
    done: int = 0
    """Number of announcements so far."""


class Announcer:
    """Announces in a thread of its own, which lives only while there is something to announce.

    `again` are the times of the repetitions, in seconds after the Join, ascending.
    """

    def __init__(self, kernel: Kernel, again: tuple[float, ...] = AGAIN) -> None:
        self._kernel = kernel
        self._again = again
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._pending: list[_Due] = []
        self.worker = OnDemandWorker(
            "announce", self._lock, lambda: bool(self._pending), self._announce_due
        )

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """Announce this endpoint as soon as possible, and again later."""
        now = time.monotonic()
        with self._lock:
            self._pending.append(_Due(endpoint, now, now))
            self.worker.start()
        self._woken.set()

    def _announce_due(self) -> None:
        """Announce what is due, or wait for it."""
        self._woken.clear()
        now = time.monotonic()
        with self._lock:
            due = [item for item in self._pending if item.at <= now]
            later = [item for item in self._pending if item.at > now]
            self._pending = later + [
                _Due(
                    item.endpoint, item.joined, item.joined + self._again[item.done], item.done + 1
                )
                for item in due
                if item.done < len(self._again)
            ]
        if not due:
            self._woken.wait(min(item.at for item in later) - now)
            return
        groups: dict[tuple[str, bool], list[Endpoint]] = {}
        for item in due:
            groups.setdefault((item.endpoint.network_id, item.done > 0), []).append(item.endpoint)
        for (network_id, again), endpoints in groups.items():
            self._announce(network_id, endpoints, again=again)

    def _announce(self, network_id: str, endpoints: list[Endpoint], *, again: bool) -> None:
        try:
            self._kernel.announce(network_id, endpoints, again=again)
        except FreeFlowError as error:
            # Neighbours learn the address from the endpoint's first packet, only later.
            ids = [endpoint.id for endpoint in endpoints]
            log.warning(
                "endpoints not announced", network=network_id, endpoints=ids, reason=str(error)
            )
