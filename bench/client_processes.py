"""Runs `bench/tools/clients.c`: clients whose connections carry load before, in and after a window.

A connection moves to another path only after a second or more of traffic. So a run first makes all
connections, loads them and waits until they have settled, then measures in a window of a given
length, and at last sees which path the connections have, when they are idle. All processes of a run
begin and end the load and the window together: no program starts beside the load, which may take
all of the machine.
"""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from bench.errors import ProgramError
from bench.latency import Latency, latency, merged
from bench.namespaces import SubjectPair, doing_now, next_line, start
from bench.servers import Running

STREAM: Final = "stream"
PATIENCE: Final = 60.0
BULK: Final = 128 * 1024
"""Bytes of a write in a stream."""


@dataclass(frozen=True, slots=True)
class ClientProcesses:
    """Client processes of one kind, each with `connections`; they share `servers` evenly.

    `rate` is of requests per second of each process; 0: as many as possible.
    """

    kind: str
    processes: int = 1
    connections: int = 1
    servers: int = 1
    pipeline: int = 1
    rate: int = 0

    @property
    def total(self) -> int:
        """The number of connections of all processes."""
        return self.processes * self.connections

    def arguments(self, server: Running) -> list[str]:
        """The arguments of a process that connects to this server."""
        where = [self.kind, server.address, str(server.port)]
        if self.kind == STREAM:
            return [*where, str(BULK)]
        return [*where, str(self.connections), str(self.pipeline), str(self.rate)]


@dataclass(frozen=True, slots=True)
class Counted:
    """The window of all processes: requests or bytes, their rate per second, and latencies."""

    count: int
    rate: float
    latency: Latency | None


def parse_window(text: str) -> tuple[int, float, dict[float, int]]:
    """Count, seconds and histogram of one process. Raises `ProgramError` for other output."""
    try:
        found = json.loads(text)
        histogram = {float(value): int(count) for value, count in found["latency_ns"]}
        count, seconds = int(found["count"]), float(found["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"clients said {text[:200]!r}: {error}") from error
    if seconds <= 0 or count <= 0:
        raise ProgramError(f"clients: {count} requests or bytes in {seconds:g} s")
    return count, seconds, histogram


def sum_up(said: Sequence[str]) -> Counted:
    """The windows of processes that worked at the same time, as one.

    Raises:
        ProgramError: a process counted nothing, or its output is unknown.
    """
    parts = [parse_window(text) for text in said]
    return Counted(
        sum(count for count, _, _ in parts),
        sum(count / seconds for count, seconds, _ in parts),
        latency(merged([histogram for _, _, histogram in parts])),
    )


class RunningClients:
    """Client processes with all their connections, at first without load; a context manager, which
    stops them without an error.
    """

    def __init__(
        self, pair: SubjectPair, clients: ClientProcesses, servers: Sequence[Running]
    ) -> None:
        self.subject = pair.subject
        self.processes: list[subprocess.Popen[str]] = []
        try:
            for number in range(clients.processes):
                server = servers[number % len(servers)]
                tool = f"{pair.client.tools}/clients"
                line = pair.client.enter(tool, *clients.arguments(server))
                self.processes.append(start(line))
            for process in self.processes:
                self._expect(process, "ready")
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> RunningClients:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _e: BaseException | None,
        _t: TracebackType | None,
    ) -> None:
        """Raises `ProgramError` if a process fails at its end."""
        try:
            if kind is None:
                self._signal(signal.SIGTERM)
                for process in self.processes:
                    self._ended(process)
        finally:
            self._kill()

    def load(self) -> None:
        """Begin the load."""
        self._signal(signal.SIGHUP)

    def begin(self) -> None:
        """Begin the window."""
        self._signal(signal.SIGUSR1)

    def end(self) -> Counted:
        """End the window; the load continues. Raises `ProgramError` if a process failed."""
        self._signal(signal.SIGUSR2)
        return sum_up([self._expect(process, "{") for process in self.processes])

    def rest(self) -> None:
        """Send nothing more; the connections stay open."""
        self._signal(signal.SIGINT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is not None:
                self._ended(process)
                raise ProgramError(f"{self.subject}: clients ended by themselves")
            process.send_signal(number)

    def _expect(self, process: subprocess.Popen[str], begin: str) -> str:
        """The next line of a process, which begins in this way."""
        line = next_line(process, PATIENCE)
        if line is None:
            which = f"{self.processes.index(process) + 1} of {len(self.processes)}"
            raise ProgramError(
                f"{self.subject}: client {which} said nothing in {PATIENCE:g} s: "
                f"{doing_now(process.pid) or 'it has ended'}"
            )
        if not line.startswith(begin):
            self._ended(process)
            raise ProgramError(f"{self.subject}: clients said {line[:200]!r}, not {begin!r}")
        return line

    def _ended(self, process: subprocess.Popen[str]) -> None:
        """Wait for the end. Raises `ProgramError` unless it was a success."""
        try:
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise ProgramError(
                f"{self.subject}: clients do not end: {doing_now(process.pid)}"
            ) from error
        if process.returncode:
            raise ProgramError(f"{self.subject}: {said.strip() or process.returncode}")

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
