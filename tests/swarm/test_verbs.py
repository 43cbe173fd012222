"""RDMA verbs in a Swarm: Debian's programs between two containers of a host, and in a service that
is scaled, rolled, and loses its host.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed import Bed, Host, wait_until
from testbed.images import WORKLOAD_IMAGE
from testbed.patience import patience
from tests.dataplane.places import compile_c
from tests.swarm.conftest import (
    address,
    make_network,
    make_service,
    run_container,
    unique,
    wait_running,
)

README = Path(__file__).parents[2] / "README.md"
PORT = 18515
USER = ("--user", "65534:65534")
Box = tuple[Host, str]
"""A container: its host, and its name."""
WRITE_LAT = ("ib_write_lat", "-d", "freeflow0", "-x", "0", "-F", "-p", str(PORT))
PING_PONG = ("ibv_rc_pingpong", "-g", "0", "-p", str(PORT))
RECONNECTING = Path(__file__).parent / "programs/reconnecting.c"
ENDS = {
    "client": "broken: transport retry counter exceeded, local work queue catastrophic error",
    "idle": "RDMA_CM_EVENT_DISCONNECTED",
}
"""What the two kinds of clients of RECONNECTING say when their peer is lost."""


def options(host: Host) -> list[str]:
    """What `freeflow inject` adds to a container of the workload image."""
    said = host.freeflow("inject", "--verbs", "--image", WORKLOAD_IMAGE)
    return said.splitlines()[-1].split()


def queue_pairs(host: Host) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(host.freeflow("connections", "--verbs", "--json"))[
        "queue_pairs"
    ]
    return listed


def listens(box: Box) -> bool:
    host, name = box
    return f":{PORT}" in host.exec(name, "ss", "-Hltn")


def spawn(box: Box, *command: str) -> subprocess.Popen[str]:
    host, name = box
    return host.spawn("docker", "exec", name, *command, stdout=subprocess.DEVNULL)


def latency(said: str) -> float:
    """The typical latency, in microseconds, of 1000 messages of 2 bytes that perftest measured."""
    columns = said.rpartition("[usec]")[2].split()
    assert columns[:2] == ["2", "1000"], said
    return float(columns[4])


def measure(server: Box, client: Box, to: str, *command: str) -> str:
    """Run a program of two halves, and return what the client's prints."""
    served = spawn(server, *command)
    try:
        wait_until("the server to listen", lambda: listens(server), 30)
        host, name = client
        said = host.exec(name, *command, to, timeout=120)
        assert served.wait(patience(30)) == 0
    finally:
        served.kill()
    return said


def test_programs_between_two_containers(manager: Host) -> None:
    """Programs of Debian run unchanged between two containers, as a user without privileges, on an
    address of the network, over shared memory; the commands show it.
    """
    network = make_network(manager)
    added = options(manager)
    boxes = [(manager, run_container(manager, network, *USER, *added)) for _ in range(2)]
    to = address(*boxes[0], network)
    for box in boxes:
        devices = manager.exec(box[1], "ibv_devinfo", "-v")
        assert "PORT_ACTIVE" in devices
        assert f"::ffff:{address(*box, network)}" in devices
    said = measure(boxes[0], boxes[1], to, *PING_PONG, "-n", "1000", "-c")
    assert "1000 iters in" in said
    said = measure(boxes[0], boxes[1], to, *PING_PONG, "-n", "1000", "-e")
    assert "1000 iters in" in said
    assert latency(measure(boxes[0], boxes[1], to, *WRITE_LAT, "-n", "1000")) > 0
    check_commands(boxes, to)


