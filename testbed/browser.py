"""Debian's Chromium without a screen, for tests of the page and its pictures; W3C WebDriver.

Each browser has an empty profile of its own, and asks no address but those that it is sent to.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from testbed.patience import patience

DRIVER: Final = "chromedriver"
INSTALLED: Final = shutil.which("chromium") is not None and shutil.which(DRIVER) is not None
_FLAGS: Final = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars"),
    # All names but those of this machine lead nowhere.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost , EXCLUDE 127.0.0.1",
)
_ELEMENT: Final = "element-6066-11e4-a52e-4f735466cecf"
_KEYS: Final = {
    "Tab": "\ue004",
    "Enter": "\ue007",
    "Escape": "\ue00c",
    "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013",
    "ArrowRight": "\ue014",
    "ArrowDown": "\ue015",
}


class BrowserError(Exception):
    """The driver's own words."""


class Browser:
    """A window of Chromium. Use it as a context manager."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="freeflow-browser-")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._log = (Path(self._profile.name) / "driver.log").open("wb")
        self._process = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=self._log, stderr=subprocess.STDOUT
        )
        self._url = f"http://127.0.0.1:{port}"
        try:
            self._wait_for_driver()
            flags = [
                *_FLAGS,
                f"--window-size={width},{height}",
                f"--user-data-dir={self._profile.name}/profile",
            ]
            wanted = {
                "alwaysMatch": {
                    "goog:chromeOptions": {"args": flags},
                    "goog:loggingPrefs": {"browser": "ALL"},
                }
            }
            made = self._ask("POST", "/session", {"capabilities": wanted})
            self._url += f"/session/{made['sessionId']}"
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """End browser and driver, and remove the profile."""
        if "/session/" in self._url:
            with suppress(BrowserError, OSError):
                self._ask("DELETE", "")
        self._process.terminate()
        try:
            self._process.wait(patience(5))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        # Processes of the browser may still write there.
        with suppress(OSError):
            self._profile.cleanup()

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded."""
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script, the body of a function."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 10.0) -> Any:
        """The first true value of a script. Raises AssertionError after a time."""
        deadline = time.monotonic() + patience(seconds)
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < deadline, f"never true: {script}; {self.messages()}"
            time.sleep(0.1)
        return found

    def click(self, selector: str) -> None:
        """Click at the middle of an element."""
        self._ask("POST", f"/element/{self._find(selector)}/click", {})

    def point(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        origin = {_ELEMENT: self._find(selector)}
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        mouse = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._ask("POST", "/actions", {"actions": [mouse]})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other: names, or characters."""
        actions = []
        for key in keys:
            value = _KEYS.get(key, key)
            actions += [{"type": kind, "value": value} for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": actions}]})

    def emulate(self, **features: str) -> None:
        """Media features, such as `prefers_color_scheme="dark"`."""
        listed = [{"name": name.replace("_", "-"), "value": v} for name, v in features.items()]
        self._tool("Emulation.setEmulatedMedia", {"features": listed})

    def tree(self) -> list[dict[str, Any]]:
        """The tree of accessibility, as a screen reader gets it."""
        self._tool("Accessibility.enable", {})
        nodes: list[dict[str, Any]] = self._tool("Accessibility.getFullAXTree", {})["nodes"]
        return nodes

    def picture(self) -> bytes:
        """The window's contents as PNG."""
        return base64.b64decode(self._ask("GET", "/screenshot"))

    def messages(self) -> list[str]:
        """What the page has written to its console since the last call, errors included."""
        return [each["message"] for each in self._ask("POST", "/se/log", {"type": "browser"})]

    def _find(self, selector: str) -> str:
        wanted = {"using": "css selector", "value": selector}
        return str(self._ask("POST", "/element", wanted)[_ELEMENT])

    def _tool(self, name: str, parameters: dict[str, Any]) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def _wait_for_driver(self) -> None:
        deadline = time.monotonic() + patience(10)
        ready: Callable[[], Any] = lambda: self._ask("GET", "/status")  # noqa: E731
        while True:
            try:
                ready()
                return
            except OSError:
                assert time.monotonic() < deadline, "chromedriver does not answer"
                time.sleep(0.05)

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=patience(30)) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise BrowserError(json.load(error)["value"]["message"]) from error
