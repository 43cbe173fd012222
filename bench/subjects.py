"""The subjects: the same two containers on a `freeflow` network, on Docker's `overlay`, on the hosts' own network.

Everything made here carries the label `bed.LABEL` and is removed at the end, also after a failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench import load
from bench.bed import LABEL, PLUGIN, Host
from bench.engine import address
from bench.errors import BenchError, EngineRefusedError, ProgramError
from bench.place import RING as BARE_RING
from bench.place import TOOLS, UNIX, Pair, Place, run
from bench.stats import AF_UNIX, FREEFLOW, FREEFLOW_PLAIN, HOST, OVERLAY, RING

DRIVERS: Final = {FREEFLOW: PLUGIN, OVERLAY: "overlay"}
SHARED: Final = Path("/run/freeflow")
"""What a container mounts to have the library."""
LIBRARY: Final = SHARED / "libfreeflow.so"
PORTS: Final = (*load.IPERF_PORTS, load.PINGPONG_PORT, load.REDIS_PORT, load.HTTP_PORT)


def network_name(subject: str) -> str:
    """The network that containers of the subject join."""
    if subject == HOST:
        return "host"
    return f"bench-{FREEFLOW if subject == FREEFLOW_PLAIN else subject}"


@contextmanager
def networks(manager: Host, subjects: Sequence[str]) -> Iterator[None]:
    """Attachable Swarm networks of the drivers of `subjects`."""
    made = []
    try:
        wanted = {FREEFLOW if one == FREEFLOW_PLAIN else one for one in subjects}
        for subject in DRIVERS:
            if subject in wanted:
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


def container(
    image: str, subject: str, program: Sequence[str], accelerated: bool = False
) -> dict[str, Any]:
    """The body of a container's creation; `accelerated` with the library, as the docs say."""
    host: dict[str, Any] = {"NetworkMode": network_name(subject)}
    environment = []
    if accelerated:
        host["Mounts"] = [{"Type": "bind", "Source": str(SHARED), "Target": str(SHARED)}]
        environment.append(f"LD_PRELOAD={LIBRARY}")
    return {
        "Image": image,
        "Entrypoint": [],
        "Cmd": list(program),
        "Env": environment,
        "Labels": {LABEL: "yes"},
        "HostConfig": host,
    }


def sweep(hosts: Sequence[Host]) -> None:
    """Remove all our containers."""
    for host in hosts:
        for identifier in host.engine.labelled(LABEL):
            host.engine.remove(identifier)


def _place(
    host: Host, subject: str, image: str, program: Sequence[str], accelerated: bool
) -> Place:
    body = container(image, subject, program, accelerated)
    identifier = host.engine.create_container(body)
    host.engine.start(identifier)
    inspected = host.engine.inspect(identifier)
    pid = int(inspected["State"]["Pid"])
    if not pid:
        raise BenchError(f"{host.name}: container {identifier[:12]} on {subject} ended at once")
    where = host.address if subject == HOST else address(inspected, network_name(subject))
    library = str(LIBRARY) if accelerated else ""
    place = Place(host.root / "proc" / str(pid), where, library)
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
    client: Host, server: Host, subjects: Sequence[str], image: str, accelerated: bool = False
) -> Iterator[tuple[Pair, ...]]:
    """Both ends of each subject, servers ready; `client` and `server` may be the same host.

    With `accelerated`, the subject `freeflow` has the library.
    """
    hosts = [client] if client == server else [client, server]
    try:
        made = []
        for subject in subjects:
            fast = accelerated and subject == FREEFLOW
            serving = _place(server, subject, image, [f"{TOOLS}/servers"], fast)
            calling = _place(client, subject, image, ["sleep", "infinity"], fast)
            pair = Pair(subject, calling, serving)
            wait_for_servers(pair)
            made.append(pair)
        yield tuple(made)
    finally:
        sweep(hosts)


def limits(pairs: Sequence[Pair], wanted: Sequence[str]) -> tuple[Pair, ...]:
    """The subjects that aren't networks: both ends in one container, of those that have no library."""
    places = [pair.server for pair in pairs if not pair.server.library]
    if not places:
        return ()
    transports = {AF_UNIX: UNIX, RING: BARE_RING}
    place = places[-1]
    return tuple(
        Pair(subject, place, place, transport)
        for subject, transport in transports.items()
        if subject in wanted
    )
