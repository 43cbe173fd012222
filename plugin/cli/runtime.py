"""`freeflow runtime`: registers freeflow-runc as a runtime of this host's engine.

The command runs in the plugin's root file system, and changes files of the host: `users_root` leads
there. What it installs must outlive the plugin, because the engine calls it at every start of a
container: so the program is copied to the host.

A container keeps the name of its runtime (HostConfig.Runtime), also the default's. So uninstalling
leaves the name registered while containers have it, and only makes the program change nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from driver.errors import EngineError, FreeFlowError, InvalidRequest
from plugin.cli import daemon_file
from plugin.cli.client import Engine, host_run
from plugin.cli.daemon_file import DaemonFile
from plugin.cli.user_files import users_root

NAME: Final = "freeflow"
SHIPPED: Final = Path("/usr/lib/freeflow/freeflow-runc")
"""Where `plugin/image` puts the program."""
PROGRAM: Final = Path("/usr/local/lib/freeflow/freeflow-runc")
SETTINGS: Final = Path("/etc/freeflow/runtime")
"""Read by the program (`plugin/runtime/real_runtime.c`)."""
_HEAD: Final = "# Written by: freeflow runtime install\n"
_PLACES: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_RELOAD: Final = 5.0
"""Seconds for the engine to read its file again."""
_LOOK: Final = "journalctl -u docker"


class RuntimeStatus(msgspec.Struct, frozen=True):
    """What is on this host.

    `registered` and `default` are what daemon.json says, `engine_*` what the engine uses. `runtime`
    is what the program calls. `outdated`: the program is another than the plugin's.
    """

    program: str = ""
    outdated: bool = False
    runtime: str = ""
    accelerates: bool = False
    file: str = ""
    registered: bool = False
    default: str = "runc"
    engine_registered: bool = False
    engine_default: str = ""


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A running dockerd: `words` are its arguments, `places` its PATH."""

    pid: int
    words: tuple[str, ...]
    places: str

    def option(self, name: str) -> str | None:
        """The value of an option of its command line, None without it."""
        for word, after in zip(self.words, (*self.words[1:], ""), strict=True):
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
            if word == f"--{name}":
                return after
        return None


@dataclass(slots=True)
class HostFiles:
    """The files that are changed, as paths of the user's root, and how to get there."""

    shipped: Path = SHIPPED
    program: Path = PROGRAM
    settings: Path = SETTINGS
    proc: Path = Path("/proc")
    root: Callable[[], AbstractContextManager[None]] = users_root
    run: Path = field(default_factory=host_run)
    kill: Callable[[int, int], None] = os.kill
    places: str = _PLACES


def engine_process(files: HostFiles) -> EngineProcess | None:
    """This host's dockerd, by its PID file; None if it isn't running."""
    try:
        pid = int((files.run / "docker.pid").read_text())
        folder = files.proc / str(pid)
        if (folder / "comm").read_text().strip() != "dockerd":
            return None
        words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
    except (OSError, ValueError):
        return None
    places = next((item[5:] for item in environment if item.startswith("PATH=")), "")
    return EngineProcess(pid, tuple(words), places)


def _settings(files: HostFiles) -> dict[str, str]:
    try:
        text = files.settings.read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, separator, value in pairs if separator}


def _write_settings(files: HostFiles, values: dict[str, str]) -> None:
    files.settings.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = files.settings.with_name(f".{files.settings.name}.new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o644), "w") as file:
        file.write(_HEAD + "".join(f"{name}={value}\n" for name, value in values.items()))
    temporary.replace(files.settings)


def _copy_program(files: HostFiles, content: bytes) -> None:
    """The engine may start the program at any moment: it is replaced by renaming."""
    files.program.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = files.program.with_name(f".{files.program.name}.new")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o755), "wb") as file:
        file.write(content)
        os.fchmod(file.fileno(), 0o755)
        os.fsync(file.fileno())
    temporary.replace(files.program)


def _called_by_shims(files: HostFiles) -> bool:
    """Whether containerd calls the program for something that runs now: also to stop it.

    The engine runs plugins by its default runtime. Each shim notes its runtime in its bundle, as
    the program's path, or that of a script of the engine's (DATA_ROOT/runtimes/NAME).
    """
    marks = (str(files.program).encode(), f"/runtimes/{NAME}".encode())
    for folder in ("docker/containerd/daemon", "containerd"):
        for name in ("runtime", "options.json"):
            for path in (files.run / folder).glob(f"*/*/*/{name}"):
                with suppress(OSError):
                    content = path.read_bytes()
                    if any(mark in content for mark in marks):
                        return True
    return False


