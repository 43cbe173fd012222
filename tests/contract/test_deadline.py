"""The deadline of a request: after a restart of the daemon Docker itself has none (moby#22615,
#33871).
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from driver.driver import Driver, DriverConfig
from driver.model import Endpoint, Network
from driver.store import FILE, Store
from plugin.app import create_app
from plugin.calls import CallStatistics
from testbed.patience import patience, within
from tests.contract.golden import IDS
from tests.contract.places import REAL, Places, Reply, call, temporary
from tests.unit.steps import SteppedKernel, Steps

NET, EP = IDS["<net>"], IDS["<ep>"]
ENDPOINT = {"NetworkID": NET, "EndpointID": EP}


class SlowKernel(SteppedKernel):
    """A kernel that attaches nothing until it is allowed to."""

    def __init__(self) -> None:
        super().__init__(Steps())
        self.may = threading.Event()
        self.done = threading.Event()

    def attach(self, network: Network, endpoint: Endpoint) -> None:
        assert self.may.wait(patience(20))
        super().attach(network, endpoint)
        self.done.set()


class SlowPlace:
    """The app over `SlowKernel`, with a deadline of a tenth of a second."""

    def __init__(self, directory: Path) -> None:
        self.kernel = SlowKernel()
        self.statistics = CallStatistics()
        driver = Driver(Store(directory), self.kernel, DriverConfig(), clock=lambda: 0.0)
        app = create_app(driver, deadline=0.1, statistics=self.statistics)
        self._client = app.test_client()

    def send(self, method: str, path: str, body: bytes = b"", headers: object = None) -> Reply:
        answer = self._client.open(path, method=method, data=body)
        return Reply(answer.status_code, answer.headers["Content-Type"], answer.data)

    def links(self) -> frozenset[str]:
        return frozenset()


@pytest.fixture
def slow() -> Iterator[SlowPlace]:
    with temporary() as directory:
        place = SlowPlace(Path(directory))
        try:
            yield place
        finally:
            place.kernel.may.set()


def test_deadline_then_repetition(slow: SlowPlace) -> None:
    """A call past its deadline gets an error; the work continues, and a repetition finds it
    done.
    """
    assert call(slow, "CreateNetwork", {"NetworkID": NET}).status == 200
    begin = time.monotonic()
    late = call(slow, "CreateEndpoint", ENDPOINT)
    assert time.monotonic() - begin < within(5)
    assert late.status == 500
    assert "CreateEndpoint was not done in 0.1 s and goes on" in late.json["Err"]
    assert "freeflow doctor" in late.json["Err"]
    slow.kernel.may.set()
    assert slow.kernel.done.wait(patience(10))
    assert call(slow, "CreateEndpoint", ENDPOINT).status == 200
    (created,) = [item for item in slow.statistics.summaries() if item.name == "CreateEndpoint"]
    assert (created.count, created.errors) == (2, 1)


def test_slow_calls_do_not_keep_others_waiting(slow: SlowPlace) -> None:
    """While calls for one endpoint hang, the plugin answers those for others, and queries."""
    call(slow, "CreateNetwork", {"NetworkID": NET})
    for _ in range(3):
        assert call(slow, "CreateEndpoint", ENDPOINT).status == 500
    assert call(slow, "GetCapabilities").status == 200
    assert call(slow, "CreateNetwork", {"NetworkID": IDS["<net2>"]}).status == 200
    other = {"NetworkID": NET, "EndpointID": IDS["<ep2>"]}
    assert call(slow, "DeleteEndpoint", other).status == 200


@pytest.mark.parametrize("kind", [REAL], indirect=True)
def test_deadline_of_the_plugin(places: Places, kind: str) -> None:
    """A plugin whose disk hangs answers within REQUEST_DEADLINE, and does the work when the disk is
    back.
    """
    place = places.real({"REQUEST_DEADLINE": "1"})
    disk = sqlite3.connect(place.directory / "state" / FILE, isolation_level=None)
    with contextlib.closing(disk):
        disk.execute("BEGIN IMMEDIATE")
        begin = time.monotonic()
        late = call(place, "CreateNetwork", {"NetworkID": NET})
        took = time.monotonic() - begin
        disk.execute("ROLLBACK")
    assert late.status == 500
    assert "CreateNetwork was not done in 1 s and goes on" in late.json["Err"]
    assert 0.9 < took < within(4)
    assert call(place, "CreateNetwork", {"NetworkID": NET}).json == {}
    assert call(place, "DeleteNetwork", {"NetworkID": NET}).json == {}
