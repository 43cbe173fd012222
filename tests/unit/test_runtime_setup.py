"""`freeflow runtime`: what it changes on the host, and what it refuses."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from driver.errors import FreeFlowError, InvalidRequest
from plugin.cli import daemon_file
from plugin.cli.client import Engine
from plugin.cli.runtime import HostFiles, RuntimeSetup, show

DOCKERD = """#!/bin/sh
[ "$1" = --validate ] || exit 9
file=${2#--config-file=}
grep -q refuse-me "$file" && { echo "unable to configure the Docker daemon: refuse-me" >&2; exit 1; }
[ ! -e "$0.old" ] || { echo "unknown flag: --validate" >&2; exit 125; }
echo "configuration OK"
"""


class FakeEngine(Engine):
    """An engine that reads daemon.json when it gets SIGHUP, as Docker does: what the file no longer
    has stays.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.runtimes: dict[str, Any] = {"runc": {"path": "runc"}}
        self.default = "runc"
        self.signals: list[int] = []
        self.containers: dict[str, str] = {}
        self.unheeding = False

    def reload(self, pid: int, number: int) -> None:
        self.signals.append(pid)
        if self.unheeding:
            return
        value = json.loads(self.file.read_text())
        if "runtimes" in value:
            self.runtimes = {"runc": {"path": "runc"}, **value["runtimes"]}
        self.default = value.get("default-runtime", self.default)

    def get(self, url: str) -> Any:
        if url == "/info":
            return {"Runtimes": self.runtimes, "DefaultRuntime": self.default}
        assert url == "/containers/json?all=1"
        return [{"Id": name} for name in self.containers]

    def find(self, url: str) -> Any:
        name = url.split("/")[2]
        return {"Name": f"/{name}", "HostConfig": {"Runtime": self.containers[name]}}


class Host:
    """A host below `top`, with a running engine."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = top / "etc/docker/daemon.json"
        self.engine = FakeEngine(self.file)
        self.bin = top / "usr/bin"
        monkeypatch.setattr(daemon_file, "DEFAULT", self.file)
        monkeypatch.setattr("plugin.cli.runtime._RELOAD", 0.3)
        for name, text in (
            ("usr/bin/dockerd", DOCKERD),
            ("usr/bin/runc", "#!/bin/sh\necho runc version 1\n"),
            ("shipped/freeflow-runc", "#!/bin/sh\nexit 0\n"),
            ("run/docker.pid", "77"),
            ("proc/77/comm", "dockerd\n"),
            ("proc/77/environ", f"A=b\0PATH={top}/usr/bin\0"),
        ):
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.arguments = top / "proc/77/cmdline"
        self.arguments.write_text("dockerd\0-H\0fd://\0")
        self.files = HostFiles(
            shipped=top / "shipped/freeflow-runc",
            program=top / "usr/local/lib/freeflow/freeflow-runc",
            settings=top / "etc/freeflow/runtime",
            proc=top / "proc",
            root=nullcontext,
            run=top / "run",
            kill=self.engine.reload,
            places=str(self.bin),
        )
        self.setup = RuntimeSetup(self.engine, self.files)

    def write(self, text: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(text)

    def value(self) -> Any:
        return json.loads(self.file.read_text())

    def settings(self) -> str:
        return self.files.settings.read_text()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


def test_install_without_a_file(host: Host) -> None:
    """On a host without daemon.json the file has the runtime alone; the engine has read it."""
    lines = host.setup.install(default=True)
    assert host.value() == {
        "runtimes": {"freeflow": {"path": str(host.files.program)}},
        "default-runtime": "freeflow",
    }
    assert host.engine.signals == [77]
    assert host.engine.default == "freeflow"
    assert os.access(host.files.program, os.X_OK)
    assert f"runtime={host.bin}/runc\n" in host.settings()
    assert "the engine has reloaded it; no container was restarted" in lines
    assert [path.name for path in host.file.parent.iterdir()] == ["daemon.json"]


def test_other_settings_stay(host: Host) -> None:
    """Other keys, their order, indentation and mode stay; the old file is kept beside the new."""
    before = (
        '{\n  "log-driver": "json-file",\n  "runtimes": {"x": {"path": "/x"}},\n  "mtu": 1400\n}'
    )
    host.write(before)
    host.file.chmod(0o640)
    lines = host.setup.install(default=False)
    assert list(host.value()) == ["log-driver", "runtimes", "mtu"]
    assert host.value()["runtimes"] == {
        "x": {"path": "/x"},
        "freeflow": {"path": str(host.files.program)},
    }
    assert '\n  "mtu": 1400\n' in host.file.read_text()
    assert host.file.stat().st_mode & 0o777 == 0o640
    assert host.file.with_name("daemon.json.before-freeflow").read_text() == before
    assert any("changed runtimes;" in line for line in lines)
    assert host.engine.default == "runc"


def test_install_again(host: Host) -> None:
    """A second time nothing changes in the file, and the real runtime is still the first one's."""
    host.setup.install(default=True)
    before = host.file.stat().st_ino
    lines = host.setup.install(default=True)
    assert host.file.stat().st_ino == before
    assert f"runtime={host.bin}/runc\n" in host.settings()
    assert f"{host.file} is as it has to be" in lines


def test_another_default_runtime(host: Host) -> None:
    """The runtime that was the default is the one that is called, with its arguments, and is the
    default again afterwards.
    """
    nvidia = host.bin / "nvidia-container-runtime"
    nvidia.write_text("#!/bin/sh\n")
    nvidia.chmod(0o755)
    entry = {"path": nvidia.name, "runtimeArgs": ["--debug"]}
    host.write(json.dumps({"default-runtime": "nvidia", "runtimes": {"nvidia": entry}}))
    host.setup.install(default=True)
    assert f"runtime={nvidia}\n" in host.settings()
    assert host.value()["runtimes"]["freeflow"]["runtimeArgs"] == ["--debug"]
    host.setup.uninstall()
    assert host.value() == {"default-runtime": "nvidia", "runtimes": {"nvidia": entry}}


@pytest.mark.parametrize(
    "entry", [{"runtimeType": "io.containerd.kata.v2"}, {"path": ""}, {}, "kata", None]
)
def test_a_default_runtime_that_cannot_be_called(host: Host, entry: Any) -> None:
    """A default that isn't called like runc can't be replaced, but used beside the runtime."""
    host.write(json.dumps({"default-runtime": "kata", "runtimes": {"kata": entry}}))
    before = host.file.read_text()
    with pytest.raises(InvalidRequest, match="kata") as raised:
        host.setup.install(default=True)
    assert raised.value.remedy
    assert host.file.read_text() == before
    assert not host.files.program.exists()
    host.setup.install(default=False)
    assert f"runtime={host.bin}/runc\n" in host.settings()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        "// comment\n{}",
        '{"runtimes": []}',
        "\udcff{}",
        "[" * 100_000,
        " " * (2 << 20),
    ],
)
def test_a_file_that_is_not_understood(host: Host, text: str) -> None:
    """A file that can't be read with certainty stays as it is, and nothing is installed."""
    host.file.parent.mkdir(parents=True, exist_ok=True)
    host.file.write_bytes(text.encode(errors="surrogateescape"))
    before = host.file.read_bytes()
    with pytest.raises(InvalidRequest) as raised:
        host.setup.install(default=True)
    assert raised.value.remedy
    assert host.file.read_bytes() == before
    assert not host.files.program.exists()
    assert host.engine.signals == []


