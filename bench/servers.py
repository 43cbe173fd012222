"""The servers of measurements: started inside a place, on chosen cores, when first needed; ended all together.

One of each kind, place and set of cores. They run on while others are measured: idle, they cost nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from bench import cost
from bench.errors import ProgramError
from bench.place import UNIX, Pair, Place, run
from driver.kernel.namespace import in_netns

FIRST_PORT: Final = 7100
PATIENCE: Final = 20.0
SMALL: Final = 1024
LARGE: Final = 100 * 1024


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a server is to listen: all addresses at a port; or, if `path` says so, a unix socket."""

    place: Place
    port: int
    path: str

    @property
    def folder(self) -> str:
        """For the server's own files; in the place's file system."""
        return f"/tmp/bench-{os.getpid()}-{self.port}"

    @property
    def at(self) -> tuple[str, str]:
        """Address and port, in the words of our own programs."""
        return (self.path, "0") if self.path else ("0.0.0.0", str(self.port))

    def write(self, name: str, text: str) -> str:
        """A file for the server; its path in there."""
        folder = self.place.root / self.folder.lstrip("/")
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        (folder / name).write_text(text)
        return f"{self.folder}/{name}"


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers: `address` and `port` are for the client; a unix socket has a path and port 0."""

    pid: int
    address: str
    port: int
    unix: bool

    def processes(self) -> set[int]:
        return set(cost.family(self.pid))

    def settled(self, processes: set[int], patience: float = 1.0) -> None:
        """Wait until those that it made for a client are gone: one that goes while we count would be missed."""
        end = time.monotonic() + patience
        while self.processes() - processes and time.monotonic() < end:
            time.sleep(0.005)

    def cpu_us(self) -> float:
        return cost.cpu_us(self.pid)


@dataclass(frozen=True, slots=True)
class Kind:
    """A server program: `command` makes its command line; `prepare` what it needs before, `fill` once it answers.

    `unix` is where it puts its unix socket in its folder, and `unix_is_folder` whether clients name only the folder;
     `user` is whose it runs as.
    """

    name: str
    command: Callable[[Seat], Sequence[str]]
    prepare: Callable[[Seat], None] = lambda _: None
    fill: Callable[[Seat], None] = lambda _: None
    user: str = ""
    end: signal.Signals = signal.SIGTERM
    unix: str = "socket"
    unix_is_folder: bool = False
    programs: tuple[tuple[str, str], ...] = ()
    """Programs of Debian that it and its clients are, each with its package."""


def _redis(seat: Seat) -> list[str]:
    where = ["--port", "0", "--unixsocket", seat.path]
    if not seat.path:
        where = ["--port", str(seat.port), "--bind", "0.0.0.0", "--protected-mode", "no"]
    return ["redis-server", *where, "--save", "", "--dir", "/tmp"]


def _memcached(seat: Seat) -> list[str]:
    where = ["-s", seat.path] if seat.path else ["-p", str(seat.port), "-l", "0.0.0.0"]
    return ["memcached", "-u", "root", "-U", "0", "-t", "2", "-c", "4096", *where]


def _nginx_files(seat: Seat) -> None:
    seat.write("small", "0123456789abcdef" * (SMALL // 16))
    seat.write("large", "0123456789abcdef" * (LARGE // 16))
    temporary = "\n".join(
        f"  {kind}_temp_path {seat.folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = f"""\
