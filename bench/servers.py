"""The servers of measurements: started in a container when first needed, and stopped together.

There is one for each program, pair and set of cores. Idle servers keep running at no cost.
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
from bench.namespaces import UNIX, ProcessNamespaces, SubjectPair, run, start
from driver.kernel.namespace import in_netns

FIRST_PORT: Final = 7100
PATIENCE: Final = 20.0
SMALL: Final = 1024
LARGE: Final = 100 * 1024


@dataclass(frozen=True, slots=True)
class Instance:
    """Where a server listens: at a port of all addresses, or with `path` at a unix socket."""

    namespaces: ProcessNamespaces
    port: int
    path: str

    @property
    def folder(self) -> str:
        """Folder of the server's files, in the container."""
        return f"/tmp/bench-{os.getpid()}-{self.port}"

    @property
    def at(self) -> tuple[str, str]:
        """Address and port as our load programs take them."""
        return (self.path, "0") if self.path else ("0.0.0.0", str(self.port))

    def write(self, name: str, text: str) -> str:
        """Write a file for the server; its path in the container."""
        folder = self.namespaces.root / self.folder.lstrip("/")
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        (folder / name).write_text(text)
        return f"{self.folder}/{name}"


@dataclass(frozen=True, slots=True)
class Running:
    """A running server, with address and port for the client; a unix socket has a path."""

    pid: int
    address: str
    port: int
    unix: bool

    def processes(self) -> set[int]:
        return set(cost.family(self.pid))

    def settled(self, processes: set[int], patience: float = 1.0) -> None:
        """Wait until processes that it forked for a client have ended, so that their time
        counts.
        """
        end = time.monotonic() + patience
        while self.processes() - processes and time.monotonic() < end:
            time.sleep(0.005)

    def cpu_us(self) -> float:
        return cost.cpu_us(self.pid)


@dataclass(frozen=True, slots=True)
class ServerProgram:
    """A server program: its command line, preparations before the start, and data after it.

    `unix` is the path of its unix socket in its folder; with `unix_is_folder` clients name only the
    folder. `user` is the user that it runs as.
    """

    name: str
    command: Callable[[Instance], Sequence[str]]
    prepare: Callable[[Instance], None] = lambda _: None
    fill: Callable[[Instance], None] = lambda _: None
    user: str = ""
    end: signal.Signals = signal.SIGTERM
    unix: str = "socket"
    unix_is_folder: bool = False
    programs: tuple[tuple[str, str], ...] = ()
    """Debian's programs for server and client, each with its package."""


def _redis(instance: Instance) -> list[str]:
    where = ["--port", "0", "--unixsocket", instance.path]
    if not instance.path:
        where = ["--port", str(instance.port), "--bind", "0.0.0.0", "--protected-mode", "no"]
    return ["redis-server", *where, "--save", "", "--dir", "/tmp"]


def _memcached(instance: Instance) -> list[str]:
    where = ["-s", instance.path] if instance.path else ["-p", str(instance.port), "-l", "0.0.0.0"]
    return ["memcached", "-u", "root", "-U", "0", "-t", "2", "-c", "4096", *where]