def test_the_engine_refuses_the_file(host: Host) -> None:
    """What dockerd --validate rejects is never put in place."""
    host.write('{"refuse-me": true}')
    with pytest.raises(InvalidRequest, match="would not accept"):
        host.setup.install(default=True)
    assert host.value() == {"refuse-me": True}
    assert host.engine.signals == []
    assert [path.name for path in host.file.parent.iterdir()] == ["daemon.json"]


def test_engines_that_cannot_validate(host: Host) -> None:
    """Engines before 23.0 have no --validate; the file is installed without it."""
    (host.bin / "dockerd.old").touch()
    host.setup.install(default=True)
    assert host.engine.default == "freeflow"


@pytest.mark.parametrize("option", ["--add-runtime=x=/x", "--default-runtime\0x"])
def test_options_of_the_engine(host: Host, option: str) -> None:
    """The engine rejects a setting that its command line has too, so it isn't written."""
    host.arguments.write_text(f"dockerd\0{option}\0")
    with pytest.raises(InvalidRequest, match="was started with"):
        host.setup.install(default=True)
    assert not host.file.exists()


def test_the_engines_own_file(host: Host, tmp_path: Path) -> None:
    """The file is the one with which the engine was started."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    host.engine.file = other
    host.arguments.write_text(f"dockerd\0--config-file\0{other}\0")
    host.setup.install(default=False)
    assert "freeflow" in json.loads(other.read_text())["runtimes"]
    assert not host.file.exists()


def test_a_program_that_does_not_run(host: Host) -> None:
    """The engine never gets a runtime that doesn't work on this host."""
    host.files.shipped.write_text("#!/bin/sh\necho no >&2\nexit 127\n")
    with pytest.raises(FreeFlowError, match="does not work"):
        host.setup.install(default=True)
    assert not host.file.exists()


