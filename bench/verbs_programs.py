"""Runs of programs of RDMA verbs: a server in one container, its client in the other.

Each program measures by itself, and prints what it found. All are Debian's, unchanged. They run in
the containers' PID namespaces too, so that their `/proc` is their own.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface
from itertools import pairwise
from pathlib import Path
from typing import Final

from bench import parse
from bench.errors import ProgramError
from bench.measures import Call, Measure
from bench.namespaces import ProcessNamespaces, SubjectPair, run, start
from bench.servers import Servers

PORT: Final = 18515
"""At which servers listen. The halves of a program of perftest exchange the numbers of their queue
pairs there, over TCP."""
PATIENCE: Final = 60.0
"""Seconds for a client."""
STARTED: Final = 20.0
"""Seconds in which a server has to listen, and to end."""
ENDING: Final = ("setpriv", "--pdeathsig", "KILL")
"""A program in a PID namespace is a child of nsenter, and ends with it."""
OVER_VERBS: Final = ("UCX_TLS=rc_v,ud_v,self", "UCX_NET_DEVICES=freeflow0:1")
"""Variables that make UCX use nothing but the device."""
FEWEST: Final = 1000
"""Iterations of perftest that are always made."""
MOST: Final = 5_000_000
AVERAGE_LATENCY: Final = "t_avg[usec]"
MESSAGES: Final = "MsgRate[Mpps]"
TRIALS: Final = 7
"""How often NetPIPE repeats the round trips that it was told to make; it prints the best time."""
KEY: Final = "/tmp/bench-key"
"""The key of sshd and of who logs in there."""
Cores = tuple[int, ...]
Server = subprocess.Popen[str]
_LISTENS: Final = "0A"
"""A state in /proc/net/tcp (include/net/tcp_states.h)."""


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """A run: its figure, and how many units of work it was."""

    figure: float
    units: float


@dataclass(frozen=True, slots=True)
class Job:
    """Where a program runs: containers, cores of both ends (empty: any), and servers for TCP."""

    pair: SubjectPair
    servers: Servers
    server_cores: Cores
    client_cores: Cores
    seconds: float

    def on_server(self, *words: str) -> list[str]:
        """The command line of a server."""
        return self.pair.server.enter(*words, cores=self.server_cores, before=ENDING, own_pids=True)

    def on_client(self, *words: str) -> list[str]:
        """The command line of a client."""
        return self.pair.client.enter(*words, cores=self.client_cores, before=ENDING, own_pids=True)


Program = Callable[[Job], ProgramRun]


def figures(text: str) -> dict[str, float]:
    """The last line of perftest's table, by the words of its head, such as `t_typical[usec]`.

    Raises:
        ProgramError: there is no such table.
    """
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if line.lstrip().startswith("#bytes")]
    for number in heads[-1:]:
        names = re.findall(r"(?:BW |[\d.]+% )?\S+", lines[number])
        values = lines[number + 1].split() if number + 1 < len(lines) else []
        try:
            return {name: float(value) for name, value in zip(names, values, strict=True)}
        except ValueError:
            break
    raise ProgramError(f"perftest said {text[-300:]!r}")


def rate(text: str) -> float:
    """Gbit/s, from the last line of rstream's table.

    Raises:
        ProgramError: there is no such table.
    """
    lines = text.splitlines()
    for head, line in pairwise(lines):
        names, values = head.split(), line.split()
        if names[:1] == ["name"] and len(values) == len(names) and "Gb/sec" in names:
            with suppress(ValueError):
                return float(values[names.index("Gb/sec")])
    raise ProgramError(f"rstream said {text[-300:]!r}")


def ucx_bandwidth(text: str) -> float:
    """Gbit/s of the whole run, from the last line of ucx_perftest, whose MB are of 1024 * 1024.

    Raises:
        ProgramError: there is no such line.
    """
    found = re.search(r"^Final:((?:\s+[\d.]+){8})\s*$", text, re.MULTILINE)
    if not found:
        raise ProgramError(f"ucx_perftest said {text[-300:]!r}")
    return float(found[1].split()[5]) * 2**20 * 8 / 1e9


def netpipe(text: str) -> float:
    """Microseconds, from the only line of NetPIPE's table.

    Raises:
        ProgramError: there is no such line.
    """
    found = re.search(r"^ *\d+: +\d+ bytes +\d+ times --> .* in +([\d.]+) usec", text, re.MULTILINE)
    if not found:
        raise ProgramError(f"NetPIPE said {text[-300:]!r}")
    return float(found[1])


def _listening(process: Path, port: int) -> bool:
    """Whether a TCP socket of a process's network namespace listens at this port."""
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                return True
    return False


