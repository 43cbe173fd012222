"""The plugin's process: its start, its end, the death of its worker, its log and its sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import wait_until
from testbed.patience import patience, within
from testbed.prometheus import INSTALLED, Prometheus
from tests.contract.golden import IDS
from tests.contract.places import TOP, RealPlace, call, temporary

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
]
NET, EP = IDS["<net>"], IDS["<ep>"]
BOTH = {"NetworkID": NET, "EndpointID": EP}


@pytest.fixture
def own() -> Iterator[RealPlace]:
    """A process with which a test may do anything."""
    with temporary() as directory:
        place = RealPlace(Path(directory), {})
        try:
            yield place
        finally:
            place.close()


def _worker(place: RealPlace) -> int:
    children = Path(f"/proc/{place.process.pid}/task/{place.process.pid}/children")
    (worker,) = children.read_text().split()
    return int(worker)


def test_early_requests_are_answered() -> None:
    """A request that arrives as soon as the socket exists waits for the plugin to load, and is
    answered.
    """
    with temporary() as directory:
        place = RealPlace(Path(directory), {}, wait=False)
        try:
            deadline = time.monotonic() + patience(20)
            while not place.socket.is_socket():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert call(place, "GetCapabilities").json["Scope"] == "global"
        finally:
            place.close()


def test_death_of_the_worker(own: RealPlace) -> None:
    """A worker that dies is replaced, on the same sockets; the next one knows all promises, and no
    link changes.
    """
    assert call(own, "CreateNetwork", {"NetworkID": NET}).status == 200
    made = call(own, "CreateEndpoint", BOTH).json
    links = own.links()
    assert len(links) == 4
    before = _worker(own)
    os.kill(before, signal.SIGKILL)
    assert call(own, "CreateEndpoint", BOTH).json == made
    assert _worker(own) != before
    assert own.links() == links
    assert call(own, "Join", BOTH).status == 200
    assert own.admin().send("GET", "/admin/status").json["networks"][0]["id"] == NET
    assert call(own, "DeleteEndpoint", BOTH).status == 200
    assert own.links() == frozenset()


def test_repeated_death_of_the_worker(own: RealPlace) -> None:
    """A plugin whose worker dies repeatedly does not report that all is well; it reports how often
    and when.
    """
    for _ in range(3):
        os.kill(_worker(own), signal.SIGABRT)
        assert own.admin().send("GET", "/admin/status").status == 200
    status = own.admin().send("GET", "/admin/status").json
    (worker,) = status["parts"]
    assert (worker["part"], worker["deaths"], worker["recent"]) == ("worker", 3, 3)
    assert any("worker died 3 times" in problem["what"] for problem in status["problems"])
    assert not status["healthy"]


def test_end(own: RealPlace) -> None:
    """On SIGTERM the plugin ends without an error within the ten seconds that Docker allows."""
    begin = time.monotonic()
    own.process.terminate()
    assert own.process.wait(patience(10)) == 0
    assert time.monotonic() - begin < within(9)


def _router(place: RealPlace, *, other_than: int | None = None) -> int:
    """The router's process, once it listens."""
    deadline = time.monotonic() + patience(10)
    while time.monotonic() < deadline:
        for worker in _children(place.process.pid):
            for pid in _children(worker):
                if pid != other_than and _listens(place):
                    return pid
        time.sleep(0.02)
    raise AssertionError("no router")


def _children(pid: int) -> list[int]:
    """The child processes of all threads of a process."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += path.read_text().split()
        except OSError:
            continue
    return [int(child) for child in children]


def _listens(place: RealPlace) -> bool:
    """Whether the public socket exists and a process answers on it."""
    path = place.run / "freeflow/router.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def test_the_router_is_open_to_all(own: RealPlace) -> None:
    """Containers of any user reach the router's socket, and find nothing that they could change."""
    _router(own)
    folder = own.run / "freeflow"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    with pytest.raises(OSError, match="Read-only"):
        (folder / "libfreeflow.so").write_text("anything")
    with pytest.raises(OSError, match="Read-only"):
        (folder / "router.sock").unlink()
    assert stat.S_IMODE((folder / "router.sock").stat().st_mode) == 0o666
    assert stat.S_IMODE((own.run / "freeflow-admin/router.sock").stat().st_mode) == 0o600
    assert own.admin().send("GET", "/admin/status").json["router"]["up"]
    assert own.admin().send("GET", "/admin/connections").json["connections"] == []


def test_death_of_the_router(own: RealPlace) -> None:
    """A router that dies is started again and gets a snapshot; Docker's calls are not affected."""
    before = _router(own)
    os.kill(before, signal.SIGKILL)
    assert call(own, "CreateNetwork", {"NetworkID": NET}).status == 200
    assert _router(own, other_than=before) != before


