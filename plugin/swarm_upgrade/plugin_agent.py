"""Upgrades the plugin of the host on which it runs, through the engine's socket.

It gets there as text and uses Python's standard library alone. Whatever fails after the plugin was
disabled, it enables it again, with the version that was there before. Each request has a deadline,
so all of it ends before Docker kills the task.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from typing import Any
from urllib.parse import quote

VARIABLE = "FREEFLOW_UPGRADE"
SOCKET = "/var/run/docker.sock"
_SECONDS = 60.0
_DOWNLOADING = 400.0
"""An upgrade downloads the plugin, while it is disabled."""
_ENABLING = 60
_STARTING = 90.0


class AgentError(Exception):
    """The engine refused a request."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        self.sock = self.stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def whole(self, response: http.client.HTTPResponse, end: float) -> bytes:
        """What is answered until then, however slowly it comes. Raises AgentError, OSError."""
        parts: list[bytes] = []
        while True:
            left = end - time.monotonic()
            try:
                self.stream.settimeout(max(left, 0.01))
                part = response.read1(65536)
            except socket.timeout:  # noqa: UP041 — not yet the same in Python 3.9
                left = 0.0
            if left <= 0:
                raise AgentError("the engine has not done it in time")
            if not part:
                return b"".join(parts)
            parts.append(part)


def ask(path: str, method: str, url: str, value: Any = None, seconds: float = 0.0) -> Any:
    """The answer of the engine at `path`. Raises AgentError, OSError."""
    seconds = seconds or _SECONDS
    end = time.monotonic() + seconds
    connection = _Connection(path, seconds)
    headers = {"Content-Type": "application/json", "X-Registry-Auth": "e30="}
    try:
        body = None if value is None else json.dumps(value)
        connection.request(method, url, body, headers)
        response = connection.getresponse()
        text = connection.whole(response, end).decode(errors="replace")
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
    """Disable, upgrade, enable; the reference that the plugin has then. A version that does not
    start is replaced by the former one.

    Raises AgentError, OSError.
    """
    name = quote(plugin, safe="")
    found = ask(path, "GET", f"/plugins/{name}/json")
    former = str(found.get("PluginReference") or "")
    try:
        if found.get("Enabled"):
            ask(path, "POST", f"/plugins/{name}/disable?force=1", seconds=_STARTING)
        _replace(path, name, remote, privileges)
    except (AgentError, OSError) as error:
        _enable_again(path, name, error)
        raise
    try:
        _enable(path, name)
    except (AgentError, OSError) as error:
        said = f"{remote} does not start: {error}"
        # The tag may be the same: then there is nothing to go back to.
        if former in ("", remote):
            raise AgentError(said) from error
        raise AgentError(f"{said}; {_go_back(path, name, former)}") from error
    return str(ask(path, "GET", f"/plugins/{name}/json").get("PluginReference"))


def _go_back(path: str, name: str, former: str) -> str:
    """Bring the former version back; what became of that."""
    try:
        privileges = ask(path, "GET", f"/plugins/privileges?remote={quote(former, safe='')}")
        _replace(path, name, former, privileges)
        _enable(path, name)
    except (AgentError, OSError) as error:
        return f"the plugin is disabled, {former} does not come back: {error}"
    return f"{former} is back"


def _replace(path: str, name: str, remote: str, privileges: list[Any]) -> None:
    url = f"/plugins/{name}/upgrade?remote={quote(remote, safe='')}"
    ask(path, "POST", url, privileges, _DOWNLOADING)


def _enable(path: str, name: str) -> None:
    ask(path, "POST", f"/plugins/{name}/enable?timeout={_ENABLING}", seconds=_STARTING)


def _enable_again(path: str, name: str, why: Exception) -> None:
    """The version that is there. Raises AgentError with both reasons."""
    try:
        _enable(path, name)
    except (AgentError, OSError) as error:
        # It may be enabled still: the engine refuses that, too.
        if not ask(path, "GET", f"/plugins/{name}/json").get("Enabled"):
            raise AgentError(f"{why}; and the plugin is disabled: {error}") from why


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
