"""A run's report as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from plugin.cli.table import table
from plugin.network_test.outcomes import CheckOutcome, CheckResult, NetworkReport, PairMeasurement
from plugin.network_test.plan import Check


def show_report(report: NetworkReport) -> str:
    """The verdict, a table of checks, what failed and what to do, and the matrices."""
    return "".join(
        (
            _verdict(report),
            _table(report),
            _listed("failed", report.failed),
            _listed(
                "not here",
                [each for each in report.checks if each.outcome == CheckOutcome.NOT_HERE],
            ),
            _matrix("Gbit/s of one connection, from (row) to (column):", report, _rate),
            _matrix("round trip in ms, median:", report, _trip),
            _left(report),
        )
    )


def _verdict(report: NetworkReport) -> str:
    counts = Counter(each.outcome for each in report.checks)
    network = f"network {report.network} ({report.driver})" if report.network else "the network"
    what = (
        f"{counts[CheckOutcome.PASSED]} passed, {counts[CheckOutcome.FAILED]} failed, "
        f"{counts[CheckOutcome.NOT_HERE]} not here"
    )
    if report.error:
        text = f"the test of {network} did not end: {report.error}\n"
        return text + (f"    do: {report.remedy}\n" if report.remedy else "")
    verdict = "works" if report.code == 0 else "does NOT work"
    return f"{network} {verdict} on {len(report.hosts)} hosts: {what}, in {report.seconds:.0f} s\n"


def _table(report: NetworkReport) -> str:
    rows = []
    for check in Check:
        own = Counter(each.outcome for each in report.checks if each.check == check.value)
        if own:
            rows.append((check.value, *(own[outcome] or "" for outcome in CheckOutcome)))
    return table(("CHECK", *(outcome.value.upper() for outcome in CheckOutcome)), rows)


def _listed(title: str, results: list[CheckResult]) -> str:
    """The results; those that say the same of many subjects in one line."""
    same: dict[tuple[str, str, str], list[str]] = {}
    for each in results:
        same.setdefault((each.check, each.detail, each.remedy), []).append(each.subject)
    text = f"{title}:\n" if same else ""
    for (check, detail, remedy), subjects in same.items():
        text += f"  {check} {', '.join(subjects)}: {detail}\n"
        text += f"      do: {remedy}\n" if remedy else ""
    return text


def _matrix(title: str, report: NetworkReport, value: Callable[[PairMeasurement], str]) -> str:
    if not report.measurements:
        return ""
    cells = {(each.source, each.target): value(each) for each in report.measurements}
    rows = [(host, *(cells.get((host, to), "-") for to in report.hosts)) for host in report.hosts]
    return f"{title}\n" + table(("", *report.hosts), rows)


def _rate(each: PairMeasurement) -> str:
    return f"{each.bits_per_second / 1e9:.2f}"


def _trip(each: PairMeasurement) -> str:
    return f"{each.round_trip_ms:.3f}"


def _left(report: NetworkReport) -> str:
    if not report.left:
        return ""
    text = f"could not be removed: {', '.join(report.left)}\n"
    return text + "    do: freeflow test removes it at its next run\n"
