"""`freeflow bugreport`: the facts that are needed to find a bug, without secrets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute

from driver.errors import FreeFlowError
from driver.kernel import nft
from driver.kernel.namespace import OVERLAY_PIN, in_netns
from plugin.cli.client import Client, Engine, host_run
from plugin.cli.doctor import examine
from plugin.settings import HIDDEN, SETTINGS
from plugin.version import VERSION

_ENGINE_FIELDS = (
    "ServerVersion",
    "KernelVersion",
    "OperatingSystem",
    "Driver",
    "CgroupVersion",
    "SecurityOptions",
)
_SECRETS = frozenset(setting.name for setting in SETTINGS if setting.secret)
_LINK_FIELDS = ("IFLA_IFNAME", "IFLA_MTU", "IFLA_OPERSTATE", "IFLA_ADDRESS")


def _links() -> list[dict[str, Any]]:
    with IPRoute() as route:
        return [
            {field: link.get_attr(field) for field in _LINK_FIELDS} for link in route.get_links()
        ]


def _engine(engine: Engine) -> dict[str, Any]:
    info = engine.get("/info")
    return {field: info.get(field) for field in _ENGINE_FIELDS}


def _plugin(engine: Engine) -> list[dict[str, Any]]:
    return [
        {
            "Name": item.get("Name"),
            "Enabled": item.get("Enabled"),
            "Settings": [_shown(line) for line in (item.get("Settings") or {}).get("Env") or ()],
        }
        for item in engine.get("/plugins") or ()
        if "freeflow" in str(item.get("Name"))
    ]


def _shown(line: str) -> str:
    """NAME=VALUE of a setting; the value of a secret is hidden."""
    name, _, value = line.partition("=")
    return f"{name}={HIDDEN}" if value and name in _SECRETS else line


def collect(client: Client) -> dict[str, Any]:
    """All parts of the report by heading; a part that can't be read has the reason instead."""
    pin = host_run() / OVERLAY_PIN
    parts: dict[str, Callable[[], Any]] = {
        "status": lambda: msgspec.to_builtins(client.status()),
        "doctor": lambda: msgspec.to_builtins(examine(client)),
        "engine": lambda: _engine(client.engine),
        "plugin": lambda: _plugin(client.engine),
        "kernel": lambda: " ".join(os.uname()),
        "links of the host": _links,
        "links of the overlay": lambda: in_netns(pin, _links),
        "source filter": lambda: nft.query("list ruleset", pin),
        "metrics": client.metrics,
        "mounts": lambda: [
            line
            for line in Path("/proc/self/mountinfo").read_text().splitlines()
            if "freeflow" in line or "docker" in line
        ],
    }
    report: dict[str, Any] = {"freeflow": VERSION}
    for heading, part in parts.items():
        try:
            report[heading] = part()
        except (FreeFlowError, OSError) as error:
            report[heading] = f"not available: {error}"
    return report


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    parts = []
    for heading, value in report.items():
        body = (
            value
            if isinstance(value, str)
            else msgspec.json.format(msgspec.json.encode(value)).decode()
        )
        parts.append(f"== {heading} ==\n{body}\n")
    return "\n".join(parts)
