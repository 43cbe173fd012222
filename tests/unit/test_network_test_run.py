"""Runs of `freeflow test` on a Swarm in memory: what passes, what is found, what is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from driver.errors import FreeFlowError
from plugin.network_test import checks_names, checks_pairs, checks_paths, coordinator, placement
from plugin.network_test.coordinator import Coordinator, only_one
from plugin.network_test.interruption import Interrupted
from plugin.network_test.outcomes import NetworkReport
from plugin.network_test.placement import LABEL, NODE, UNTIL, ProbePlacement
from plugin.network_test.plan import TestPlan
from testbed.patience import patience
from tests.unit.fake_swarm import FakeSwarm, UnreachedError
from tests.unit.swarm_probes import HOSTS, FakePlugin, hello, probe_answers


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSwarm:
    """A healthy Swarm of three hosts; waits are short."""
    monkeypatch.setattr(coordinator, "host_run", lambda: tmp_path)
    monkeypatch.setattr(checks_names, "_GOSSIP", 0.5)
    monkeypatch.setattr(checks_paths, "_SESSION", 0.0)
    monkeypatch.setattr(placement, "_PAUSE", 0.01)
    made = FakeSwarm()
    made.answers = probe_answers()
    return made


def run(swarm: FakeSwarm, plan: TestPlan | None = None) -> NetworkReport:
    wanted = plan or TestPlan(image="image:1", quick=True)
    report = Coordinator(FakePlugin(swarm), wanted, lambda _line: None).run()  # type: ignore[arg-type]
    assert (swarm.services, swarm.networks, swarm.containers) == ({}, {}, {})
    assert report.left == []
    return report


def failures(report: NetworkReport) -> set[tuple[str, str]]:
    return {(each.check, each.subject) for each in report.failed}


def test_a_healthy_swarm(swarm: FakeSwarm) -> None:
    """Everything passes, and containers, services, network are removed in this order."""
    report = run(swarm)
    assert (report.code, report.error, failures(report)) == (0, "", set())
    assert report.hosts == ["h1", "h2", "h3"]
    deleted = [line.split("/")[1] for line in swarm.requests if line.startswith("DELETE")]
    order = {"containers": 0, "services": 1, "networks": 2}
    assert [order[kind] for kind in deleted if kind != "containers"][:3] == [1, 1, 2]


def test_measurements_alone(swarm: FakeSwarm) -> None:
    """--perf measures every pair in both directions, and checks nothing else."""
    report = run(swarm, TestPlan(image="image:1", perf=True))
    assert {each.check for each in report.checks} == {"probe", "reach", "measure"}
    assert len({(each.source, each.target) for each in report.measurements}) == 9


def lost(to: str, call: str, arguments: dict[str, Any]) -> Any:
    if to in HOSTS["h2"]:
        raise UnreachedError("timed out")
    return hello(to, call, arguments)


def broken(address: str, answer: Any) -> Any:
    """An answer with an error if it is asked of, or is about, an address."""

    def given(to: str, _call: str, arguments: dict[str, Any]) -> Any:
        if address in (to, arguments.get("to")):
            raise OSError("no answer")
        return answer

    return given


@pytest.mark.parametrize(
    ("call", "answer", "wanted"),
    [
        ("hello", lost, {("reach", "h2")}),
        ("resolve", lambda *_: {}, {("dns", name) for name in HOSTS}),
        (
            "identities",
            lambda *_: {"answers": {"node-h1/one": 9}, "failures": []},
            {("vip", name) for name in HOSTS},
        ),
        (
            "mtu_edges",
            broken("10.0.1.3", {"mtu": 1450, "exact": True, "refused": True, "passing": 1450}),
            {("mtu", "h3"), ("mtu", "h1 -> h3"), ("mtu", "h2 -> h3")},
        ),
        (
            "datagrams",
            lambda to, *_: {"lost": [9000] if to == "10.0.1.102" else []},
            {("udp", "h2"), ("udp", "h2 -> h3")},
        ),
        (
            "transfer",
            lambda to, *_: {"there": to != "10.0.1.101", "back": True},
            {("transfer", "h1"), ("transfer", "h1 -> h2"), ("transfer", "h1 -> h3")},
        ),
        (
            "move",
            lambda to, *_: {"connections": 1, "moved": int(to != "10.0.1.103"), "right": True},
            {("shm", "h3")},
        ),
        ("move", lambda *_: [], {("shm", name) for name in HOSTS}),
    ],
)
def test_what_is_broken_is_named(
    swarm: FakeSwarm, call: str, answer: Any, wanted: set[tuple[str, str]]
) -> None:
    """A check fails for exactly those hosts and pairs that it concerns, with a remedy."""
    swarm.answers[call] = answer
    report = run(swarm)
    found = failures(report)
    if call == "hello":
        # What its absence means for names of the others is no subject here.
        found = {each for each in found if each[0] == "reach"}
    assert found == wanted
    assert report.code == 1


def test_answers_of_another_kind_are_failures(swarm: FakeSwarm) -> None:
    """Whatever probes answer, the run ends with a report."""
    for call in list(swarm.answers):
        if call != "hello":
            swarm.answers[call] = lambda *_: {"answers": 1, "failures": None, "mtu": "x"}
    report = run(swarm, TestPlan(image="image:1"))
    assert report.error == ""
    assert {"dns", "vip", "mtu", "udp", "transfer", "shm", "measure"} <= {
        check for check, _ in failures(report)
    }


def test_a_host_without_a_probe(swarm: FakeSwarm) -> None:
    """It is a failure with the engine's reason and a remedy; the others are tested."""
    swarm.lacking["h2"] = "No such image: image:1"
    report = run(swarm)
    (failure,) = [each for each in report.failed if each.check == "probe"]
    assert (failure.subject, failure.detail) == ("h2", "No such image: image:1")
    assert "docker pull image:1" in failure.remedy
    assert report.hosts == ["h1", "h3"]


