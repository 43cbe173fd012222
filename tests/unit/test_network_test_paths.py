"""`freeflow test` and the paths between hosts: what is checked, and what is not here, and why."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dataplane.control import ConnectionFact, Connections, PeerFact, RdmaFacts, RelayFacts
from plugin.network_test import checks_paths
from plugin.network_test.checks_paths import check_between
from plugin.network_test.checks_verbs import check_verbs
from plugin.network_test.outcomes import CheckOutcome
from plugin.network_test.placement import ProbedHost, TestedNetwork
from plugin.network_test.plan import TestPlan
from plugin.network_test.probe.probe_wire import LIBRARY_DATA
from plugin.network_test.scene import Ledger, Scene
from plugin.status import RouterStatus, Status
from tests.unit.statuses import status

OWN = ProbedHost("h1", "n1", "192.0.2.1", own=True, probes={"one": "10.0.1.1", "two": "10.0.1.11"})
FAR = ProbedHost("h2", "n2", "192.0.2.2", probes={"one": "10.0.1.2", "two": "10.0.1.12"})
SENTENCES = {"few": "too few are busy", "no-link": "the relays don't reach each other"}


def described(rdma: RdmaFacts, *, relay: bool = True) -> Status:
    router = RouterStatus(up=True, rdma=rdma, relay=RelayFacts(on=relay, why="it is off"))
    return msgspec.structs.replace(status(), router=router)


def hosts(**facts: Any) -> RdmaFacts:
    peer = PeerFact(address=FAR.address, **{"session": True, "relay": True, "rdma": True, **facts})
    return RdmaFacts(why="there is no device", hosts=(peer,))


class Answering:
    """The plugin, the gateway and the one answer of the probe, which comes after two looks."""

    def __init__(self, found: Status, path: str, reason: str | None, moved: int) -> None:
        self._status = found
        self._path, self._reason, self._moved = path, reason, moved
        self._looks = 0
        self.asked: list[str] = []

    def status(self) -> Status:
        return self._status

    def connections(self) -> Connections:
        self._looks += 1
        one = ConnectionFact(
            namespace=1,
            container="c",
            network="n",
            local=f"{OWN.two}:40000",
            remote=f"{FAR.one}:{LIBRARY_DATA}",
            path=self._path,
            reason=self._reason,
        )
        # After their end there are none.
        listed = (one,) if self._looks < 3 else ()
        return Connections(connections=listed, reasons=SENTENCES)

    def start(self, to: str, call: str, _seconds: float, /, **_arguments: Any) -> Any:
        assert (to, call) == (OWN.two, "move")
        self.asked.append(call)
        return self

    @property
    def done(self) -> bool:
        return self._looks >= 3

    def result(self) -> Any:
        return {"connections": 24, "moved": self._moved, "right": True}


def scene_of(fake: Answering, options: dict[str, str] | None = None) -> Scene:
    """Two hosts whose probes have the library and verbs."""
    anything: Any = fake
    network = TestedNetwork("i", "n", "freeflow:latest", True, options or {}, {})
    said = {"library": True, "verbs": True}
    facts = {address: said for each in (OWN, FAR) for address in each.probes.values()}
    ledger = Ledger(lambda _: None)
    return Scene(TestPlan(), anything, anything, network, anything, ledger, [OWN, FAR], facts)


def check(
    found: Status,
    *,
    path: str = "relay",
    reason: str | None = None,
    moved: int = 24,
    options: dict[str, str] | None = None,
) -> tuple[dict[str, tuple[str, str]], Answering]:
    """Each path's outcome and detail, and what was asked."""
    fake = Answering(found, path, reason, moved)
    scene = scene_of(fake, options)
    check_between(scene)
    results = scene.ledger.results
    assert {each.subject for each in results} == {"h1 -> h2"}
    return {each.check: (each.outcome, each.detail) for each in results}, fake


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a session, or between looks."""
    monkeypatch.setattr(checks_paths, "_SESSION", 0.0)
    monkeypatch.setattr(checks_paths, "_LOOKING", 0.01)


NO_DEVICE = (CheckOutcome.NOT_HERE, "there is no device")


def test_connections_on_the_relay() -> None:
    """Without a device the relay is checked, and passes if the plugin shows connections there."""
    found, _ = check(described(hosts()))
    assert found == {
        "rdma": NO_DEVICE,
        "relay": (CheckOutcome.PASSED, "24 of 24 connections moved"),
    }


def test_connections_over_rdma() -> None:
    """Where both hosts have a device only that path is used."""
    facts = msgspec.structs.replace(hosts(), device="rxe0", why="")
    found, _ = check(described(facts), path="rdma")
    assert found["rdma"][0] == CheckOutcome.PASSED
    assert found["relay"] == (CheckOutcome.NOT_HERE, "the hosts use RDMA")


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [("few", CheckOutcome.NOT_HERE), ("no-link", CheckOutcome.FAILED), (None, CheckOutcome.FAILED)],
)
def test_connections_that_stay_on_tcp(reason: str | None, outcome: CheckOutcome) -> None:
    """If the rule keeps them there, the path is not here; otherwise it has failed. The reason is
    the last one that the plugin gave while there were connections.
    """
    found, _ = check(described(hosts()), path="overlay+ebpf", reason=reason, moved=0)
    assert found["relay"][0] == outcome
    assert SENTENCES.get(reason or "", "") in found["relay"][1]


@pytest.mark.parametrize(
    ("found", "options", "outcome", "text"),
    [
        (described(hosts(session=False, reason="refused")), {}, CheckOutcome.FAILED, "refused"),
        (described(hosts(), relay=False), {}, CheckOutcome.NOT_HERE, "it is off"),
        (described(hosts(relay=False)), {}, CheckOutcome.NOT_HERE, "h2 carries no TCP"),
        (described(hosts()), {"relay": "off"}, CheckOutcome.NOT_HERE, "relay is off"),
        (described(hosts()), {"acceleration": "off"}, CheckOutcome.NOT_HERE, "acceleration is off"),
        (status(), {}, CheckOutcome.FAILED, "router does not answer"),
    ],
)
def test_a_path_that_is_not_there(
    found: Status, options: dict[str, str], outcome: CheckOutcome, text: str
) -> None:
    """It is said why, and no probe is asked."""
    results, fake = check(found, options=options)
    assert results["relay"][0] == outcome
    assert text in results["relay"][1]
    assert fake.asked == []


class Writing(Answering):
    """Its probes' queue pairs can be opened and connected, and write."""

    def ask(self, to: str, call: str, _seconds: float, /, **arguments: Any) -> Any:
        assert call == "verbs"
        self.asked.append(to)
        return {} if arguments["call"] == "open" else "hash"


@pytest.mark.parametrize(
    ("found", "options", "outcome"),
    [
        (described(hosts()), {}, CheckOutcome.PASSED),
        (described(hosts()), {"relay": "off"}, CheckOutcome.NOT_HERE),
        (described(hosts(session=False)), {}, CheckOutcome.FAILED),
    ],
)
def test_verbs_between_hosts(found: Status, options: dict[str, str], outcome: CheckOutcome) -> None:
    """Queue pairs of two hosts are checked if there is a path; those of one host always."""
    fake = Writing(found, "relay", None, 0)
    scene = scene_of(fake, options)
    check_verbs(scene)
    results = {each.subject: each.outcome for each in scene.ledger.results}
    passed = dict.fromkeys(("h1", "h2"), CheckOutcome.PASSED)
    assert results == {**passed, "h1 -> h2": outcome}
