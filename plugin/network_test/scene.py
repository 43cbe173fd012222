"""What all checks share: the hosts with their probes, the gateway, and the ledger of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from driver.names import is_freeflow
from plugin.cli.client import Client
from plugin.network_test.gateway import Gateway, PendingAnswer, ProbeError, Unreachable
from plugin.network_test.outcomes import CheckOutcome, CheckResult, PairMeasurement
from plugin.network_test.placement import ProbedHost, ProbePlacement, TestedNetwork
from plugin.network_test.plan import Check, TestPlan, rounds

Verdict = tuple[CheckOutcome, str, str]
"""The outcome, what was seen, and the remedy."""
Pair = tuple[ProbedHost, ProbedHost]
ARROW: Final = "->"


def passed(detail: str = "") -> Verdict:
    return CheckOutcome.PASSED, detail, ""


def failed(detail: str, remedy: str = "") -> Verdict:
    return CheckOutcome.FAILED, detail, remedy


def not_here(why: str) -> Verdict:
    return CheckOutcome.NOT_HERE, why, ""


def pair_name(pair: Pair) -> str:
    """What reports call two hosts."""
    source, target = pair
    return source.name if source is target else f"{source.name} {ARROW} {target.name}"


class Ledger:
    """The results so far; `say` shows a line of progress."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begin = time.monotonic()
        self.results: list[CheckResult] = []
        self.measurements: list[PairMeasurement] = []

    def note(self, text: str) -> None:
        """A line of progress."""
        self._say(f"{time.monotonic() - self._begin:6.1f} s  {text}")

    def add(self, check: Check, subject: str, verdict: Verdict, seconds: float = 0.0) -> None:
        """Keep a result, and show it if it is a failure."""
        outcome, detail, remedy = verdict
        self.results.append(
            CheckResult(
                check=check.value,
                subject=subject,
                outcome=outcome,
                detail=detail,
                remedy=remedy,
                seconds=round(seconds, 3),
            )
        )
        if outcome is CheckOutcome.FAILED:
            self.note(f"{check.value} {subject}: FAILED: {detail}")


@dataclass(slots=True)
class Scene:
    """A run's objects. `hosts` are those whose probes answer; `facts` what each has said."""

    plan: TestPlan
    client: Client
    placement: ProbePlacement
    network: TestedNetwork
    gateway: Gateway
    ledger: Ledger
    hosts: list[ProbedHost]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Address of a probe to its answer to `hello`."""

    @property
    def freeflow(self) -> bool:
        """Whether the network is FreeFlow's own."""
        return is_freeflow(self.network.driver)

    def each_host(
        self,
        check: Check,
        start: Callable[[ProbedHost], PendingAnswer],
        judge: Callable[[ProbedHost, Any], Verdict],
    ) -> None:
        """One request per host, all at the same time."""
        self._each(check, self.hosts, lambda host: host.name, start, judge)

    def each_pair(
        self,
        check: Check,
        start: Callable[[Pair], PendingAnswer],
        judge: Callable[[Pair, Any], Verdict],
    ) -> None:
        """One request per pair of hosts, in rounds."""
        for pairs in rounds(self.hosts):
            self._each(check, pairs, pair_name, start, judge)

    def _each(
        self,
        check: Check,
        subjects: Sequence[Any],
        name: Callable[[Any], str],
        start: Callable[[Any], PendingAnswer],
        judge: Callable[[Any, Any], Verdict],
    ) -> None:
        begin = time.monotonic()
        pending = [(subject, start(subject)) for subject in subjects]
        for subject, answer in pending:
            verdict = self.judged(answer, lambda value, s=subject: judge(s, value))  # type: ignore[misc]
            self.ledger.add(check, name(subject), verdict, time.monotonic() - begin)

    def judged(self, answer: PendingAnswer, judge: Callable[[Any], Verdict]) -> Verdict:
        """The verdict on an answer. What a probe says is not trusted to have the right fields."""
        try:
            return judge(answer.result())
        except Unreachable as error:
            return failed(f"the probe did not answer ({error})", "freeflow doctor, on both hosts")
        except ProbeError as error:
            return failed(str(error), "freeflow doctor, on both hosts")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return failed(f"the probe's answer can't be used ({type(error).__name__}: {error})")

    def interface(self, address: str) -> dict[str, Any]:
        """What the probe with an address has said of the interface with it."""
        for each in self.facts.get(address, {}).get("interfaces", ()):
            if each.get("ipv4") == address:
                return dict(each)
        return {}


def names(hosts: Iterable[ProbedHost]) -> str:
    """The names of hosts as text."""
    return ", ".join(host.name for host in hosts) or "none"
