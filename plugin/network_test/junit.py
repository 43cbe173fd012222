"""A run's report as JUnit's XML, which CI systems read."""

from __future__ import annotations

import re
from typing import Final
from xml.etree import ElementTree

from plugin.network_test.outcomes import CheckOutcome, NetworkReport

_NO_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_text(report: NetworkReport) -> str:
    """One test case per check of a host or pair; a run that did not end is one more, in error."""
    suite = ElementTree.Element(
        "testsuite",
        name="freeflow test",
        tests=str(len(report.checks) + bool(report.error)),
        failures=str(len(report.failed)),
        errors=str(int(bool(report.error))),
        skipped=str(sum(each.outcome == CheckOutcome.NOT_HERE for each in report.checks)),
        time=f"{report.seconds:.3f}",
        timestamp=report.started,
    )
    for each in report.checks:
        case = _case(suite, each.check, each.subject, each.seconds)
        if each.outcome == CheckOutcome.FAILED:
            failure = ElementTree.SubElement(case, "failure", message=_clean(each.detail))
            failure.text = _clean(f"{each.detail}\ndo: {each.remedy}")
        elif each.outcome == CheckOutcome.NOT_HERE:
            ElementTree.SubElement(case, "skipped", message=_clean(each.detail))
        elif each.detail:
            ElementTree.SubElement(case, "system-out").text = _clean(each.detail)
    if report.error:
        case = _case(suite, "run", "all hosts", report.seconds)
        error = ElementTree.SubElement(case, "error", message=_clean(report.error))
        error.text = _clean(f"{report.error}\ndo: {report.remedy}")
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _case(suite: ElementTree.Element, check: str, subject: str, took: float) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"freeflow.{check}",
        name=_clean(subject),
        time=f"{took:.3f}",
    )


def _clean(text: str) -> str:
    return _NO_XML.sub("?", text)
