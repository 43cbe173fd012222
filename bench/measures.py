"""The cases for connections within one host: the server, its cores, and what the client does.

A measure's `call` makes one run and returns its figure. `bench/sampling.py` measures CPU time and
upgraded connections around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from bench import parse
from bench.errors import ProgramError
from bench.latency import Latency
from bench.namespaces import RING, TCP, UNIX, SubjectPair, run
from bench.servers import (
    IPERF3,
    MEMCACHED,
    NGINX,
    PGSQL,
    PINGPONG,
    PINGPONG_EPOLL,
    REDIS,
    STREAM,
    Running,
    ServerProgram,
)
from bench.stats import Case

PATIENCE: Final = 30.0

ALL: Final = frozenset((TCP, UNIX, RING))
SOCKETS: Final = frozenset((TCP, UNIX))
INTERNET: Final = frozenset((TCP,))


@dataclass(frozen=True, slots=True)
class Seen:
    """The result of a run: its figure, its units of work, and what else the program reports: the
    client's CPU time, and the latencies of requests.
    """

    figure: float
    units: float
    client_us: float | None = None
    latency: Latency | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a run. `server` is None where one program is both ends."""

    pair: SubjectPair
    server: Running | None
    seconds: float
    client_cores: tuple[int, ...]
    server_cores: tuple[int, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def to(self) -> Running:
        if self.server is None:
            raise ProgramError(f"{self.pair.subject}: no server")
        return self.server

    def at(self) -> tuple[str, str]:
        """Address and port as our load programs take them."""
        return self.to.address, "0" if self.to.unix else str(self.to.port)

    def program(self, *argv: str) -> str:
        """Run a program in the client's namespaces, on its cores; its output."""
        line = self.pair.client.enter(*argv, cores=self.client_cores, environment=self.environment)
        return run(line, self.seconds * 10 + PATIENCE)

    def tool(self, name: str, *argv: str) -> str:
        return self.program(f"{self.pair.client.tools}/{name}", *argv)


@dataclass(frozen=True, slots=True)
class Measure:
    """One case. Cores count from the last, 0, which handles fewest interrupts; empty: any core."""

    case: Case
    kind: ServerProgram
    call: Callable[[Call], Seen]
    cpu_of: str
    """The unit of work that CPU time is divided by."""
    transports: frozenset[str] = INTERNET
    server_cores: tuple[int, ...] = ()
    client_cores: tuple[int, ...] = ()
    hogs: bool = False
    """A busy loop runs on every core."""
    upgraded: bool = True
    """Its connections live long enough to be upgraded."""
    aside: int = 0
    """Connections of the client that carry no load."""
    calibrate: bool = False
    """The first run only finds how much work fits in the time."""
    in_suite: bool = True
    """The case is in the suite `same-host`, not only in `quick`."""


def pingpong(kind: str, size: int) -> Callable[[Call], Seen]:
    """Messages of `size` bytes there and back; the figure is in microseconds."""

    def call(it: Call) -> Seen:
        if it.pair.transport == RING:
            cores = (str(it.client_cores[0]), str(it.server_cores[0]))
            text = it.tool("ring", "pingpong", *cores, str(size), str(it.seconds))
        else:
            text = it.tool("pingpong", kind, "call", "-1", *it.at(), str(size), str(it.seconds))
        trips = parse.pingpong(text)
        latency = Latency(trips.p50_us, trips.p99_us)
        return Seen(trips.p50_us, trips.count, trips.cpu_us, latency)

    return call


def stream(size: int) -> Callable[[Call], Seen]:
    """Writes of `size` bytes in one direction; the figure is in GB/s."""

    def call(it: Call) -> Seen:
        if it.pair.transport == RING:
            cores = (str(it.client_cores[0]), str(it.server_cores[0]))
            text = it.tool("ring", "stream", *cores, str(size), str(it.seconds))
        else:
            text = it.tool("throughput", "call", "-1", *it.at(), str(size), str(it.seconds))
        moved = parse.moved(text)
        return Seen(moved.count / moved.seconds / 1e9, moved.count / 1e9, moved.cpu_us)

    return call


def iperf3_stream(it: Call) -> Seen:
    """One stream of iperf3; the figure is in Gbit/s."""
    length = ("--time", str(max(1, round(it.seconds))))
    text = it.program(
        "iperf3", "--client", it.to.address, "--port", str(it.to.port), "--json", *length
    )
    transfer = parse.iperf3(text)
    return Seen(transfer.bits_per_second / 1e9, transfer.bytes / 1e9)


@dataclass(slots=True)
class _Redis:
    """redis-benchmark stops after a number of requests, which is taken from its last rate."""

    clients: int
    pipeline: int
    rates: dict[str, float] = field(default_factory=dict)

    def __call__(self, it: Call) -> Seen:
        rate = self.rates.get(it.pair.subject)
        requests = 5000 if rate is None else max(5000, round(rate * it.seconds))
        where = ["-s", it.to.address]
        if not it.to.unix:
            where = ["-h", it.to.address, "-p", str(it.to.port)]
        shape = ("-c", str(self.clients), "-P", str(self.pipeline), "-n", str(requests))
        text = it.program("redis-benchmark", *where, "-t", "get", *shape, "--csv")
        found = self.rates[it.pair.subject] = parse.redis_benchmark(text)
        return Seen(found, requests, latency=parse.redis_latency(text))


def _memcached(clients: int) -> Callable[[Call], Seen]:
    def call(it: Call) -> Seen:
        moved = parse.moved(it.tool("memload", "-1", *it.at(), str(clients), str(it.seconds)))
        return Seen(moved.count / moved.seconds, moved.count, moved.cpu_us, moved.latency)

    return call


def _wrk(clients: int, file: str, *headers: str) -> Callable[[Call], Seen]:
    def call(it: Call) -> Seen:
        text = it.program(
            *("wrk", "--latency", "--threads", "2", "--connections", str(clients)),
            *("--duration", f"{max(1, round(it.seconds))}s", *headers),
            f"http://{it.to.address}:{it.to.port}/{file}",
        )
        return Seen(parse.wrk(text), parse.wrk_requests(text), latency=parse.wrk_latency(text))

    return call


def _new_process(kind: str, about: str) -> Measure:
    def call(it: Call) -> Seen:
        made = parse.moved(it.tool("processes", kind, *it.at(), str(it.seconds)))
        return Seen(made.seconds / made.count * 1e6, made.count, made.cpu_us)

    case = Case(f"{kind}_us", "us", False, f"{about}, in a program with one connection")
    return Measure(case, PINGPONG, call, "process", SOCKETS, upgraded=False)


@dataclass(slots=True)
class _Pgbench:
    """pgbench runs a number of transactions, which is taken from its last rate."""

    clients: int
    more: tuple[str, ...] = ()
    least: float = 0.0
    """Seconds, at least."""
    rates: dict[str, float] = field(default_factory=dict)

    def __call__(self, it: Call) -> Seen:
        rate = self.rates.get(it.pair.subject, 100 * self.clients)
        count = max(20, round(rate * max(it.seconds, self.least) / self.clients))
        text = it.program(
            *("pgbench", "-h", it.to.address, "-p", str(it.to.port), "-U", "postgres"),
            *("-S", "-n", "-c", str(self.clients), "-j", str(min(self.clients, 2)), *self.more),
            *("-t", str(count), "postgres"),
        )
        done = parse.pgbench(text)
        self.rates[it.pair.subject] = done.rate
        return Seen(done.rate, done.count)


def _trip(name: str, size: int, kind: ServerProgram, cores: tuple[int, int], about: str) -> Measure:
    word = "epoll" if kind is PINGPONG_EPOLL else "stream"
    apart = cores[0] != cores[1]
    return Measure(
        Case(name, "us", False, f"{about}, p50"),
        kind,
        pingpong(word, size),
        "round trip",
        ALL if apart and word == "stream" else SOCKETS,
        (cores[0],),
        (cores[1],),
        in_suite=size == 64,
    )


def _trips() -> list[Measure]:
    made = []
    for label, size in (("64b", 64), ("1k", 1024), ("64k", 65536)):
        for where, cores in (("two_cores", (1, 0)), ("one_core", (0, 0))):
            for word, kind in (("", PINGPONG), ("_epoll", PINGPONG_EPOLL)):
                how = "an event loop at each end" if word else "blocking calls"
                about = f"{size} bytes there and back, {how}, {where.replace('_', ' ')}"
                made.append(_trip(f"pingpong_{label}_{where}{word}", size, kind, cores, about))
    return made


def _streams() -> list[Measure]:
    return [
        Measure(
            Case(
                f"stream_{label}",
                "GB/s",
                True,
                f"one connection, writes of {size} bytes, two cores",
            ),
            STREAM,
            stream(size),
            "GB",
            ALL,
            (1,),
            (0,),
        )
        for label, size in (("4k", 4096), ("16k", 16384), ("128k", 131072))
    ]


def _redis(name: str, clients: int, pipeline: int) -> Measure:
    about = f"redis GET, {clients} connections, pipelines of {pipeline}"
    return Measure(
        Case(name, "requests/s", True, about),
        REDIS,
        _Redis(clients, pipeline),
        "request",
        SOCKETS,
        aside=1,
        calibrate=True,
    )


def _memcached_of(clients: int) -> Measure:
    about = (
        f"memcached with 2 threads, get of 100 bytes, {clients} connections, every answer compared"
    )
    case = Case(f"memcached_c{clients}", "requests/s", True, about)
    call = _memcached(clients)
    return Measure(case, MEMCACHED, call, "request", SOCKETS, in_suite=clients > 1)


def _pgbench_of(clients: int) -> Measure:
    case = Case(f"pgbench_select_c{clients}", "transactions/s", True, f"pgbench -S -c {clients}")
    return Measure(case, PGSQL, _Pgbench(clients), "transaction", SOCKETS, aside=1, calibrate=True)


def _nginx(name: str, size: str, file: str) -> Measure:
    about = f"nginx, {size} file, wrk, 32 connections"
    case = Case(name, "requests/s", True, about)
    return Measure(case, NGINX, _wrk(32, file), "request", aside=1)


def _short_connections() -> list[Measure]:
    """Loads whose connections end before they can be upgraded."""
    nginx = Case(
        "connect_request_close",
        "connections/s",
        True,
        "nginx, 1 KiB file, a connection for each request, wrk, 50 at a time",
    )
    pgbench = Case(
        "pgbench_reconnect", "transactions/s", True, "pgbench -S -C: one for each transaction"
    )
    close = _wrk(50, "small", "--header", "Connection: close")
    reconnect = _Pgbench(1, ("-C",), least=1.0)
    return [
        Measure(nginx, NGINX, close, "connection", upgraded=False),
        Measure(pgbench, PGSQL, reconnect, "transaction", upgraded=False, calibrate=True),
    ]


def _plain() -> list[Measure]:
    """All cases in which cores are not short."""
    iperf3 = Case(
        "iperf3", "Gbit/s", True, "iperf3 as it comes: writes of 128 KiB, what the receiver got"
    )
    return [
        *_trips(),
        *_streams(),
        Measure(iperf3, IPERF3, iperf3_stream, "GB", aside=1),
        _redis("redis_p1_c1", 1, 1),
        _redis("redis_p1_c50", 50, 1),
        _redis("redis_p16_c50", 50, 16),
        _memcached_of(1),
        _memcached_of(50),
        _nginx("nginx_keepalive", "1 KiB", "small"),
        _nginx("nginx_keepalive_100k", "100 KiB", "large"),
        _pgbench_of(1),
        _pgbench_of(8),
        *_short_connections(),
        _new_process("fork", "fork() and the child's end"),
        _new_process("exec", "fork() and exec() of a program without the library"),
        _new_process("start", "posix_spawn() of a program, with the library where there is one"),
    ]


def _crowded(plain: dict[str, Measure]) -> list[Measure]:
    """The same cases with too few cores."""
    made = []
    for prefix, cores, hogs, words in (
        ("busy", (), True, "every core busy with something else"),
        ("cores2", (0, 1), False, "both programs on the same 2 cores"),
        ("cores1", (0,), False, "both programs on the same core"),
    ):
        for name in ("pingpong_64b_two_cores_epoll", "redis_p1_c50", "memcached_c50"):
            old = plain[name]
            short = name.replace("_two_cores", "").removesuffix("_c50").removesuffix("_p1")
            call = _Redis(50, 1) if old.kind is REDIS else old.call
            about = f"{old.case.about.removesuffix(', two cores, p50')}; {words}"
            case = Case(f"{prefix}_{short}", old.case.unit, old.case.more_is_better, about)
            made.append(
                Measure(
                    case,
                    old.kind,
                    call,
                    old.cpu_of,
                    INTERNET,
                    cores,
                    cores,
                    hogs,
                    aside=old.aside,
                    calibrate=old.calibrate,
                )
            )
    return made


def measures() -> list[Measure]:
    """All cases. Each has its own state."""
    plain = _plain()
    return [*plain, *_crowded({one.case.name: one for one in plain})]
