"""The task that upgrades the plugin of one host: a service with one task, tied to the host, with
the engine's socket mounted.

It is on no network, so it does not need the plugin that it replaces.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from driver.errors import EngineError, FreeFlowError
from plugin.cli.client import Engine
from plugin.swarm_upgrade import plugin_agent

LABEL: Final = "freeflow.upgrade"
_ENDED: Final = frozenset({"complete", "shutdown", "failed", "rejected", "remove", "orphaned"})
_GRACE: Final = 300
"""Seconds that Docker leaves a task that works before it kills it."""
_PAUSE: Final = 0.5
_HEADER: Final = struct.Struct("!BxxxI")


class UpgradeFailed(FreeFlowError):
    """A host's plugin was not upgraded."""


class UpgradeTask:
    """Upgrades hosts from a manager; `privileges` are those that the new version is granted."""

    def __init__(
        self,
        engine: Engine,
        image: str,
        plugin: str,
        remote: str,
        privileges: list[Any],
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._image = image
        wanted = {"plugin": plugin, "remote": remote, "privileges": privileges}
        self._wanted = msgspec.json.encode(wanted).decode()
        self._text = Path(plugin_agent.__file__).read_text()
        self._sleep = sleep
        self._clock = clock

    def use(self, engine: Engine) -> None:
        """Speak to the engine by another socket from now on."""
        self._engine = engine

    def run(self, node: str, seconds: float = 900.0) -> None:
        """Upgrade the plugin of a node. With the grace that is longer than the task takes at most.

        Raises UpgradeFailed, EngineError.
        """
        made = self._engine.change("POST", "/services/create", self._service(node))
        service = str(made["ID"])
        try:
            self._wait(service, seconds)
        finally:
            self._remove(service)

    def _service(self, node: str) -> dict[str, Any]:
        target = plugin_agent.SOCKET
        return {
            "Name": f"freeflow-upgrade-{node[:12]}",
            "Labels": {LABEL: node},
            "TaskTemplate": {
                "ContainerSpec": {
                    "Image": self._image,
                    "Command": ["python3", "-c", self._text],
                    "User": "0",
                    "Env": [
                        f"{plugin_agent.VARIABLE}={self._wanted}",
                        "FREEFLOW=off",
                        "PYTHONUNBUFFERED=1",
                    ],
                    "Mounts": [{"Type": "bind", "Source": target, "Target": target}],
                    "StopGracePeriod": _GRACE * 1_000_000_000,
                },
                "RestartPolicy": {"Condition": "none"},
                "Placement": {"Constraints": [f"node.id=={node}"]},
            },
            "Mode": {"Replicated": {"Replicas": 1}},
        }

    def _wait(self, service: str, seconds: float) -> None:
        end = self._clock() + seconds
        filters = quote(msgspec.json.encode({"service": [service]}).decode())
        why = ""
        while self._clock() < end:
            self._sleep(_PAUSE)
            for task in self._engine.get(f"/tasks?filters={filters}"):
                status = task.get("Status") or {}
                state = status.get("State")
                why = str(status.get("Err") or state)
                if state == "complete":
                    return
                if state in _ENDED:
                    raise UpgradeFailed("the upgrade failed", cause=self._said(service) or why)
        raise UpgradeFailed(f"the upgrade was not done in {seconds:g} s", cause=why)

    def _said(self, service: str) -> str:
        """The last line of the task's output, where its host's engine keeps that."""
        try:
            content = self._engine.read(f"/services/{service}/logs?stdout=1&stderr=1&tail=5")
        except EngineError:
            return ""
        text = b""
        while len(content) >= _HEADER.size:
            _, length = _HEADER.unpack_from(content)
            text += content[_HEADER.size : _HEADER.size + length]
            content = content[_HEADER.size + length :]
        lines = text.decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ")[:300] if lines else ""

    def _remove(self, service: str) -> None:
        try:
            self._engine.change("DELETE", f"/services/{service}")
        except EngineError:
            # The next upgrade removes it.
            return

    def remove_older(self) -> None:
        """Remove the services of earlier upgrades. Raises EngineError, UpgradeFailed."""
        filters = quote(msgspec.json.encode({"label": [LABEL]}).decode())
        for service in self._engine.get(f"/services?filters={filters}") or ():
            identifier = service["ID"]
            own = quote(msgspec.json.encode({"service": [identifier]}).decode())
            for task in self._engine.get(f"/tasks?filters={own}") or ():
                if (task.get("Status") or {}).get("State") not in _ENDED:
                    raise UpgradeFailed(
                        f"service {service['Spec']['Name']} has not ended",
                        cause="another upgrade runs, or was interrupted",
                        remedy=f"wait until it has, or: docker service rm {identifier}",
                    )
            self._engine.change("DELETE", f"/services/{identifier}")
