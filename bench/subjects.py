"""The three subjects: the same two containers on a `freeflow` network, on Docker's `overlay`, on the hosts' own network.

Everything made here carries the label `bed.LABEL` and is removed at the end, also after a failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from bench import load
from bench.bed import LABEL, PLUGIN, Host
from bench.engine import address
from bench.errors import BenchError, EngineRefusedError, ProgramError
from bench.place import TOOLS, Pair, Place, run
from bench.stats import FREEFLOW, HOST, OVERLAY

DRIVERS: Final = {FREEFLOW: PLUGIN, OVERLAY: "overlay"}
PORTS: Final = (*load.IPERF_PORTS, load.PINGPONG_PORT, load.REDIS_PORT, load.HTTP_PORT)


def network_name(subject: str) -> str:
    """The network that containers of the subject join."""
    return "host" if subject == HOST else f"bench-{subject}"


@contextmanager
def networks(manager: Host, subjects: Sequence[str]) -> Iterator[None]:
    """Attachable Swarm networks of the drivers of `subjects`."""
    made = []
    try:
        for subject in subjects:
            if subject != HOST:
                manager.engine.create_network(
                    network_name(subject), DRIVERS[subject], {LABEL: "yes"}
                )
                made.append(network_name(subject))
        yield
    finally:
        for name in made:
            remove_network(manager, name)


def remove_network(manager: Host, name: str, patience: float = 30.0) -> None:
    """The Swarm lets a network go only once its last attachment is gone."""
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


def container(image: str, subject: str, program: Sequence[str]) -> dict[str, Any]:
    """The body of a container's creation."""
    return {
        "Image": image,
        "Entrypoint": [],
        "Cmd": list(program),
        "Labels": {LABEL: "yes"},
        "HostConfig": {"NetworkMode": network_name(subject)},
    }


def sweep(hosts: Sequence[Host]) -> None:
    """Remove all our containers."""
    for host in hosts:
        for identifier in host.engine.labelled(LABEL):
            host.engine.remove(identifier)


def _place(host: Host, subject: str, image: str, program: Sequence[str]) -> Place:
    identifier = host.engine.create_container(container(image, subject, program))
    host.engine.start(identifier)
    inspected = host.engine.inspect(identifier)
    pid = int(inspected["State"]["Pid"])
    if not pid:
        raise BenchError(f"{host.name}: container {identifier[:12]} on {subject} ended at once")
    where = host.address if subject == HOST else address(inspected, network_name(subject))
    place = Place(host.root / "proc" / str(pid), where)
    place.set_congestion_control()
    return place


def wait_for_servers(pair: Pair, patience: float = 60.0) -> None:
    """All TCP servers answer the client; a new overlay takes a moment to know where its containers are."""
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
    client: Host, server: Host, subjects: Sequence[str], image: str
) -> Iterator[tuple[Pair, ...]]:
    """Both ends of each subject, servers ready; `client` and `server` may be the same host."""
    hosts = [client] if client == server else [client, server]
    try:
        made = []
        for subject in subjects:
            serving = _place(server, subject, image, [f"{TOOLS}/servers"])
            calling = _place(client, subject, image, ["sleep", "infinity"])
            pair = Pair(subject, calling, serving)
            wait_for_servers(pair)
            made.append(pair)
        yield tuple(made)
    finally:
        sweep(hosts)
