"""Replaces the IPv6 address that a Swarm's engine gave a container by the network's unique one.

In a Swarm each engine numbers IPv6 addresses by itself, so two hosts may give out the same one. The
answer to CreateEndpoint can't change an address that the request contains. So the address is
exchanged in the container's namespace, as soon as the engine has set it: since Docker 28 just after
Join, up to 27 when the container starts. The source filter keeps the engine's address off the
network from the first moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv6Interface
from pathlib import Path
from typing import Final

import structlog

from driver.errors import KernelError
from driver.model import Endpoint
from driver.worker import OnDemandWorker

log = structlog.get_logger()

PAUSE: Final = 0.02
PATIENCE: Final = 60.0
"""Seconds after which a container is given up: most likely it has failed to start."""

Exchange = Callable[[Path, str, IPv6Interface, IPv6Interface], bool]


class Ipv6Override:
    """Exchanges addresses in a thread that lives only while an exchange is pending.

    `sandbox` tells where an endpoint's namespace is; `exchange` is
    `driver.kernel.addresses.exchange`; `background` false: the caller calls `once`.
    """

    def __init__(
        self,
        exchange: Exchange,
        sandbox: Callable[[Endpoint], Path | None],
        clock: Callable[[], float] = time.monotonic,
        *,
        background: bool = True,
    ) -> None:
        self._exchange = exchange
        self._sandbox = sandbox
        self._clock = clock
        self._background = background
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[Endpoint, float]] = {}
        """Endpoints, each with the time at which it is given up."""
        self._worker = OnDemandWorker(
            "ipv6-override", self._lock, lambda: bool(self._pending), self._step
        )

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """Exchange the address of this endpoint, if it needs it, as soon as possible."""
        self.resume([endpoint])

    def resume(self, endpoints: Iterable[Endpoint]) -> None:
        """Finish what an earlier process may have left undone."""
        until = self._clock() + PATIENCE
        with self._lock:
            for endpoint in endpoints:
                if endpoint.engine_ipv6 is not None and endpoint.ipv6 is not None:
                    self._pending[endpoint.id] = (endpoint, until)
            if self._pending and self._background:
                self._worker.start()

    def _step(self) -> None:
        self.once()
        if self._pending:
            time.sleep(PAUSE)

    def once(self) -> None:
        """Try all pending exchanges."""
        now = self._clock()
        with self._lock:
            pending = list(self._pending.values())
        for endpoint, until in pending:
            if self._try(endpoint) or now > until:
                with self._lock:
                    if self._pending.get(endpoint.id) == (endpoint, until):
                        del self._pending[endpoint.id]

    def _try(self, endpoint: Endpoint) -> bool:
        """Whether nothing is left to do."""
        path = self._sandbox(endpoint)
        if path is None or endpoint.ipv6 is None or endpoint.engine_ipv6 is None:
            return True
        try:
            done = self._exchange(path, endpoint.mac, endpoint.engine_ipv6, endpoint.ipv6)
        except KernelError as error:
            # The namespace is being made or removed: the next try finds out.
            log.debug("address not exchanged", endpoint=endpoint.id, reason=str(error))
            return False
        if done:
            log.info(
                "address exchanged",
                endpoint=endpoint.id,
                engine=str(endpoint.engine_ipv6.ip),
                own=str(endpoint.ipv6.ip),
            )
        return done
