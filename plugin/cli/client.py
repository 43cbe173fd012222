"""Clients of the running plugin (its admin socket) and of the engine (its API socket)."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, TypeVar
from urllib.parse import quote

import msgspec

from dataplane.control import Connections, VerbsObjects
from driver.errors import EngineError, FreeFlowError
from driver.unix_http import UnixConnection
from plugin.host_paths import ADMIN_SOCKET
from plugin.ping import PingRequest, PingResult
from plugin.status import Status
from plugin.traffic_names import AddressBook, TrafficReport

T = TypeVar("T")

HOST_RUNS: Final = (Path("/host/run"), Path("/run"))
"""The host's /run, as seen inside the plugin's root file system and on the host itself."""
_SLOW: Final = 60.0
"""Seconds for requests that make the engine work on its disk."""
_WORK: Final = 300.0
"""Seconds of silence in requests for images."""
_NOBODY: Final = "e30="
"""The encoded object {} (API, AuthConfig)."""
_LOOK: Final = "systemctl status docker"
_LOG: Final = "journalctl -u docker"
_HEAD: Final = 8192
"""Limit of an answer's header."""
_INSTALL: Final = "docker plugin install --alias freeflow:latest REGISTRY/freeflow:latest"


class NotRunning(FreeFlowError):
    """The plugin doesn't answer."""


class InUse(FreeFlowError):
    """Containers of this host are on FreeFlow networks."""


def host_run() -> Path:
    """Where this process sees the host's /run."""
    return next((path for path in HOST_RUNS if (path / "docker").exists()), HOST_RUNS[-1])


def _ask(
    path: Path, method: str, url: str, body: bytes | None, timeout: float
) -> tuple[int, bytes]:
    connection = UnixConnection(path, timeout)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, url, body, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _message(answer: bytes) -> str:
    """What an answer of the engine says about an error."""
    text = answer.decode(errors="replace").strip()
    try:
        found = msgspec.json.decode(text.splitlines()[-1] if text else "")
        text = str(found.get("message") or found.get("error") or text)
    except (msgspec.DecodeError, AttributeError):
        pass
    return text[:300]


class Engine:
    """The engine of this host. `path` is its socket; `timeout`, in seconds, bounds each read.

    A manager whose engine has just started takes several seconds to answer /info.
    """

    def __init__(self, path: Path | None = None, timeout: float = 15.0) -> None:
        self._path = path or host_run() / "docker.sock"
        self._timeout = timeout

    def get(self, url: str) -> Any:
        """An answer of the engine's API. Raises EngineError."""
        return self._decoded(url, *self._ask("GET", url))

    def find(self, url: str) -> Any | None:
        """As `get`; None if there is no such thing. Raises EngineError."""
        status, body = self._ask("GET", url)
        return None if status == http.HTTPStatus.NOT_FOUND else self._decoded(url, status, body)

    def read(self, url: str) -> bytes:
        """An answer that is no JSON. Raises EngineError."""
        status, body = self._ask("GET", url)
        if status != http.HTTPStatus.OK:
            raise EngineError(
                f"the engine answered {url} with {status}", cause=_message(body), remedy=_LOG
            )
        return body

    def change(self, method: str, url: str, value: Any = None) -> Any:
        """A request that changes something; its answer, None if that is empty. Raises EngineError.

        An object that is not there is no error for DELETE.
        """
        body = None if value is None else msgspec.json.encode(value)
        status, answer = self._ask(method, url, body)
        if method == "DELETE" and status == http.HTTPStatus.NOT_FOUND:
            return None
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise EngineError(
                f"the engine refused {method} {url.partition('?')[0]} ({status})",
                cause=_message(answer),
                remedy=_LOG,
            )
        return msgspec.json.decode(answer) if answer.strip() else None

    def work(self, url: str, content: IO[bytes] | None = None, length: int = 0) -> None:
        """A POST whose answer is lines of progress, to the end: of an import, a pull or a push.
        `content` is a file to send. Raises EngineError.
        """
        connection = UnixConnection(self._path, _WORK)
        headers = {"Content-Length": str(length), "X-Registry-Auth": _NOBODY}
        if content is not None:
            headers["Content-Type"] = "application/x-tar"
        try:
            connection.request("POST", url, content, headers)
            response = connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"the engine did not do {url.partition('?')[0]}", cause=str(error), remedy=_LOOK
            ) from error
        finally:
            connection.close()
        # The status is sent before the work is done.
        if response.status != http.HTTPStatus.OK or b'"errorDetail"' in answer:
            raise EngineError(
                f"the engine refused {url.partition('?')[0]}",
                cause=_message(answer),
                remedy=_LOG,
            )

    def attach(self, container: str) -> socket.socket:
        """The standard streams of a container as one socket (API, ContainerAttach): what comes from
        it has headers, what is sent is its input. Raises EngineError.
        """
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(self._timeout)
        try:
            stream.connect(str(self._path))
            url = f"/containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1"
            head = f"POST {url} HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n"
            stream.sendall(f"{head}Content-Length: 0\r\n\r\n".encode())
            answer = b""
            # Byte by byte, because what follows belongs to the container.
            while not answer.endswith(b"\r\n\r\n") and len(answer) < _HEAD:
                piece = stream.recv(1)
                if not piece:
                    break
                answer += piece
            words = answer.split(None, 2)
            if len(words) < 2 or words[1] not in (b"101", b"200"):
                raise EngineError(
                    f"the engine did not attach to container {container[:12]}",
                    cause=_message(answer),
                    remedy=_LOG,
                )
        except OSError as error:
            stream.close()
            raise EngineError(
                f"the engine does not answer on {self._path}", cause=str(error), remedy=_LOOK
            ) from error
        except EngineError:
            stream.close()
            raise
        return stream

    def _decoded(self, url: str, status: int, body: bytes) -> Any:
        if status != http.HTTPStatus.OK:
            raise EngineError(f"the engine answered {url} with {status}", remedy=_LOOK)
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise EngineError(
                f"the engine's answer to {url} is no JSON", cause=str(error), remedy=_LOOK
            ) from error

    @contextmanager
    def created(self, image: str) -> Iterator[str]:
        """A container of this image, for its files; it is never started. Raises EngineError."""
        wanted = {
            "Image": image,
            "Entrypoint": ["freeflow-reads-files"],
            "Labels": {"freeflow.inject": ""},
            "HostConfig": {"NetworkMode": "none"},
        }
        status, body = self._ask("POST", "/containers/create", msgspec.json.encode(wanted))
        if status != http.HTTPStatus.CREATED:
            reason = body.decode(errors="replace").strip()[:300]
            raise EngineError(
                f"the engine did not create a container of {image} ({status})",
                cause=reason,
                remedy=f"docker run --rm {image} true",
            )
        container = str(msgspec.json.decode(body)["Id"])
        try:
            yield container
        finally:
            with suppress(EngineError):
                self._ask("DELETE", f"/containers/{container}?v=1&force=1")

    @contextmanager
    def archive(self, container: str, path: str) -> Iterator[IO[bytes] | None]:
        """A file of a container as a tar stream, None without it. Links aren't followed.

        Raises EngineError.
        """
        connection = UnixConnection(self._path, _SLOW)
        try:
            connection.request(
                "GET", f"/containers/{container}/archive?path={quote(path, safe='')}"
            )
            response = connection.getresponse()
            yield response if response.status == http.HTTPStatus.OK else None
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"the engine does not send {path} ({error})", remedy=_LOOK) from error
        finally:
            connection.close()

    def _ask(self, method: str, url: str, body: bytes | None = None) -> tuple[int, bytes]:
        try:
            timeout = self._timeout if method == "GET" else _SLOW
            return _ask(self._path, method, url, body, timeout)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"the engine does not answer on {self._path}", cause=str(error), remedy=_LOOK
            ) from error

    def plugin_state(self) -> tuple[str, str]:
        """Why the plugin may not answer, as the engine sees it, and the next step."""
        try:
            plugins = self.get("/plugins")
        except EngineError as error:
            return error.reason, error.remedy
        own = [item for item in plugins or () if "freeflow" in str(item.get("Name"))]
        if not own:
            return "it is not installed", _INSTALL
        name = own[0]["Name"]
        if not own[0].get("Enabled"):
            return "it is disabled", f"docker plugin enable {name}"
        restart = f"docker plugin disable -f {name} && docker plugin enable {name}"
        return "it is enabled but does not answer", restart


