"""Two containers for the two ends of a program, with and without the library.

Without the library the kernel's own TCP defines what is right. With it, the same must hold on a
ring.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from dataplane.control import RouterSettings, Rule
from testbed.namespace_bed import ROUTER, BedContainer, NamespaceBed, bed
from testbed.patience import patience

ROOT: Final = Path(__file__).parents[2]
LIBRARY: Final = Path(os.environ.get("FREEFLOW_LIBRARY", ROOT / "build" / "libfreeflow.so"))
SOURCES: Final = Path(__file__).with_name("programs")
RELAY: Final = Path(__file__).with_name("relay.c")
WARNINGS: Final = ("-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wshadow", "-Werror")
PATIENCE: Final = 30.0
ATTEMPTS: Final = 10.0
"""Seconds within which a router that isn't stuck answers in time once."""
ORDERS: Final = "relay.sock"
"""The socket on which the relays of `relay.c` take commands."""


def compile_c(source: Path, to: Path, *options: str, compiler: str = "gcc") -> Path:
    """A program with one source file."""
    subprocess.run(
        [compiler, *WARNINGS, "-O2", "-g", *options, "-pthread", str(source), "-o", str(to)],
        check=True,
        capture_output=True,
        text=True,
    )
    return to


@dataclass(frozen=True)
class Counts:
    """The counters of the library in some processes."""

    rows: tuple[dict[str, Any], ...]

    def __getitem__(self, name: str) -> int:
        return sum(int(row[name]) for row in self.rows)


def counts_of(path: Path) -> Counts:
    """One line for each process that has ended."""
    lines = path.read_text().splitlines() if path.exists() else []
    return Counts(tuple(json.loads(line) for line in lines))


@dataclass(eq=False)
class Places:
    """A server's and a client's container."""

    made: NamespaceBed
    accelerated: bool
    folder: Path
    programs: Path
    remote: bool = False
    """Their connections pass through the relays of `relay.c`, as if to another host."""
    ports: Iterator[int] = field(default_factory=lambda: itertools.count(7100))

    @property
    def server(self) -> BedContainer:
        return self.made.containers["server"]

    @property
    def client(self) -> BedContainer:
        return self.made.containers["client"]

    @property
    def address(self) -> str:
        """The server's address."""
        return str(self.server.ipv4)

    @property
    def statistics(self) -> Path:
        return self.folder / "statistics.json"

    def environment(self, **more: str) -> dict[str, str]:
        """The environment for programs whose library writes its counters."""
        expected = {"FREEFLOW_EXPECTED": "1"} if self.accelerated else {}
        return {"FREEFLOW_STATS": str(self.statistics), **expected, **more}

    def counted(self) -> Counts:
        """The sums over all processes that have ended."""
        return counts_of(self.statistics)

    def forget(self) -> None:
        """Reset the counters."""
        self.statistics.unlink(missing_ok=True)

    def has_upgraded(self, connections: int = 1) -> bool:
        """Whether so many connections used rings, in both directions at both ends."""
        counted = self.counted()
        needed = ("senders", "receivers", "remote") if self.remote else ("senders", "receivers")
        return all(counted[name] >= connections for name in needed)

    def upgraded(self, connections: int = 1) -> None:
        """Check that, with a library, so many connections used rings, in both directions at both
        ends.
        """
        if self.accelerated:
            counted = self.counted()
            assert self.has_upgraded(connections), counted
            assert counted["corrupt"] == 0, counted

    def attempts(self, used: Callable[[], bool]) -> Iterator[int]:
        """Attempts at something short, numbered from 0, until one has used rings: see `used`.

        A connection moves when the router has answered both of its ends. On a busy machine the
        router may answer after the end of a connection, which is then over TCP, and rightly so.
        Each attempt starts with new counters, so one of them has to do all that `used` wants.
        Without a library there is one attempt.
        """
        until = time.monotonic() + patience(ATTEMPTS)
        for number in itertools.count():
            self.forget()
            yield number
            if not self.accelerated:
                return
            counted = self.counted()
            assert counted["corrupt"] == 0, counted
            if used():
                return
            assert time.monotonic() < until, counted

    def order(self, *orders: str) -> None:
        """Send the relays a command."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.settimeout(patience(PATIENCE))
            control.connect(str(self.made.shared / ORDERS))
            for order in orders:
                control.send(order.encode())
                assert control.recv(8) == b"yes", order

    def play(self, program: str, scenario: str, **environment: str) -> None:
        """Run both ends of a scenario of a program in `programs/`."""
        port = str(next(self.ports))
        file = str(self.programs / program)
        ends = {
            role: container.popen(
                [file, role, self.address, port, scenario],
                env=self.environment(**environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            for role, container in (("server", self.server), ("client", self.client))
        }
        said: dict[str, str] = {}
        try:
            said["client"] = ends["client"].communicate(timeout=patience(PATIENCE))[0]
            said["server"] = ends["server"].communicate(
                timeout=patience(PATIENCE) if ends["client"].returncode == 0 else 1
            )[0]
        except subprocess.TimeoutExpired:
            where = {role: waits_in(end.pid) for role, end in ends.items()}
            said["stuck"] = str(where)
        finally:
            for role, end in ends.items():
                # Its children too, because they would hold its output open.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(end.pid, signal.SIGKILL)
                said[role] = said.get(role) or end.communicate()[0] or ""
        codes = {role: end.returncode for role, end in ends.items()}
        if 77 in codes.values():
            pytest.skip(said["client"].strip())
        killed = {"killed_whole"}
        assert codes["client"] == 0, (said, codes)
        assert codes["server"] == 0 or (scenario in killed and codes["server"] == -9), (said, codes)
        # Nobody waits for the status of processes that have outlived the two.
        assert not said["client"] + said["server"], said


def waits_in(pid: int) -> list[str]:
    """The state of a process's threads, as the kernel reports it."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found.append(f"{task.name}: {(task / 'wchan').read_text()}")
        except OSError:
            continue
    return found


@contextmanager
def places(
    accelerated: bool,
    folder: Path,
    programs: Path,
    rule: Rule | None = None,
    library: Path = LIBRARY,
) -> Iterator[Places]:
    """A bed whose router upgrades connections at their first operations, unless a rule says
    otherwise.
    """
    with bed(
        "server",
        "client",
        library=library if accelerated else None,
        settings=RouterSettings(rule=rule or Rule(operations=2, age=0)),
        router=accelerated,
    ) as made:
        yield Places(made, accelerated, folder, programs)


@contextmanager
def relayed(
    folder: Path,
    programs: Path,
    *settings: str,
    library: Path = LIBRARY,
    dies: bool = False,
) -> Iterator[Places]:
    """A bed like `accelerated`, with its containers as if on two hosts; `settings` are those of
    `relay.c`.
    """
    program = programs / "relay"
    if not program.exists():
        compile_c(RELAY, program)
    with bed("server", "client", library=library, router=False) as made:
        sockets = [made.shared / ROUTER, made.shared / ORDERS]
        relay = subprocess.Popen([str(program), *map(str, sockets), *settings])
        try:
            until = time.monotonic() + patience(PATIENCE)
            while not sockets[0].exists():
                assert relay.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            yield Places(made, True, folder, programs, remote=True)
        finally:
            died = relay.poll()
            relay.kill()
            relay.wait()
        assert dies or died is None, f"the relay ended with {died}"
