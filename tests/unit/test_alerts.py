"""The alert rules fire when they should, and only then: Prometheus's promtool evaluates them."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from plugin.metrics import METRICS
from testbed.patience import patience
from testbed.prometheus import INSTALLED
from tools.grafana import exported

DOCS: Final = Path(__file__).parents[2] / "docs"
RULES: Final = DOCS / "alerts.yml"
HOST: Final = {"job": "freeflow", "instance": "a:9477"}
LABELS: Final = {exported(spec): set(spec.labels) for spec in METRICS} | {"up": set()}

Series = dict[str, str]
"""Metric with its labels, but for those of the host, to values, one a minute: `0x3 1+2x9`."""


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@dataclass(frozen=True)
class Case:
    """An alert that fires with some series, and not with others, after so many minutes."""

    alert: str
    fires: Series
    quiet: Series
    minutes: int
    labels: dict[str, str] = field(default_factory=dict)
    """Of the alert, but for its severity and the host's."""
    value: str = ""
    """As the text shows it."""
    host: bool = True
    """Whether the alert is one of a host."""
    step: int = 1
    """Minutes between two evaluations."""


CASES: Final = (
    Case("FreeFlowDown", {"up": "1 0x9"}, {"up": "0x3 1x9"}, 6),
    Case(
        "FreeFlowError",
        {'freeflow_problems{severity="error"}': "1x9"},
        {
            'freeflow_problems{severity="error"}': "1x2 0x9",
            'freeflow_problems{severity="warning"}': "1x9",
        },
        6,
        {"severity": "critical"},
    ),
    Case(
        "FreeFlowWarning",
        {'freeflow_problems{severity="warning"}': "1x40"},
        {'freeflow_problems{severity="warning"}': "0x20 1x20"},
        32,
    ),
    Case("FreeFlowEngineAway", {"freeflow_engine_up": "0x9"}, {"freeflow_engine_up": "0x3 1x9"}, 6),
    Case("FreeFlowRouterDown", {"freeflow_router_up": "0x9"}, {"freeflow_router_up": "0x3 1x9"}, 6),
    Case(
        "FreeFlowPartDied",
        {'freeflow_deaths_total{part="router"}': "0x5 1x9"},
        {'freeflow_deaths_total{part="router"}': "1x20"},
        8,
        {"part": "router"},
    ),
    Case(
        "FreeFlowRouterBug",
        {"freeflow_bugs_total": "0x5 1x9"},
        {"freeflow_bugs_total": "3x2 0x20"},
        8,
    ),
    Case(
        "FreeFlowNetworkStale",
        {
            'freeflow_sync_age_seconds{network="n"}': "60+60x20",
            'freeflow_endpoints{network="n",path="overlay"}': "1x20",
        },
        {
            'freeflow_sync_age_seconds{network="n"}': "60+60x20",
            'freeflow_endpoints{network="n",path="overlay"}': "0x20",
            'freeflow_sync_age_seconds{network="m"}': "5x20",
            'freeflow_endpoints{network="m",path="overlay"}': "1x20",
        },
        10,
        {"network": "n"},
    ),
    Case(
        "FreeFlowSpoofedFrames",
        {'freeflow_spoofed_frames_total{network="n"}': "2x3 7x9"},
        {'freeflow_spoofed_frames_total{network="n"}': "7x30"},
        6,
        {"network": "n"},
    ),
    Case(
        "FreeFlowSessionsMissing",
        {"freeflow_sessions_missing": "2x20"},
        {"freeflow_sessions_missing": "2x8 0 2x8"},
        12,
        value="2",
    ),
    Case(
        "FreeFlowConnectionsReset",
        {"freeflow_rdma_broken_total": "0x9", "freeflow_relay_broken_total": "0x5 2x9"},
        {"freeflow_rdma_broken_total": "4x20", "freeflow_relay_broken_total": "2x20"},
        8,
    ),
    Case(
        "FreeFlowCorruptMemory",
        {'freeflow_retreats_total{reason="corrupt"}': "_x18 1x9"},
        {
            'freeflow_retreats_total{reason="corrupt"}': "1x40",
            'freeflow_retreats_total{reason="option"}': "0+9x40",
        },
        20,
        {"reason": "corrupt"},
    ),
    Case(
        "FreeFlowWrongMessages",
        {"freeflow_wrong_messages_total": "0x5 1x9"},
        {"freeflow_wrong_messages_total": "1x20"},
        8,
    ),
    Case(
        "FreeFlowRefusals",
        {'freeflow_refusals_total{reason="limit"}': "0+20x20"},
        {
            'freeflow_refusals_total{reason="limit"}': "0+5x20",
            'freeflow_refusals_total{reason="remote"}': "0+500x20",
        },
        12,
        {"reason": "limit"},
    ),
    Case(
        "FreeFlowRelayBusy",
        {
            'freeflow_relay_cpu_seconds_total{container="x"}': "0+40x20",
            'freeflow_relay_cpu_seconds_total{container="y"}': "0+19x20",
        },
        {'freeflow_relay_cpu_seconds_total{container="x"}': "0+40x20"},
        16,
    ),
    Case(
        "FreeFlowRelayLimit",
        {
            'freeflow_relay_cpu_seconds_total{container="x"}': "0+14x20",
            "freeflow_relay_cpu_limit": "0.25x20",
        },
        {
            'freeflow_relay_cpu_seconds_total{container="x"}': "0+14x20",
            "freeflow_relay_cpu_limit": "1x20",
        },
        16,
        {"container": "x"},
    ),
    Case(
        "FreeFlowQueuePairsLimit",
        {
            'freeflow_container_queue_pairs{container="x"}': "95x5",
            "freeflow_queue_pairs_limit": "100x5",
        },
        {
            'freeflow_container_queue_pairs{container="x"}': "85x5",
            "freeflow_queue_pairs_limit": "100x5",
        },
        3,
        {"container": "x"},
    ),
    Case(
        "FreeFlowCallErrors",
        {'freeflow_request_errors_total{call="Join"}': "0+1x20"},
        {'freeflow_request_errors_total{call="Join"}': "0x5 2x20"},
        12,
        {"call": "Join"},
    ),
    Case(
        "FreeFlowVersionsDiffer",
        {
            'freeflow_build_info{version="1"}': "1x1500",
            'freeflow_build_info{version="2"}': "1x1500",
        },
        {
            'freeflow_build_info{version="1"}': "1x1500",
            'freeflow_build_info{version="2"}': "1x700",
        },
        1470,
        value="2",
        host=False,
        step=60,
    ),
)


