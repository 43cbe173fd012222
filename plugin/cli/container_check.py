"""`freeflow doctor CONTAINER`: whether the library is mounted, loaded, and this host's version.

/proc shows the environment of each process and the files that it has mapped. A library that was
replaced since is another file with the same name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from driver.errors import EngineError, FreeFlowError
from plugin.cli import preload
from plugin.cli.client import Client, Engine, host_run
from plugin.cli.doctor import DoctorReport
from plugin.cli.preload import FOLDER, LIBRARY
from plugin.settings import RESTART
from plugin.status import Finding, Status

RUNTIME: Final = "freeflow"
_WAYS: Final = {
    "user": "mounted by its stack or its command line (freeflow inject)",
    "runtime": "added by the runtime (freeflow runtime)",
}
_OPTIONS: Final = " ".join(preload.options({}))

_MOST_BYTES: Final = 8 << 20
"""Limit of a file in /proc; the kernel allows 65,530 mappings."""
_MOST_PROCESSES: Final = 2000
_MAPPED: Final = re.compile(
    rf"^\S+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) +\S*/{re.escape(LIBRARY)}( \(deleted\))?$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """One process. `library` is the mapped file's device and inode, None without it."""

    pid: int
    name: str
    preloads: bool
    library: tuple[int, int] | None


def _read(path: Path) -> str:
    """The beginning of a file whose content a container's process controls. Raises OSError."""
    with path.open("rb") as file:
        return file.read(_MOST_BYTES).decode(errors="backslashreplace")


def inspect_process(pid: int, proc: Path = Path("/proc")) -> Loaded | None:
    """A process, as the kernel shows it; None if it has ended."""
    folder = proc / str(pid)
    try:
        environment = _read(folder / "environ").split("\0")
        # A process may give itself any name.
        name = _read(folder / "comm").strip()
        mapped = _MAPPED.search(_read(folder / "maps"))
    except OSError:
        return None
    preloads = any(
        variable.startswith("LD_PRELOAD=") and LIBRARY in variable for variable in environment
    )
    library = None
    if mapped is not None:
        device = os.makedev(int(mapped[1], 16), int(mapped[2], 16))
        library = (device, int(mapped[3]))
    return Loaded(pid, name, preloads, library)


def own_library(run: Path) -> tuple[int, int] | None:
    """The host's library: device and inode; None if there is none."""
    try:
        found = (run / "freeflow" / LIBRARY).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _container(engine: Engine, name: str) -> dict[str, Any] | Finding:
    try:
        found: dict[str, Any] = engine.get(f"/containers/{quote(name, safe='')}/json")
    except EngineError as error:
        remedy = "docker ps, on the host that runs it"
        return Finding("error", f"{name} can't be inspected", error.reason, remedy)
    if not found.get("State", {}).get("Running"):
        return Finding("error", f"{name} isn't running", "it has ended", f"docker start {name}")
    return found


def _processes(engine: Engine, name: str, proc: Path) -> list[Loaded]:
    """Raises EngineError."""
    top = engine.get(f"/containers/{quote(name, safe='')}/top?ps_args=-eo%20pid")
    column = top["Titles"].index("PID")
    found = (inspect_process(int(row[column]), proc) for row in top["Processes"][:_MOST_PROCESSES])
    return [process for process in found if process is not None]


def mounted_by(container: dict[str, Any], proc: Path) -> str:
    """Who has mounted the directory of library and router: `user`, `runtime`, or nobody (empty).

    Docker knows the mounts of users alone; the kernel knows what the runtime has added, too.
    """
    mounts = container.get("Mounts") or ()
    if any(str(mount.get("Destination")).rstrip("/") == FOLDER for mount in mounts):
        return "user"
    try:
        table = _read(proc / str(container["State"].get("Pid")) / "mountinfo")
    except OSError:
        return ""
    fields = (line.split(" ") for line in table.splitlines())
    return "runtime" if any(len(each) > 4 and each[4] == FOLDER for each in fields) else ""


def why_not_by_runtime(name: str, container: dict[str, Any]) -> str:
    """Why the runtime, if it is registered at all, has not given the library to the container."""
    config = container.get("Config") or {}
    if (container.get("HostConfig") or {}).get("Runtime") != RUNTIME:
        return f"its runtime isn't {RUNTIME}"
    if (config.get("Labels") or {}).get("freeflow.accelerate") == "off":
        return "its label freeflow.accelerate is off"
    if "FREEFLOW=off" in (config.get("Env") or ()):
        return "its variable FREEFLOW is off"
    return (
        f"runtime {RUNTIME} did not add it (docs/runtime.md says when it doesn't), or {name} was on no "
        "FreeFlow network when it started"
    )


