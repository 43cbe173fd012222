"""`freeflow doctor CONTAINER`: whether the library is mounted, loaded, and this host's version; the
same of our libibverbs, where it was added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from dataplane.control import VerbsDeviceFact
from driver.answers import items, text_of
from driver.errors import EngineError, FreeFlowError
from driver.other_networks import LABEL, switch
from plugin.cli import preload, verbs_check
from plugin.cli.client import Client, Engine, host_run
from plugin.cli.doctor import DoctorReport
from plugin.cli.loaded import File, Loaded, host_file, inspect_process, read_some, some_names
from plugin.cli.preload import FOLDER, LIBRARY
from plugin.settings import RESTART
from plugin.status import Finding, Status

RUNTIME: Final = "freeflow"
_WAYS: Final = {
    "user": "mounted by its stack or its command line (freeflow inject)",
    "runtime": "added by the runtime (freeflow runtime)",
}
_OPTIONS: Final = " ".join(preload.options({}))

_MOST_PROCESSES: Final = 2000


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
        table = read_some(proc / str(container["State"].get("Pid")) / "mountinfo")
    except OSError:
        return ""
    fields = (line.split(" ") for line in table.splitlines())
    return "runtime" if any(len(each) > 4 and each[4] == FOLDER for each in fields) else ""


def why_not_by_runtime(name: str, container: dict[str, Any]) -> str:
    """Why the runtime, if it is registered at all, has not given the library to the container."""
    config = container.get("Config") or {}
    if (container.get("HostConfig") or {}).get("Runtime") != RUNTIME:
        return f"its runtime isn't {RUNTIME}"
    if switch((config.get("Labels") or {}).get(LABEL)) is False:
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


def _others(name: str, status: Status) -> list[str]:
    """What the container's networks of other drivers gain."""
    return [
        f"on {network.name} ({network.driver}) connections move "
        + ("within and between hosts" if network.between_hosts else "within this host")
        for network in status.other_networks
        if name in network.containers
    ]


def _refusals(container: dict[str, Any], status: Status) -> list[str]:
    """Why networks of the container that ask for acceleration don't have it."""
    own = (container.get("NetworkSettings") or {}).get("Networks") or {}
    ids = {text_of(items(network).get("NetworkID")) for network in own.values()}
    return [
        f"{network.name}: {network.reason}"
        for network in status.other_networks
        if network.reason and network.id in ids
    ]


def check_network(name: str, container: dict[str, Any], status: Status) -> Iterator[Finding]:
    """Whether the container is on a network that accelerates."""
    networks = [
        network
        for network in status.networks
        if any(endpoint.container == name for endpoint in network.endpoints)
    ]
    others = any(name in network.containers for network in status.other_networks)
    if not networks and not others:
        yield Finding(
            "error",
            f"{name} is on no network that is accelerated",
            "; ".join(_refusals(container, status))
            or "only FreeFlow networks are, and others with the label freeflow.accelerate=on",
            f"docker network connect NETWORK {name}",
        )
    elif not others and not any(network.acceleration for network in networks):
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


def check_processes(name: str, processes: list[Loaded], own: File | None) -> Iterator[Finding]:
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
            f"{some_names(without)}: a static or Go program, one with more privileges than its user, or of another "
            "architecture",
            "nothing can be done: their connections stay on the overlay",
        )
    old = [process for process in processes if process.library not in (None, own)]
    if old:
        yield Finding(
            "warning",
            f"{len(old)} of {len(processes)} processes of {name} run with another library than this host's",
            f"{some_names(old)}: started before the plugin was upgraded; it works, but its peers may be ahead",
            f"docker restart {name}",
        )


@dataclass(slots=True)
class _Examination:
    """What the checks have found so far."""

    passed: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, found: Iterable[Finding]) -> None:
        """`what` is true if a check has found nothing."""
        before = len(self.findings)
        self.findings.extend(found)
        if len(self.findings) == before:
            self.passed.append(what)

    def report(self) -> DoctorReport:
        return DoctorReport(self.passed, self.findings, self.notes)


def examine_container(
    client: Client, name: str, *, run: Path | None = None, proc: Path = Path("/proc")
) -> DoctorReport:
    """All checks of one container's libraries."""
    container = _container(client.engine, name)
    if isinstance(container, Finding):
        return DoctorReport([], [container])
    name = str(container.get("Name", name)).lstrip("/")
    run = run or host_run()
    found = _Examination()
    by = mounted_by(container, proc)
    found.add(f"{FOLDER} is in the container: {_WAYS.get(by)}", check_mount(name, container, by))
    processes: list[Loaded] = []
    try:
        processes = _processes(client.engine, name, proc)
    except EngineError as error:
        found.findings.append(Finding.of("warning", "not checked: its processes", error))
    else:
        loaded = sum(process.library is not None for process in processes)
        what = f"{loaded} of {len(processes)} processes have this host's library"
        found.add(what, check_processes(name, processes, host_file(run, preload.PRELOAD)))
    try:
        status = client.status()
    except FreeFlowError as error:
        found.findings.append(Finding.of("error", "the plugin is not running", error))
        return found.report()
    found.add("a network of it is accelerated", check_network(name, container, status))
    found.passed += _others(name, status)
    _examine_verbs(client, found, name, processes, status, run)
    router = status.router
    if router is None or not router.up:
        found.findings.append(
            Finding(
                "warning",
                "the router does not answer; new connections stay on the overlay",
                "it is being started, or it can't be started",
                "journalctl -u docker | grep router",
            )
        )
    for share in router.containers if router is not None else ():
        if share.container == name:
            found.passed.append(
                f"the router knows {share.processes} of its processes, "
                f"{share.connections} connections on shm, {share.waiting} waiting for their peers"
            )
    return found.report()


def _examine_verbs(
    client: Client,
    found: _Examination,
    name: str,
    processes: list[Loaded],
    status: Status,
    run: Path,
) -> None:
    """Our libibverbs, where it was added; elsewhere a note on another one, if there is one."""
    devices: list[VerbsDeviceFact] = []
    if verbs_check.have_verbs(processes):
        loaded = sum(process.verbs is not None for process in processes)
        what = f"{loaded} of {len(processes)} processes have this host's libibverbs"
        own, companion = (host_file(run, path) for path in preload.VERBS)
        found.add(what, verbs_check.check_libraries(name, processes, own, companion))
        found.add("a network of it has verbs", verbs_check.check_verbs_on(name, status))
        # The router's answer; without it a finding says so.
        with contextlib.suppress(FreeFlowError):
            devices = [device for device in client.verbs().devices if device.container == name]
    found.notes += verbs_check.notes(processes, devices)
