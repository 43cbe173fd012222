"""The cases of `cross-host`: what its clients do, and one run of a case on a subject.

A run starts the servers where they are missing, then the clients; waits until the connections have
settled; measures in a window; and lists the paths of the connections, which are idle by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Final

from bench import conditions, load, relayed
from bench.accounting import Accounts
from bench.client_processes import STREAM as BYTES
from bench.client_processes import ClientProcesses, Counted, RunningClients
from bench.errors import BenchError, ProgramError
from bench.latency import Latency
from bench.namespaces import SubjectPair
from bench.relayed import Listed
from bench.servers import (
    MEMCACHED,
    NGINX,
    PINGPONG_EPOLL,
    REDIS,
    STREAM,
    Running,
    ServerProgram,
    Servers,
)
from bench.stats import FREEFLOW, FREEFLOW_OFF, Case
from bench.subjects import NETWORKS, network_name
from bench.swarm_hosts import BenchHost

WARM_UP: Final = 1.0
"""Seconds of traffic before the window, where no connection can move."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """A case with clients in a window.

    `beside` are further clients, in no figure. With `is_tail` the figure is the 99th percentile of
    the latencies in place of the rate.
    """

    case: Case
    server: ServerProgram
    clients: ClientProcesses
    cpu_of: str | None = "request"
    scale: float = 1.0
    """What is counted (requests, or bytes) is divided by it."""
    condition: conditions.Condition = conditions.unchanged
    beside: tuple[ServerProgram, ClientProcesses] | None = None
    is_tail: bool = False
    moves: bool = True
    """Its connections are expected to move to the relay."""


@dataclass(frozen=True, slots=True)
class LoadCase:
    """A case of `bench/load.py`: a program's figure of its whole run."""

    case: Case
    run: Callable[[SubjectPair, float], Mapping[str, float]]
    condition: conditions.Condition = conditions.unchanged


@dataclass(frozen=True, slots=True)
class TrafficSample:
    """A run's result. CPU time is of both hosts, per unit; None: not measured."""

    figure: float
    cpu_us: float | None = None
    latency: Latency | None = None
    foreign: float | None = None
    listed: Listed | None = None


def _redis(name: str, clients: ClientProcesses, about: str, moves: bool = True) -> Traffic:
    case = Case(name, "requests/s", True, f"redis GET, {about}")
    return Traffic(case, REDIS, clients, moves=moves)


def _redis_connections(connections: int, pipeline: int = 1) -> Traffic:
    clients = ClientProcesses("redis", connections=connections, pipeline=pipeline)
    about = f"one process, {connections} connections, pipelines of {pipeline}"
    return _redis(f"redis_p{pipeline}_c{connections}", clients, about, connections > 8)


def _pairs(count: int) -> Traffic:
    about = f"64 bytes there and back, {count} pairs of processes with one connection each"
    case = Case(f"pairs_{count}", "round trips/s", True, about)
    clients = ClientProcesses("echo", processes=count, servers=count)
    return Traffic(case, PINGPONG_EPOLL, clients, "round trip", moves=False)


def _streams(
    count: int, name: str = "", condition: conditions.Condition = conditions.unchanged
) -> Traffic:
    about = f"{count} TCP streams" if count > 1 else "one TCP stream"
    more = ", without tunnel segmentation on the underlay" if name else ""
    case = Case(f"stream_{count}{name}", "Gbit/s", True, f"{about}, writes of 128 KiB{more}")
    clients = ClientProcesses(BYTES, processes=count, servers=count)
    # Rates are of bits, CPU time is per GB.
    moves = condition is not conditions.unchanged
    return Traffic(case, STREAM, clients, "GB", 1e9, condition, moves=moves)


def traffic() -> list[Traffic]:
    """The cases with a window."""
    memcached = Case(
        *("memcached_c50", "requests/s", True),
        "memcached with 2 threads, get of 100 bytes, one process, 50 connections",
    )
    nginx = Case(
        *("nginx_keepalive", "requests/s", True),
        "nginx with 2 workers, 1 KiB file, one process, 32 connections",
    )
    beside = Case(
        *("redis_c8_beside_stream_p99", "us", False),
        "99 % of redis GETs, 8 connections, beside a stream, over a link of 1 Gbit/s",
    )
    eight = ClientProcesses("redis", connections=8)
    offload = conditions.without_tunnel_segmentation
    return [
        *(_redis_connections(count) for count in (1, 4, 8, 16, 50, 200)),
        _redis_connections(50, 16),
        _redis(
            "redis_4x12", ClientProcesses("redis", 4, 12), "four processes with 12 connections each"
        ),
        _redis(
            "redis_16x1",
            ClientProcesses("redis", 16),
            "16 processes with one connection each",
            False,
        ),
        _redis(
            "redis_slow_c50",
            ClientProcesses("redis", connections=50, rate=2000),
            "one process, 50 connections, 2000 requests/s in all",
            moves=False,
        ),
        Traffic(memcached, MEMCACHED, ClientProcesses("memcached", connections=50)),
        Traffic(nginx, NGINX, ClientProcesses("http", connections=32)),
        _pairs(8),
        _pairs(24),
        _streams(1),
        _streams(4),
        _streams(1, "_no_offload", offload),
        _streams(4, "_no_offload", offload),
        Traffic(
            beside,
            REDIS,
            eight,
            cpu_of=None,
            condition=conditions.shaped,
            beside=(STREAM, ClientProcesses(BYTES)),
            is_tail=True,
        ),
    ]


