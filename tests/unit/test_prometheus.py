"""A real Prometheus scrapes the exporter, and answers what the board and the alert rules ask."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from plugin.metrics import METRICS, Exporter, render
from testbed import wait_until
from testbed.patience import patience
from testbed.prometheus import INSTALLED, Prometheus
from tests.unit.session_world import free_port
from tests.unit.statuses import status
from tests.unit.test_alerts import RULES, promtool, rules
from tests.unit.test_grafana import BOARD, queries
from tools.grafana import exported

pytestmark = pytest.mark.skipif(not INSTALLED, reason="missing: Debian's package prometheus")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped a host with a value of each metric."""
    port = free_port()
    exporter = Exporter(status, ("127.0.0.1", port))
    exporter.start()
    folder = tmp_path_factory.mktemp("prometheus")
    made = Prometheus(folder, f"127.0.0.1:{free_port()}", f"127.0.0.1:{port}", RULES)
    try:
        made.wait_scraped()
        yield made
    finally:
        made.stop()
        exporter.stop()


def test_metrics_pass_promtool() -> None:
    """The names and types of metrics are as Prometheus wants them."""
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        check=False,
        input=render(status()),
        capture_output=True,
        timeout=patience(60),
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_board(prometheus: Prometheus) -> None:
    """Each query of the board has an answer, and so has the list of hosts."""
    for each in queries():
        asked = each.replace("$host", ".*").replace("$__rate_interval", "1m")
        assert prometheus.query(asked), asked
    _, host = BOARD["templating"]["list"]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", host["query"])
    assert found is not None
    assert prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]})


def test_every_metric_is_stored(prometheus: Prometheus) -> None:
    """Each metric of the list is there after a scrape, with its labels and its host's."""
    for spec in METRICS:
        labels = [set(series["metric"]) for series in prometheus.query(exported(spec))]
        # For Prometheus, a label that is empty is none.
        assert set().union(*labels) == {"__name__", "job", "instance", *spec.labels}
        assert all(each >= {"__name__", "job", "instance"} for each in labels)


def test_rules_are_evaluated(prometheus: Prometheus) -> None:
    """Prometheus takes the configuration and all rules, and no rule fails when it is evaluated."""

    def evaluated() -> list[dict[str, Any]] | None:
        (group,) = prometheus.ask("rules")["groups"]
        found: list[dict[str, Any]] = group["rules"]
        return found if all(rule["health"] != "unknown" for rule in found) else None

    promtool("check", "config", prometheus.config)
    found = wait_until("evaluation", evaluated) or []
    assert [(rule["name"], rule["health"]) for rule in found] == [
        (rule["alert"], "ok") for rule in rules()
    ]
    assert prometheus.query('up{job="freeflow"}')