def test_no_host_with_a_probe(swarm: FakeSwarm) -> None:
    """Then nothing was tested: exit code 2, with the reason."""
    swarm.lacking = dict.fromkeys(HOSTS, "No such image: image:1")
    report = run(swarm)
    assert report.code == 2
    assert "No such image" in report.error


@pytest.mark.parametrize(
    "request_",
    ["POST /services/create", "POST /containers/create", "GET /tasks", "GET /nodes", "POST /networks/create"],
)  # fmt: skip
def test_an_engine_that_fails_half_way(swarm: FakeSwarm, request_: str) -> None:
    """The run says why it ended, with exit code 2, and everything is removed."""
    method, _, path = request_.partition(" ")
    swarm.refuse = lambda verb, url: (
        "the engine ended" if (verb, url.partition("?")[0]) == (method, path) else ""
    )
    report = run(swarm)
    assert report.code == 2
    assert "the engine ended" in report.error


def test_an_answer_that_is_lost(swarm: FakeSwarm) -> None:
    """What the engine has made although its answer was lost is removed, too."""
    change = swarm.change

    def losing(method: str, url: str, value: Any = None) -> Any:
        made = change(method, url, value)
        if url == "/services/create":
            raise FreeFlowError("the engine does not answer")
        return made

    swarm.change = losing  # type: ignore[method-assign]
    assert run(swarm).code == 2


