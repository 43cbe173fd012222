"""Announcing after the answer to Join."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import pairwise

from driver.announcer import AGAIN, Announcer
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
        self.again: list[bool] = []

    def announce(
        self, network_id: str, endpoints: Iterable[Endpoint], *, again: bool = False
    ) -> None:
        self.again.append(again)
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
    announcer = Announcer(kernel, again=())
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
    announcer = Announcer(kernel, again=())
    announcer.endpoint_joined(_endpoint("a", "mute"))
    announcer.endpoint_joined(_endpoint("b"))
    _await_end(announcer)
    announcer.endpoint_joined(_endpoint("c"))
    _await_end(announcer)
    assert [name for _, names in kernel.told for name in names] == ["b", "c"]


def test_announcements_are_repeated() -> None:
    """An endpoint is announced again at each of the times after its Join, and marked as such."""
    kernel = GatedKernel()
    kernel.gate.release(9)
    announcer = Announcer(kernel, again=(0.02, 0.05))
    announcer.endpoint_joined(_endpoint("a"))
    _await_end(announcer)
    assert kernel.told == [("net", ["a"])] * 3
    assert kernel.again == [False, True, True]


def test_a_join_does_not_wait_for_a_repetition() -> None:
    """While the repetition of an announcement is waited for, an endpoint that joins is announced at
    once."""
    kernel = GatedKernel()
    kernel.gate.release(9)
    announcer = Announcer(kernel, again=(600.0,))
    for name in ("a", "b"):
        announcer.endpoint_joined(_endpoint(name))
        assert kernel.begun.acquire(timeout=patience(PATIENCE))
    assert kernel.again == [False, False]


def test_repetitions_outlast_the_gossip() -> None:
    """The last repetition comes after the 30 s in which Docker's gossip repairs what it lost, and
    each interval is at most the time since the Join."""
    assert AGAIN[-1] > 30
    assert all(later <= 2 * earlier for earlier, later in pairwise(AGAIN))
