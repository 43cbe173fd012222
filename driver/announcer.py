"""Announcements of endpoints that join, after the answer: Docker needs nothing of them, and each waits for the kernel's
one lock of all links (rtnl), which is the bottleneck when many containers start at once.
"""

from __future__ import annotations

import threading

import structlog

from driver.errors import FreeFlowError
from driver.model import Endpoint
from driver.ports import Kernel

log = structlog.get_logger()


class Announcer:
    """One thread, which lives only while there is something to announce."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._lock = threading.Lock()
        self._pending: list[Endpoint] = []
        self._thread: threading.Thread | None = None

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """Announce this endpoint as soon as possible."""
        with self._lock:
            self._pending.append(endpoint)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="announce", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._lock:
                pending, self._pending = self._pending, []
                if not pending:
                    self._thread = None
                    return
            for network_id in dict.fromkeys(endpoint.network_id for endpoint in pending):
                self._announce(
                    network_id, [item for item in pending if item.network_id == network_id]
                )

    def _announce(self, network_id: str, endpoints: list[Endpoint]) -> None:
        try:
            self._kernel.announce(network_id, endpoints)
        except FreeFlowError as error:
            # Neighbours learn it from the first packet as well, only later.
            ids = [endpoint.id for endpoint in endpoints]
            log.warning(
                "endpoints not announced", network=network_id, endpoints=ids, reason=str(error)
            )
