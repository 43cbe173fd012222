"""Unchanged Debian programs: their results are right, and use rings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from testbed.patience import patience
from tests.dataplane.places import SOURCES, Places

PYTHON = sys.executable


def need(*names: str) -> None:
    """Skip the test if a program is missing."""
    if missing := [name for name in names if not shutil.which(name)]:
        pytest.skip(f"missing: {', '.join(missing)}")


@contextlib.contextmanager
def serving(
    both: Places, command: Sequence[str], port: int, stop: signal.Signals = signal.SIGTERM
) -> Iterator[subprocess.Popen[Any]]:
    """A server that runs until a signal ends it; it listens when the block begins."""
    log = both.folder / "server.log"
    with log.open("wb") as out:
        server = both.server.popen(
            command, env=both.environment(), stdout=out, stderr=out, stdin=subprocess.DEVNULL
        )
    deadline = time.monotonic() + patience(20)
    while True:
        with contextlib.suppress(OSError):
            both.server.do(lambda: socket.create_connection((both.address, port), 5)).close()
            break
        assert server.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.05)
    try:
        yield server
    finally:
        server.send_signal(stop)
        server.wait(patience(15))


def run(both: Places, *command: str, timeout: float = 60) -> str:
    """Run a client and return its output."""
    done = both.client.run(command, env=both.environment(), timeout=patience(timeout), check=False)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return str(done.stdout)


def check(both: Places, program: str, *arguments: str) -> None:
    run(both, PYTHON, str(SOURCES / program), *arguments)


def test_redis(both: Places) -> None:
    """redis answers its own load generator, and keeps values of all sizes."""
    need("redis-server", "redis-benchmark")
    port = next(both.ports)
    server = ["redis-server", "--port", str(port), "--bind", "0.0.0.0", "--save", ""]
    with serving(both, [*server, "--protected-mode", "no", "--dir", str(both.folder)], port):
        load = ["redis-benchmark", "-h", both.address, "-p", str(port), "-n", "20000", "-q"]
        for pipeline in ("1", "16"):
            said = run(both, *load, "-c", "30", "-P", pipeline, "-t", "set,get,lpush,lrange_100")
            assert said.count("requests per second") >= 3, said
        check(both, "check_redis.py", both.address, str(port))
    both.upgraded(60)


def test_memcached(both: Places) -> None:
    """memcached with several threads gives each client its own values."""
    need("memcached")
    port = next(both.ports)
    server = ["memcached", "-u", "root", "-l", "0.0.0.0", "-p", str(port), "-t", "2", "-U", "0"]
    for _ in both.attempts(lambda: both.has_upgraded(12)):
        with serving(both, server, port):
            check(both, "check_memcached.py", both.address, str(port))


def nginx_configuration(folder: Path, port: int) -> Path:
    path = folder / "nginx.conf"
    path.write_text(
        f"""daemon off; worker_processes 2; user root; pid {folder}/nginx.pid; error_log stderr;
