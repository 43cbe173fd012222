"""Announcing after the answer to Join."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from driver.announcer import Announcer
from driver.errors import KernelError
from driver.model import Endpoint
from testbed.patience import patience
from tests.unit.steps import SteppedKernel, Steps

PATIENCE = 5.0
"""Seconds."""


class GatedKernel(SteppedKernel):
    """Each announcement waits at the gate; those of network `mute` are refused."""

    def __init__(self) -> None:
        super().__init__(Steps())
        self.gate = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.told: list[tuple[str, list[str]]] = []

    def announce(self, network_id: str, endpoints: Iterable[Endpoint]) -> None:
        self.begun.release()
        assert self.gate.acquire(timeout=patience(PATIENCE))
        if network_id == "mute":
            raise KernelError("network is down")
        self.told.append((network_id, [endpoint.id for endpoint in endpoints]))


def _endpoint(name: str, network: str = "net") -> Endpoint:
    return Endpoint(name, network, "02:42:0a:00:00:05", None)


def _await_end(announcer: Announcer) -> None:
    assert announcer.worker.join(patience(PATIENCE))


def test_what_joins_meanwhile_is_announced_together() -> None:
    """No join waits for the kernel, all endpoints are announced, with one request per network."""
    kernel = GatedKernel()
    announcer = Announcer(kernel)
    announcer.endpoint_joined(_endpoint("first"))
    assert kernel.begun.acquire(timeout=patience(PATIENCE))
    for name, network in (("a", "net"), ("b", "other"), ("c", "net")):
        announcer.endpoint_joined(_endpoint(name, network))
    kernel.gate.release(3)
    _await_end(announcer)
    assert kernel.told == [("net", ["first"]), ("net", ["a", "c"]), ("other", ["b"])]


def test_a_refusal_stops_nothing() -> None:
    """If announcing on one network fails, others are announced, and so are later joins."""
    kernel = GatedKernel()
    kernel.gate.release(9)
    announcer = Announcer(kernel)
    announcer.endpoint_joined(_endpoint("a", "mute"))
    announcer.endpoint_joined(_endpoint("b"))
    _await_end(announcer)
    announcer.endpoint_joined(_endpoint("c"))
    _await_end(announcer)
    assert [name for _, names in kernel.told for name in names] == ["b", "c"]
