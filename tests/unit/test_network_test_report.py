"""Reports of `freeflow test`: text, JSON, JUnit."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import msgspec
import pytest

from plugin.cli.terminal import shown_all
from plugin.network_test.junit import junit_text
from plugin.network_test.outcomes import CheckOutcome, CheckResult, NetworkReport, PairMeasurement
from plugin.network_test.report_text import show_report

FAILURE = CheckResult(
    check="mtu",
    subject="h1 -> h2",
    outcome=CheckOutcome.FAILED,
    detail="packets of 1450 do not pass",
    remedy="give the hosts an MTU of 1500",
    seconds=1.5,
)
RESULTS = [
    CheckResult(check="dns", subject="h1", outcome=CheckOutcome.PASSED, detail="4 names"),
    CheckResult(check="dns", subject="h2", outcome=CheckOutcome.PASSED, detail="4 names"),
    CheckResult(
        check="rdma", subject="h1 -> h2", outcome=CheckOutcome.NOT_HERE, detail="no device"
    ),
    CheckResult(
        check="rdma", subject="h1 -> h3", outcome=CheckOutcome.NOT_HERE, detail="no device"
    ),
]
MEASURED = [
    PairMeasurement(
        source=one,
        target=other,
        bits_per_second=2.5e9,
        round_trip_ms=0.125,
        round_trip_p99_ms=1,
    )
    for one, other in itertools.product(("h1", "h2"), repeat=2)
]


def report(*more: CheckResult, error: str = "", left: tuple[str, ...] = ()) -> NetworkReport:
    return NetworkReport(
        version="1",
        started="2026-11-30T12:00:00+00:00",
        seconds=12.5,
        network="net",
        driver="freeflow:latest",
        hosts=["h1", "h2"],
        checks=[*RESULTS, *more],
        measurements=MEASURED,
        error=error,
        remedy="try again" if error else "",
        left=list(left),
    )


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (report(), 0),
        (report(FAILURE), 1),
        (report(left=("service x",)), 1),
        (report(FAILURE, error="the engine ended"), 2),
    ],
)
def test_exit_codes(made: NetworkReport, code: int) -> None:
    """0: everything works; 1: something failed, or was not removed; 2: the test did not end."""
    assert made.code == code
    # What is shown is a copy without control characters.
    assert shown_all(made).code == code


def test_the_text_says_what_failed_and_what_to_do() -> None:
    """The verdict comes first; failures have their remedy; equal ones are one line."""
    text = show_report(shown_all(report(FAILURE)))
    first = text.splitlines()[0]
    assert "does NOT work on 2 hosts" in first
    assert "2 passed, 1 failed, 2 not here" in first
    assert "  mtu h1 -> h2: packets of 1450 do not pass\n" in text
    assert "      do: give the hosts an MTU of 1500\n" in text
    assert "  rdma h1 -> h2, h1 -> h3: no device\n" in text
    assert "works on 2 hosts" in show_report(report()).splitlines()[0]
    assert "did not end: the engine" in show_report(report(error="the engine ended"))
    assert "could not be removed: service x" in show_report(report(left=("service x",)))


def test_the_matrices_have_each_pair() -> None:
    """Rows are senders, columns receivers; a pair that was not measured has a dash."""
    whole = report()
    text = show_report(msgspec.structs.replace(whole, measurements=whole.measurements[:3]))
    assert "  h1  2.50  2.50\n  h2  2.50  -\n" in text
    assert "  h1  0.125  0.125\n  h2  0.125  -\n" in text


def test_junit() -> None:
    """One test case per result, with failures and skipped ones; a run that did not end is in error;
    characters that XML lacks are replaced.
    """
    odd = msgspec.structs.replace(FAILURE, subject="h\x00\x1b<&", detail="\x07 ]]> \ud800")
    suites = ElementTree.fromstring(junit_text(report(FAILURE, odd, error="it ended")))  # noqa: S314
    (suite,) = suites
    assert suite.attrib == {
        "name": "freeflow test",
        "tests": "7",
        "failures": "2",
        "errors": "1",
        "skipped": "2",
        "time": "12.500",
        "timestamp": "2026-11-30T12:00:00+00:00",
    }
    cases = suite.findall("testcase")
    assert len(cases) == 7
    assert cases[0].attrib == {"classname": "freeflow.dns", "name": "h1", "time": "0.000"}
    failure = cases[4].find("failure")
    assert failure is not None
    assert failure.get("message") == FAILURE.detail
    assert FAILURE.remedy in str(failure.text)
    assert cases[5].get("name") == "h??<&"
    assert cases[6].find("error") is not None


def test_json_has_every_field() -> None:
    """A program reads a report back as it was."""
    made = report(FAILURE)
    assert msgspec.json.decode(msgspec.json.encode(made), type=NetworkReport) == made
