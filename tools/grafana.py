"""Writes `docs/grafana.json`, the Grafana board, from the list of metrics in the code.

Each metric has one panel: current values of a host at the top, values over time below. A test
compares the stored board with this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from plugin.metrics import METRICS, MetricSpec

STORED: Final = Path(__file__).parents[1] / "docs/grafana.json"
WIDTH: Final = 24
"""Grafana's grid, in columns."""
FIGURE: Final = (4, 4)
COURSE: Final = (12, 8)
SOURCE: Final = {"type": "prometheus", "uid": "${source}"}
HOSTS: Final = 'instance=~"$host"'

_UNITS: Final = {"seconds": "s", "bytes": "bytes", "": "short"}
_RATES: Final = {"seconds": "s", "bytes": "Bps", "": "cps"}


def exported(spec: MetricSpec) -> str:
    """The name that Prometheus sees."""
    return f"{spec.name}_total" if spec.kind == "counter" else spec.name


def query(spec: MetricSpec) -> str:
    """A panel's query: a gauge itself, the rate of a counter."""
    selected = f"{exported(spec)}{{{HOSTS}}}"
    return f"rate({selected}[$__rate_interval])" if spec.kind == "counter" else selected


def _is_figure(spec: MetricSpec) -> bool:
    return spec.kind == "gauge" and (not spec.labels or spec.name.endswith("_info"))


def _mappings(spec: MetricSpec) -> list[dict[str, Any]]:
    if not spec.help.startswith("1 if"):
        return []
    texts = {"0": {"text": "no", "color": "red"}, "1": {"text": "yes", "color": "green"}}
    return [{"type": "value", "options": texts}]


def _panel(number: int, spec: MetricSpec, place: dict[str, int]) -> dict[str, Any]:
    legend = " ".join(f"{{{{{label}}}}}" for label in ("instance", *spec.labels))
    units = _RATES if spec.kind == "counter" else _UNITS
    panel: dict[str, Any] = {
        "id": number,
        "title": spec.help,
        "type": "stat" if _is_figure(spec) else "timeseries",
        "datasource": SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": units[spec.unit], "min": 0, "mappings": _mappings(spec)},
            "overrides": [],
        },
        "targets": [
            {"refId": "A", "datasource": SOURCE, "expr": query(spec), "legendFormat": legend}
        ],
    }
    if _is_figure(spec):
        # The labels matter: the metric's value is always 1.
        text = "name" if spec.name.endswith("_info") else "value_and_name"
        panel["options"] = {"textMode": text, "reduceOptions": {"calcs": ["lastNotNull"]}}
    return panel


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    top = 0
    for size, chosen in (
        (FIGURE, [spec for spec in METRICS if _is_figure(spec)]),
        (COURSE, [spec for spec in METRICS if not _is_figure(spec)]),
    ):
        wide, high = size
        columns = WIDTH // wide
        for place, spec in enumerate(chosen):
            row, column = divmod(place, columns)
            where = {"x": column * wide, "y": top + row * high, "w": wide, "h": high}
            panels.append(_panel(len(panels) + 1, spec, where))
        top += -(-len(chosen) // columns) * high
    return panels


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "host",
            "label": "Host",
            "type": "query",
            "datasource": SOURCE,
            "query": "label_values(freeflow_build_info, instance)",
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        },
    ]


def board() -> dict[str, Any]:
    """The board as Grafana imports it."""
    return {
        "title": "FreeFlow",
        "uid": "freeflow",
        "description": "FreeFlow, the network plugin for Docker Swarm: hosts, networks, services, Docker's calls",
        "tags": ["docker", "freeflow", "network"],
        "schemaVersion": 39,
        "editable": True,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": _variables()},
        "panels": _panels(),
    }


def text() -> str:
    """The board as it is stored."""
    return msgspec.json.format(msgspec.json.encode(board()), indent=2).decode() + "\n"


if __name__ == "__main__":
    STORED.write_text(text())