def check_mount(name: str, container: dict[str, Any], by: str) -> Iterator[Finding]:
    """Whether the directory of library and router is mounted in the container."""
    if not by:
        yield Finding(
            "error",
            f"{name} has no {FOLDER}",
            f"library and router are not visible in the container: {why_not_by_runtime(name, container)}",
            f"start it with {_OPTIONS}, or: freeflow runtime install --default, and make it anew",
        )


def check_network(name: str, status: Status) -> Iterator[Finding]:
    """Whether the container is on a network that accelerates."""
    networks = [
        network
        for network in status.networks
        if any(endpoint.container == name for endpoint in network.endpoints)
    ]
    if not networks:
        yield Finding(
            "error",
            f"{name} is on no FreeFlow network",
            "only FreeFlow networks are accelerated",
            f"docker network connect NETWORK {name}",
        )
    elif not any(network.acceleration for network in networks):
        yield Finding(
            "warning",
            f"acceleration is off on all networks of {name}",
            "they were made with -o acceleration=off",
            "make a network without that option",
        )
    elif status.settings.get("ACCELERATION", "on") != "on":
        yield Finding(
            "warning",
            "acceleration is off on this host",
            "the setting ACCELERATION is off",
            "docker plugin set freeflow:latest ACCELERATION=on, with the plugin disabled",
        )


def _names(processes: Iterable[Loaded]) -> str:
    found = sorted({process.name for process in processes})
    return ", ".join(found[:5]) + (" …" if len(found) > 5 else "")


def check_processes(
    name: str, processes: list[Loaded], own: tuple[int, int] | None
) -> Iterator[Finding]:
    """Whether the container's processes have loaded the library, and which."""
    if own is None:
        yield Finding(
            "error",
            f"this host has no {FOLDER}/{LIBRARY}",
            "the plugin should have put it there at its start",
            RESTART,
        )
        return
    if not any(process.preloads or process.library for process in processes):
        yield Finding(
            "error",
            f"no process of {name} loads the library",
            "LD_PRELOAD is not in their environment",
            f"start it with {_OPTIONS}",
        )
    # What `docker run --init` puts before the program is static, and has no connections.
    without = [
        process
        for process in processes
        if process.preloads and process.library is None and process.name != "docker-init"
    ]
    if without:
        yield Finding(
            "warning",
            f"{len(without)} of {len(processes)} processes of {name} can't load the library",
            f"{_names(without)}: a static or Go program, one with more privileges than its user, or of another "
            "architecture",
            "nothing can be done: their connections stay on the overlay",
        )
    old = [process for process in processes if process.library not in (None, own)]
    if old:
        yield Finding(
            "warning",
            f"{len(old)} of {len(processes)} processes of {name} run with another library than this host's",
            f"{_names(old)}: started before the plugin was upgraded; it works, but its peers may be ahead",
            f"docker restart {name}",
        )


def examine_container(
    client: Client, name: str, *, run: Path | None = None, proc: Path = Path("/proc")
) -> DoctorReport:
    """All checks of one container's library."""
    container = _container(client.engine, name)
    if isinstance(container, Finding):
        return DoctorReport([], [container])
    name = str(container.get("Name", name)).lstrip("/")
    passed: list[str] = []
    findings: list[Finding] = []

    def add(what: str, found: Iterable[Finding]) -> None:
        before = len(findings)
        findings.extend(found)
        if len(findings) == before:
            passed.append(what)

    by = mounted_by(container, proc)
    add(f"{FOLDER} is in the container: {_WAYS.get(by)}", check_mount(name, container, by))
    try:
        processes = _processes(client.engine, name, proc)
    except EngineError as error:
        findings.append(Finding.of("warning", "not checked: its processes", error))
    else:
        loaded = sum(process.library is not None for process in processes)
        what = f"{loaded} of {len(processes)} processes have this host's library"
        add(what, check_processes(name, processes, own_library(run or host_run())))
    try:
        status = client.status()
    except FreeFlowError as error:
        findings.append(Finding.of("error", "the plugin is not running", error))
        return DoctorReport(passed, findings)
    add("a network of it is accelerated", check_network(name, status))
    router = status.router
    if router is None or not router.up:
        findings.append(
            Finding(
                "warning",
                "the router does not answer; new connections stay on the overlay",
                "it is being started, or it can't be started",
                "journalctl -u docker | grep router",
            )
        )
    for share in router.containers if router is not None else ():
        if share.container == name:
            passed.append(
                f"the router knows {share.processes} of its processes, "
                f"{share.connections} connections on shm, {share.waiting} waiting for their peers"
            )
    return DoctorReport(passed, findings)