def _ended(server: Server, pair: SubjectPair, name: str) -> None:
    """Wait for the server's end. Raises `ProgramError` if it failed."""
    try:
        said, _ = server.communicate(timeout=STARTED)
    except subprocess.TimeoutExpired as error:
        raise ProgramError(f"{pair.subject}: the server of {name} does not end") from error
    if server.returncode != 0:
        raise ProgramError(f"{pair.subject}: the server of {name}: {said.strip()[-300:]}")


@contextmanager
def _started(line: list[str]) -> Iterator[Server]:
    """A server, which is killed in the end if it has not ended by then."""
    server = start(line, stderr=subprocess.STDOUT)
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def _serving(pair: SubjectPair, name: str, line: list[str]) -> Iterator[Server]:
    """A server that listens. Raises `ProgramError` if it doesn't."""
    with _started(line) as server:
        end = time.monotonic() + STARTED
        while not _listening(pair.server.process, PORT):
            if server.poll() is not None or time.monotonic() > end:
                raise ProgramError(f"{pair.subject}: the server of {name} does not listen")
            time.sleep(0.01)
        yield server


def _between(
    job: Job, name: str, server_words: tuple[str, ...], client_words: tuple[str, ...]
) -> str:
    """Run both halves of a program, and return what the client prints.

    Raises:
        ProgramError: one of them failed, or has not ended in time.
    """
    with _serving(job.pair, name, job.on_server(*server_words)) as server:
        said = run(job.on_client(*client_words), PATIENCE)
        _ended(server, job.pair, name)
    return said


@dataclass(slots=True)
class Perftest:
    """A program of perftest: the column of its table that is the figure, and how many units of work
    an iteration is. `trips`: how many of its latencies an iteration takes; 0: it has a bandwidth.

    It stops after a number of iterations, which is taken from the rate of the run before. A subject
    needs a short run first.
    """

    column: str
    units: float
    trips: int
    words: tuple[str, ...]
    rates: dict[str, float] = field(default_factory=dict)

    def __call__(self, job: Job) -> ProgramRun:
        count = self.rates[job.pair.subject] * job.seconds
        return self._run(job, min(MOST, max(2 * FEWEST, round(count))))

    def short(self, job: Job) -> ProgramRun:
        """A run of few iterations, of which most is the program's start and end."""
        return self._run(job, FEWEST)

    def _run(self, job: Job, count: int) -> ProgramRun:
        words = (*self.words, "-n", str(count), "-F", "-p", str(PORT))
        found = figures(_between(job, words[0], words, (*words, str(job.pair.server.address))))
        pace = AVERAGE_LATENCY if self.trips else MESSAGES
        missing = {self.column, pace} - set(found)
        if missing:
            raise ProgramError(
                f"{self.words[0]} prints no {', '.join(missing)}: {', '.join(found)}"
            )
        if self.trips:
            self.rates[job.pair.subject] = 1e6 / max(found[pace] * self.trips, 0.01)
        else:
            self.rates[job.pair.subject] = found[pace] * 1e6
        return ProgramRun(found[self.column], found["#iterations"] * self.units)


def rstream(size: int, count: int, *more: str) -> Program:
    """rstream, over RDMA or with `-T s` over TCP: pieces of `size` bytes, `count` there and as many
    back. The figure is in Gbit/s, units are GB.

    A server of rdma_cm can't be seen listening, so the client asks until it answers.
    """

    def call(job: Job) -> ProgramRun:
        words = ("rstream", "-p", str(PORT), "-S", str(size), "-C", str(count), *more)
        client = job.on_client(*words, "-s", str(job.pair.server.address))
        with _started(job.on_server(*words)) as server:
            end = time.monotonic() + STARTED
            while True:
                try:
                    found = rate(run(client, PATIENCE))
                    break
                except ProgramError:
                    if server.poll() is not None or time.monotonic() > end:
                        raise
                    time.sleep(0.05)
            _ended(server, job.pair, "rstream")
        return ProgramRun(found, 2 * size * count / 1e9)

    return call


def _device(end: ProcessNamespaces) -> str:
    """The device that has a container's address; it has others, which do not reach its peers."""
    said = run(end.enter_network("ip", "-o", "-4", "addr", "show", "to", str(end.address)), STARTED)
    if not said:
        raise ProgramError(f"no device has {end.address}")
    return said.split()[1]


