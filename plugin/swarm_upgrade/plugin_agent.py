"""Upgrades the plugin of the host on which it runs, through the engine's socket.

It gets there as text and uses Python's standard library alone. Whatever fails after the plugin was
disabled, it enables it again, with the version that is there then.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from typing import Any
from urllib.parse import quote

VARIABLE = "FREEFLOW_UPGRADE"
SOCKET = "/var/run/docker.sock"
_SECONDS = 240.0
"""For one request: an upgrade downloads the plugin."""
_ENABLING = 60


class AgentError(Exception):
    """The engine refused a request."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(self._path)


def ask(path: str, method: str, url: str, value: Any = None) -> Any:
    """The answer of the engine at `path`. Raises AgentError, OSError."""
    connection = _Connection(path)
    headers = {"Content-Type": "application/json", "X-Registry-Auth": "e30="}
    try:
        body = None if value is None else json.dumps(value)
        connection.request(method, url, body, headers)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise AgentError(f"{method} {url}: {error}") from error
    finally:
        connection.close()
    lines = [line for line in text.splitlines() if line.strip()]
    # The status is sent before an upgrade is done; an error is its last line then.
    last = _decoded(lines[-1]) if lines else None
    error_text = isinstance(last, dict) and (last.get("error") or last.get("message"))
    if response.status >= 400 or (isinstance(last, dict) and "errorDetail" in last):
        raise AgentError(str(error_text or text)[:300])
    return last


def _decoded(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def upgrade(path: str, plugin: str, remote: str, privileges: list[Any]) -> str:
    """Disable, upgrade, enable; the reference that the plugin has then.

    Raises AgentError, OSError.
    """
    name = quote(plugin, safe="")
    found = ask(path, "GET", f"/plugins/{name}/json")
    if found.get("Enabled"):
        ask(path, "POST", f"/plugins/{name}/disable?force=1")
    try:
        ask(path, "POST", f"/plugins/{name}/upgrade?remote={quote(remote, safe='')}", privileges)
    finally:
        ask(path, "POST", f"/plugins/{name}/enable?timeout={_ENABLING}")
    return str(ask(path, "GET", f"/plugins/{name}/json").get("PluginReference"))


def main() -> None:
    """Process 1 of the task. Its output says why it failed."""
    # Half an upgrade would leave the host without the plugin.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wanted = json.loads(os.environ[VARIABLE])
    try:
        reference = upgrade(SOCKET, wanted["plugin"], wanted["remote"], wanted["privileges"])
    except (AgentError, OSError) as error:
        print(f"error: {error}", flush=True)
        os._exit(1)
    print(f"done: {reference}", flush=True)


if __name__ == "__main__":
    main()