class _Refusal(msgspec.Struct):
    """The admin API's answer to a request that failed."""

    error: str
    what: str = ""
    cause: str = ""
    remedy: str = ""


def _refusal(answer: bytes) -> FreeFlowError:
    try:
        found = msgspec.json.decode(answer, type=_Refusal)
    except msgspec.DecodeError:
        return FreeFlowError(answer.decode(errors="replace")[:500])
    return FreeFlowError(found.what or found.error, cause=found.cause, remedy=found.remedy)


class Client:
    """The running plugin. `path` is its admin socket."""

    def __init__(
        self, path: Path | None = None, engine: Engine | None = None, timeout: float = 30.0
    ) -> None:
        self.engine = engine or Engine()
        self._path = path or host_run() / ADMIN_SOCKET
        self._timeout = timeout

    def _call(self, method: str, url: str, body: bytes | None = None) -> bytes:
        try:
            status, answer = _ask(self._path, method, url, body, self._timeout)
        except (OSError, http.client.HTTPException) as error:
            cause, remedy = self.engine.plugin_state()
            raise NotRunning(
                f"the plugin does not answer on {self._path} ({error})", cause=cause, remedy=remedy
            ) from error
        if status != http.HTTPStatus.OK:
            raise _refusal(answer)
        return answer

    def _value(self, kind: type[T], method: str, url: str, body: bytes | None = None) -> T:
        answer = self._call(method, url, body)
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:
            raise FreeFlowError(
                f"the plugin's answer to {url} can't be decoded ({error})",
                cause="the plugin and this command have different versions",
                remedy="docker plugin disable -f and enable it, which installs its own command",
            ) from error

    def status(self) -> Status:
        """Raises NotRunning, FreeFlowError."""
        return self._value(Status, "GET", "/admin/status")

    def connections(self) -> Connections:
        """Raises NotRunning, FreeFlowError."""
        return self._value(Connections, "GET", "/admin/connections")

    def verbs(self) -> VerbsObjects:
        """Raises NotRunning, FreeFlowError."""
        return self._value(VerbsObjects, "GET", "/admin/verbs")

    def traffic(self) -> TrafficReport:
        """Raises NotRunning, FreeFlowError."""
        return self._value(TrafficReport, "GET", "/admin/traffic")

    def addresses(self) -> AddressBook:
        """Raises NotRunning, FreeFlowError."""
        return self._value(AddressBook, "GET", "/admin/addresses")

    def ping(self, address: str, count: int) -> PingResult:
        """Raises NotRunning, FreeFlowError."""
        body = msgspec.json.encode(PingRequest(address, count))
        return self._value(PingResult, "POST", "/admin/ping", body)

    def metrics(self) -> str:
        """Raises NotRunning, FreeFlowError."""
        return self._call("GET", "/admin/metrics").decode()
