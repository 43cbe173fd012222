"""The suite `control`: networks, attachments, a hundred containers at once, the plugin's start.

Calls to the engine are timed on its socket. The plugin's share comes from its call statistics, on
its admin socket.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pyroute2 import IPRoute

from bench.engine_api import EngineApi
from bench.errors import BenchError, EngineRefusedError
from bench.rounds import Say
from bench.stats import FREEFLOW, HOST, Case, Row, percentile, row
from bench.subjects import DRIVERS, container, networks, remove_network
from bench.swarm_hosts import LABEL, PLUGIN, BenchHost

ATTACH_CALLS: Final = ("CreateEndpoint", "Join")
DETACH_CALLS: Final = ("Leave", "DeleteEndpoint")
AT_ONCE: Final = 100

NETWORK_CREATE: Final = Case(
    "network_create", "ms", False, "POST /networks/create until the network has its subnet"
)
RUN_P50: Final = Case("docker_run_p50", "ms", False, "container create + start, one at a time")
RUN_P99: Final = Case("docker_run_p99", "ms", False, "same, p99")
ADDED: Final = Case(
    "attach_added", "ms", False, "docker_run less the host network's in the same round"
)
ATTACH_P50: Final = Case(
    "attach_p50",
    "ms",
    False,
    "the plugin's share of docker_run: p50 of CreateEndpoint + p50 of Join, by the plugin's own clock",
)
ATTACH_P99: Final = Case("attach_p99", "ms", False, "same, sum of the two p99")
HUNDRED: Final = Case(
    "hundred_at_once",
    "s",
    False,
    f"{AT_ONCE} containers created, then all started at the same moment",
)
HUNDRED_P99: Final = Case(
    "hundred_call_p99",
    "ms",
    False,
    "the slowest kind of call to the plugin while they start, its p99",
)
HUNDRED_LINK: Final = Case(
    "hundred_link_p99",
    "ms",
    False,
    "a request that changes nothing but takes the kernel's lock of all links (rtnl), p99 while they start: the limit",
)
HUNDRED_DETACH: Final = Case(
    "hundred_detach_p99", "ms", False, "the same when all are killed and removed, eight at a time"
)
LISTENING: Final = Case(
    "plugin_listening",
    "ms",
    False,
    "from the start of the plugin's process until its socket takes a connection",
)
ANSWERING: Final = Case(
    "plugin_answering", "ms", False, "same, until it has answered Plugin.Activate"
)


@dataclass(frozen=True, slots=True)
class Calls:
    """The plugin's statistics of one kind of call since its start, in milliseconds."""

    count: int
    errors: int
    p50_ms: float
    p99_ms: float


def plugin_calls(host: BenchHost) -> dict[str, Calls]:
    """Call to statistics. Raises `BenchError` if a call failed: its time means nothing."""
    admin = EngineApi(host.root / "run/freeflow-admin/admin.sock", timeout=10)
    try:
        status = admin.call("GET", "/admin/status")
    except OSError as error:
        raise BenchError(f"{host.name}: no plugin at its admin socket: {error}") from error
    found = {
        one["name"]: Calls(one["count"], one["errors"], one["p50_ms"], one["p99_ms"])
        for one in status["calls"]
    }
    failed = {name: calls.errors for name, calls in found.items() if calls.errors}
    if failed:
        raise BenchError(f"{host.name}: the plugin refused calls: {failed}; see its log")
    return found


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def network_create(manager: BenchHost, subject: str, number: int) -> float:
    """Seconds until the Swarm has allocated a subnet."""
    name = f"bench-create-{subject}-{number}"

    def create() -> None:
        manager.engine.create_network(name, DRIVERS[subject], {LABEL: "yes"})
        end = time.monotonic() + 20
        while not manager.engine.network(name)["IPAM"]["Config"]:
            if time.monotonic() > end:
                raise BenchError(f"{manager.name}: network {name} got no subnet in 20 s")
            time.sleep(0.001)

    try:
        return _timed(create)
    finally:
        remove_network(manager, name)


def docker_run(host: BenchHost, subject: str, image: str) -> float:
    """Seconds to create and start a container."""
    made = []

    def start() -> None:
        made.append(host.engine.create_container(container(image, subject, ["sleep", "infinity"])))
        host.engine.start(made[0])

    try:
        return _timed(start)
    finally:
        for identifier in made:
            host.engine.remove(identifier)


class LinkProbe:
    """Measures the wait for the kernel's lock of links (rtnl): sets `lo` up ten times a second.

    `took` has the seconds of each request; `lo` is up already, so nothing changes.
    """

    PERIOD: Final = 0.1

    def __init__(self) -> None:
        self.took: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> LinkProbe:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with IPRoute() as route:
            (loopback,) = route.link_lookup(ifname="lo")
            while not self._stop.wait(self.PERIOD):
                self.took.append(_timed(lambda: route.link("set", index=loopback, state="up")))


def at_once(
    host: BenchHost, subject: str, image: str, count: int, meanwhile: AbstractContextManager[object]
) -> float:
    """Seconds from the start of all containers until the last one runs.

    `meanwhile` is entered for that time.

    Raises:
        BenchError: a container did not start.
    """
    body = container(image, subject, ["sleep", "infinity"])
    gate = threading.Barrier(count + 1)

    def start(identifier: str) -> str | None:
        gate.wait()
        try:
            host.engine.start(identifier)
        except EngineRefusedError as error:
            return str(error)
        return None

    made = [host.engine.create_container(body) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool, meanwhile:
            futures = [pool.submit(start, identifier) for identifier in made]
            gate.wait()
            begin = time.perf_counter()
            failed = [said for said in (future.result() for future in futures) if said]
            seconds = time.perf_counter() - begin
        if failed:
            raise BenchError(f"{subject}: {len(failed)} of {count} did not start: {failed[0]}")
        return seconds
    finally:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(host.engine.remove, made))


