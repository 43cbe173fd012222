"""One Swarm for all scenarios: four hosts, three of them managers, engines 28.5 (twice), 20.10 with
systemd, and 26.1.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import Bed, Host, wait_until
from testbed.bed import in_parallel
from testbed.images import WORKLOAD_IMAGE
from testbed.process import CommandError

PLUGIN = Path(__file__).resolve().parents[2] / "build/plugin"
ENGINES = ("28.5", "20.10+systemd", "26.1", "28.5")
MANAGERS = 3

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = ""
    if os.geteuid() != 0:
        missing = "root"
    elif shutil.which("mmdebstrap") is None:
        missing = "mmdebstrap (make setup)"
    elif not (PLUGIN / "config.json").exists():
        missing = "the built plugin (make plugin)"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.swarm)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"needs {missing}"))


@pytest.fixture(scope="session")
def plugin() -> Path:
    """The built plugin's directory."""
    return PLUGIN


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    """The Swarm, with the plugin on every host."""
    with Bed(f"test{os.getpid()}", ENGINES) as made:
        made.swarm(managers=MANAGERS)
        made.load_workload()
        made.install_plugin(PLUGIN)
        yield made


@pytest.fixture
def manager(bed: Bed) -> Host:
    return bed.hosts[0]


@pytest.fixture(autouse=True)
def tidy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove whatever a scenario leaves behind, and show the engines' logs if it fails."""
    yield
    if "bed" not in request.fixturenames:
        return
    bed: Bed = request.getfixturevalue("bed")
    report = getattr(request.node, "report_call", None)
    if report is not None and report.failed:
        for host in bed.hosts:
            lines = [line for line in host.log_tail(300).splitlines() if "Inconsistent" not in line]
            report.sections.append((f"{host.name} dockerd", "\n".join(lines[-40:])))
    remove_everything(bed)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    if call.when == "call":
        item.report_call = outcome.get_result()  # type: ignore[attr-defined]


def remove_containers(host: Host) -> None:
    """Remove all containers of a host, also those whose removal is in progress.

    Docker refuses to remove the latter again.
    """

    def removed() -> bool:
        left = host.docker("ps", "-aq").split()
        if left:
            host.docker("rm", "-f", *left, timeout=180, check=False)
        return not host.docker("ps", "-aq").split()

    wait_until(f"the containers of {host.name} to be removed", removed, 180)


def remove_everything(bed: Bed) -> None:
    """Remove all services, containers and networks of the Swarm of the bed."""
    manager = bed.hosts[0]
    services = manager.docker("service", "ls", "-q").split()
    if services:
        manager.docker("service", "rm", *services)
    # Tasks, too: many programs ignore SIGTERM as process 1, and would have ten seconds.
    in_parallel([lambda h=host: remove_containers(h) for host in bed.hosts])  # type: ignore[misc]

    def networks() -> list[str]:
        listed = manager.docker("network", "ls", "--format", "{{.ID}} {{.Driver}} {{.Name}}")
        return [
            line.split()[0]
            for line in listed.splitlines()
            if line.split()[1].startswith("freeflow")
            or (line.split()[1] == "overlay" and line.split()[-1] != "ingress")
        ]

    def removed() -> bool:
        left = networks()
        if left:
            manager.docker("network", "rm", *left, check=False)
        return not networks()

    wait_until("networks to be removed", removed, 60, 0.5)


def logged(bed: Bed, text: str) -> bool:
    """Whether some engine's log contains a text.

    The text may be in the log of any leader, because earlier scenarios may have moved the leader.
    """
    return any(text in host.log_tail(2000) for host in bed.hosts)


def plugin_answers(host: Host) -> bool:
    """Whether the plugin runs and its command is installed on the host."""
    return '"version"' in host.freeflow("status", "--json", check=False)


def unique(prefix: str) -> str:
    """A name that no other scenario uses."""
    return f"{prefix}{next(_numbers)}"


def make_network(host: Host, *options: str, driver: str = "freeflow:latest") -> str:
    """Make an attachable network of the Swarm and return its name."""
    name = unique("net")
    host.docker("network", "create", "-d", driver, "--attachable", *options, name)
    wait_until(
        f"{name} to be allocated",
        lambda: host.docker("network", "inspect", "-f", "{{.Driver}}", name).strip() == driver,
        20,
    )
    return name


def not_attached(error: str) -> bool:
    """Whether an error means that the Swarm has not attached a container within 20 s.

    The engine waits no longer. It happens for a minute after some power failures, and at times on a
    busy machine, with any driver. If the request is repeated just when the Swarm withdraws the late
    attachment, the engine reports the second of these errors.
    """
    return "attaching to network failed" in error or ("network" in error and "not found" in error)


def run_container(host: Host, network: str, *options: str, command: str = "sleep infinity") -> str:
    """Start a container of the workload image on a network and return its name."""
    name = unique("box")
    try:
        host.docker(
            *("run", "-d", "--init", "--name", name, "--network", network, *options),
            *(WORKLOAD_IMAGE, "sh", "-c", command),
        )
    except CommandError as error:
        if not not_attached(str(error)):
            raise
        wait_until(f"{name} to be attached", lambda: host.docker("start", name, timeout=30), 90, 1)
    return name


def address(host: Host, container: str, network: str) -> str:
    """A container's IPv4 address on a network."""
    text = host.docker(
        *(
            "inspect",
            "-f",
            f'{{{{(index .NetworkSettings.Networks "{network}").IPAddress}}}}',
            container,
        )
    )
    return text.strip()


LIBRARY = (
    *("--mount", "type=bind,src=/run/freeflow,dst=/run/freeflow"),
    *("--env", "LD_PRELOAD=/run/freeflow/libfreeflow.so"),
)
"""The options of an accelerated container or service."""

NGINX = "hostname > /var/www/html/index.html; exec nginx -g 'daemon off;'"
REDIS = "exec redis-server --protected-mode no --bind 0.0.0.0 --save ''"


def make_service(
    manager: Host, network: str, command: str, *options: str, replicas: int = 3, wait: bool = True
) -> str:
    """Start a service of the workload image and return its name."""
    name = unique("svc")
    manager.docker(
        *("service", "create", "-d", "--no-resolve-image", "--name", name, "--network", network),
        # A program without a handler for SIGTERM is killed soon.
        *("--replicas", str(replicas), "--stop-grace-period", "2s", *options),
        *(WORKLOAD_IMAGE, "sh", "-c", command),
    )
    if wait:
        wait_running(manager, name, replicas)
    return name


def wait_running(manager: Host, service: str, replicas: int, timeout: float = 60) -> None:
    def running() -> bool:
        text = manager.docker(
            *(
                "service",
                "ps",
                "-f",
                "desired-state=running",
                "--format",
                "{{.CurrentState}}",
                service,
            )
        )
        states = text.splitlines()
        return len(states) == replicas and all(state.startswith("Running") for state in states)

    try:
        wait_until(f"{replicas} tasks of {service}", running, timeout, 0.3)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{tasks_of(manager, service)}") from error


def tasks_of(manager: Host, service: str) -> str:
    """A table of a service's tasks, with their hosts and errors."""
    form = "{{.Name}} {{.Node}} {{.DesiredState}} {{.CurrentState}} {{.Error}}"
    return manager.docker("service", "ps", "--no-trunc", "--format", form, service)
