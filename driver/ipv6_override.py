"""IPv6 in a Swarm: containers whose engine has counted an address for itself get the unique one instead.

The answer to CreateEndpoint can't change what the request says, so it is done in the container's namespace, as soon as
the engine has put the address there: since Docker 28 just after Join, up to 27 when the container is started. The source
filter keeps the engine's address off the network from the first moment.
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

log = structlog.get_logger()

PAUSE: Final = 0.02
PATIENCE: Final = 60.0
"""Seconds after which a container is given up: it has failed to start, most likely."""

Exchange = Callable[[Path, str, IPv6Interface, IPv6Interface], bool]


class Ipv6Override:
    """One thread, which works only while there is something to settle.

    `sandbox` tells where an endpoint's namespace is; `exchange` as `driver.kernel.addresses.exchange`.
    """

    def __init__(
        self,
        exchange: Exchange,
        sandbox: Callable[[Endpoint], Path | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._exchange = exchange
        self._sandbox = sandbox
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[str, tuple[Endpoint, float]] = {}
        self._thread: threading.Thread | None = None

    def endpoint_joined(self, endpoint: Endpoint) -> None:
        """Settle this endpoint, if it needs it, as soon as possible."""
        self.resume([endpoint])

    def resume(self, endpoints: Iterable[Endpoint]) -> None:
        """Settle what an earlier process may have left."""
        until = self._clock() + PATIENCE
        with self._lock:
            for endpoint in endpoints:
                if endpoint.engine_ipv6 is not None and endpoint.ipv6 is not None:
                    self._pending[endpoint.id] = (endpoint, until)
            if self._pending and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ipv6-override", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self.once()
            with self._lock:
                if not self._pending:
                    self._thread = None
                    return
            time.sleep(PAUSE)

    def once(self) -> None:
        """Try all that is pending."""
        now = self._clock()
        with self._lock:
            pending = list(self._pending.values())
        for endpoint, until in pending:
            if self._try(endpoint) or now > until:
                with self._lock:
                    if self._pending.get(endpoint.id) == (endpoint, until):
                        del self._pending[endpoint.id]

    def _try(self, endpoint: Endpoint) -> bool:
        path = self._sandbox(endpoint)
        if path is None or endpoint.ipv6 is None or endpoint.engine_ipv6 is None:
            return True
        try:
            done = self._exchange(path, endpoint.mac, endpoint.engine_ipv6, endpoint.ipv6)
        except KernelError as error:
            # Its namespace goes, or comes: the next try knows more.
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
