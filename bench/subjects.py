"""The subjects: two equal containers on `freeflow`, on Docker's `overlay`, and on the host network.

Everything made here has the label `swarm_hosts.LABEL`, and is removed at the end, also after an
error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench import load
from bench.accounting import LOAD
from bench.engine_api import address
from bench.errors import BenchError, EngineRefusedError, ProgramError
from bench.namespaces import RING as BARE_RING
from bench.namespaces import TOOLS, UNIX, ProcessNamespaces, SubjectPair, run
from bench.stats import (
    AF_UNIX,
    FREEFLOW,
    FREEFLOW_DIRECT,
    FREEFLOW_OFF,
    FREEFLOW_PLAIN,
    HOST,
    OVERLAY,
    RING,
)
from bench.swarm_hosts import LABEL, PLUGIN, BenchHost

DRIVERS: Final = {FREEFLOW: PLUGIN, OVERLAY: "overlay"}
"""Subjects with a network of their own that every suite measures."""
NETWORKS: Final = {**DRIVERS, FREEFLOW_OFF: PLUGIN, FREEFLOW_DIRECT: PLUGIN}
OPTIONS: Final = {FREEFLOW_OFF: {"relay": "off"}, FREEFLOW_DIRECT: {"verbs_direct": "on"}}
ACCELERATED: Final = (FREEFLOW, FREEFLOW_OFF, FREEFLOW_DIRECT)
SHARED: Final = Path("/run/freeflow")
"""The folder that a container mounts for the library."""
LIBRARY: Final = SHARED / "libfreeflow.so"
PORTS: Final = (*load.IPERF_PORTS, load.PINGPONG_PORT, load.HTTP_PORT)


def network_name(subject: str) -> str:
    """The network that containers of the subject join."""
    if subject == HOST:
        return "host"
    return f"bench-{FREEFLOW if subject == FREEFLOW_PLAIN else subject}"


@contextmanager
def networks(manager: BenchHost, subjects: Sequence[str]) -> Iterator[None]:
    """Attachable Swarm networks of the drivers of `subjects`."""
    made = []
    try:
        wanted = {FREEFLOW if one == FREEFLOW_PLAIN else one for one in subjects}
        for subject, driver in NETWORKS.items():
            if subject in wanted:
                name = network_name(subject)
                manager.engine.create_network(name, driver, {LABEL: "yes"}, OPTIONS.get(subject))
                made.append(name)
        yield
    finally:
        for name in made:
            remove_network(manager, name)


def remove_network(manager: BenchHost, name: str, patience: float = 30.0) -> None:
    """Remove a network; waits until the Swarm has removed its last attachment."""
    end = time.monotonic() + patience
    while True:
        try:
            manager.engine.remove_network(name)
            return
        except EngineRefusedError as error:
            if error.status == 404:
                return
            if time.monotonic() > end:
                raise
            time.sleep(0.3)


def container(
    image: str, subject: str, program: Sequence[str], preload: str = ""
) -> dict[str, Any]:
    """The request that creates a container; `preload` are the libraries that it has from us."""
    host: dict[str, Any] = {"NetworkMode": network_name(subject)}
    environment = []
    if preload:
        host["Mounts"] = [{"Type": "bind", "Source": str(SHARED), "Target": str(SHARED)}]
        environment.append(f"LD_PRELOAD={preload}")
    return {
        "Image": image,
        "Entrypoint": [],
        "Cmd": list(program),
        "Env": environment,
        "Labels": {LABEL: "yes"},
        "HostConfig": host,
    }


def sweep(hosts: Sequence[BenchHost]) -> None:
    """Remove all containers with our label."""
    for host in hosts:
        for identifier in host.engine.labelled(LABEL):
            host.engine.remove(identifier)


def _start_container(
    host: BenchHost, subject: str, image: str, program: Sequence[str], preload: str
) -> ProcessNamespaces:
    body = container(image, subject, program, preload)
    identifier = host.engine.create_container(body)
    host.engine.start(identifier)
    inspected = host.engine.inspect(identifier)
    pid = int(inspected["State"]["Pid"])
    if not pid:
        raise BenchError(f"{host.name}: container {identifier[:12]} on {subject} ended at once")
    where = host.address if subject == HOST else address(inspected, network_name(subject))
    group = host.group / LOAD if host.group else None
    namespaces = ProcessNamespaces(host.root / "proc" / str(pid), where, preload, group=group)
    namespaces.set_congestion_control()
    return namespaces


def wait_for_servers(pair: SubjectPair, patience: float = 60.0) -> None:
    """Wait until all TCP servers answer: a new overlay takes a moment to learn addresses."""
    script = (
        "import socket,sys\n"
        "for port in sys.argv[2:]:\n"
        "    socket.create_connection((sys.argv[1], int(port)), 2).close()\n"
    )
    program = [sys.executable, "-c", script, str(pair.server.address), *map(str, PORTS)]
    end = time.monotonic() + patience
    while True:
        try:
            run(pair.client.enter_network(*program), 30)
            return
        except ProgramError as error:
            if time.monotonic() > end:
                raise BenchError(
                    f"{pair.subject}: the servers at {pair.server.address} don't answer: {error}"
                ) from error
            time.sleep(0.3)


@contextmanager
def pairs(
    client: BenchHost,
    server: BenchHost,
    subjects: Sequence[str],
    image: str,
    preload: str = "",
) -> Iterator[tuple[SubjectPair, ...]]:
    """Both containers of each subject, with servers that answer. Both hosts may be the same.

    `preload` are libraries that the subjects in `ACCELERATED` have.
    """
    hosts = [client] if client == server else [client, server]
    try:
        made = []
        for subject in subjects:
            fast = preload if subject in ACCELERATED else ""
            serving = _start_container(server, subject, image, [f"{TOOLS}/servers"], fast)
            calling = _start_container(client, subject, image, ["sleep", "infinity"], fast)
            pair = SubjectPair(subject, calling, serving)
            wait_for_servers(pair)
            made.append(pair)
        yield tuple(made)
    finally:
        sweep(hosts)


def limits(pairs: Sequence[SubjectPair], wanted: Sequence[str]) -> tuple[SubjectPair, ...]:
    """The subjects that are limits: both ends in one container without the library."""
    places = [pair.server for pair in pairs if not pair.server.library]
    if not places:
        return ()
    transports = {AF_UNIX: UNIX, RING: BARE_RING}
    namespaces = places[-1]
    return tuple(
        SubjectPair(subject, namespaces, namespaces, transport)
        for subject, transport in transports.items()
        if subject in wanted
    )