def _nginx_files(instance: Instance) -> None:
    instance.write("small", "0123456789abcdef" * (SMALL // 16))
    instance.write("large", "0123456789abcdef" * (LARGE // 16))
    temporary = "\n".join(
        f"  {kind}_temp_path {instance.folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    text = f"""\
worker_processes 2;
daemon off;
pid {instance.folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 1000000000;
{temporary}
  server {{
    listen {instance.port};
    root {instance.folder};
  }}
}}
"""
    instance.write("nginx.conf", text)


def _nginx(instance: Instance) -> list[str]:
    return ["nginx", "-c", f"{instance.folder}/nginx.conf"]


def postgres_programs(namespaces: ProcessNamespaces) -> str:
    """The folder of PostgreSQL's programs: Debian has one per version, none in PATH."""
    found = sorted((namespaces.root / "usr/lib/postgresql").glob("*/bin/postgres"))
    if not found:
        raise ProgramError("no PostgreSQL: the package postgresql is missing")
    return "/" + str(found[-1].parent.relative_to(namespaces.root))


def as_user(name: str) -> list[str]:
    return [f"--reuid={name}", f"--regid={name}", "--clear-groups"]


def _postgres_data(instance: Instance) -> None:
    data = f"{instance.folder}/data"
    programs = postgres_programs(instance.namespaces)
    bare = ProcessNamespaces(instance.namespaces.process, instance.namespaces.address)
    script = (
        f"install -d -o postgres {data} && setpriv {' '.join(as_user('postgres'))} {programs}/initdb -D {data} -A trust"
        f" -U postgres --no-sync >/dev/null && echo host all all all trust >>{data}/pg_hba.conf"
    )
    run(bare.enter("sh", "-c", script), 60)


def _postgres(instance: Instance) -> list[str]:
    settings = {
        "port": instance.port,
        "listen_addresses": "*",
        "unix_socket_directories": f"{instance.folder}/data",
        "fsync": "off",
        "log_min_messages": "panic",
    }
    words = (word for name, value in settings.items() for word in ("-c", f"{name}={value}"))
    program = f"{postgres_programs(instance.namespaces)}/postgres"
    return [program, "-D", f"{instance.folder}/data", *words]


def _postgres_rows(instance: Instance) -> None:
    bare = ProcessNamespaces(instance.namespaces.process, instance.namespaces.address)
    where = ("-h", f"{instance.folder}/data", "-p", str(instance.port), "-U", "postgres")
    run(bare.enter("pgbench", "-i", "-q", *where, "postgres"), 60)


PINGPONG: Final = ServerProgram("pingpong", lambda instance: _tool(instance, "pingpong", "stream"))
PINGPONG_EPOLL: Final = ServerProgram(
    "pingpong-epoll", lambda instance: _tool(instance, "pingpong", "epoll")
)
STREAM: Final = ServerProgram("stream", lambda instance: _tool(instance, "throughput"))
IPERF3: Final = ServerProgram(
    "iperf3",
    lambda instance: ["iperf3", "--server", "--port", str(instance.port)],
    programs=(("iperf3", "iperf3"),),
)
REDIS: Final = ServerProgram(
    "redis",
    _redis,
    programs=(("redis-server", "redis-server"), ("redis-benchmark", "redis-tools")),
)
MEMCACHED: Final = ServerProgram("memcached", _memcached, programs=(("memcached", "memcached"),))
NGINX: Final = ServerProgram(
    "nginx", _nginx, prepare=_nginx_files, programs=(("nginx", "nginx-light"), ("wrk", "wrk"))
)
PGSQL: Final = ServerProgram(
    "postgres",
    _postgres,
    prepare=_postgres_data,
    fill=_postgres_rows,
    user="postgres",
    unix="data/.s.PGSQL.{port}",
    unix_is_folder=True,
    programs=(("pgbench", "postgresql"),),
    # After SIGTERM it would wait until all clients have disconnected.
    end=signal.SIGINT,
)


def _tool(instance: Instance, name: str, *words: str) -> list[str]:
    return [f"{instance.namespaces.tools}/{name}", *words, "serve", "-1", *instance.at]


def _answers(pair: SubjectPair, instance: Instance) -> bool:
    """Does the server accept connections from the client's namespace?"""

    def connect() -> None:
        if instance.path:
            with socket.socket(socket.AF_UNIX) as made:
                made.settimeout(2)
                made.connect(f"{instance.namespaces.root}{instance.path}")
        else:
            where = (str(pair.server.address), instance.port)
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
    """All started servers. Leaving the context stops them."""

    ports: count[int] = field(default_factory=lambda: count(FIRST_PORT))
    started: dict[tuple[str, str, frozenset[int]], Running] = field(default_factory=dict)
    _processes: list[tuple[subprocess.Popen[Any], ServerProgram, Instance]] = field(
        default_factory=list
    )

    def __enter__(self) -> Servers:
        return self

    def __exit__(
        self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None
    ) -> None:
        for process, kind, _ in self._processes:
            process.send_signal(kind.end)
        for process, _, instance in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(
                instance.namespaces.root / instance.folder.lstrip("/"), ignore_errors=True
            )

    def get(
        self, pair: SubjectPair, kind: ServerProgram, cores: frozenset[int] = frozenset()
    ) -> Running:
        """The server of this pair; started if it is not running."""
        key = (pair.subject, kind.name, cores)
        if key not in self.started:
            self.started[key] = self._start(pair, kind, cores)
        return self.started[key]

    def fresh(self, pair: SubjectPair, kind: ServerProgram) -> Running:
        """A new server, not used before."""
        return self._start(pair, kind, frozenset())

    def _start(self, pair: SubjectPair, kind: ServerProgram, cores: frozenset[int]) -> Running:
        instance = Instance(pair.server, next(self.ports), "")
        if pair.transport == UNIX:
            instance = replace(
                instance, path=f"{instance.folder}/{kind.unix.format(port=instance.port)}"
            )
        if _answers(pair, instance):
            raise ProgramError(
                f"{pair.subject}: port {instance.port} is another program's; measure without it"
            )
        said = instance.namespaces.root / instance.write("log", "").lstrip("/")
        kind.prepare(instance)
        # If the benchmark is killed, its servers end, too.
        before = ["setpriv", "--pdeathsig", kind.end.name.removeprefix("SIG")]
        if kind.user:
            before += as_user(kind.user)
        with said.open("w") as log:
            process = start(
                pair.server.enter(*kind.command(instance), cores=cores, before=before),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._processes.append((process, kind, instance))
        end = time.monotonic() + PATIENCE
        while not _answers(pair, instance):
            if process.poll() is not None or time.monotonic() > end:
                raise ProgramError(
                    f"{pair.subject}: {kind.name} does not answer at port {instance.port}: {said.read_text()[-500:].strip()}"
                )
            time.sleep(0.02)
        kind.fill(instance)
        address = instance.path or str(pair.server.address)
        if instance.path and kind.unix_is_folder:
            address = str(Path(instance.path).parent)
        return Running(process.pid, address, instance.port, bool(instance.path))