def test_removal_waits_for_an_engine_that_is_away(swarm: FakeSwarm) -> None:
    """If the engine does not answer for a while, removal goes on when it does; if it stays away,
    what is left is named.
    """
    made = ProbePlacement(swarm, "node-h1", sleep=lambda _seconds: None)  # type: ignore[arg-type]
    made.make_network("freeflow:latest", {})
    away = iter([True] * 5)
    swarm.refuse = lambda *_: "away" if next(away, False) else ""
    assert made.remove() == []
    assert swarm.networks == {}
    swarm.refuse = lambda *_: "away"
    (left,) = made.remove(seconds=0)
    assert f"{LABEL}={made.identifier}" in left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(swarm: FakeSwarm, number: signal.Signals) -> None:
    """A signal ends the run; everything is removed, even if more of them come meanwhile."""

    def interrupt(*_: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        return {}

    swarm.answers["datagrams"] = interrupt
    change = swarm.change

    def again(method: str, url: str, value: Any = None) -> Any:
        if method == "DELETE":
            os.kill(os.getpid(), number)
        return change(method, url, value)

    swarm.change = again  # type: ignore[method-assign]
    report = run(swarm)
    assert (report.code, report.error) == (2, "it was interrupted")


@contextlib.contextmanager
def at_start(number: signal.Signals, handler: Any) -> Iterator[None]:
    """What the process that started this one has left of a signal's handling."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_signal_at_any_request(swarm: FakeSwarm) -> None:
    """Whichever request of the run is under way, SIGINT ends it with exit code 2, or with an error
    before anything was made; nothing is left. So it does where a shell has started the command in
    the background, with SIGINT ignored.
    """
    places, wanted, reported = count(), -1, 0

    def interrupt(_method: str, _url: str) -> str:
        # Threads send requests at the same time: each has its own place.
        if next(places) == wanted:
            os.kill(os.getpid(), signal.SIGINT)
        return ""

    swarm.refuse = interrupt
    with at_start(signal.SIGINT, signal.SIG_IGN):
        run(swarm)
        requests = next(places)
        for wanted in range(requests):
            places = count()
            try:
                report = run(swarm)
            except Interrupted:
                assert (swarm.services, swarm.networks, swarm.containers) == ({}, {}, {})
                continue
            assert (report.code, report.error) == (2, "it was interrupted"), wanted
            reported += 1
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    # Before the network is made, there is nothing to report.
    assert requests - 10 < reported < requests


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_finalizer(swarm: FakeSwarm) -> None:
    """Python drops an exception that is raised in a finalizer: the signal ends the run anyway."""

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    done: list[bool] = []

    def refuse(_method: str, url: str) -> str:
        if not done and url == "/services/create":
            done.append(True)
            Finalized()
        return ""

    swarm.refuse = refuse
    report = run(swarm)
    assert done
    assert (report.code, report.error) == (2, "it was interrupted")


def test_nohup(swarm: FakeSwarm) -> None:
    """A run that was started with SIGHUP ignored outlives its terminal."""

    def hang_up(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return {"lost": []}

    swarm.answers["datagrams"] = hang_up
    with at_start(signal.SIGHUP, signal.SIG_IGN):
        assert run(swarm).code == 0


def leftover(swarm: FakeSwarm, node: str, until: float) -> str:
    older = ProbePlacement(swarm, node)  # type: ignore[arg-type]
    network = older.make_network("freeflow:latest", {})
    older.make_services(network, "image:1", library=True, ingress=False)
    for each in (*swarm.services.values(), *swarm.networks.values()):
        labels = (each.get("Spec") or each)["Labels"]
        labels.update({UNTIL: str(int(until)), NODE: node})
    return older.identifier


def test_leftovers_are_removed(swarm: FakeSwarm) -> None:
    """A run removes what an earlier one of this host has left, and a very old one of another."""
    leftover(swarm, "node-h1", time.time() + 1000)
    assert run(swarm).code == 0
    leftover(swarm, "node-h3", time.time() - 1)
    assert run(swarm).code == 0


def test_a_run_of_another_manager_is_left_alone(swarm: FakeSwarm) -> None:
    """While a run of another manager may not have ended, this one doesn't begin, and says whose."""
    identifier = leftover(swarm, "node-h3", time.time() + 1000)
    with pytest.raises(FreeFlowError, match=identifier):
        run(swarm)
    assert len(swarm.services) == 2


@pytest.mark.parametrize("until", ["9" * 12, "9" * 5000, "²", "-1", "", "soon"])
def test_labels_that_no_run_has(swarm: FakeSwarm, until: str) -> None:
    """A container with such a label, from its image, neither keeps runs from beginning nor breaks
    them.
    """
    swarm.containers["c"] = {"Id": "c", "Labels": {LABEL: "x", NODE: "other", UNTIL: until}}
    assert run(swarm).code == 0


def test_a_published_port_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program at the port, however slowly it speaks, is named soon."""
    monkeypatch.setattr(checks_names, "_CONNECTING", 0.2)
    done = threading.Event()

    def drip(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not done.is_set():
                connection, _ = server.accept()
                for _ in range(int(patience(20) / 0.1)):
                    connection.sendall(b"x")
                    if done.wait(0.1):
                        break

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        begin = time.monotonic()
        verdict = checks_names._published("127.0.0.1", server.getsockname()[1], "node-h1/two")
        done.set()
    assert verdict[0] == "failed"
    assert time.monotonic() - begin < patience(10)


def test_the_leader_has_an_address(swarm: FakeSwarm) -> None:
    """The engine of another manager says 0.0.0.0 of the leader: that would be this host."""
    placed = ProbePlacement(swarm, "node-h1")  # type: ignore[arg-type]
    network = placed.make_network("freeflow:latest", {})
    find = swarm.find

    def led(url: str) -> Any:
        found: Any = find(url)
        if url == "/nodes":
            found[1]["Status"]["Addr"] = "0.0.0.0"
            found[1]["ManagerStatus"] = {"Addr": "192.0.2.9:2377", "Leader": True}
        return found

    swarm.find = led  # type: ignore[method-assign]
    made = Coordinator(FakePlugin(swarm), TestPlan(), lambda _line: None)  # type: ignore[arg-type]
    hosts = made._nodes("node-h1", "192.0.2.1", network)
    assert [host.address for host in hosts] == ["192.0.2.1", "192.0.2.9", "192.0.2.3"]


def test_one_run_at_a_time(swarm: FakeSwarm, tmp_path: Path) -> None:
    """A second run on this host ends at once and removes nothing."""
    with only_one(tmp_path), pytest.raises(FreeFlowError, match="another freeflow test"):
        run(swarm)
    assert swarm.requests == []


def test_a_worker_is_refused(swarm: FakeSwarm) -> None:
    """On a worker the command says where to run it."""
    swarm.manager = False
    with pytest.raises(FreeFlowError, match="docker node ls"):
        run(swarm)


def test_an_attachment_that_is_late(swarm: FakeSwarm) -> None:
    """The gateway is made again if the Swarm has not attached it in time."""
    failing = iter([True, True])
    swarm.refuse = lambda _method, url: (
        "attaching to network failed" if url.endswith("/start") and next(failing, False) else ""
    )
    assert run(swarm).code == 0


def spoofing(swarm: FakeSwarm, arriving: set[str]) -> NetworkReport:
    """A run in which frames of these kinds arrive."""
    sent: dict[str, str] = {}

    def send_as(to: str, _call: str, arguments: dict[str, Any]) -> None:
        mac = hello(arguments["own"], "", {})["interfaces"][0]["mac"]
        kind = "honest" if arguments["source"] == to else "IP address"
        sent[arguments["mark"]] = kind if arguments["source_mac"] == mac else "MAC address"

    swarm.answers["send_as"] = send_as
    swarm.answers["noted"] = lambda _to, _call, given: (
        ["10.0.1.101"] if sent[given["mark"]] in arriving else []
    )
    return run(swarm, TestPlan(image="image:1"))


@pytest.mark.parametrize(
    ("arriving", "outcome", "text"),
    [
        ({"honest"}, "passed", ""),
        ({"honest", "IP address"}, "failed", "IP address arrived"),
        ({"honest", "MAC address"}, "failed", "MAC address arrived"),
        (set(), "failed", "right source did not arrive"),
    ],
)
def test_spoofing(
    swarm: FakeSwarm,
    monkeypatch: pytest.MonkeyPatch,
    arriving: set[str],
    outcome: str,
    text: str,
) -> None:
    """It passes only if spoofed frames do not arrive and honest ones do."""
    monkeypatch.setattr(checks_pairs, "_ARRIVING", 0.0)
    report = spoofing(swarm, arriving)
    results = [each for each in report.checks if each.check == "spoofing"]
    assert len(results) == 6
    assert {each.outcome for each in results} == {outcome}
    assert all(text in each.detail for each in results)