def test_the_commands_of_the_readme(manager: Host) -> None:
    """README's commands, typed one after the other, measure between two containers."""
    section = README.read_text().partition("\n## RDMA programs\n")[2].partition("\n## ")[0]
    build, typed = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    image = build.split()[3]
    alias, *commands = typed.splitlines()
    network = make_network(manager)
    alias = alias.replace("--network n ", f"--network {network} ")
    assert network in alias
    manager.docker("tag", WORKLOAD_IMAGE, image)
    said = []
    for command in commands:
        said.append(manager.run("sh", "-s", stdin=f"{alias}\n{command}\n", timeout=120))
        if " -d " in command:
            wait_until("the server to listen", lambda: listens((manager, "server")), 30)
    devices, _, measured = said
    assert "PORT_ACTIVE" in devices
    assert latency(measured) > 0


@contextmanager
def working(boxes: list[Box], to: str) -> Iterator[None]:
    """A program that exchanges messages between two containers."""
    long = (*PING_PONG, "-n", "100000000", "-e")
    ends = [spawn(boxes[0], *long)]
    try:
        wait_until("the server to listen", lambda: listens(boxes[0]), 30)
        ends.append(spawn(boxes[1], *long, to))

        def both_work() -> bool:
            found = [each for host in {host for host, _ in boxes} for each in queue_pairs(host)]
            return len(found) == 2 and all(each["operations"] for each in found)

        wait_until("both queue pairs to work", both_work, 30)
        yield
    finally:
        for end in ends:
            end.kill()
        for host, name in boxes:
            host.exec(name, "pkill", "-f", "ibv_rc_pingpong", check=False)


def check_commands(boxes: list[Box], to: str) -> None:
    """What the commands show while a program runs."""
    host, server = boxes[0]
    with working(boxes, to):
        found = queue_pairs(host)
        assert {each["container"] for each in found} == {name for _, name in boxes}
        assert [(each["type"], each["path"], each["reason"]) for each in found] == [
            ("RC", "shm", None)
        ] * 2
        report = json.loads(host.freeflow("doctor", server, "--json", check=False))
        assert report["findings"] == []
        assert "a network of it has verbs" in report["passed"]
        assert any("has a device of verbs with" in note for note in report["notes"])
        assert "2 connected queue pairs" in host.freeflow("status")
    wait_until("the queue pairs to end", lambda: not queue_pairs(host), 30)


def test_without_verbs(manager: Host) -> None:
    """A container with the library alone finds no device, and nor does one on a network without
    verbs.
    """
    network, other = make_network(manager), make_network(manager, "-o", "verbs=off")
    added = options(manager)
    plain = [word.partition(":/run/freeflow/verbs")[0] for word in added]
    assert plain != added
    for box in (
        run_container(manager, network, *plain),
        run_container(manager, other, *added),
    ):
        # Debian's own fails where the kernel has no RDMA.
        assert "freeflow0" not in manager.exec(box, "ibv_devices", check=False)


def test_service(manager: Host) -> None:
    """The tasks of a service have verbs, after it was scaled and updated, too."""
    network = make_network(manager)
    place = ("--constraint", f"node.hostname=={manager.name}")
    serve = " ".join((*PING_PONG, "-n", "100"))
    client = run_container(manager, network, *USER, *options(manager))
    service = make_service(
        manager,
        network,
        f"while :; do {serve}; done",
        *USER,
        *place,
        *options(manager),
        replicas=1,
    )

    def tasks() -> list[str]:
        return manager.docker(
            "ps", "-q", "--filter", f"label=com.docker.swarm.service.name={service}"
        ).split()

    def all_serve(count: int) -> bool:
        found = tasks()
        return len(found) == count and all(
            "100 iters in"
            in manager.exec(
                client, *PING_PONG, "-n", "100", address(manager, task, network), check=False
            )
            for task in found
        )

    wait_until("the task to serve", lambda: all_serve(1), 60, 0.5)
    manager.docker("service", "scale", "-d", f"{service}=3")
    wait_running(manager, service, 3)
    wait_until("three tasks to serve", lambda: all_serve(3), 60, 0.5)
    before = set(tasks())
    manager.docker("service", "update", "-d", "--force", service, timeout=120)
    wait_until("new tasks", lambda: len(tasks()) == 3 and not before & set(tasks()), 120, 0.5)
    wait_until("the new tasks to serve", lambda: all_serve(3), 60, 0.5)


