"""Announces endpoints that join, after the answer to Docker.

Docker needs no announcement, and each one waits for the kernel's lock of all links (rtnl), the
bottleneck when many containers start at once.
"""

from __future__ import annotations

import threading

import structlog

from driver.errors import FreeFlowError
from driver.model import Endpoint
from driver.ports import Kernel
from driver.worker import OnDemandWorker

log = structlog.get_logger()


class Announcer:
    """Announces in a thread of its own, which lives only while there is something to announce."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._lock = threading.Lock()
        self._pending: list[Endpoint] = []
        self.worker = OnDemandWorker(
            "announce", self._lock, lambda: bool(self._pending), self._announce_all
        )

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """Announce this endpoint as soon as possible."""
        with self._lock:
            self._pending.append(endpoint)
            self.worker.start()

    def _announce_all(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for network_id in dict.fromkeys(endpoint.network_id for endpoint in pending):
            self._announce(network_id, [item for item in pending if item.network_id == network_id])

    def _announce(self, network_id: str, endpoints: list[Endpoint]) -> None:
        try:
            self._kernel.announce(network_id, endpoints)
        except FreeFlowError as error:
            # Neighbours learn the address from the endpoint's first packet, only later.
            ids = [endpoint.id for endpoint in endpoints]
            log.warning(
                "endpoints not announced", network=network_id, endpoints=ids, reason=str(error)
            )