def test_no_runc(host: Host) -> None:
    """Without a real runtime there is nothing to call."""
    (host.bin / "runc").unlink()
    with pytest.raises(InvalidRequest, match="runc was not found"):
        host.setup.install(default=True)


def test_an_engine_that_does_not_reload(host: Host) -> None:
    """If the engine goes on without the new file, that is an error."""
    host.engine.unheeding = True
    with pytest.raises(FreeFlowError, match="has not taken over"):
        host.setup.install(default=True)


@pytest.mark.parametrize("pid", ["", "x", "78", "-1"])
def test_no_engine(host: Host, pid: str) -> None:
    """Without a running engine the file is changed, and no process gets a signal."""
    (host.files.run / "docker.pid").write_text(pid)
    lines = host.setup.install(default=True)
    assert "the engine isn't running; it reads the file when it starts" in lines
    assert host.engine.signals == []
    host.setup.uninstall()
    assert host.value()["default-runtime"] == "runc"
    assert host.files.program.exists()


def test_uninstall(host: Host) -> None:
    """Nothing stays but an explicit default: a reload would keep the old one without it."""
    host.write('{"mtu": 1400}')
    host.setup.install(default=True)
    host.setup.uninstall()
    assert host.value() == {"mtu": 1400, "default-runtime": "runc"}
    assert host.engine.default == "runc"
    assert not host.files.program.parent.exists()
    assert not host.files.settings.parent.exists()


def test_uninstall_while_containers_have_it(host: Host) -> None:
    """Containers that were made with it can still start: the name stays until they are gone."""
    host.setup.install(default=True)
    host.engine.containers = {"web": "freeflow", "db": "runc"}
    lines = host.setup.uninstall()
    assert any("web can't start" in line for line in lines)
    assert "freeflow" in host.value()["runtimes"]
    assert host.value()["default-runtime"] == "runc"
    assert "accelerate=off" in host.settings()
    assert host.files.program.exists()
    assert "changes nothing" in "\n".join(show(host.setup.status()))
    del host.engine.containers["web"]
    host.setup.uninstall()
    assert "runtimes" not in host.value()
    assert not host.files.program.exists()


@pytest.mark.parametrize("file", ["runtime", "options.json"])
def test_uninstall_while_plugins_run_with_it(host: Host, file: str) -> None:
    """The engine stops its plugins by the runtime with which it has started them."""
    host.setup.install(default=True)
    bundle = (
        host.files.run / "docker/containerd/daemon/io.containerd.runtime.v2.task/plugins.moby/5"
    )
    bundle.mkdir(parents=True)
    (bundle / file).write_text(f'{{"binary_name":"{host.files.program}"}}')
    lines = host.setup.uninstall()
    assert any("restart the engine" in line for line in lines)
    assert host.files.program.exists()
    assert "runtimes" not in host.value()
    (bundle / file).write_text('{"binary_name":"/usr/bin/runc"}')
    host.setup.uninstall()
    assert not host.files.program.exists()


def test_status(host: Host) -> None:
    """The status says what is installed, what the file says, and what the engine uses."""
    assert list(show(host.setup.status())) == ["not installed (freeflow runtime install --default)"]
    host.setup.install(default=True)
    found = host.setup.status()
    assert (found.registered, found.default, found.engine_default) == (True, "freeflow", "freeflow")
    assert (found.accelerates, found.outdated) == (True, False)
    host.files.shipped.write_text("#!/bin/sh\n# new\n")
    assert any("another version" in line for line in show(host.setup.status()))
    host.files.program.unlink()
    assert any(
        "no container with this runtime starts" in line for line in show(host.setup.status())
    )