env FREEFLOW_STATS;
events {{ }}
http {{
    access_log off; sendfile on; keepalive_requests 100000;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen 0.0.0.0:{port} reuseport; root {folder}/files; limit_rate $arg_rate;
    }}
}}
"""
    )
    return path


def random_files(folder: Path, *sizes: int) -> dict[str, str]:
    """Make files that are named after their sizes; their hashes by name."""
    folder.mkdir(exist_ok=True)
    hashes = {}
    for size in sizes:
        data = os.urandom(size)
        (folder / str(size)).write_bytes(data)
        hashes[str(size)] = hashlib.sha256(data).hexdigest()
    return hashes


def fetch(both: Places, hashes: dict[str, str], url: str, times: int, *options: str) -> None:
    """Fetch each file so many times from `url`, with {} for its name, by one curl."""
    names = [name for _ in range(times) for name in hashes]
    got = both.folder / "got"
    shutil.rmtree(got, ignore_errors=True)
    got.mkdir()
    urls = [
        part
        for number, name in enumerate(names)
        for part in ("-o", str(got / f"{number}-{name}"), url.format(name))
    ]
    run(both, "curl", "-sS", "--fail", *options, *urls)
    for number, name in enumerate(names):
        found = hashlib.sha256((got / f"{number}-{name}").read_bytes()).hexdigest()
        assert found == hashes[name]


@pytest.mark.parametrize("keep_alive", [True, False])
def test_nginx(both: Places, keep_alive: bool) -> None:
    """Files from nginx's workers arrive complete, over persistent connections and over one for each
    file.
    """
    need("nginx", "curl")
    hashes = random_files(both.folder / "files", 1, 1024, 100_000, 3_000_000)
    header = [] if keep_alive else ["-H", "Connection: close"]
    for attempt in both.attempts(lambda: both.counted()["received"] > 1_000_000):
        port = next(both.ports)
        configuration = nginx_configuration(both.folder, port)
        # At full speed a connection lasts about as long as the router needs for an answer, and on a
        # busy machine none may get it in time. At a limited rate a connection lasts for seconds.
        rate, times = ((0, 40), ("512k", 1), ("128k", 1))[min(attempt, 2)]
        url = f"http://{both.address}:{port}/{{}}?rate={rate}"
        with serving(both, ["nginx", "-c", str(configuration)], port, signal.SIGQUIT):
            fetch(both, hashes, url, times, *header)


def test_iperf3(both: Places) -> None:
    """iperf3's two ends count the same bytes, in both directions."""
    need("iperf3")
    for attempt in both.attempts(lambda: both.has_upgraded(4)):
        transfer(both, 500 << min(attempt, 4))


def transfer(both: Places, mebibytes: int) -> None:
    """Transfer as much with iperf3 in each direction."""
    for reverse in ((), ("-R",)):
        port = next(both.ports)
        server = both.server.popen(
            ["iperf3", "-s", "-1", "-p", str(port)],
            env=both.environment(),
            stdout=subprocess.DEVNULL,
        )
        time.sleep(0.5)
        size = f"{mebibytes}M"
        client = ["iperf3", "-c", both.address, "-p", str(port), "-n", size, "-P", "2", "-J"]
        said = json.loads(run(both, *client, *reverse))
        assert server.wait(patience(10)) == 0
        sent, received = said["end"]["sum_sent"]["bytes"], said["end"]["sum_received"]["bytes"]
        assert sent >= mebibytes << 20
        # Bytes in flight when the client reports its end are not read any more.
        assert 0 <= sent - received < 64 << 20


def test_asyncio(both: Places) -> None:
    """Python's asyncio at both ends echoes all bytes."""
    program = str(SOURCES / "echo_asyncio.py")
    for _ in both.attempts(lambda: both.has_upgraded(20)):
        port = next(both.ports)
        server = [PYTHON, program, "server", "0.0.0.0", str(port)]
        with serving(both, server, port, signal.SIGINT):
            run(both, PYTHON, program, "client", both.address, str(port))


def test_node(both: Places) -> None:
    """Node.js at both ends echoes all bytes over persistent connections."""
    need("node")
    port = next(both.ports)
    program = str(SOURCES / "echo_node.js")
    with serving(both, ["node", program, "server", "0.0.0.0", str(port)], port):
        run(both, "node", program, "client", both.address, str(port))
    both.upgraded(8)


def test_java(both: Places) -> None:
    """Java's selectors and blocking sockets echo all bytes."""
    need("java", "javac")
    port = next(both.ports)
    subprocess.run(
        ["javac", "-d", str(both.folder), str(SOURCES / "Echo.java")],
        check=True,
        timeout=patience(120),
    )
    java = ["java", "-Xmx256m", "-cp", str(both.folder), "Echo"]
    with serving(both, [*java, "server", both.address, str(port)], port):
        run(both, *java, "client", both.address, str(port))
    both.upgraded(8)