def with_host(series: str) -> str:
    """The series with the labels of its host."""
    name, _, labels = series.rstrip("}").partition("{")
    own = ",".join(f'{label}="{value}"' for label, value in HOST.items())
    return f"{name}{{{own}{',' if labels else ''}{labels}}}"


def filled(text: str, labels: dict[str, str], value: str) -> str:
    """An annotation for an alert with these labels."""

    def fill(found: re.Match[str]) -> str:
        return value if found[1] == "$value" else labels[found[1].removeprefix("$labels.")]

    return re.sub(r"{{ (\S+) }}", fill, text)


def promised(case: Case) -> dict[str, Any]:
    """The alert as it has to be while it fires."""
    (rule,) = (each for each in rules() if each["alert"] == case.alert)
    labels = {**(HOST if case.host else {}), **case.labels, **rule["labels"]}
    annotations = {
        name: filled(text, labels, case.value) for name, text in rule["annotations"].items()
    }
    return {"exp_labels": labels, "exp_annotations": annotations}


def unit_test(case: Case, series: Series, alerts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "interval": "1m",
        "name": case.alert,
        "input_series": [
            {"series": with_host(name), "values": values} for name, values in series.items()
        ],
        "alert_rule_test": [
            {"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": alerts}
        ],
    }


def promtool(*arguments: str | Path) -> str:
    """What promtool says."""
    if not INSTALLED:
        pytest.skip("missing: Debian's package prometheus")
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience(60),
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_rules() -> None:
    """Prometheus takes each rule, and finds nothing to complain about."""
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES)


def test_alerts(tmp_path: Path) -> None:
    """Each alert fires with the values of its case, with its labels and texts, and does not fire
    with others.
    """
    files = []
    for step in {case.step for case in CASES}:
        tests = [
            unit_test(case, *each)
            for case in CASES
            if case.step == step
            for each in ((case.fires, [promised(case)]), (case.quiet, []))
        ]
        said = {"rule_files": [str(RULES)], "evaluation_interval": f"{step}m", "tests": tests}
        # JSON is YAML.
        files.append(tmp_path / f"{step}.yml")
        files[-1].write_text(json.dumps(said))
    promtool("test", "rules", *files)


def test_every_alert_has_a_case() -> None:
    """No rule is untested."""
    assert [case.alert for case in CASES] == [rule["alert"] for rule in rules()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_series_are_exported(case: Case) -> None:
    """A case's series have the names and labels of those that the exporter has, and a rule asks for
    no others.
    """
    for series in (*case.fires, *case.quiet):
        name, _, labels = series.partition("{")
        assert set(re.findall(r"(\w+)=", labels)) == LABELS[name]
    (rule,) = (each for each in rules() if each["alert"] == case.alert)
    asked = set(re.findall(r"\bfreeflow_\w+", rule["expr"]))
    assert asked <= LABELS.keys()
    assert asked <= {series.partition("{")[0] for series in case.fires}


def test_every_alert_is_described() -> None:
    """docs/monitoring.md lists each alert with its severity."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", (DOCS / "monitoring.md").read_text(), re.M)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in rules()]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_rule_is_complete(rule: dict[str, Any]) -> None:
    """Each alert has a severity, a sentence, and a text that says what to do or look at."""
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert all(text.endswith(".") for text in rule["annotations"].values())
