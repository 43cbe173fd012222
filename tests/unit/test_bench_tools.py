"""The load programs in bench/tools, over loopback: correct counts, and errors for wrong data."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from bench import client_processes, compiled, parse
from bench.client_processes import ClientProcesses, RunningClients
from bench.errors import ProgramError
from bench.namespaces import ProcessNamespaces, SubjectPair
from bench.servers import Running
from testbed.patience import patience


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools")
    compiled.compile_into(directory)
    return directory


def run(*argv: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    line = [str(word) for word in argv]
    return subprocess.run(
        line, input=stdin, capture_output=True, text=True, timeout=patience(30), check=False
    )


@contextlib.contextmanager
def serving(*argv: object) -> Iterator[tuple[str, str]]:
    """A server of bench/tools at a unix socket; its address as a client takes it."""
    path = Path(str(argv[0])).with_name(f"socket-{time.monotonic_ns()}")
    line = [*(str(word) for word in argv), "serve", "-1", str(path), "0"]
    process = subprocess.Popen(line)
    try:
        end = time.monotonic() + patience(10)
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.05)
        yield str(path), "0"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, str]]:
    """A server in Python with a thread per connection; its address and port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                answer(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield "127.0.0.1", str(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["stream", "epoll"])
@pytest.mark.parametrize("size", [64, 65536])
def test_round_trips_are_counted(tools: Path, kind: str, size: int) -> None:
    """Blocking calls and epoll exchange whole messages of the given size."""
    with serving(tools / "pingpong", kind) as where:
        done = run(tools / "pingpong", kind, "call", -1, *where, size, 0.5)
    trips = parse.pingpong(done.stdout)
    assert trips.count > 0
    assert 0 < trips.p50_us <= trips.p99_us
    assert trips.cpu_us > 0


def test_wrong_answer_is_an_error(tools: Path) -> None:
    """A message that comes back changed ends the run without a figure."""

    def answer(connection: socket.socket) -> None:
        connection.recv(4)
        while connection.recv(64):
            connection.sendall(b"\xff" * 64)

    with answering(answer) as where:
        done = run(tools / "pingpong", "stream", "call", -1, *where, 64, 0.2)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "answer" in done.stderr


def test_held_connections_work_afterwards(tools: Path) -> None:
    """Connections are idle from "ready" to the end of input; then they carry one more message."""
    with serving(tools / "pingpong", "epoll") as where:
        done = run(tools / "pingpong", "epoll", "hold", -1, *where, 64, 20)
    assert done.stdout == 'ready\n{"count": 20}\n'
    assert done.returncode == 0


def test_stream_counts_what_arrived(tools: Path) -> None:
    """The rate is that of the bytes that the reader counted."""
    with serving(tools / "throughput") as where:
        done = run(tools / "throughput", "call", -1, *where, 16384, 0.2)
    moved = parse.moved(done.stdout)
    assert moved.count > 0
    assert moved.count % 16384 == 0
    assert moved.seconds >= 0.2


def test_copies(tools: Path) -> None:
    """Whole copies are counted, in the time that they took."""
    moved = parse.moved(run(tools / "copies", 65536, 0.1).stdout)
    assert moved.count > 0
    assert moved.count % 65536 == 0
    assert 0.1 <= moved.seconds < 10


def test_stream_with_bytes_missing_is_an_error(tools: Path) -> None:
    """Different counts of reader and writer are an error."""

    def answer(connection: socket.socket) -> None:
        got = -4
        while some := connection.recv(1 << 20):
            got += len(some)
        connection.sendall((got - 1).to_bytes(8, "little"))

    with answering(answer) as where:
        done = run(tools / "throughput", "call", -1, *where, 4096, 0.1)
    assert done.returncode != 0
    assert "arrived" in done.stderr


class Memcached:
    """The part of memcached that the load needs; `wrong` and `forgets` make it misbehave."""

    def __init__(self, wrong: bool = False, forgets: int = 0) -> None:
        self.wrong = wrong
        self.forgets = forgets
        self.values: dict[bytes, bytes] = {}
        self.hits = 0
        self.lock = threading.Lock()

    def __call__(self, connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        while line := lines.readline():
            match line.split():
                case [b"set", key, _, _, size]:
                    self.values[key] = lines.read(int(size) + 2)
                    connection.sendall(b"STORED\r\n")
                case [b"get", key]:
                    with self.lock:
                        self.hits += 1
                    value = self.values[key]
                    if self.wrong:
                        value = b"?" + value[1:]
                    head = b"VALUE %b 0 %d\r\n" % (key, len(value) - 2)
                    connection.sendall(head + value + b"END\r\n")
                case [b"stats"]:
                    told = max(0, self.hits - self.forgets)
                    connection.sendall(b"STAT pid 1\r\nSTAT get_hits %d\r\nEND\r\n" % told)


def test_memcached_requests_are_those_the_server_counted(tools: Path) -> None:
    """The load's count equals the server's."""
    server = Memcached()
    with answering(server) as where:
        done = run(tools / "memload", -1, *where, 3, 0.3)
    assert parse.moved(done.stdout).count == server.hits > 0


@pytest.mark.parametrize(
    ("server", "words"),
    [(Memcached(wrong=True), "wrong answer"), (Memcached(forgets=1), "server has counted")],
)
def test_memcached_that_is_wrong_gives_no_figure(
    tools: Path, server: Memcached, words: str
) -> None:
    """A wrong value, or a different count of the server, is an error."""
    with answering(server) as where:
        done = run(tools / "memload", -1, *where, 3, 0.3)
    assert done.returncode != 0
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two cores are needed")
def test_bare_ring(tools: Path) -> None:
    """The ring's two ends exchange messages, and the reader gets every byte of a stream."""
    cores = sorted(os.sched_getaffinity(0))[-2:]
    trips = parse.pingpong(run(tools / "ring", "pingpong", *cores, 64, 0.3).stdout)
    assert trips.count > 0
    moved = parse.moved(run(tools / "ring", "stream", *cores, 4096, 0.2).stdout)
    assert moved.count % 4096 == 0
    assert moved.count > 0


def test_nobody_there_is_an_error(tools: Path, tmp_path: Path) -> None:
    """A program that cannot connect fails with an error."""
    for program in (("pingpong", "stream"), ("throughput",)):
        tool = tools / program[0]
        done = run(tool, *program[1:], "call", -1, tmp_path / "nobody", 0, 64, 0.1)
        assert done.returncode != 0
        assert "connect" in done.stderr


@pytest.mark.parametrize("kind", ["fork", "exec", "start"])
def test_processes_are_counted(tools: Path, kind: str) -> None:
    """The cost of a new process includes the CPU time of parent and children."""
    with serving(tools / "pingpong", "stream") as where:
        made = parse.moved(run(tools / "processes", kind, *where, 0.2).stdout)
    assert made.count > 0
    assert made.seconds >= 0.2
    assert made.cpu_us > 0


class Redis:
    """The part of redis that the load needs. `wrong` changes each value that it returns; `mute`
    returns none.
    """

    def __init__(self, wrong: bool = False, mute: bool = False) -> None:
        self.wrong = wrong
        self.mute = mute
        self.values: dict[bytes, bytes] = {}
        self.gets = 0
        self.connections = 0
        self.lock = threading.Lock()

    def __call__(self, connection: socket.socket) -> None:
        with self.lock:
            self.connections += 1
        lines = connection.makefile("rb")
        while line := lines.readline():
            words = []
            for _ in range(int(line[1:])):
                size = int(lines.readline()[1:])
                words.append(lines.read(size + 2)[:-2])
            if words[0] == b"SET":
                self.values[words[1]] = words[2]
                connection.sendall(b"+OK\r\n")
                continue
            with self.lock:
                self.gets += 1
            if self.mute:
                continue
            value = self.values[words[1]]
            said = b"?" + value[1:] if self.wrong and self.gets > 5 else value
            connection.sendall(b"$%d\r\n%b\r\n" % (len(value), said))


def web(connection: socket.socket) -> None:
    """A server whose every answer has another header of the same size, as a date does."""
    lines = connection.makefile("rb")
    for number in range(10**6):
        while (line := lines.readline()) not in (b"\r\n", b""):
            continue
        if not line:
            return
        head = f"HTTP/1.1 200 OK\r\nDate: {number:09}\r\nContent-Length: 5\r\n\r\n"
        connection.sendall(head.encode() + b"hello")


def window(
    seconds: float, *argv: object, rest: Callable[[], None] = lambda: None
) -> tuple[client_processes.Counted, int]:
    """The window of a run of `clients`, and its exit code; `rest` is called without load."""
    line = [str(word) for word in argv]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGHUP)
            time.sleep(0.1)
            process.send_signal(signal.SIGUSR1)
            time.sleep(seconds)
            process.send_signal(signal.SIGUSR2)
            counted = client_processes.sum_up([process.stdout.readline()])
            process.send_signal(signal.SIGINT)
            rest()
            process.terminate()
            return counted, process.wait(patience(10))
        finally:
            process.kill()


@pytest.mark.parametrize("pipeline", [1, 4])
def test_clients_count_in_their_window_only(tools: Path, pipeline: int) -> None:
    """Requests before and after the window are not counted, and each answer belongs to one."""
    server = Redis()
    with answering(server) as where:
        counted, code = window(0.3, tools / "clients", "redis", *where, 3, pipeline, 0)
    assert code == 0
    assert server.connections == 3
    assert 0 < counted.count < server.gets
    assert counted.count % pipeline == 0
    assert counted.latency is not None
    assert 0 < counted.latency.p50_us <= counted.latency.p99_us


def test_clients_rest_with_open_connections(tools: Path) -> None:
    """After SIGINT the connections stay open and carry nothing, until SIGTERM."""
    server = Redis()
    gets: list[int] = []

    def rest() -> None:
        time.sleep(0.3)
        for _ in range(2):
            gets.append(server.gets)
            time.sleep(0.2)

    with answering(server) as where:
        _, code = window(0.2, tools / "clients", "redis", *where, 3, 1, 0, rest=rest)
    assert code == 0
    assert gets[0] == gets[1] == server.gets > 0


def test_clients_keep_to_their_rate(tools: Path) -> None:
    """With a rate, the connections together send so many requests per second, and no more."""
    with answering(Redis()) as where:
        counted, code = window(1.0, tools / "clients", "redis", *where, 5, 1, 200)
    assert code == 0
    assert 0 < counted.rate <= 220


def test_clients_of_other_servers(tools: Path) -> None:
    """memcached, HTTP and echo are spoken, and a stream counts its bytes."""
    tool = tools / "clients"
    with answering(Memcached()) as where:
        assert window(0.2, tool, "memcached", *where, 2, 1, 0)[1] == 0
    with answering(web) as where:
        assert window(0.2, tool, "http", *where, 2, 1, 0)[1] == 0
    with serving(tools / "pingpong", "epoll") as where:
        assert window(0.2, tool, "echo", *where, 2, 1, 0)[1] == 0
    with serving(tools / "throughput") as where:
        counted, code = window(0.2, tool, "stream", *where, 4096)
    assert code == 0
    assert counted.count % 4096 == 0
    assert counted.latency is None


def pair_of(tools: Path, where: tuple[str, str]) -> tuple[SubjectPair, Running]:
    """A pair whose client programs run here, and its server."""
    here = Here(Path("/proc/self"), IPv4Address("127.0.0.1"), tools=str(tools))
    return SubjectPair("here", here, here), Running(1, where[0], int(where[1]), False)


class Here(ProcessNamespaces):
    """The namespaces that the test itself runs in, which need not be entered."""

    def enter(self, *program: str, **_: object) -> list[str]:
        return list(program)


def test_load_begins_when_all_clients_are_there(tools: Path) -> None:
    """Nothing is sent before all processes have their connections and the load is begun; then each
    process has a session of its own, and the window counts.
    """
    server = Redis()
    with answering(server) as where:
        pair, running = pair_of(tools, where)
        with RunningClients(pair, ClientProcesses("redis", 3, 2), [running]) as clients:
            time.sleep(0.3)
            assert (server.connections, server.gets) == (6, 0)
            pids = [process.pid for process in clients.processes]
            assert [os.getsid(pid) for pid in pids] == pids
            clients.load()
            time.sleep(0.1)
            clients.begin()
            time.sleep(0.2)
            assert 0 < clients.end().count < server.gets


def test_clients_end_without_load(tools: Path) -> None:
    """Clients that are not to load anything end without an error, and without a request."""
    server = Redis()
    with answering(server) as where:
        pair, running = pair_of(tools, where)
        with RunningClients(pair, ClientProcesses("redis", 2, 2), [running]):
            pass
    assert server.gets == 0


def test_silent_clients_are_explained(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error about a client that says nothing tells which one, and where it waits."""
    monkeypatch.setattr(client_processes, "PATIENCE", 0.5)
    with answering(lambda connection: time.sleep(5)) as where:
        pair, running = pair_of(tools, where)
        with pytest.raises(ProgramError, match=r"client 1 of 2 said nothing .*: clients is "):
            RunningClients(pair, ClientProcesses("redis", 2), [running])


def test_a_request_without_an_answer_is_an_error(tools: Path) -> None:
    """The error says whether the request has arrived: here TCP has delivered all of it."""
    with answering(Redis(mute=True)) as where:
        process = subprocess.Popen(
            [str(tools / "clients"), "redis", *where, "1", "1", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGHUP)
            _, said = process.communicate(timeout=patience(30))
    assert process.returncode == 1
    assert "no answer in ten seconds: 0 segments not acknowledged, sent again 0 times" in said


def test_clients_refuse_another_answer(tools: Path) -> None:
    """An answer that differs from what the program has stored ends it with an error."""
    with answering(Redis(wrong=True)) as where:
        pair, running = pair_of(tools, where)
        clients = RunningClients(pair, ClientProcesses("redis", 1, 2), [running])
        clients.load()
        clients.processes[0].wait(patience(10))
        with pytest.raises(ProgramError, match="an answer differs"):
            clients.__exit__(None, None, None)


def test_clients_refuse_another_server(tools: Path) -> None:
    """A server that does not store what the program sends is not measured."""
    with serving(tools / "pingpong", "epoll") as where:
        done = run(tools / "clients", "redis", *where, 1, 1, 0)
    assert done.returncode == 1
    assert "didn't store" in done.stderr
