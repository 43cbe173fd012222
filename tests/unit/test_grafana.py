"""The Grafana board shows what the exporter exports, no more and no less."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from plugin.metrics import METRICS, render
from tests.unit.statuses import status
from tools.grafana import HOSTS, STORED, WIDTH, text

BOARD: dict[str, Any] = json.loads(STORED.read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]


def exported() -> dict[str, set[str]]:
    """Sample names that a scraper gets, each with its labels."""
    families = text_string_to_metric_families(render(status()).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def names(query: str) -> list[str]:
    return re.findall(r"\bfreeflow_\w+", query)


def test_stored_board_is_the_generated_one() -> None:
    """docs/grafana.json is what `python -m tools.grafana` writes."""
    assert STORED.read_text() == text()


def test_every_query_names_an_exported_metric() -> None:
    """Each panel's metric exists, and each exported metric has a panel."""
    asked = [name for query in queries() for name in names(query)]
    assert sorted(asked) == sorted(exported())


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel(panel: dict[str, Any]) -> None:
    """Each panel shows the chosen hosts, counters as rates, and existing labels in its legend."""
    (target,) = panel["targets"]
    (name,) = names(target["expr"])
    assert f"{name}{{{HOSTS}}}" in target["expr"]
    assert name.endswith("_total") == target["expr"].startswith("rate(")
    labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    assert labels == exported()[name] | {"instance"}
    assert panel["title"] in {spec.help for spec in METRICS}


def test_panels_do_not_overlap() -> None:
    """Panels lie side by side on Grafana's grid, each with a number of its own."""
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert all(x < WIDTH for x, _ in cells)
        taken |= cells
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_variables() -> None:
    """The board has variables for the data source and the hosts, by a metric of every host."""
    source, host = BOARD["templating"]["list"]
    assert (source["name"], source["type"]) == ("source", "datasource")
    (name,) = names(host["query"])
    assert name in exported()
    assert not exported()[name] - {"version"}