def _since_start(pid: int) -> float:
    """Seconds since the process started, with a resolution of 10 ms."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    # Field 22 of proc(5), in ticks since boot; the list begins with field 3.
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began


def plugin_start(host: BenchHost, plugin: str = PLUGIN) -> tuple[float, float]:
    """Restart the plugin; seconds from its start until it listens, and until it answers."""
    identifier = str(host.engine.call("GET", f"/plugins/{plugin}/json")["Id"])
    # A socket's path may have 107 bytes, so the directory is named by a descriptor.
    plugins = os.open(host.root / "run/docker/plugins", os.O_PATH)
    path = f"/proc/self/fd/{plugins}/{identifier}/freeflow.sock"
    host.engine.call("POST", f"/plugins/{plugin}/disable?force=1")
    enabling = threading.Thread(
        target=host.engine.call, args=("POST", f"/plugins/{plugin}/enable?timeout=30")
    )
    enabling.start()
    try:
        end = time.monotonic() + 30
        while True:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                client.settimeout(30)
                client.connect(path)
                break
            except OSError as error:
                client.close()
                if time.monotonic() > end:
                    raise BenchError(f"{host.name}: {plugin} does not listen: {error}") from error
                time.sleep(0.001)
        with client:
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid = int(struct.unpack("3i", credentials)[0])
            listening = _since_start(pid)
            client.sendall(b"POST /Plugin.Activate HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
            said = client.recv(4096)
            answering = _since_start(pid)
        if b" 200 " not in said.split(b"\r\n", 1)[0]:
            raise BenchError(f"{host.name}: {plugin} answered {said[:100]!r} to Plugin.Activate")
    finally:
        enabling.join()
        os.close(plugins)
    return listening, answering


@dataclass(slots=True)
class Control:
    """One run of the suite, all of it on `manager`."""

    manager: BenchHost
    subjects: Sequence[str]
    image: str
    rounds: int
    order: random.Random
    say: Say
    enough: Callable[[], bool] = lambda: False
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def keep(self, case: Case, subject: str, figure: float, quietly: bool = False) -> None:
        self.samples.setdefault(case.name, {}).setdefault(subject, []).append(figure)
        if not quietly:
            self.say(f"{subject:<8} {case.name} {figure:.4g} {case.unit}")

    def in_turn(self) -> list[str]:
        return self.order.sample(list(self.subjects), len(self.subjects))

    def measure(self) -> dict[str, Row]:
        """All cases, subjects in turn. Restarts the plugin where its statistics must begin anew."""
        with networks(self.manager, self.subjects):
            self.network_create()
            for subject in self.subjects:
                docker_run(self.manager, subject, self.image)
            self.plugin_start()
            self.one_at_a_time()
            self.plugin_start()
            self.many()
        return rows(self.samples)

    def network_create(self) -> None:
        for number in range(self.rounds):
            for subject in self.in_turn():
                if subject != HOST:
                    seconds = network_create(self.manager, subject, number)
                    self.keep(NETWORK_CREATE, subject, seconds * 1000)

    def plugin_start(self) -> None:
        if FREEFLOW in self.subjects:
            for _ in range(max(2, self.rounds // 4)):
                listening, answering = plugin_start(self.manager)
                self.keep(LISTENING, FREEFLOW, listening * 1000)
                self.keep(ANSWERING, FREEFLOW, answering * 1000)

    def one_at_a_time(self) -> None:
        for _ in range(self.rounds * 3):
            took = {}
            for subject in self.in_turn():
                took[subject] = docker_run(self.manager, subject, self.image) * 1000
                self.keep(RUN_P50, subject, took[subject])
                self.keep(RUN_P99, subject, took[subject], quietly=True)
            for subject, milliseconds in took.items():
                if subject != HOST and HOST in took:
                    self.keep(ADDED, subject, milliseconds - took[HOST], quietly=True)
        if FREEFLOW in self.subjects:
            calls = plugin_calls(self.manager)
            self.keep(ATTACH_P50, FREEFLOW, sum(calls[name].p50_ms for name in ATTACH_CALLS))
            self.keep(ATTACH_P99, FREEFLOW, sum(calls[name].p99_ms for name in ATTACH_CALLS))

    def many(self) -> None:
        for number in range(max(1, self.rounds // 4)):
            if number and self.enough():
                break
            for subject in self.in_turn():
                probe = LinkProbe()
                took = at_once(self.manager, subject, self.image, AT_ONCE, probe)
                self.keep(HUNDRED, subject, took)
                self.keep(HUNDRED_LINK, subject, percentile(probe.took, 99) * 1000)
        if FREEFLOW in self.subjects:
            calls = plugin_calls(self.manager)
            detaching = {name: calls.pop(name).p99_ms for name in DETACH_CALLS}
            self.keep(HUNDRED_P99, FREEFLOW, max(one.p99_ms for one in calls.values()))
            self.keep(HUNDRED_DETACH, FREEFLOW, max(detaching.values()))


CASES: Final = (
    NETWORK_CREATE,
    RUN_P50,
    RUN_P99,
    ADDED,
    ATTACH_P50,
    ATTACH_P99,
    HUNDRED,
    HUNDRED_P99,
    HUNDRED_LINK,
    HUNDRED_DETACH,
    LISTENING,
    ANSWERING,
)


def rows(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Row]:
    return {
        case.name: row(case, samples.get(case.name, {}), 99 if case == RUN_P99 else 50)
        for case in CASES
    }