def ucx(test: str, size: int, count: int, *, by_tcp: bool = False) -> Program:
    """A test of bandwidth of ucx_perftest; the figure is in Gbit/s, units are GB."""
    shape = ("-t", test, "-s", str(size), "-n", str(count), "-w", "100", "-p", str(PORT))

    def words(end: ProcessNamespaces) -> tuple[str, ...]:
        carrier = ("UCX_TLS=tcp,self", f"UCX_NET_DEVICES={_device(end)}") if by_tcp else OVER_VERBS
        return ("env", *carrier, "ucx_perftest")

    def call(job: Job) -> ProgramRun:
        server, client = words(job.pair.server), words(job.pair.client)
        to = str(job.pair.server.address)
        said = _between(job, "ucx_perftest", (*server, *shape), (*client, to, *shape))
        return ProgramRun(ucx_bandwidth(said), size * count / 1e9)

    return call


def _keys(pair: SubjectPair) -> None:
    """Make the key of sshd in both containers."""
    mine, theirs = (end.root / KEY.lstrip("/") for end in (pair.client, pair.server))
    if mine.exists() and theirs.exists():
        return
    for path in (mine, mine.with_suffix(".pub")):
        path.unlink(missing_ok=True)
    run(pair.client.enter("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY), STARTED)
    for suffix in ("", ".pub"):
        copy = theirs.with_suffix(suffix)
        copy.touch(0o600)
        copy.write_bytes(mine.with_suffix(suffix).read_bytes())


def _ssh(job: Job) -> list[str]:
    """The command line of sshd."""
    options = ("StrictModes=no", "UsePAM=no", "PermitRootLogin=yes", "PidFile=none")
    return job.on_server(
        *("sh", "-c", 'mkdir -p /run/sshd && exec "$@"', "sh", "/usr/sbin/sshd", "-D", "-e"),
        *("-p", str(PORT), "-h", KEY, "-o", f"AuthorizedKeysFile={KEY}.pub"),
        *(word for each in options for word in ("-o", each)),
    )


def mpi(size: int, count: int, *, by_tcp: bool = False) -> Program:
    """NetPIPE over Open MPI, whose second rank is started by ssh: `count` times `size` bytes there
    and back, in `TRIALS` trials. The figure is half of the time of a round trip, of the best trial,
    in microseconds; units are round trips.
    """
    agent = f"ssh -i {KEY} -p {PORT} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
    shape = ("-l", str(size), "-u", str(size), "-p", "0", "-n", str(count))

    def call(job: Job) -> ProgramRun:
        # mpirun, sshd and what they start run without the library, but for the ranks.
        pair = replace(
            job.pair,
            client=replace(job.pair.client, library=""),
            server=replace(job.pair.server, library=""),
        )
        plain = replace(job, pair=pair)
        _keys(pair)
        network = str(IPv4Interface(f"{pair.client.address}/24").network)
        options = {"plm_rsh_agent": f"{agent} -o LogLevel=ERROR", "oob_tcp_if_include": network}
        exported: tuple[str, ...] = ()
        if by_tcp:
            options |= {"pml": "ob1", "btl": "tcp,self", "btl_tcp_if_include": network}
        else:
            options |= {"pml": "ucx", "btl": "^openib", "osc": "ucx"}
            exported = (f"LD_PRELOAD={job.pair.client.library}", *OVER_VERBS)
        client = plain.on_client(
            *("sh", "-c", 'exec "$@" 2>&1', "sh", "env", *allowed, "mpirun", "-n", "2"),
            *("--host", f"{pair.client.address},{pair.server.address}", "--bind-to", "none"),
            *(word for name, value in options.items() for word in ("--mca", name, value)),
            *(word for each in exported for word in ("-x", each)),
            *("NPopenmpi", *shape),
        )
        with _serving(pair, "sshd", _ssh(plain)):
            return ProgramRun(netpipe(run(client, PATIENCE)), count * TRIALS)

    return call


def tcp(measure: Measure, scale: float = 1.0, units: float = 1.0) -> Program:
    """A measure of TCP, whose figure and units are multiplied by these."""

    def call(job: Job) -> ProgramRun:
        server = job.servers.get(job.pair, measure.kind, frozenset(job.server_cores))
        seen = measure.call(Call(job.pair, server, job.seconds, job.client_cores, job.server_cores))
        return ProgramRun(seen.figure * scale, seen.units * units)

    return call


def copies(size: int) -> Program:
    """One core of the client's that copies `size` bytes from one buffer to another, again and
    again. The figure is in Gbit/s, units are GB.
    """

    def call(job: Job) -> ProgramRun:
        tool = job.on_client(f"{job.pair.client.tools}/copies", str(size), str(job.seconds))
        moved = parse.moved(run(tool, job.seconds + PATIENCE))
        return ProgramRun(moved.count * 8 / moved.seconds / 1e9, moved.count / 1e9)

    return call