def test_stack(manager: Host) -> None:
    """`freeflow inject --verbs` adds verbs to a stack; Docker takes what it prints."""
    name = unique("stack")
    text = (
        'version: "3.8"\nservices:\n  rank:\n'
        f"    image: {WORKLOAD_IMAGE}\n    command: [sleep, infinity]\n    networks: [n]\n"
        f"    deploy: {{placement: {{constraints: [node.hostname == {manager.name}]}}}}\n"
        "networks:\n  n: {driver: 'freeflow:latest', attachable: true}\n"
    )
    folder = "/root/verbs"
    manager.run("sh", "-c", f"mkdir -p {folder} && cat >{folder}/stack.yml", stdin=text)
    manager.run("sh", "-c", f"freeflow inject --verbs {folder}/stack.yml -o {folder}/verbs.yml")
    manager.docker(
        *("stack", "deploy", "-c", f"{folder}/stack.yml", "-c", f"{folder}/verbs.yml", name)
    )
    try:
        wanted = f"label=com.docker.swarm.service.name={name}_rank"
        box = wait_until(
            "the task", lambda: manager.docker("ps", "-q", "--filter", wanted).strip(), 60
        )
        assert "freeflow0" in manager.exec(box, "ibv_devices")
    finally:
        manager.docker("stack", "rm", name)


def compiled(to: Path) -> Path:
    """The program RECONNECTING."""
    if shutil.which("gcc") is None or not Path("/usr/include/rdma/rdma_cma.h").exists():
        pytest.skip("missing: gcc, librdmacm-dev (make setup)")
    return compile_c(
        RECONNECTING, to / "reconnecting", "-Wl,--no-as-needed", "-lrdmacm", "-libverbs"
    )


def copy(program: Path, host: Host) -> list[str]:
    """Put a program on a host. Returns the options that put it into a container."""
    shutil.copy(program, host.root / "root" / program.name)
    return ["--mount", f"type=bind,src=/root/{program.name},dst=/{program.name},readonly"]


@pytest.mark.timeout(600)
def test_reboot(bed: Bed, manager: Host, tmp_path: Path) -> None:
    """When the host of a service loses power, queue pairs to it that have requests break, with an
    event; rdma_cm says that idle ones are disconnected. The same programs connect to the new task.
    """
    host = bed.hosts[3]
    network = make_network(manager)
    program = compiled(tmp_path)
    mounts = {each.name: copy(program, each) for each in (manager, host)}
    service = make_service(
        manager,
        network,
        f"exec /{program.name} server {PORT}",
        *(*USER, *options(manager), *mounts[host.name]),
        *("--constraint", f"node.hostname=={host.name}"),
        replicas=1,
    )
    clients = {
        mode: run_container(
            manager,
            network,
            *(*USER, *options(manager), *mounts[manager.name]),
            command=f"exec /{program.name} {mode} tasks.{service} {PORT}",
        )
        for mode in ENDS
    }

    def said(mode: str) -> list[str]:
        return manager.docker("logs", clients[mode]).splitlines()

    def all_said(count: int) -> bool:
        return all(said(mode).count("answered") == count for mode in clients)

    wait_until("both clients to be answered", lambda: all_said(1), 60, 0.3)
    wait_until(
        "both queue pairs on their path",
        lambda: [each["path"] for each in queue_pairs(manager)] == ["relay"] * 2,
    )
    bed.reboot(host)
    wait_until("both clients to be answered again", lambda: all_said(2), 120, 0.3)
    for mode, end in ENDS.items():
        assert said(mode) == ["answered", end, "answered"]
    for each in (manager, host):
        wait_until("only new queue pairs", lambda h=each: len(queue_pairs(h)) == 2, 30)  # type: ignore[misc]
    bed.wait_plugin_reported()