GO: Final = """package main

import ("io"; "net"; "os")

func main() {
	listener, err := net.Listen("tcp", os.Args[1])
	if err != nil { panic(err) }
	for {
		connection, err := listener.Accept()
		if err != nil { panic(err) }
		go func() { io.Copy(connection, connection); connection.Close() }()
	}
}
"""


def test_go(both: Places) -> None:
    """A Go program, which calls the kernel itself, stays on TCP and works with accelerated
    clients.
    """
    need("go")
    port = next(both.ports)
    source, binary = both.folder / "echo.go", both.folder / "echo-go"
    source.write_text(GO)
    subprocess.run(
        ["go", "build", "-o", str(binary), str(source)],
        check=True,
        timeout=patience(180),
        env={**os.environ, "CGO_ENABLED": "0", "GOCACHE": str(both.folder / "go")},
    )
    with serving(both, [str(binary), f"0.0.0.0:{port}"], port):
        check(both, "echo_asyncio.py", "client", both.address, str(port))
    counted = both.counted()
    assert not counted.rows or (counted["senders"], counted["receivers"]) == (0, 0)


def postgres_folder() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("missing: postgresql")
    return found[-1].parent


def test_postgresql(both: Places) -> None:
    """pgbench's transactions leave PostgreSQL's sums equal, with a process per connection."""
    binaries = postgres_folder()
    need("pgbench", "psql", "setpriv")
    port = next(both.ports)
    both.folder.chmod(0o755)
    for parent in both.folder.parents:
        if parent == Path("/tmp"):
            break
        parent.chmod(parent.stat().st_mode | 0o055)
    data = both.folder / "postgres"
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")
    both.statistics.touch()
    both.statistics.chmod(0o666)
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    subprocess.run(
        [*user, str(binaries / "initdb"), "-D", str(data), "-A", "trust", "--no-sync"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    (data / "pg_hba.conf").write_text("host all all all trust\n")
    server = [*user, str(binaries / "postgres"), "-D", str(data), "-p", str(port), "-h", "0.0.0.0"]
    to = ["-h", both.address, "-p", str(port), "-U", "postgres"]
    with serving(both, [*server, "-k", "", "-F"], port, signal.SIGINT):
        run(both, "pgbench", *to, "-i", "-q", "postgres")
        said = run(both, "pgbench", *to, "-n", "-c", "6", "-j", "2", "-t", "150", "postgres")
        assert "900/900" in said, said
        run(both, "pgbench", *to, "-n", "-c", "2", "-t", "20", "-C", "-S", "postgres")
        sums = [
            run(both, "psql", *to, "-At", "-c", f"select sum({column}) from {table}", "postgres")
            for column, table in (
                ("abalance", "pgbench_accounts"),
                ("tbalance", "pgbench_tellers"),
                ("bbalance", "pgbench_branches"),
                ("delta", "pgbench_history"),
            )
        ]
        assert len(set(sums)) == 1, sums
        rows = run(both, "psql", *to, "-At", "-c", "select * from pgbench_accounts", "postgres")
        assert len(rows.splitlines()) == 100000
    both.upgraded(6)


def test_rsync(both: Places, tmp_path: Path) -> None:
    """rsync's daemon, which forks, delivers complete files."""
    need("rsync")
    port = next(both.ports)
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for number in range(200):
        (source / str(number)).write_bytes(os.urandom(number * 500))
    configuration = tmp_path / "rsyncd.conf"
    configuration.write_text(f"uid=root\nuse chroot=no\n[all]\npath={source}\n")
    server = ["rsync", "--daemon", "--no-detach", f"--config={configuration}", f"--port={port}"]
    with serving(both, server, port):
        run(both, "rsync", "-a", f"rsync://{both.address}:{port}/all/", f"{target}/")
    for each in source.iterdir():
        assert (target / each.name).read_bytes() == each.read_bytes()