def test_the_router_ends_with_the_plugin(own: RealPlace) -> None:
    """However the plugin ends, no router is left; on SIGTERM it leaves no socket either."""
    worker, router = _worker(own), _router(own)
    os.kill(worker, signal.SIGKILL)
    _wait_for_end(router)
    router = _router(own, other_than=router)
    own.process.terminate()
    assert own.process.wait(patience(10)) == 0
    _wait_for_end(router)
    assert not _listens(own)


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + patience(5)
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


def test_log_is_events(own: RealPlace) -> None:
    """Each line of the log is one event in JSON with its level."""
    call(own, "CreateNetwork", {"NetworkID": NET})
    call(own, "CreateNetwork", {"NetworkID": "bad"})
    own.close()
    events = [json.loads(line) for line in own.log.read_text().splitlines()]
    assert all(event["event"] and event["level"] for event in events)
    (created,) = [event for event in events if event["event"] == "network created"]
    assert created["network"] == NET
    (refused,) = [event for event in events if event["event"] == "request refused"]
    assert (refused["path"], refused["level"]) == ("/NetworkDriver.CreateNetwork", "warning")


def test_sockets_are_roots(own: RealPlace) -> None:
    """Only root can open both sockets and FreeFlow's directory."""
    admin = own.admin().socket
    for path, mode in ((own.socket, 0o600), (admin, 0o600), (admin.parent, 0o700)):
        found = path.stat()
        assert found.st_uid == 0
        assert stat.S_IMODE(found.st_mode) == mode


def test_metrics_where_asked() -> None:
    """Root's socket always serves metrics, and so does the configured address, with the page of
    this host.
    """
    with temporary() as directory:
        place = RealPlace(Path(directory), {"METRICS_ADDR": "127.0.0.1:9477"})
        try:
            call(place, "CreateNetwork", {"NetworkID": NET})
            own = place.admin().send("GET", "/admin/metrics")
            assert own.content_type.startswith("text/plain")
            assert b'freeflow_requests_total{call="CreateNetwork"} 1.0\n' in own.body
            assert b'freeflow_build_info{version="' in place.scrape("127.0.0.1", 9477)
            assert b"<title>FreeFlow</title>" in place.scrape("127.0.0.1", 9477, "")
            page = json.loads(place.scrape("127.0.0.1", 9477, "snapshot"))
            assert [network["id"] for network in page["map"]["networks"]] == [NET]
            assert page["traffic"]["paths"] == {}
        finally:
            place.close()


@pytest.mark.skipif(not INSTALLED, reason="missing: Debian's package prometheus")
def test_prometheus_scrapes(tmp_path: Path) -> None:
    """Prometheus takes the metrics of a real plugin, which name its problems, and its rules see
    them.
    """
    with temporary() as directory:
        place = RealPlace(Path(directory), {"METRICS_ADDR": "127.0.0.1:9477"})
        namespace = Path(f"/proc/{place.process.pid}/ns/net")
        rules = TOP / "docs/alerts.yml"
        prometheus = Prometheus(tmp_path, "127.0.0.1:9090", "127.0.0.1:9477", rules, namespace)
        try:
            call(place, "CreateNetwork", {"NetworkID": NET})
            prometheus.wait_scraped()
            (requests,) = prometheus.query('freeflow_requests_total{call="CreateNetwork"}')
            assert requests["value"][1] == "1"
            # There is no engine.
            names = "ALERTS{alertname='FreeFlowEngineAway', alertstate='pending'}"
            wait_until("the alert", lambda: prometheus.query(names))
        finally:
            prometheus.stop()
            place.close()


def test_no_engine_anywhere(own: RealPlace) -> None:
    """Without an engine, the plugin starts and serves a container's whole life at once
    (moby#32815).
    """
    assert not (own.run / "docker.sock").exists()
    begin = time.monotonic()
    for name, request in (
        ("CreateNetwork", {"NetworkID": NET}),
        ("CreateEndpoint", BOTH),
        ("Join", {**BOTH, "SandboxKey": "/var/run/docker/netns/abc"}),
        ("Leave", BOTH),
        ("DeleteEndpoint", BOTH),
        ("DeleteNetwork", {"NetworkID": NET}),
    ):
        assert call(own, name, request).status == 200
    assert time.monotonic() - begin < within(5)
    status = own.admin().send("GET", "/admin/status").json
    assert [problem["what"] for problem in status["problems"]] == [
        "the engine does not answer; peers and VIPs stay as they were"
    ]