@dataclass(slots=True)
class RuntimeSetup:
    """Installs, uninstalls, and shows. Messages for the user are returned as lines."""

    engine: Engine
    files: HostFiles = field(default_factory=HostFiles)

    # --- install

    def install(self, *, default: bool) -> list[str]:
        """Register the runtime; `default`: for all containers that name none.

        Raises:
            FreeFlowError: the engine's file is as it was; or the engine has not taken over the changed
                one. That stays, because the engine may do so late, and containers would need it.
        """
        process = engine_process(self.files)
        try:
            content = self.files.shipped.read_bytes()
        except OSError as error:
            raise FreeFlowError(
                "this plugin has no freeflow-runc", cause=str(error), remedy="upgrade the plugin"
            ) from error
        with self.files.root(), _host_errors():
            file = self._daemon_file(process, default)
            real, entry = self._real(file, process, default)
            values = {"runtime": real}
            before = _settings(self.files).get("default") or file.default_runtime()
            values["default"] = before if before != NAME else "runc"
            _copy_program(self.files, content)
            _write_settings(self.files, values)
            self._try_program()
            lines = [f"{self.files.program} calls {real}"]
            value = dict(file.value)
            value["runtimes"] = {**file.runtimes(), NAME: entry}
            if default:
                value["default-runtime"] = NAME
            lines += self._change(file, value, process)
        lines += self._reload(process, lambda info: _has_runtime(info, default))
        lines.append(
            "containers that are created from now on use it; existing ones keep their runtime"
            if default
            else "docker run --runtime freeflow uses it; services need: freeflow runtime install --default"
        )
        return lines

    def _daemon_file(self, process: EngineProcess | None, default: bool) -> DaemonFile:
        path = daemon_file.DEFAULT
        if process is not None:
            path = Path(process.option("config-file") or path)
            for option in ("add-runtime", *(("default-runtime",) if default else ())):
                if process.option(option) is not None:
                    raise InvalidRequest(
                        f"the engine was started with --{option}",
                        cause=f"it rejects a file that has this setting too ({path})",
                        remedy=f"move the option from dockerd's command line to {path}, and restart it",
                    )
        return daemon_file.read(path)

    def _real(
        self, file: DaemonFile, process: EngineProcess | None, default: bool
    ) -> tuple[str, dict[str, Any]]:
        """The absolute path of the runtime that the program is to call, and its own entry."""
        name = file.default_runtime()
        if name == NAME:
            name = _settings(self.files).get("default") or "runc"
        found = file.runtimes().get(name, {"path": "runc"} if name == "runc" else {})
        if not isinstance(found, dict) or not found.get("path") or found.get("runtimeType"):
            if default:
                raise InvalidRequest(
                    f"the default runtime {name} can't be called by FreeFlow's",
                    cause="it is no program with runc's arguments",
                    remedy="freeflow runtime install, without --default; then docker run --runtime freeflow",
                )
            found = {"path": "runc"}
        places = (process.places if process is not None else "") or self.files.places
        real = shutil.which(str(found["path"]), path=places)
        if real is None or not Path(real).is_absolute():
            raise InvalidRequest(
                f"{found['path']} was not found on this host",
                cause=f"it is the engine's runtime {name}, and none of {places} has it",
                remedy="write its absolute path into daemon.json, below runtimes",
            )
        entry = {"path": str(self.files.program)}
        if found.get("runtimeArgs"):
            entry["runtimeArgs"] = found["runtimeArgs"]
        return real, entry

    def _try_program(self) -> None:
        """The program must lead to the real runtime before the engine depends on it."""
        done = subprocess.run(
            [str(self.files.program), "--version"], capture_output=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise FreeFlowError(
                f"{self.files.program} does not work on this host",
                cause=done.stderr.decode(errors="replace").strip()[-300:],
                remedy=f"{self.files.program} --version shows it; daemon.json was not changed",
            )

    def _change(
        self, file: DaemonFile, value: dict[str, Any], process: EngineProcess | None
    ) -> list[str]:
        if value == file.value:
            return [f"{file.path} is as it has to be"]
        places = (process.places if process is not None else "") or self.files.places
        daemon_file.replace(file, value, shutil.which("dockerd", path=places))
        changed = [
            key
            for key in dict.fromkeys((*file.value, *value))
            if file.value.get(key) != value.get(key)
        ]
        kept = f"; before: {file.path.name}{daemon_file.BACKUP}" if file.text else ""
        return [f"{file.path}: changed {' and '.join(changed)}{kept}"]

    def _reload(
        self, process: EngineProcess | None, taken: Callable[[dict[str, Any]], bool]
    ) -> list[str]:
        if process is None:
            return ["the engine isn't running; it reads the file when it starts"]
        try:
            self.files.kill(process.pid, signal.SIGHUP)
            until = time.monotonic() + _RELOAD
            while not taken(self.engine.get("/info")):
                if time.monotonic() > until:
                    raise FreeFlowError(
                        "the engine has not taken over the changed file",
                        cause="it was told to reload it (SIGHUP)",
                        remedy=f"{_LOOK} says why; a restart of the engine reads it, too",
                    )
                time.sleep(0.1)
        except OSError as error:
            raise FreeFlowError(
                "the engine can't be told to reload its file",
                cause=str(error),
                remedy="systemctl reload docker",
            ) from error
        return ["the engine has reloaded it; no container was restarted"]

    # --- uninstall

    def uninstall(self) -> list[str]:
        """Take the runtime away, as far as no container needs it. Raises FreeFlowError."""
        process = engine_process(self.files)
        users = self._users() if process is not None else []
        with self.files.root(), _host_errors():
            settings = _settings(self.files)
            file = self._daemon_file(process, default=False)
            value = dict(file.value)
            if value.get("default-runtime") == NAME:
                # Explicit, because a reload keeps a setting that the file no longer has.
                value["default-runtime"] = settings.get("default") or "runc"
            others = {name: entry for name, entry in file.runtimes().items() if name != NAME}
            if not users and process is not None:
                value["runtimes"] = others
                if not others:
                    del value["runtimes"]
            if settings:
                _write_settings(self.files, {**settings, "accelerate": "off"})
            lines = self._change(file, value, process)
        lines += self._reload(process, lambda info: info.get("DefaultRuntime") != NAME)
        if process is None:
            lines.append(
                "the program stays, because containers may need it: repeat this with the engine"
            )
        elif users:
            more = f" and {len(users) - 5} more" if len(users) > 5 else ""
            lines.append(
                f"the name stays registered, and changes nothing: {', '.join(users[:5])}{more} can't start "
                "without it; create them anew, then repeat this"
            )
        elif _called_by_shims(self.files):
            lines.append(
                f"{self.files.program} stays, and changes nothing: the engine's plugins were started with it; "
                "restart the engine, then repeat this"
            )
        else:
            with self.files.root(), _host_errors():
                for path in (self.files.program, self.files.settings):
                    path.unlink(missing_ok=True)
                    with suppress(OSError):
                        path.parent.rmdir()
            lines.append(f"removed {self.files.program}")
        return lines

    def _users(self) -> list[str]:
        """Names of containers that have this runtime, running or not. Raises EngineError."""
        found = []
        for item in self.engine.get("/containers/json?all=1"):
            container = self.engine.find(f"/containers/{item['Id']}/json")
            if container and (container.get("HostConfig") or {}).get("Runtime") == NAME:
                found.append(str(container.get("Name", item["Id"][:12])).lstrip("/"))
        return sorted(found)

    # --- status

    def status(self) -> RuntimeStatus:
        """Raises InvalidRequest if daemon.json can't be read."""
        process = engine_process(self.files)
        shipped = self.files.shipped.read_bytes() if self.files.shipped.exists() else b""
        info: dict[str, Any] = {}
        with suppress(EngineError):
            info = self.engine.get("/info")
        with self.files.root(), _host_errors():
            path = Path((process.option("config-file") if process else None) or daemon_file.DEFAULT)
            file = daemon_file.read(path)
            settings = _settings(self.files)
            present = self.files.program.exists()
            outdated = present and self.files.program.read_bytes() != shipped
        return RuntimeStatus(
            program=str(self.files.program) if present else "",
            outdated=outdated,
            runtime=settings.get("runtime", ""),
            accelerates=present and settings.get("accelerate") != "off",
            file=str(path),
            registered=NAME in file.runtimes(),
            default=file.default_runtime(),
            engine_registered=NAME in (info.get("Runtimes") or {}),
            engine_default=str(info.get("DefaultRuntime") or ""),
        )


def _has_runtime(info: dict[str, Any], default: bool) -> bool:
    registered = NAME in (info.get("Runtimes") or {})
    return registered and (not default or info.get("DefaultRuntime") == NAME)


@contextmanager
def _host_errors() -> Iterator[None]:
    """Files of the host that can't be changed are an error with a remedy."""
    try:
        yield
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FreeFlowError(
            "a file of the host can't be changed or called",
            cause=str(error),
            remedy="run it as root, on a host whose /etc and /usr/local can be written",
        ) from error


def show(status: RuntimeStatus) -> Iterator[str]:
    """Lines for the user."""
    if not status.program and not status.registered and not status.engine_registered:
        yield "not installed (freeflow runtime install --default)"
        return
    if status.program:
        state = "adds the library" if status.accelerates else "changes nothing (uninstalled)"
        yield f"program {status.program}: {state}, calls {status.runtime or 'runc in PATH'}"
        if status.outdated:
            yield "it is of another version than the plugin (freeflow runtime install replaces it)"
    else:
        yield "the program is missing, so no container with this runtime starts: freeflow runtime install"
    yield f"{status.file}: {'registered' if status.registered else 'not registered'}, default {status.default}"
    if status.engine_default:
        known = "registered" if status.engine_registered else "not registered"
        yield f"engine: {known}, default {status.engine_default}"
    else:
        yield "engine: it does not answer"
