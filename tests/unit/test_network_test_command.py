"""`freeflow test` as a command, and the requests to an engine that it needs, over real sockets."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from driver.errors import EngineError
from plugin.cli.client import Engine
from plugin.cli.commands import cli
from plugin.network_test import probe_image
from tests.unit.sockets import engine, served

WORKER = {"/info": {"Swarm": {"LocalNodeState": "active", "ControlAvailable": False}}}


def invoke(path: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["--engine", str(path), "test", *arguments])
    return done.exit_code, done.output


def test_a_worker_is_told_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a worker the exit code is 2, with the remedy."""
    monkeypatch.setattr("plugin.network_test.coordinator.host_run", lambda: tmp_path)
    with served(engine(WORKER), tmp_path / "engine") as path:
        code, text = invoke(path)
    assert code == 2
    assert "no manager of a Swarm" in text
    assert "do: run it on a manager" in text


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The command says so before it makes anything: no request has come."""
    for option in ("--json", "--junit"):
        code, text = invoke(tmp_path / "no engine", option, str(tmp_path / "absent/report"))
        assert code == 2
        assert "absent/report can't be written" in text


@pytest.mark.parametrize(
    "options", [("--quick", "--perf"), ("--image", "a", "--registry", "b"), ("--wait", "0")]
)
def test_options_that_contradict_each_other(tmp_path: Path, options: tuple[str, ...]) -> None:
    """They are refused as wrong usage."""
    code, text = invoke(tmp_path / "no engine", *options)
    assert code == 2
    assert "Usage" in text


Requests = list[tuple[str, str, bytes]]


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Engine, Requests]]:
    """An engine that answers by path, and what it was sent."""
    requests: Requests = []
    answers = {
        "/made": ("201 Created", b'{"Id": "x"}'),
        "/empty": ("204 No Content", b""),
        "/used": ("409 Conflict", b'{"message": "network in use"}'),
        "/absent": ("404 Not Found", b'{"message": "no such network"}'),
        "/images/create": ("200 OK", b'{"status": "working"}\n{"status": "done"}\n'),
        "/images/no/push": (
            "200 OK",
            b'{"status": "working"}\n{"errorDetail": {"message": "denied"}, "error": "denied"}\n',
        ),
    }

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], body))
        status, answer = answers[environ["PATH_INFO"]]
        start_response(status, [("Content-Type", "application/json")])
        return [answer]

    with served(app, tmp_path / "engine") as path:
        yield Engine(path), requests


def test_changes(recorded: tuple[Engine, Requests]) -> None:
    """A change returns the engine's answer; its refusal is an error with the engine's words; what
    is to be removed may be absent.
    """
    made, requests = recorded
    assert made.change("POST", "/made", {"Name": "n"}) == {"Id": "x"}
    assert requests[-1] == ("POST", "/made", b'{"Name":"n"}')
    assert made.change("POST", "/empty") is None
    assert made.change("DELETE", "/absent") is None
    for method, url, text in (
        ("DELETE", "/used", "network in use"),
        ("POST", "/absent", "no such"),
    ):
        with pytest.raises(EngineError, match=text):
            made.change(method, url)


def test_work(recorded: tuple[Engine, Requests]) -> None:
    """A file arrives whole; an error in the lines of progress is one, whatever the status was."""
    made, requests = recorded
    content = bytes(100_000)
    made.work("/images/create", io.BytesIO(content), len(content))
    assert requests[-1] == ("POST", "/images/create", content)
    with pytest.raises(EngineError, match="denied"):
        made.work("/images/no/push")


@pytest.mark.parametrize("head", [b"HTTP/1.1 101 UPGRADED\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_attaching(tmp_path: Path, head: bytes) -> None:
    """What follows the engine's answer at once belongs to the container."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "engine"))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(head + b"A: b\r\n\r\nfirst")
                connection.sendall(connection.recv(100).upper())

        thread = threading.Thread(target=answer)
        thread.start()
        with Engine(tmp_path / "engine").attach("c") as stream:
            assert stream.recv(100) == b"first"
            stream.sendall(b"second")
            assert stream.recv(100) == b"SECOND"
        thread.join()


def test_attaching_is_refused(tmp_path: Path) -> None:
    """A refusal has the engine's words."""
    with served(engine({}), tmp_path / "engine") as path, pytest.raises(EngineError, match="404"):
        Engine(path).attach("c")


def test_the_image_is_the_same_each_time() -> None:
    """The archive has Python and its loader, no file twice, and no time or owner of this host."""
    files = probe_image.used_files()
    assert Path("/proc/self/maps") not in files
    one, two = io.BytesIO(), io.BytesIO()
    probe_image.write_archive(one, files)
    probe_image.write_archive(two, probe_image.used_files())
    assert one.getvalue() == two.getvalue()
    assert any(path.name.startswith("ld-") for path in files)
    assert len(files) == len(set(files))


class RegistryEngine:
    """An engine that has pushed the image, and knows these digests of it."""

    def __init__(self, *digests: str) -> None:
        self.digests = digests
        self.asked: list[str] = []

    def change(self, _method: str, url: str) -> None:
        self.asked.append(url)

    def work(self, url: str) -> None:
        self.asked.append(url)

    def get(self, _url: str) -> Any:
        return {"RepoDigests": list(self.digests)}


def test_hosts_get_the_pushed_image_by_its_digest() -> None:
    """Who else can push to the registry can't change what hosts start: a name without the digest
    is never used, nor is a digest of another repository.
    """
    other, wanted = "registry:5000/x@sha256:00", "registry:5000/freeflow-probe@sha256:11"
    made: Any = RegistryEngine(other, wanted)
    assert probe_image.push_image(made, "registry:5000/") == wanted
    assert "/images/registry:5000/freeflow-probe/push" in made.asked[1]
    with pytest.raises(EngineError, match="digest"):
        probe_image.push_image(RegistryEngine(other), "registry:5000")  # type: ignore[arg-type]


def test_no_registry_has_the_image_that_hosts_make() -> None:
    """Its name leads to no registry, so an engine that tries to pull it gets nothing."""
    assert probe_image.IMAGE.partition("/")[0].endswith(".invalid")
