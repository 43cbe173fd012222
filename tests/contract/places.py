"""The places that must keep the contract: the app on a fake kernel in this process, and the
plugin's own process on the real kernel.

A place accepts requests as Docker's client sends them, and lists FreeFlow's links.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import pytest
from pyroute2 import IPRoute

from driver import names
from driver.driver import Driver, DriverConfig
from driver.kernel.namespace import OVERLAY_PIN, in_netns
from driver.recovery import recover
from driver.store import Store
from plugin.app import create_app
from plugin.calls import CallStatistics
from plugin.settings import read
from testbed.patience import patience
from tests.unit.steps import SteppedKernel, Steps

TOP: Final = Path(__file__).parents[2]

DOCKERS_HEADERS: Final = {
    "Host": "plugin.moby.localhost",
    "User-Agent": "Go-http-client/1.1",
    "Accept": "application/vnd.docker.plugins.v1.2+json",
}
"""All headers: Docker sends no content type."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    content_type: str
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Place(Protocol):
    """A plugin that answers requests."""

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = DOCKERS_HEADERS,
    ) -> Reply: ...

    def links(self) -> frozenset[str]:
        """Names of FreeFlow's links, in the host's namespace and in the overlay's."""


def call(place: Place, name: str, request: Any = None) -> Reply:
    """Send a call as Docker does; without a request the body is empty."""
    body = b"" if request is None else msgspec.json.encode(request) + b"\n"
    path = name if "." in name else f"NetworkDriver.{name}"
    return place.send("POST", f"/{path}", body)


# --- fake


class FakePlace:
    """The app and the driver in this process, on a kernel that consists of a few sets."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        settings, bad = read(environment)
        self.kernel = SteppedKernel(Steps())
        self.store = Store(directory)
        self.driver = Driver(
            self.store,
            self.kernel,
            DriverConfig(settings.scope, settings.vxlan_port, settings.mtu),
            clock=lambda: 0.0,
        )
        recover(self.driver, "boot")
        self.statistics = CallStatistics()
        app = create_app(
            self.driver,
            deadline=settings.request_deadline,
            statistics=self.statistics,
            bad_settings=bad,
        )
        self._client = app.test_client()

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = DOCKERS_HEADERS,
    ) -> Reply:
        answer = self._client.open(path, method=method, data=body, headers=dict(headers))
        return Reply(answer.status_code, answer.headers.get("Content-Type", ""), answer.data)

    def links(self) -> frozenset[str]:
        kernel = self.kernel
        return frozenset(
            {names.bridge(short) for short in kernel.bridges}
            | {names.vxlan(short) for short in kernel.vxlans}
            | {names.host_veth(short) for short in kernel.veths}
            | {names.container_veth(short) for short in kernel.veths}
        )

    def close(self) -> None:
        self.store.close()


# --- real


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("plugin", timeout=patience(30))
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class RealPlace:
    """The plugin's process with gunicorn, on its unix socket; see `plugin_process`."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], *, wait: bool = True
    ) -> None:
        self.directory = directory
        self.socket = directory / "freeflow.sock"
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.contract.plugin_process"),
                    *(str(directory), str(os.getpid())),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=TOP,
                env={"PYTHONDONTWRITEBYTECODE": "1"} | dict(environment),
                start_new_session=True,
            )
        try:
            if wait:
                self._await()
        except BaseException:
            self.close()
            raise

    def _await(self) -> None:
        deadline = time.monotonic() + patience(30)
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                if self.send("GET", "/NetworkDriver.GetCapabilities").status == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"the plugin did not start: {self.log.read_text()[-2000:]}")

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = DOCKERS_HEADERS,
    ) -> Reply:
        connection = _Connection(self.socket)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                connection.putheader(name, value)
            # The answer may arrive before the body has been read, as with Go's client.
            with contextlib.suppress(BrokenPipeError):
                connection.endheaders(body)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers.get("Content-Type", ""), answer.read())
        finally:
            connection.close()

    def admin(self) -> RealPlace:
        """A client of the same process on the command's socket; the path is the one outside its
        mount namespace.
        """
        seen = copy.copy(self)
        seen.socket = self.run / "freeflow-admin/admin.sock"
        return seen

    def scrape(self, host: str, port: int, path: str = "metrics") -> bytes:
        """The metrics, or the page, that a program on this machine gets."""

        def get() -> bytes:
            with urllib.request.urlopen(
                f"http://{host}:{port}/{path}", timeout=patience(10)
            ) as answer:
                return bytes(answer.read())

        return in_netns(Path(f"/proc/{self.process.pid}/ns/net"), get)

    @property
    def run(self) -> Path:
        """The plugin's /run."""
        return Path(f"/proc/{self.process.pid}/root{self.directory}/run")

    def links(self) -> frozenset[str]:
        host = Path(f"/proc/{self.process.pid}/ns/net")
        overlay = self.run / OVERLAY_PIN
        found: set[str] = set()
        for namespace in (host, overlay):
            if namespace.exists():
                found |= in_netns(namespace, _link_names)
        return frozenset(name for name in found if name.startswith(names.PREFIXES))

    def close(self) -> None:
        """Kill the process; its objects disappear with its namespaces."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(patience(20))


def _link_names() -> set[str]:
    with IPRoute() as route:
        return {str(link.get_attr("IFLA_IFNAME")) for link in route.get_links()}


# --- both


def temporary() -> tempfile.TemporaryDirectory[str]:
    """A directory in memory, if there is one: thousands of durable writes need not wait for a
    disk.
    """
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="ff-", dir=memory if memory.is_dir() else None)


REAL: Final = pytest.param(
    "real",
    marks=[
        pytest.mark.kernel,
        pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces"),
    ],
)
KINDS: Final = ("fake", REAL)


class Places:
    """Makes places. Real ones are made once per environment, because a process takes a second to
    start.
    """

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._real: dict[tuple[tuple[str, str], ...], RealPlace] = {}

    def real(self, environment: Mapping[str, str]) -> RealPlace:
        key = tuple(sorted(environment.items()))
        if key not in self._real:
            # Short, because a socket's path has 107 characters at most.
            directory = self._stack.enter_context(temporary())
            self._real[key] = self._stack.enter_context(
                contextlib.closing(RealPlace(Path(directory), environment))
            )
        return self._real[key]

    @contextlib.contextmanager
    def get(self, kind: str, environment: Mapping[str, str]) -> Iterator[Place]:
        """A place of this kind, with these settings."""
        if kind == "real":
            yield self.real(environment)
            return
        with temporary() as directory:
            place = FakePlace(Path(directory), environment)
            with contextlib.closing(place):
                yield place