worker_processes 2;
daemon off;
pid {seat.folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 1000000000;
{temporary}
  server {{
    listen {seat.port};
    root {seat.folder};
  }}
}}
"""
    seat.write("nginx.conf", text)


def _nginx(seat: Seat) -> list[str]:
    return ["nginx", "-c", f"{seat.folder}/nginx.conf"]


def postgres_programs(place: Place) -> str:
    """Debian keeps a directory per version, none of them in PATH."""
    found = sorted((place.root / "usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        raise ProgramError("no PostgreSQL: the package postgresql is missing")
    return "/" + str(found[-1].parent.relative_to(place.root))


def as_user(name: str) -> list[str]:
    return [f"--reuid={name}", f"--regid={name}", "--clear-groups"]


def _postgres_data(seat: Seat) -> None:
    data = f"{seat.folder}/data"
    programs = postgres_programs(seat.place)
    bare = Place(seat.place.process, seat.place.address)
    script = (
        f"install -d -o postgres {data} && setpriv {' '.join(as_user('postgres'))} {programs}/initdb -D {data} -A trust"
        f" -U postgres --no-sync >/dev/null && echo host all all all trust >>{data}/pg_hba.conf"
    )
    run(bare.enter("sh", "-c", script), 60)


def _postgres(seat: Seat) -> list[str]:
    settings = {
        "port": seat.port,
        "listen_addresses": "*",
        "unix_socket_directories": f"{seat.folder}/data",
        "fsync": "off",
        "log_min_messages": "panic",
    }
    words = (word for name, value in settings.items() for word in ("-c", f"{name}={value}"))
    program = f"{postgres_programs(seat.place)}/postgres"
    return [program, "-D", f"{seat.folder}/data", *words]


def _postgres_rows(seat: Seat) -> None:
    bare = Place(seat.place.process, seat.place.address)
    where = ("-h", f"{seat.folder}/data", "-p", str(seat.port), "-U", "postgres")
    run(bare.enter("pgbench", "-i", "-q", *where, "postgres"), 60)


PINGPONG: Final = Kind("pingpong", lambda seat: _tool(seat, "pingpong", "stream"))
PINGPONG_EPOLL: Final = Kind("pingpong-epoll", lambda seat: _tool(seat, "pingpong", "epoll"))
STREAM: Final = Kind("stream", lambda seat: _tool(seat, "stream"))
IPERF3: Final = Kind(
    "iperf3",
    lambda seat: ["iperf3", "--server", "--port", str(seat.port)],
    programs=(("iperf3", "iperf3"),),
)
REDIS: Final = Kind(
    "redis",
    _redis,
    programs=(("redis-server", "redis-server"), ("redis-benchmark", "redis-tools")),
)
MEMCACHED: Final = Kind("memcached", _memcached, programs=(("memcached", "memcached"),))
NGINX: Final = Kind(
    "nginx", _nginx, prepare=_nginx_files, programs=(("nginx", "nginx-light"), ("wrk", "wrk"))
)
PGSQL: Final = Kind(
    "postgres",
    _postgres,
    prepare=_postgres_data,
    fill=_postgres_rows,
    user="postgres",
    unix="data/.s.PGSQL.{port}",
    unix_is_folder=True,
    programs=(("pgbench", "postgresql"),),
    # SIGTERM would wait for the clients to go.
    end=signal.SIGINT,
)


def _tool(seat: Seat, name: str, *words: str) -> list[str]:
    return [f"{seat.place.tools}/{name}", *words, "serve", "-1", *seat.at]


def _answers(pair: Pair, seat: Seat) -> bool:
    """Whether a connection can be made, from where the client is."""

    def connect() -> None:
        if seat.path:
            with socket.socket(socket.AF_UNIX) as made:
                made.settimeout(2)
                made.connect(f"{seat.place.root}{seat.path}")
        else:
            where = (str(pair.server.address), seat.port)
            socket.create_connection(where, 2).close()

    namespace = os.open(pair.client.process / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        in_netns(namespace, connect)
    except OSError:
        return False
    finally:
        os.close(namespace)
    return True


@dataclass(slots=True)
class Servers:
    """All that were started. Leaving it ends them."""

    ports: count[int] = field(default_factory=lambda: count(FIRST_PORT))
    started: dict[tuple[str, str, frozenset[int]], Running] = field(default_factory=dict)
    _processes: list[tuple[subprocess.Popen[Any], Kind, Seat]] = field(default_factory=list)

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        for process, kind, _ in self._processes:
            process.send_signal(kind.end)
        for process, _, seat in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(seat.place.root / seat.folder.lstrip("/"), ignore_errors=True)

    def get(self, pair: Pair, kind: Kind, cores: frozenset[int] = frozenset()) -> Running:
        """The server of this pair; started, and waited for, if it doesn't run yet."""
        key = (pair.subject, kind.name, cores)
        if key not in self.started:
            self.started[key] = self._start(pair, kind, cores)
        return self.started[key]

    def fresh(self, pair: Pair, kind: Kind) -> Running:
        """One that nobody has used."""
        return self._start(pair, kind, frozenset())

    def _start(self, pair: Pair, kind: Kind, cores: frozenset[int]) -> Running:
        seat = Seat(pair.server, next(self.ports), "")
        if pair.transport == UNIX:
            seat = replace(seat, path=f"{seat.folder}/{kind.unix.format(port=seat.port)}")
        said = seat.place.root / seat.write("log", "").lstrip("/")
        kind.prepare(seat)
        # A bench that is killed takes its servers with it.
        before = ["setpriv", "--pdeathsig", kind.end.name.removeprefix("SIG")]
        if kind.user:
            before += as_user(kind.user)
        with said.open("w") as log:
            process = subprocess.Popen(
                pair.server.enter(*kind.command(seat), cores=cores, before=before),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._processes.append((process, kind, seat))
        end = time.monotonic() + PATIENCE
        while not _answers(pair, seat):
            if process.poll() is not None or time.monotonic() > end:
                raise ProgramError(
                    f"{pair.subject}: {kind.name} doesn't answer at port {seat.port}: {said.read_text()[-500:].strip()}"
                )
            time.sleep(0.02)
        kind.fill(seat)
        address = seat.path or str(pair.server.address)
        if seat.path and kind.unix_is_folder:
            address = str(Path(seat.path).parent)
        return Running(process.pid, address, seat.port, bool(seat.path))