def packets() -> list[LoadCase]:
    """The cases of single packets and short connections."""
    return [
        LoadCase(load.TCP_RR, load.tcp_rr),
        LoadCase(load.UDP_RR, load.udp_rr),
        LoadCase(load.CONNECT, load.connect_request_close),
    ]


def names() -> list[str]:
    """Names of all cases."""
    return [*(one.case.name for one in traffic()), *(one.case.name for one in packets())]


@dataclass(slots=True)
class Runner:
    """Makes runs on the pairs of two hosts. `most` limits the seconds of warming up."""

    client: BenchHost
    server: BenchHost
    servers: Servers
    accounts: Accounts
    most: float = relayed.MOST
    sleep: Callable[[float], None] = time.sleep
    look: Callable[[BenchHost, BenchHost, Sequence[str], float], Listed] = field(
        default=relayed.look
    )

    def run(self, one: Traffic | LoadCase, pair: SubjectPair, seconds: float) -> TrafficSample:
        """One run. Raises `ProgramError` if a program failed, or the figure is of another path."""
        try:
            return self._run(one, pair, seconds)
        except ProgramError as error:
            raise ProgramError(f"{error}{self._lonely(pair)}") from error

    def _lonely(self, pair: SubjectPair) -> str:
        """Words about an engine that has lost the other one. What failed may have failed by that:
        without gossip no overlay has peers.
        """
        if pair.subject not in NETWORKS:
            return ""
        said = ""
        for host in (self.client, self.server):
            with suppress(BenchError, OSError):
                peers = host.engine.network(network_name(pair.subject)).get("Peers") or ()
                if len(peers) < 2:
                    said += f"; the engine of {host.name} has lost the other host"
        return said

    def _run(self, one: Traffic | LoadCase, pair: SubjectPair, seconds: float) -> TrafficSample:
        if isinstance(one, LoadCase):
            before = self.accounts.read()
            figure = one.run(pair, seconds)[one.case.name]
            return TrafficSample(figure, foreign=self.accounts.used_since(before).foreign)
        with ExitStack() as loads:
            started = []
            if one.beside is not None:
                started.append(loads.enter_context(self._start(pair, *one.beside)[0]))
            running, servers = self._start(pair, one.server, one.clients)
            started.append(loads.enter_context(running))
            for some in started:
                some.load()
            where = [f"{server.address}:{server.port}" for server in servers]
            self._settle(pair, one, where)
            before = self.accounts.read()
            running.begin()
            self.sleep(seconds)
            counted = running.end()
            used = self.accounts.used_since(before)
            # Without load, the routers have the processor for their listings.
            running.rest()
            listed = self._listed(pair, one, where)
        return _sample(one, counted, used.cpu_us, used.foreign, listed)

    def _start(
        self, pair: SubjectPair, kind: ServerProgram, clients: ClientProcesses
    ) -> tuple[RunningClients, list[Running]]:
        servers = [
            self.servers.get(pair, replace(kind, name=f"{kind.name} {number}"))
            for number in range(clients.servers)
        ]
        return RunningClients(pair, clients, servers), servers

    def _settle(self, pair: SubjectPair, one: Traffic, where: Sequence[str]) -> None:
        if pair.subject != FREEFLOW:
            self.sleep(WARM_UP)
            return
        relayed.settle(
            lambda: self.look(self.client, self.server, where, relayed.BESIDE),
            one.clients.total,
            min(self.most, relayed.LEAST_MOVING if one.moves else relayed.LEAST),
            self.most,
            sleep=self.sleep,
        )

    def _listed(self, pair: SubjectPair, one: Traffic, where: Sequence[str]) -> Listed | None:
        """The paths at the end of the window; None for subjects that a router doesn't know."""
        if pair.subject not in (FREEFLOW, FREEFLOW_OFF):
            return None
        listed = self.look(self.client, self.server, where, relayed.PATIENCE)
        if listed.total != one.clients.total:
            raise BenchError(
                f"{pair.subject}: the router lists {listed.total} of {one.clients.total} connections "
                f"of {one.case.name}; look at `freeflow connections`"
            )
        if pair.subject == FREEFLOW_OFF and listed.in_relay:
            raise ProgramError(f"{listed.in_relay} connections are in the relay, which is off")
        return listed


def _sample(
    one: Traffic, counted: Counted, cpu_us: float, foreign: float, listed: Listed | None
) -> TrafficSample:
    units = counted.count / one.scale
    figure = counted.rate * 8 / one.scale if one.cpu_of == "GB" else counted.rate / one.scale
    if one.is_tail:
        if counted.latency is None:
            raise ProgramError(f"{one.case.name}: no latencies")
        figure = counted.latency.p99_us
    cpu = cpu_us / units if one.cpu_of else None
    return TrafficSample(figure, cpu, counted.latency, foreign, listed)
